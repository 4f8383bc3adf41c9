"""Trains the digits reader: `python -m digits_vlm.train --out FOLDER`.

The curriculum goes from one digit per image to four, then adds pairs of images in one prompt and short videos. Batches
are made by the processor that later serves the model, so the model learns from the same inputs that vLLM gives it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor

from digits_vlm.architecture import QUESTION, build_model, build_processor, build_tokenizer
from digits_vlm.samples import Split, digits_image, digits_video, held_out_images, random_size

ANSWER_END = "<|im_end|>"
PAIRS_FROM, PAIRS_SHARE, VIDEOS_SHARE = 4, 0.10, 0.08


def _prompt(processor: Qwen2_5_VLProcessor, images: int, videos: int) -> str:
    parts = [{"type": "image"}] * images + [{"type": "video"}] * videos + [{"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": parts}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def make_batch(
    processor: Qwen2_5_VLProcessor, rng: np.random.Generator, split: Split, batch: int, most: int
) -> dict[str, Any]:
    """Make a batch: the processor's tensors and `labels`, which are -100 everywhere except on the answer."""
    texts, images, videos = [], [], []
    for _ in range(batch):
        kind = rng.uniform() if most >= PAIRS_FROM else 1.0
        if kind < PAIRS_SHARE:
            pair = [digits_image(rng, split, random_size(rng, 168), 3) for _ in range(2)]
            images += [p.image for p in pair]
            texts.append((_prompt(processor, 2, 0), " ".join(p.truth for p in pair)))
        elif kind < PAIRS_SHARE + VIDEOS_SHARE:
            clip = digits_video(rng, split)
            videos.append(clip.frames)
            texts.append((_prompt(processor, 0, 1), clip.truth))
        else:
            sample = digits_image(rng, split, random_size(rng, 392 if rng.uniform() < 0.12 else 252), most)
            images.append(sample.image)
            texts.append((_prompt(processor, 1, 0), sample.truth))
    inputs = processor(
        text=[question + answer + ANSWER_END for question, answer in texts],
        images=images or None,
        videos=videos or None,
        videos_kwargs={"do_sample_frames": False, "cap_pixels_per_frame": False},
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

    def __init__(self, processor: Qwen2_5_VLProcessor, seed: int, batch: int, most: torch.Tensor) -> None:
        self.processor, self.seed, self.batch, self.most = processor, seed, batch, most

    def __iter__(self) -> Iterator[dict[str, Any]]:
        torch.set_num_threads(1)
        rng = np.random.default_rng(self.seed)
        while True:
            yield make_batch(self.processor, rng, "train", self.batch, int(self.most))


@torch.no_grad()
def teacher_forced(model: Qwen2_5_VLForConditionalGeneration, batches: list[dict[str, Any]]) -> float:
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
def greedy_exact_match(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, count: int
) -> tuple[int, int]:
    """Return how many held-out images transformers reads exactly by greedy decoding, and how many were tried."""
    model.eval()
    right = 0
    for sample in held_out_images(count):
        inputs = processor(text=[_prompt(processor, 1, 0)], images=[sample.image], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        right += processor.tokenizer.decode(tokens, skip_special_tokens=True) == sample.truth
    return right, count


def main(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 12000,
    batch: Annotated[int, typer.Option(help="Prompts per step.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
) -> None:
    """Train the digits reader and save the checkpoint with its held-out score."""
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    model = build_model(tokenizer, seed)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.5e-3, total_steps=steps, pct_start=0.05)
    most = torch.ones((), dtype=torch.int64).share_memory_()
    batches = iter(DataLoader(_Batches(processor, seed + 1, batch, most), batch_size=None, num_workers=1))
    rng = np.random.default_rng(seed + 2)
    watched = {n: [make_batch(processor, rng, "held_out", 32, n) for _ in range(3)] for n in range(1, 5)}
    log: list[dict[str, float]] = []
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
            if step % 200 == 0 or step == steps:
                digits = int(most)
                score = teacher_forced(model, watched[digits])
                log.append({"step": step, "digits": digits, "loss": loss.item(), "teacher_forced": score})
                progress.console.print(log[-1])
                if score > 0.6 and digits < 4:
                    most += 1
            progress.update(task, completed=step, description=f"up to {int(most)} digits, loss {loss.item():.3f}")
        model.save_pretrained(out)
        processor.save_pretrained(out)
        progress.update(task, description="scoring on held-out images")
        right, asked = greedy_exact_match(model, processor, 300)
    score = {
        "held_out_images": asked,
        "exact_match_transformers": right / asked,
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "torch": torch.__version__,
        "training_log": log,
    }
    (out / "score.json").write_text(json.dumps(score, indent=1) + "\n")
    typer.echo(f"read {right} of {asked} held-out images; saved to {out}")


if __name__ == "__main__":
    typer.run(main)
