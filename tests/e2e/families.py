"""Stock vLLM and each backend in each mode on a tiny model of each architecture: `python families.py RESULTS`.

Writes a row for each: how many of its answers equal stock vLLM's, and the largest difference of a log-probability or of
a pooling model's number.
"""

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import forked
from pooling_models import POOLING, write_pooling_model
from visionaccel_bench.server import quiet_environment
from whole_models import MODELS, write_model

MODES: Mapping[str, str] = {"pipelined": "pipelined", "in-line": "inline"}
"""The modes, and the settings that require them."""

BACKENDS = ("onnxrt", "openvino", "torch_ref")


class Row(NamedTuple):
    """What one backend showed in one mode."""

    family: str
    architecture: str
    task: str  # `generate`, or what a pooling model does
    backend: str
    mode: str
    precision: str
    prompts: int
    equal: int  # prompts whose greedy tokens are all equal, or whose numbers all are within the tolerance
    difference: float  # the largest of a log-probability, of tokens that are equal, or of a number


TOLERANCE = 1e-4
"""How much a log-probability or a number may differ."""


class Answers(NamedTuple):
    """What each model answered, and the log of the process."""

    by_model: Mapping[str, Any]
    log: str


def write_models(folder: Path, names: Iterable[str]) -> Path:
    """Write a checkpoint of each architecture or pooling model and return their folder."""
    for name in names:
        if name in POOLING:
            write_pooling_model(POOLING[name], folder / name)
        else:
            write_model(MODELS[name], folder / name)
    return folder


def ask(models: Path, names: Sequence[str], settings: Mapping[str, str], folder: Path) -> Answers:
    """Ask models, all or none of them pooling ones, in one process of vLLM's, which keeps its output in a folder.

    Raises:
        RuntimeError: If it fails; with the end of its output.
    """
    folder.mkdir()
    target, log = folder / "answers.json", folder / "log"
    script = Path(__file__).with_name("ask_pooling.py" if names[0] in POOLING else "ask_families.py")
    command = [sys.executable, str(script), str(models), str(target), *names]
    environment = quiet_environment(settings) | forked.WORKER_IN_ENGINE | {"OMP_NUM_THREADS": "1"}
    status = forked.run(command, environment, log)
    output = log.read_text(errors="replace")
    if status != 0:
        raise RuntimeError(f"asking with {settings} ended with status {status}: {output[-4000:]}")
    return Answers(json.loads(target.read_text()), output)


def settings_of(backend: str, mode: str) -> dict[str, str]:
    """The settings with which a backend encodes in a mode."""
    return {"VISIONACCEL_BACKEND": backend, "VISIONACCEL_MODE": MODES[mode]}


def compared(name: str, backend: str, mode: str, stock: Answers, ours: Answers) -> Row:
    """Compare what one model answered."""
    theirs, found = stock.by_model[name], ours.by_model[name]
    if name in POOLING:
        pooling = POOLING[name]
        family, architecture, task = pooling.model.family, pooling.architecture, pooling.task
        differences = [difference(*pair) for pair in zip(theirs, found, strict=True)]
        equal = sum(each <= TOLERANCE for each in differences)
    else:
        family, architecture, task = MODELS[name].family, name, "generate"
        pairs = [pair for pair in zip(theirs, found, strict=True) if pair[0]["tokens"] == pair[1]["tokens"]]
        differences = [difference(one["logprobs"], other["logprobs"]) for one, other in pairs]
        equal = len(pairs)
    largest = max(differences, default=0.0)
    return Row(family, architecture, task, backend, mode, "float32", len(theirs), equal, largest)


def difference(one: Any, other: Any) -> float:
    """The largest difference of two arrays' numbers."""
    left, right = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert left.shape == right.shape
    return float(np.abs(left - right).max())


def main() -> None:
    """Compare everything, and write the rows."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for kind, names in (("models", list(MODELS)), ("pooling", list(POOLING))):
            models = write_models(folder / kind, names)
            stock = ask(models, names, {}, folder / f"{kind}-stock")
            found = []
            for backend in BACKENDS:
                for mode in MODES:
                    ours = ask(models, names, settings_of(backend, mode), folder / f"{kind}-{backend}-{mode}")
                    found += [(names.index(name), compared(name, backend, mode, stock, ours)) for name in names]
            rows += [row for _, row in sorted(found)]
    Path(sys.argv[1]).write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
