"""Stock vLLM and each backend in each mode on a tiny model of each architecture: `python families.py RESULTS`.

Writes a row for each: how many of its answers equal stock vLLM's, and the largest difference of a log-probability.
"""

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import forked
from visionaccel_bench.server import quiet_environment
from whole_models import MODELS, write_model

_ASK = Path(__file__).with_name("ask_families.py")

MODES: Mapping[str, str] = {"pipelined": "pipelined", "in-line": "inline"}
"""The modes, and the settings that require them."""

BACKENDS = ("onnxrt", "openvino", "torch_ref")


class Row(NamedTuple):
    """What one backend showed in one mode."""

    family: str
    architecture: str
    backend: str
    mode: str
    precision: str
    prompts: int
    equal: int  # prompts whose greedy tokens are all equal
    difference: float  # the largest of a log-probability, of tokens that are equal


class Answers(NamedTuple):
    """What the models answered, by architecture, and the log of the process."""

    by_architecture: Mapping[str, list[dict[str, Any]]]
    log: str


def write_models(folder: Path, architectures: Iterable[str]) -> Path:
    """Write a checkpoint of each architecture and return their folder."""
    for architecture in architectures:
        write_model(MODELS[architecture], folder / architecture)
    return folder


def ask(models: Path, architectures: Sequence[str], settings: Mapping[str, str], folder: Path) -> Answers:
    """Ask each model in one process of vLLM's with these settings, which keeps its output in a folder.

    Raises:
        RuntimeError: If it fails; with the end of its output.
    """
    folder.mkdir()
    target, log = folder / "answers.json", folder / "log"
    command = [sys.executable, str(_ASK), str(models), str(target), *architectures]
    environment = quiet_environment(settings) | forked.WORKER_IN_ENGINE | {"OMP_NUM_THREADS": "1"}
    status = forked.run(command, environment, log)
    output = log.read_text(errors="replace")
    if status != 0:
        raise RuntimeError(f"asking with {settings} ended with status {status}: {output[-4000:]}")
    return Answers(json.loads(target.read_text()), output)


def settings_of(backend: str, mode: str) -> dict[str, str]:
    """The settings with which a backend encodes in a mode."""
    return {"VISIONACCEL_BACKEND": backend, "VISIONACCEL_MODE": MODES[mode]}


def compared(architecture: str, backend: str, mode: str, stock: Answers, ours: Answers) -> Row:
    """Compare the answers of one architecture's model."""
    theirs, found = stock.by_architecture[architecture], ours.by_architecture[architecture]
    pairs = list(zip(theirs, found, strict=True))
    equal = [(one, other) for one, other in pairs if one["tokens"] == other["tokens"]]
    differences = [
        abs(left - right)
        for one, other in equal
        for left, right in zip(one["logprobs"], other["logprobs"], strict=True)
    ]
    family = MODELS[architecture].family
    return Row(family, architecture, backend, mode, "float32", len(pairs), len(equal), max(differences, default=0.0))


def main() -> None:
    """Compare everything, and write the rows."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        models, all_of_them = write_models(folder / "models", MODELS), list(MODELS)
        stock = ask(models, all_of_them, {}, folder / "stock")
        for backend in BACKENDS:
            for mode in MODES:
                ours = ask(models, all_of_them, settings_of(backend, mode), folder / f"{backend}-{mode}")
                rows += [compared(architecture, backend, mode, stock, ours) for architecture in MODELS]
    rows.sort(key=lambda row: (all_of_them.index(row.architecture), row.backend, row.mode))
    Path(sys.argv[1]).write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
