"""Asks tiny models about images, videos, sounds and text: `python ask_families.py FOLDER ANSWERS [ARCHITECTURE ...]`.

The folder has a checkpoint of `whole_models` for each architecture. One engine after another answers, in float32.
"""

import gc
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry

from whole_models import MODELS, Model

TOKENS = ((2, 2), (3, 2), (2, 5), (5, 3), (7, 2), (1, 9), (9, 1), (2, 34), (34, 2), (4, 4), (8, 8), (9, 10))
"""Columns and rows of tokens of the images; the pictures are a few pixels off, so that they are resized."""

STEP = 128
"""Tokens in a step of the engine. Some prompts are longer."""

LONGEST = 1024
"""Tokens that a prompt and its answer may have."""


def picture(columns: int, rows: int, side: int, seed: int) -> Image.Image:
    """A picture of that many tokens."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    size = columns * side + seed % 5, rows * side - seed % 3
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def clip(frames: int, seed: int, *, metadata: bool) -> Any:
    """A short video."""
    video = np.stack([np.asarray(picture(4, 3, 32, seed + number).resize((128, 96))) for number in range(frames)])
    about = {
        "fps": 2.0,
        "duration": frames / 2,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "none",
        "do_sample_frames": False,
    }
    return (video, about) if metadata else video


def sound(seed: int) -> tuple[np.ndarray, int]:
    """Half a second of noise.

    vLLM pads the sounds of a step to one length, and Qwen3-Omni's convolutions do not mask the padding: with different
    lengths, an answer would depend on which sounds are in its step.
    """
    samples = np.random.default_rng(seed).standard_normal(8000, dtype=np.float32)
    return samples / 10, 16000


def prompts(model: Model) -> list[dict[str, Any]]:
    """What a model is asked: at least 20 prompts."""
    side = 2 * model.patch
    pictures = [picture(*tokens, side, seed) for seed, tokens in enumerate(TOKENS)]

    def ask(media: str, **data: Any) -> dict[str, Any]:
        text = f"<|im_start|>user\n{media}Read the digits.<|im_end|>\n<|im_start|>assistant\n"
        return {"prompt": text, **({"multi_modal_data": data} if data else {})}

    found = [ask(model.image, image=one) for one in pictures]
    pairs = [(9, 10), (1, 1), (11, 10), (5, 7), (3, 8)]
    found += [ask(model.image * 2, image=[pictures[each] for each in pair]) for pair in pairs]
    found += [ask(""), ask("user assistant 42")]
    found += [ask(model.image + "And now: " + model.image, image=[pictures[2], pictures[11]])]
    if model.video:
        clips = [clip(frames, 50 * frames, metadata=model.metadata) for frames in (4, 6, 5)]
        found += [ask(model.video, video=[one]) for one in clips]
        found.append(ask(model.image + model.video + model.image, image=pictures[:2], video=clips[:1]))
    if model.audio:
        found.append(ask(model.audio, audio=[sound(1)]))
        found.append(ask(model.audio + model.image, audio=[sound(2)], image=pictures[4]))
        found.append(
            ask(model.image + model.audio + model.video, audio=[sound(3)], image=pictures[6], video=clips[1:2])
        )
    return found


def answers(llm: LLM, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Greedy tokens with their log-probabilities, of one batch."""
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
    found = []
    for output in llm.generate(requests, sampling, use_tqdm=False):
        (completion,) = output.outputs
        chosen = zip(completion.token_ids, completion.logprobs or (), strict=True)
        found.append(
            {
                "tokens": list(completion.token_ids),
                "logprobs": [logprobs[token].logprob for token, logprobs in chosen],
                "finish_reason": completion.finish_reason,
                "steps": -(-len(output.prompt_token_ids or ()) // STEP),
                "cached_tokens": output.num_cached_tokens,
            }
        )
    return found


@contextmanager
def engine(checkpoint: Path, model: Model, **arguments: Any) -> Iterator[LLM]:
    """An engine of a checkpoint in this process, which can have another one afterwards."""
    kinds = ["image", *(["video"] if model.video else []), *(["audio"] if model.audio else [])]
    llm = LLM(
        model=str(checkpoint),
        dtype="float32",
        enforce_eager=True,
        max_model_len=LONGEST,
        max_num_seqs=8,
        block_size=32,
        num_gpu_blocks_override=100,
        disable_log_stats=True,
        limit_mm_per_prompt=dict.fromkeys(kinds, 2),
        trust_remote_code=True,
        **{"max_num_batched_tokens": STEP, **model.engine, **arguments},
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def asked(checkpoint: Path, architecture: str) -> list[dict[str, Any]]:
    """What one engine answers: every prompt in one batch, and then some of them again, from the prefix cache."""
    requests = prompts(MODELS[architecture])
    with engine(checkpoint, MODELS[architecture]) as llm:
        return [*answers(llm, requests), *answers(llm, [*requests[4:9], *requests[-3:]])]


def ask_each(asked: Callable[[Path, str], Any], names: Iterable[str]) -> None:
    """Ask each model, as the command line says, and write what they answer after each."""
    folder, target, *chosen = sys.argv[1:]
    found = {}
    registry._run_in_subprocess = lambda look: look()  # instead of a new process for each class that vLLM has not seen
    gc.collect = lambda *_: 0  # engines collect garbage several times, with all that vLLM has imported
    for name in chosen or names:
        found[name] = asked(Path(folder) / name, name)
        Path(target).write_text(json.dumps(found))


if __name__ == "__main__":
    ask_each(asked, MODELS)
