"""Asks an offline vLLM engine a fixed set of questions in float32: `python ask.py CHECKPOINT PART ANSWERS [EC]`.

Run as a process of its own, because vLLM starts processes and its settings are read from the environment.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from vllm import LLM, ModelRegistry, SamplingParams

from digits_vlm.samples import digits_video, held_out_images
from message_parts import picture

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
QUESTION = "Read the digits."
SINGLES, ACCURACY = 22, 300


def prompt(media: str, question: str = QUESTION) -> str:
    """The chat template's text around some placeholders."""
    return f"<|im_start|>user\n{media}{question}<|im_end|>\n<|im_start|>assistant\n"


def image_request(*samples: Any) -> dict[str, Any]:
    """One prompt with one or several images."""
    pictures = [sample.image for sample in samples]
    return {"prompt": prompt(IMAGE * len(pictures)), "multi_modal_data": {"image": pictures}}


def video_request(seed: int, fps: float = 2.0) -> dict[str, Any]:
    """One prompt with a short video."""
    clip = digits_video(np.random.default_rng(seed), "held_out", frames=6)
    metadata = {
        "fps": fps,
        "duration": 6 / fps,
        "total_num_frames": 6,
        "frames_indices": list(range(6)),
        "video_backend": "none",
        "do_sample_frames": False,
    }
    return {"prompt": prompt(VIDEO), "multi_modal_data": {"video": [(clip.frames, metadata)]}}


def grid(sample: Any, side: int) -> tuple[int, int]:
    """Merged rows and columns of an image: the processor rounds its sides to multiples of a token's."""
    return round(sample.image.height / side), round(sample.image.width / side)


