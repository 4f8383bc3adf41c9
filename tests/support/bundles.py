"""Bundles to test with: written from a checkpoint, then changed on purpose and sealed again."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from visionaccel.bundle import MANIFEST, ProgramRequest, export_bundle, open_bundle, seal
from visionaccel.checkpoint import read_header
from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid, FixedGrid, OperatorDialect
from visionaccel.encoder import open_tower

Change = Callable[[dict[str, Any]], object]


def write_bundle(
    checkpoint: Path,
    folder: Path,
    *grids: str,
    bucket: str | None = None,
    dynamic: bool = False,
    split_host: bool = False,
    dialect: OperatorDialect | None = None,
    **settings: Any,
) -> Path:
    """Export a bundle with programs for those grids, a bucket and any grid; `settings` are `export_bundle`'s."""
    tower = open_tower(checkpoint)
    requests = [ProgramRequest(FixedGrid(Grid.parse(grid)), split_host) for grid in grids]
    if bucket is not None:
        requests.append(ProgramRequest(tower.bucket(Grid.parse(bucket)), split_host))
    if dynamic:
        requests.append(ProgramRequest(AnyGrid(), dialect=dialect))
    export_bundle(tower, folder, requests, **settings)
    return folder


def document(folder: Path) -> dict[str, Any]:
    """The manifest's JSON."""
    return json.loads((folder / MANIFEST).read_text())


def entry(manifest: dict[str, Any], program: str) -> dict[str, Any]:
    """One program in a manifest's JSON."""
    (found,) = (each for each in manifest["programs"] if each["name"] == program)
    return found


def reseal(folder: Path, change: Change = lambda manifest: None) -> None:
    """Make a changed bundle consistent again: sizes and digests of all stated files, and the manifest's own digest.

    Args:
        folder: The bundle.
        change: Changes the manifest's JSON in place, before the files are measured.
    """
    manifest = document(folder)
    change(manifest)
    for file in [*manifest["files"], *(file for program in manifest["programs"] for file in program["files"])]:
        data = (folder / file["path"]).read_bytes()
        file |= {"bytes": len(data), "sha256": "sha256:" + hashlib.sha256(data).hexdigest()}
    sealed = seal(manifest)
    (folder / MANIFEST).write_text(json.dumps(sealed.model_dump(mode="json")))


def make_version_1(folder: Path) -> None:
    """Give a bundle the manifest that was written before schema version 2."""
    manifest = document(folder)
    tower = open_bundle(folder).tower
    del manifest["spec"], manifest["digest"]
    manifest |= {"schema_version": 1, "vision_config": dict(tower.configuration)}
    for program in manifest["programs"]:
        if program["coverage"]["kind"] == "bucket":
            program["coverage"] |= program["coverage"].pop("sizes")
        if program["host"] is not None:
            program["host"]["window_order"] = program["host"].pop("order")
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    manifest["digest"] = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def replace_model(folder: Path, program: str, model: bytes) -> None:
    """Give a program another model file."""
    (folder / entry(document(folder), program)["model"]).write_bytes(model)
    reseal(folder)


def edit_model(folder: Path, program: str, change: Callable[[onnx.ModelProto], object]) -> None:
    """Change a program's ONNX model in place."""
    path = folder / entry(document(folder), program)["model"]
    model = onnx.load_model(path, load_external_data=False)
    change(model)
    replace_model(folder, program, model.SerializeToString())


def edit_index(model: onnx.ModelProto, which: int, change: Callable[[Any], Any]) -> None:
    """Change a constant that a model gathers its tokens by: `which` is 0 for the window index, -1 for its inverse."""
    constants = {constant.name: constant for constant in model.graph.initializer}
    gathers = [node for node in model.graph.node if node.op_type == "Gather" and node.input[1] in constants]
    constant = constants[gathers[which].input[1]]
    constant.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(constant).copy()), constant.name))


def zero_tensor(folder: Path, name: str) -> None:
    """Overwrite one tensor of a bundle that holds its weights with zeros."""
    tensors, _ = read_header(folder / "model.safetensors")
    stored = tensors[name]
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(stored.offset)
        file.write(bytes(stored.length))
    reseal(folder)
