"""`visionaccel inspect`: what a bundle holds, and how far it was proved right."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from visionaccel.bundle import Bundle, json_schema, open_bundle
from visionaccel.checkpoint import locate_checkpoint
from visionaccel.cli.output import Json, print_json, results
from visionaccel.cli.validate import print_certificate
from visionaccel.core.program import HOST_AFTER, HOST_BEFORE, ONNX_MODELS, Program
from visionaccel.errors import ConfigurationError

__all__ = ["inspect"]


def inspect(
    bundle: Annotated[Path | None, typer.Argument(help="Folder of the bundle.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Where the weights are, if the bundle holds none and its checkpoint moved.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Read every file again, unchanged ones too.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the manifest's JSON schema instead.")] = False,
    as_json: Json = False,
) -> None:
    """Verify a bundle and show its programs, tensors, operators, sizes, grids and certificate."""
    if schema:
        print_json(json_schema())
        return
    if bundle is None:
        raise ConfigurationError("no bundle was named.", hint="Pass the folder of a bundle, or --schema.")
    found = locate_checkpoint(checkpoint) if checkpoint is not None else None
    opened = open_bundle(bundle, checkpoint=found, trust_unchanged=not full)
    names = {entry.name for entry in opened.manifest.programs}
    formats = {entry.format for entry in opened.manifest.programs}
    programs = {program.name: program for program in opened.programs(formats) if program.name in names}
    rows = [_row(opened, programs[entry.name]) for entry in opened.manifest.programs]
    if as_json:
        print_json({"manifest": opened.manifest.model_dump(mode="json"), "programs": rows})
        return
    _print_summary(opened)
    for row in rows:
        _print_program(row)
    if opened.manifest.certificate is None:
        results.print("No certificate: run `visionaccel validate` before you trust it.", style="yellow")
    else:
        certificate = opened.manifest.certificate
        print_certificate(certificate, f"Certificate of {certificate.created}")


def _row(bundle: Bundle, program: Program) -> dict[str, Any]:
    entry = next(entry for entry in bundle.manifest.programs if entry.name == program.name)
    return {
        "name": program.name,
        "format": program.format,
        "takes": str(program.coverage),
        "precision": program.precision,
        "device": program.device or "any",
        "host": list(entry.host.tensors) if entry.host else [],
        "bytes": sum(file.bytes for file in entry.files),
        "inputs": [str(spec) for spec in program.inputs],
        "outputs": [str(spec) for spec in program.outputs],
        "stored_names": dict(program.stored_names),
        "companions": dict(entry.companions),
        **(_graph(program) if program.format in ONNX_MODELS else {}),
    }


def _graph(program: Program) -> dict[str, Any]:
    """Operators and opsets of an ONNX program; its weights are not read."""
    import onnx

    assert program.model is not None
    model = onnx.load_model_from_string(program.model())
    operators = Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph.node)
    return {
        "opset": {opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        "nodes": len(model.graph.node),
        "operators": dict(operators.most_common()),
    }


def _print_summary(bundle: Bundle) -> None:
    manifest = bundle.manifest
    table = Table(title=f"Bundle {bundle.folder}", show_header=False)
    weights = "in the bundle" if manifest.checkpoint is None else f"in checkpoint {manifest.checkpoint.source}"
    if not bundle.tower.complete:
        weights += ", the host's alone"
    table.add_row("family", manifest.family)
    table.add_row("weights", f"{weights}, {manifest.weights_digest}")
    table.add_row("image processor", manifest.processor_digest or "not stated")
    table.add_row("fixed grids", ", ".join(f"{grid.h}x{grid.w}" for grid in bundle.grids) or "none")
    table.add_row("shared files", ", ".join(f"{f.path} ({f.bytes / 1e6:.2f} MB)" for f in manifest.files) or "none")
    table.add_row("written with", ", ".join(f"{name} {version}" for name, version in manifest.toolchain.items()))
    results.print(table)


def _print_program(row: dict[str, Any]) -> None:
    table = Table(title=f"Program {row['name']}", show_header=False)
    table.add_row("takes", row["takes"])
    table.add_row("format", f"{row['format']}, {row['precision']}, device {row['device']}")
    split = f"window reorder and {', '.join(row['host'])}" if row["host"] else "nothing but tables"
    if {HOST_BEFORE, HOST_AFTER} <= set(row["companions"]):
        split = "the operators around the device's part, on ONNX Runtime"
    table.add_row("left to the host", split)
    table.add_row("size", f"{row['bytes'] / 1e6:.2f} MB")
    table.add_row("inputs", "\n".join(row["inputs"]))
    table.add_row("outputs", "\n".join(row["outputs"]))
    if row["stored_names"]:
        table.add_row("in the file", "\n".join(f"{name}: {stored}" for name, stored in row["stored_names"].items()))
    if row["companions"]:
        table.add_row("beside it", "\n".join(f"{role}: {path}" for role, path in row["companions"].items()))
    if "nodes" in row:
        table.add_row("opset", ", ".join(f"{domain} {version}" for domain, version in row["opset"].items()))
        table.add_row("nodes", f"{row['nodes']}: " + ", ".join(f"{op} {n}" for op, n in row["operators"].items()))
    results.print(table)