def answers(llm: LLM, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Greedy tokens with their log-probabilities, of one batch."""
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=0)
    found = []
    for output in llm.generate(requests, sampling, use_tqdm=False):
        (completion,) = output.outputs
        chosen = zip(completion.token_ids, completion.logprobs, strict=True)
        found.append(
            {
                "text": completion.text,
                "tokens": list(completion.token_ids),
                "logprobs": [logprobs[token].logprob for token, logprobs in chosen],
                "finish_reason": completion.finish_reason,
                "prompt_tokens": len(output.prompt_token_ids),
                "cached_tokens": output.num_cached_tokens,
            }
        )
    return found


def matrix(llm: LLM) -> dict[str, Any]:
    """Single images, two images in a prompt, a video, text alone, and all of them in one batch; and the accuracy."""
    images = held_out_images(ACCURACY)
    side = 2 * llm.llm_engine.vllm_config.model_config.hf_config.vision_config.patch_size
    different = list({grid(image, side): image for image in reversed(images)}.values())[:SINGLES]
    singles = [image_request(image) for image in different]
    others = [image_request(*images[30:32]), image_request(*images[32:34]), video_request(7)]
    texts = [{"prompt": prompt("", text)} for text in ("Read the digits.", "user assistant 42")]
    mixed = [
        *(image_request(image) for image in images[40:52]),
        image_request(*images[60:62]),
        video_request(8),
        *texts,
    ]
    parts = {
        "singles": [answers(llm, [request])[0] for request in singles],
        "others": [answers(llm, [request])[0] for request in [*others, *texts]],
        "mixed": answers(llm, mixed),
        "video": answers(llm, [video_request(7)]),
        "slow video": answers(llm, [video_request(7, fps=0.5)]),
        "repeated": answers(llm, singles[:4]),
        "first": answers(llm, [image_request(image) for image in images[:6]]),
        "crowd": answers(llm, crowd()),
    }
    read = answers(llm, [image_request(image) for image in images])
    right = sum(answer["text"] == image.truth for answer, image in zip(read, images, strict=True))
    return {
        "parts": parts,
        "read": [answer["tokens"] for answer in read],
        "accuracy": right / ACCURACY,
        "grids": [grid(image, side) for image in different],
    }


def crowd() -> list[dict[str, Any]]:
    """Twenty images, and prompts of up to four of them, some twice, that are longer than a small engine's step."""
    images = held_out_images(320)[300:]
    several = [images[0:4], images[4:8], [images[0], images[0]], [images[9], images[1], images[9]], images[8:11]]
    return [*(image_request(image) for image in images), *(image_request(*group) for group in several)]


def pressed(llm: LLM) -> dict[str, Any]:
    """The crowd twice, in an engine whose steps and encoder cache are small."""
    once, again = answers(llm, crowd()), answers(llm, crowd())
    return {"parts": {"crowd": once, "again": again}}


def few(llm: LLM) -> dict[str, Any]:
    """A handful of images in one batch, and a video."""
    first = answers(llm, [image_request(image) for image in held_out_images(6)])
    return {"parts": {"first": first, "video": answers(llm, [video_request(7)])}}


def replaced(llm: LLM) -> dict[str, Any]:
    """Images before and after the weights of the checkpoint in `RELOAD_FROM` are loaded, and what follows a refusal.

    That is of vision weights which no file holds. Loading the checkpoint once more makes up for it.
    """
    folder = os.environ["RELOAD_FROM"]
    requests = [image_request(image) for image in held_out_images(17)]
    parts = {"overridden": answers(llm, requests[:6])}
    llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    parts["reloaded"] = answers(llm, requests[6:12])
    weights = load_file(Path(folder) / "model.safetensors")
    weights["visual.merger.ln_q.weight"] *= 2
    refusal = None
    try:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights.items())})
    except Exception as error:
        refusal = str(error)
    (after,) = llm.generate(requests[12:13], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    parts["text"] = answers(llm, [{"prompt": prompt("", QUESTION)}])
    llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    parts["again"] = answers(llm, requests[13:])
    return {"parts": parts, "refusal": refusal, "after": [after.outputs[0].finish_reason, after.outputs[0].stop_reason]}


def text(llm: LLM) -> dict[str, Any]:
    """Text alone."""
    return {"parts": {"text": answers(llm, [{"prompt": prompt("", "Read the digits.")}])}}


def read(llm: LLM) -> dict[str, Any]:
    """The accuracy images in one batch, with the number of image tokens that each got."""
    images = held_out_images(ACCURACY)
    sampling = SamplingParams(temperature=0, max_tokens=8)
    outputs = llm.generate([image_request(image) for image in images], sampling, use_tqdm=False)
    pad = llm.get_tokenizer().convert_tokens_to_ids("<|image_pad|>")
    texts = [output.outputs[0].text for output in outputs]
    return {
        "accuracy": sum(text == image.truth for text, image in zip(texts, images, strict=True)) / ACCURACY,
        "read": [list(output.outputs[0].token_ids) for output in outputs],
        "image_tokens": [output.prompt_token_ids.count(pad) for output in outputs],
    }


def pooled(llm: LLM) -> dict[str, Any]:
    """What a pooling engine makes of six images in a batch, of the first once more, and its scores of two of them."""
    images = held_out_images(6)
    requests = [image_request(image) for image in images]
    encode = partial(llm.encode, pooling_task=llm.pooling_task, use_tqdm=False)
    pairs = [llm.score(QUESTION, {"content": [picture(image)]}, use_tqdm=False) for image in images[:2]]
    outputs = [*encode(requests), *encode(requests[:1])]
    return {"parts": {"results": list(map(numbers, outputs)), "scores": [pair.outputs.score for (pair,) in pairs]}}


def numbers(output: Any) -> list[float] | str:
    """The numbers of a pooling request, or its error."""
    error = getattr(output, "error", None)
    try:
        return output.outputs.data.flatten().tolist() if error is None else str(error.message)
    except Exception as raised:
        return str(raised)


PRESSED = {
    "max_num_batched_tokens": 136,  # prompts of several images are computed in chunks, and few images are in the cache
    "max_num_seqs": 8,
    "limit_mm_per_prompt": {"image": 4, "video": 0},
    "mm_processor_kwargs": {"max_pixels": 130 * 28 * 28},
}
TWO_WAYS = {
    "architectures": ["Qwen2_5_VLForSequenceClassification"],
    "method": "from_2_way_softmax",
    "classifier_from_token": ["3", "8"],
}
"""Makes a classifier of the language model's last layer: whether the answer begins with one token or the other. vLLM
has no model of this name and takes the suffix for a kind of pooling, as it does with rerankers."""

ENGINES: dict[str, tuple[Any, dict[str, Any]]] = {
    "matrix": (matrix, {}),
    "few": (few, {}),
    "read": (read, {}),
    "replaced": (replaced, {"hf_overrides": {"vision_config": {"fullatt_block_indexes": [1]}}}),
    "text": (text, {"limit_mm_per_prompt": {"image": 0, "video": 0}}),
    "pressed": (pressed, PRESSED),
    "pressed-tp2": (pressed, {**PRESSED, "tensor_parallel_size": 2}),
    "embed": (pooled, {"runner": "pooling", "convert": "embed"}),
    "classify": (pooled, {"runner": "pooling", "hf_overrides": TWO_WAYS}),
    "blind": (few, {"mm_processor_cache_type": "shm"}),
}
"""What is asked of an engine, and how it differs from the usual one."""


def main() -> None:
    """Start the engine, ask, write."""
    checkpoint, part, target = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    ask, arguments = ENGINES[part]
    usual = {"max_num_seqs": 16, "limit_mm_per_prompt": {"image": 4, "video": 4}}
    llm = LLM(
        model=checkpoint,
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        disable_log_stats=True,
        ec_transfer_config=json.loads(sys.argv[4]) if len(sys.argv) > 4 else None,
        **{**usual, **arguments},
    )
    found = ask(llm)
    found["scheduler"] = str(llm.llm_engine.vllm_config.scheduler_config.scheduler_cls)
    (architecture,) = json.loads((Path(checkpoint) / "config.json").read_text())["architectures"]
    found["model"] = ModelRegistry.models[architecture].module_name
    found["client_embeds"] = llm.llm_engine.vllm_config.model_config.multimodal_config.enable_mm_embeds
    target.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
