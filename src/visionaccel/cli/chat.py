"""`visionaccel chat`: a question about images, answered with an encoder in the place of the model's vision tower."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visionaccel.checkpoint import locate_checkpoint
from visionaccel.cli.output import (
    Backend,
    Device,
    EncodingBundle,
    Json,
    MaxTokens,
    OptionsText,
    backend_options,
    print_json,
    results,
    status,
)
from visionaccel.errors import ConfigurationError
from visionaccel.images import load_image

if TYPE_CHECKING:
    from visionaccel.integrations.transformers.answering import Answer


def chat(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or Hugging Face repository.")],
    images: Annotated[list[Path] | None, typer.Argument(help="Image files.", show_default=False)] = None,
    question: Annotated[str, typer.Argument(help="A question about them, in quotes.", show_default=False)] = "",
    bundle: EncodingBundle = None,
    backend: Backend = None,
    device: Device = None,
    options: OptionsText = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Let the model's own vision tower answer too, and compare the tokens.")
    ] = False,
    max_tokens: MaxTokens = None,
    as_json: Json = False,
) -> None:
    """Ask a model about images, in transformers, with an encoder in the place of the model's vision tower.

    The answer is decoded greedily. The language model runs on the GPU if PyTorch finds one.
    """
    paths = _checked(images or [], question)
    pictures = [load_image(path) for path in paths]
    chosen = {} if options is None else {"options": backend_options(options, {})}
    from visionaccel.integrations.transformers import load
    from visionaccel.integrations.transformers.answering import MOST_TOKENS, ask, model_device, open_processor

    most = max_tokens or MOST_TOKENS
    folder = locate_checkpoint(checkpoint).folder
    processor = open_processor(folder)
    own, difference = None, None
    with load(folder, backend=backend, device=device, bundle=bundle, settings=chosen, keep_tower=compare) as handle:
        handle.model.to(model_device())
        fitter = handle.fitter(processor)
        fitted = pictures if fitter is None else [fitter.fit(picture) for picture in pictures]
        with status("Answering"):
            answer = ask(handle.model, processor, fitted, question, most_tokens=most)
        primary = handle.encoder.primary
        found = {
            "backend": primary.backend,
            "device": primary.capabilities.device,
            "simulated": primary.capabilities.simulated,
            "fitted_images": sum(ours is not given for ours, given in zip(fitted, pictures, strict=True)),
            "fallback_images": handle.encoder.fallback_items,
            **_described(answer),
        }
        if compare:
            with handle.own_tower() as tower, status("Answering with the model's own tower"):
                tower.to(model_device())
                reference = ask(handle.model, processor, pictures, question, most_tokens=most)
            own = {"dtype": str(tower.dtype).removeprefix("torch."), **_described(reference)}
            difference = _first_difference(processor, answer, reference)
    if as_json:
        document: dict[str, Any] = {"question": question, "images": paths, "encoder": found}
        if own is not None:
            document |= {"own_tower": own, "first_difference": difference}
        print_json(document)
        return
    where = f"{found['backend']}, {found['device']}" + (" (simulated)" if found["simulated"] else "")
    _print(found, where)
    if found["fitted_images"]:
        results.print(f"Images that were fitted to the programs' grids: {found['fitted_images']} of {len(paths)}.")
    if found["fallback_images"]:
        results.print(f"Images that a fallback encoded: {found['fallback_images']} of {len(paths)}.")
    if own is None:
        return
    _print(own, f"the model's own tower, {own['dtype']}")
    if difference is None:
        results.print("The tokens of both answers are the same.")
    else:
        results.print(
            "The answers differ from token {position} on: {encoder!r} and {own_tower!r}.".format(**difference),
            style="yellow", highlight=False, soft_wrap=True,
        )  # fmt: skip


def _checked(images: list[Path], question: str) -> list[Path]:
    """Return the images after checking, before a model is loaded, that they exist and that a question follows."""
    hint = "Write the question last, in quotes: visionaccel chat CHECKPOINT page.png 'What is this?'"
    if os.path.isfile(question):  # noqa: PTH113 - Path's raises an error for a long question
        raise ConfigurationError(f"no question was given: the last argument, {question}, is a file.", hint=hint)
    if not images or not question.strip():
        raise ConfigurationError(f"no {'image' if question.strip() else 'question'} was given.", hint=hint)
    if missing := next((path for path in images if not path.is_file()), None):
        raise ConfigurationError(f"{missing} is not a file.", hint=f"Check its path. {hint}")
    return images


def _described(answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "tokens": list(answer.tokens),
        "encode_ms": round(1e3 * answer.encode_seconds, 3),
    }


def _print(answer: Mapping[str, Any], who: str) -> None:
    """Print an answer, and on the next line what encoded the images, and in what time."""
    results.print(answer["answer"], highlight=False, soft_wrap=True)
    results.print(f"({who}: encoded in {answer['encode_ms']:.1f} ms)", style="dim", highlight=False, soft_wrap=True)


def _first_difference(processor: Any, answer: Answer, reference: Answer) -> dict[str, Any] | None:
    """Return the first tokens in which two answers differ, with their position from 1; None if all are the same.

    The token of an answer that has ended is empty.
    """
    for position, (ours, theirs) in enumerate(zip_longest(answer.tokens, reference.tokens), 1):
        if ours != theirs:
            texts = ["" if token is None else processor.tokenizer.decode([token]) for token in (ours, theirs)]
            return {"position": position, "encoder": texts[0], "own_tower": texts[1]}
    return None
