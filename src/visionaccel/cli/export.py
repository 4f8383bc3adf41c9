"""`visionaccel export`: the tower's ONNX graph as a file, over the checkpoint's own weights."""

from __future__ import annotations

import os
import shutil
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from visionaccel.cli.output import Json, messages, print_json, results
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError
from visionaccel.program import ONNX

__all__ = ["Weights", "export"]


class Weights(StrEnum):
    """How the weights get beside an exported graph."""

    AUTO = "auto"
    LINK = "link"
    COPY = "copy"


def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or Hugging Face repository.")],
    output: Annotated[Path, typer.Argument(help="The .onnx file to write.")],
    weights: Annotated[
        Weights,
        typer.Option(
            help="The graph's weights must lie in its folder or below. link: hard-link the checkpoint's shards there; "
            "copy: copy them; auto: nothing if they are there already, else link, else copy."
        ),
    ] = Weights.AUTO,
    force: Annotated[bool, typer.Option(help="Overwrite an existing graph.")] = False,
    as_json: Json = False,
) -> None:
    """Write the vision tower as one ONNX graph that serves every grid."""
    started = time.perf_counter()
    tower = open_tower(checkpoint)
    (program,) = tower.programs([ONNX])
    output = output.resolve()
    if output.exists() and not force:
        raise ConfigurationError(f"{output} exists.", hint="Pass --force to overwrite it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    base, shards = tower.checkpoint.weights_folder, sorted({tensor.file for tensor in program.weights.values()})
    in_place = weights is Weights.AUTO and base.is_relative_to(output.parent)
    if in_place:
        ways = dict.fromkeys(map(str, shards), "in place")
        model = tower.onnx_model(output.parent)
    else:
        targets = {shard: output.parent / shard.relative_to(base) for shard in shards}
        ways = {str(shard): _place(shard, target, weights) for shard, target in targets.items()}
        model = tower.onnx_model()
    partial = output.with_name(output.name + ".partial")
    partial.write_bytes(model)
    partial.replace(output)
    result = {
        "graph": str(output),
        "bytes": len(model),
        "weights": ways,
        "inputs": [str(spec) for spec in program.inputs],
        "seconds": round(time.perf_counter() - started, 3),
    }
    if as_json:
        print_json(result)
        return
    results.print(f"Wrote {output} ({len(model) / 1e3:.1f} kB) in {result['seconds']} s.", markup=False)
    for shard, way in ways.items():
        results.print(f"  weights {way}: {shard}", markup=False)


def _place(shard: Path, target: Path, weights: Weights) -> str:
    """Bring a shard beside the graph. A hard link takes no space; it cannot cross file systems, and a copy can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        if target.samefile(shard):
            return "in place"
        raise ConfigurationError(f"{target} exists and is another file.", hint="Export into an empty folder.")
    if weights is not Weights.COPY:
        try:
            os.link(shard, target)
        except OSError as error:
            if weights is Weights.LINK:
                raise ConfigurationError(f"{shard} cannot be linked: {error}", hint="Pass --weights copy.") from error
        else:
            return "hard-linked"
    with messages.status(f"Copying {shard.name} ({shard.stat().st_size / 2**30:.2f} GiB)"):
        partial = target.with_name(target.name + ".partial")
        shutil.copyfile(shard, partial)
        partial.replace(target)
    return "copied"
