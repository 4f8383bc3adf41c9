"""Trains a digits reader: `python -m digits_vlm.train --family qwen3_vl --out FOLDER`.

The curriculum goes from one digit per image to four, then adds pairs of images in one prompt and short videos. Batches
are made by the processor that later serves the model, so the model learns from the same inputs that vLLM gives it.
"""

import json
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.functional import interpolate, linear
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from digits_vlm.architecture import ARCHITECTURES, QUESTION, build_model, build_processor, build_tokenizer
from digits_vlm.samples import Split, digits_image, digits_video, held_out_images, random_size

ANSWER_END = "<|im_end|>"
PAIRS_FROM, PAIRS_SHARE, VIDEOS_SHARE = 4, 0.10, 0.08
LARGEST = (112,) * 4 + (168,) * 3 + (252,) * 2 + (392,)
"""Longest sides of canvases in pixels, one of which is drawn: small images train as well, in shorter steps."""
UP_TO = (4, 7, 9, 10)
"""How many of them are drawn from, by the number of digits."""
FRAME_RATES = (1, 2, 4, 8, 24)
"""Frames per second of the videos; Qwen3-VL's prompts contain timestamps."""
SAME_LAYERS = (
    ("mlp.linear_fc1", "mlp.fc1"),
    ("mlp.linear_fc2", "mlp.fc2"),
    ("merger.norm", "merger.ln_q"),
    ("merger.linear_fc1", "merger.mlp.0"),
    ("merger.linear_fc2", "merger.mlp.2"),
)
"""Names of layers in Qwen3-VL, and of the same layers in Qwen2-VL."""
CHECK_EVERY, SAVE_EVERY = 100, 500
"""Steps between looks at the score, and between snapshots of the weights in the output folder."""


