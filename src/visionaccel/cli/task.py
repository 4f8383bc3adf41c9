"""`visionaccel validate --task`: questions about images, answered with a bundle and with the model's own tower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import MofNCompleteColumn

from visionaccel.cli.output import print_json, print_table, progress, results
from visionaccel.errors import ConfigurationError

if TYPE_CHECKING:
    from visionaccel.integrations.transformers.evaluation import Evaluation, Outcome

TaskFile = Annotated[
    Path | None,
    typer.Option(help="JSON lines with image, question and answer: answer these questions instead, in transformers."),
]
Margin = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="By how much accuracy on the task may be lower than the model's own. Default: 0.01."
    ),
]
_MOST_SHOWN = 20


def refuse_options(what: str, options: Mapping[str, Any]) -> None:
    """Refuse options that were given although they do not apply."""
    if given := next((name for name, value in options.items() if value is not None), None):
        raise ConfigurationError(f"{given} does not apply to {what}.", hint=f"Leave out {given}.")


def validate_by_task(
    bundle: Path,
    checkpoint: str,
    file: Path,
    backend: str | None,
    device: str | None,
    options: Mapping[str, Any],
    margin: float | None,
    max_tokens: int | None,
    *,
    as_json: bool,
) -> None:
    """Evaluate a bundle by a task, and print the result. Exit status 1 if it does not pass."""
    from visionaccel.integrations.transformers.answering import MOST_TOKENS
    from visionaccel.integrations.transformers.evaluation import MARGIN, evaluate, read_task

    task = read_task(file)
    with progress(MofNCompleteColumn()) as tell:
        found = evaluate(
            checkpoint,
            task,
            backend=backend,
            device=device,
            bundle=bundle,
            settings={"options": options},
            most_tokens=max_tokens or MOST_TOKENS,
            progress=lambda done, total: tell("Answering", done, total),
        )
    failure = found.verdict(MARGIN if margin is None else margin)
    if as_json:
        print_json(_document(found, failure, bundle, file))
    else:
        _print(found, failure, f"{bundle} on {found.backend}, {found.device}" + " (simulated)" * found.simulated)
    if failure is not None:
        raise typer.Exit(1)


def _document(found: Evaluation, failure: str | None, bundle: Path, file: Path) -> dict[str, Any]:
    return {
        "bundle": bundle,
        "task": file,
        "backend": found.backend,
        "device": found.device,
        "simulated": found.simulated,
        "questions": len(found.outcomes),
        "agreement": found.agreement,
        "reference_accuracy": found.reference_accuracy,
        "accuracy": found.accuracy,
        "mean_drift": found.mean_drift,
        "largest_drift": found.largest_drift,
        "failure": failure,
        "answers": [
            {
                "line": outcome.line,
                "image": outcome.question.image,
                "fitted": outcome.fitted,
                "expected": outcome.question.answer,
                "reference": outcome.reference.text,
                "answer": None if outcome.answer is None else outcome.answer.text,
                "agrees": outcome.agrees,
                "correct": outcome.correct,
                "largest_drift": max(outcome.drifts, default=None),
                "failure": outcome.failure,
            }
            for outcome in found.outcomes
        ],
    }


def _print(found: Evaluation, failure: str | None, title: str) -> None:
    """Print the figures, the answers that differ from the reference's, and the verdict."""
    count = len(found.outcomes)
    shares = {
        "answers equal to the reference's": found.agreement,
        "correct answers of the reference": found.reference_accuracy,
        "correct answers of the bundle": found.accuracy,
        "images fitted to the programs": sum(outcome.fitted for outcome in found.outcomes) / count,
    }
    rows = [(name, f"{round(share * count)} of {count}", f"{share:.1%}") for name, share in shares.items()]
    print_table(title, ("measure", "answers", "share"), rows)
    if found.mean_drift is not None:
        results.print(
            f"Log-probabilities of the reference's tokens drift by {found.mean_drift:.1e} on average, at most by "
            f"{found.largest_drift:.1e}.", highlight=False, soft_wrap=True,
        )  # fmt: skip
    different = [outcome for outcome in found.outcomes if not outcome.agrees]
    if different:
        more = f"; the first {_MOST_SHOWN} of {len(different)}" if len(different) > _MOST_SHOWN else ""
        columns = ("line", "image", "expected", "reference", "answer")
        print_table(f"Answers that differ{more}", columns, list(map(_row, different[:_MOST_SHOWN])))
    if failure is not None:
        results.print(f"FAILED: {failure}", style="bold red", highlight=False, soft_wrap=True)
    else:
        results.print("Passed.", style="green")


def _row(outcome: Outcome) -> tuple[object, ...]:
    answer = "(failed)" if outcome.answer is None else outcome.answer.text
    return outcome.line, outcome.question.image, outcome.question.answer, outcome.reference.text, answer