def _prompt(processor: ProcessorMixin, images: int, videos: int) -> str:
    parts = [{"type": "image"}] * images + [{"type": "video"}] * videos + [{"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": parts}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _timing(frames: int, rate: float) -> dict[str, Any]:
    """Describe a clip of `frames` frames, `rate` of them per second."""
    return {"fps": rate, "total_num_frames": frames, "frames_indices": list(range(frames)), "duration": frames / rate}


def make_batch(
    processor: ProcessorMixin, rng: np.random.Generator, split: Split, batch: int, most: int
) -> dict[str, Any]:
    """Make a batch: the processor's tensors and `labels`, which are -100 everywhere except on the answer."""
    texts, images, videos, timings = [], [], [], []
    for _ in range(batch):
        kind = rng.uniform() if most >= PAIRS_FROM else 1.0
        if kind < PAIRS_SHARE:
            pair = [digits_image(rng, split, random_size(rng, 168), 3) for _ in range(2)]
            images += [p.image for p in pair]
            texts.append((_prompt(processor, 2, 0), " ".join(p.truth for p in pair)))
        elif kind < PAIRS_SHARE + VIDEOS_SHARE:
            clip = digits_video(rng, split)
            videos.append(clip.frames)
            timings.append(_timing(len(clip.frames), float(rng.choice(FRAME_RATES))))
            texts.append((_prompt(processor, 0, 1), clip.truth))
        else:
            sample = digits_image(rng, split, random_size(rng, int(rng.choice(LARGEST[: UP_TO[most - 1]]))), most)
            images.append(sample.image)
            texts.append((_prompt(processor, 1, 0), sample.truth))
    inputs = processor(
        text=[question + answer + ANSWER_END for question, answer in texts],
        images=images or None,
        videos=videos or None,
        videos_kwargs={"do_sample_frames": False, "cap_pixels_per_frame": False, "video_metadata": timings or None},
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    inputs = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (_, answer) in enumerate(texts):
        end = int(inputs["attention_mask"][row].sum())
        start = end - len(processor.tokenizer.encode(answer + ANSWER_END))
        labels[row, start:end] = inputs["input_ids"][row, start:end]
    return {**inputs, "labels": labels}


class _Batches(IterableDataset[dict[str, Any]]):
    """Endless training batches; `most` is in shared memory, so that the worker process follows the curriculum."""

    def __init__(self, processor: ProcessorMixin, seed: int, batch: int, most: torch.Tensor) -> None:
        self.processor, self.seed, self.batch, self.most = processor, seed, batch, most

    def __iter__(self) -> Iterator[dict[str, Any]]:
        torch.set_num_threads(1)
        rng = np.random.default_rng(self.seed)
        while True:
            yield make_batch(self.processor, rng, "train", self.batch, int(self.most))


@torch.no_grad()
def teacher_forced(model: PreTrainedModel, batches: list[dict[str, Any]]) -> float:
    """Return the share of answers in which every token is the most likely one after the true tokens before it."""
    model.eval()
    right = total = 0
    for batch in batches:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].argmax(-1)
        target = batch["labels"][:, 1:]
        right += int(((logits == target) | (target == -100)).all(1).sum())
        total += len(target)
    model.train()
    return right / total


@torch.no_grad()
def greedy_exact_match(model: PreTrainedModel, processor: ProcessorMixin, count: int) -> tuple[int, int]:
    """Return how many held-out images transformers reads exactly by greedy decoding, and how many were tried."""
    model.eval()
    right = 0
    for sample in held_out_images(count):
        inputs = processor(text=[_prompt(processor, 1, 0)], images=[sample.image], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        right += processor.tokenizer.decode(tokens, skip_special_tokens=True) == sample.truth
    return right, count


def warm_start(model: PreTrainedModel, checkpoint: Path) -> int:
    """Copy the weights of a trained reader that fit into `model`; return how many there are.

    A weight fits if it is of the same layer and has the same shape; a patch embedding is resampled to other patches.
    """
    trained = AutoModelForImageTextToText.from_pretrained(checkpoint).state_dict()  # nosec B615 # a local folder
    fitting = {}
    for name, weight in model.state_dict().items():
        source = trained.get(name, trained.get(reduce(lambda n, layer: n.replace(*layer), SAME_LAYERS, name)))
        if source is not None and name.endswith("patch_embed.proj.weight"):
            source = interpolate(source, weight.shape[2:], mode="trilinear")
        if source is not None and source.shape == weight.shape:
            fitting[name] = source
    model.load_state_dict(fitting, strict=False)
    return len(fitting)


def record_of(checkpoint: Path) -> dict[str, Any]:
    """Return how a checkpoint was trained, and from which one, without the log."""
    record = json.loads((checkpoint / "score.json").read_text())
    return {name: value for name, value in record.items() if name != "training_log"}


def embed_as_matrix(model: PreTrainedModel) -> None:
    """Compute the patch embedding as a matrix product; as a convolution, it takes a quarter of the time of a step."""
    embedding = model.model.visual.patch_embed
    convolution = embedding.proj
    embedding.forward = lambda patches: linear(patches, convolution.weight.flatten(1), convolution.bias)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    family: Annotated[str, typer.Option(help=f"One of {', '.join(ARCHITECTURES)}.")] = "qwen2_5_vl",
    start: Annotated[
        Path | None, typer.Option(help="Trained checkpoint of any family, to copy the weights from that fit.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 12000,
    batch: Annotated[int, typer.Option(help="Prompts per step.")] = 16,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1.5e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
) -> None:
    """Train the digits reader and save the checkpoint with its held-out score."""
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer, family)
    model = build_model(tokenizer, family, seed)
    copied = warm_start(model, start) if start else 0
    embed_as_matrix(model)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.05)
    most = torch.ones((), dtype=torch.int64).share_memory_()
    batches = iter(DataLoader(_Batches(processor, seed + 1, batch, most), batch_size=None, num_workers=1))
    rng = np.random.default_rng(seed + 2)
    watched = {n: [make_batch(processor, rng, "held_out", 32, n) for _ in range(3)] for n in range(1, 5)}
    log: list[dict[str, float]] = []
    record = {
        "family": family,
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "rate": rate,
        "start": None if start is None else record_of(start),
        "copied_tensors": copied,
        "torch": torch.__version__,
        "training_log": log,
    }

    def save(folder: Path, score: dict[str, float]) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "score.json").write_text(json.dumps(score | record, indent=1) + "\n")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps)
        for step in range(1, steps + 1):
            loss = model(**next(batches)).loss
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            if step % CHECK_EVERY == 0 or step == steps:
                digits = int(most)
                score = teacher_forced(model, watched[digits])
                log.append({"step": step, "digits": digits, "loss": loss.item(), "teacher_forced": score})
                progress.console.print(log[-1])
                if score > 0.6 and digits < 4:
                    most += 1
            if step % SAVE_EVERY == 0:
                save(out / f"step-{step}", {})
            progress.update(task, completed=step, description=f"up to {int(most)} digits, loss {loss.item():.3f}")
        progress.update(task, description="scoring on held-out images")
        right, asked = greedy_exact_match(model, processor, 300)
    save(out, {"held_out_images": asked, "exact_match_transformers": right / asked})
    typer.echo(f"read {right} of {asked} held-out images; saved to {out}")


if __name__ == "__main__":
    typer.run(main)
