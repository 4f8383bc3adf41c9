"""`visionaccel export`: a bundle of programs from a checkpoint."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TextColumn
from rich.table import Table

from visionaccel.bundle import BundleFile, ProgramRequest, export_bundle
from visionaccel.bundle import as_json as json_file
from visionaccel.cli.output import Force, Json, Revision, print_json, progress, results
from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid, FixedGrid, OperatorDialect
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError

__all__ = ["PrecisionName", "export", "frame_grid"]


class PrecisionName(StrEnum):
    """Dtype of weights and activations."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Target(StrEnum):
    """A compiler that the programs are for."""

    VITISAI = "vitisai"


class DialectName(StrEnum):
    """Whose operators programs are written in."""

    STANDARD = "standard"
    MICROSOFT = "microsoft"


VITISAI_DEVICE = "npu"
VITISAI_CONFIG = {
    "passes": [
        {"name": "init", "plugin": "vaip-pass_init"},
        {
            "name": "vaiml_partition",
            "plugin": "vaip-pass_vaiml_partition",
            # 1 is the compiler's own default; "unvectorized" is what AMD names for transformers.
            "vaiml_config": {"optimize_level": 1, "preferred_data_storage": "unvectorized"},
        },
    ],
    "target": "VAIML",
    "targets": [{"name": "VAIML", "pass": ["init", "vaiml_partition"]}],
}
"""Has AMD's Vitis AI compiler make bfloat16 of a float32 program.

Source: https://github.com/amd/RyzenAI-SW, `Transformer-examples/DistilBERT_text_classification_bf16`.
"""


def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or Hugging Face repository.")],
    output: Annotated[Path, typer.Argument(help="Folder of the bundle to write.")],
    grid: Annotated[
        list[str] | None,
        typer.Option(help="A program of fixed shapes for this grid, height x width in patches: 58x74. Repeatable."),
    ] = None,
    bucket: Annotated[
        list[str] | None,
        typer.Option(help="A program of fixed shapes for every grid within this one, padded and masked. Repeatable."),
    ] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="One program for every grid; what is written if nothing is named.")
    ] = False,
    split_host: Annotated[
        bool,
        typer.Option(
            "--split-host",
            help="Leave the patch embedding and the window reorder of fixed-shape programs to the host.",
        ),
    ] = False,
    self_contained: Annotated[
        bool, typer.Option("--self-contained", help="Pack the weights into the bundle instead of referencing them.")
    ] = False,
    precision: Annotated[
        PrecisionName, typer.Option(help="Dtype of weights and activations; inputs and outputs stay float32.")
    ] = PrecisionName.FLOAT32,
    dialect: Annotated[
        DialectName | None,
        typer.Option(
            help="Whose operators to write. standard: what every runtime knows, the default for fixed shapes. "
            "microsoft: ONNX Runtime's own, the default for every grid, which onnxrt runs faster on cpu and cuda."
        ),
    ] = None,
    target: Annotated[
        Target | None,
        typer.Option(
            help="Compiler that the programs are for: fixed shapes, its device, and its configuration beside."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Kind of device that the programs are for, such as npu. Default: any.")
    ] = None,
    revision: Revision = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a bundle: programs of a checkpoint's vision encoder with a manifest that states all of them."""
    started = time.perf_counter()
    tower = open_tower(checkpoint, revision)
    fixed = [frame_grid(text, "--grid", tower.merge_size) for text in grid or ()]
    largest = [frame_grid(text, "--bucket", tower.merge_size) for text in bucket or ()]
    if split_host and not (fixed or largest):
        raise ConfigurationError("--split-host needs a program of fixed shapes.", hint="Add --grid or --bucket.")
    if target is not None and (dynamic or not (fixed or largest)):
        raise ConfigurationError(
            f"--target {target} takes programs of fixed shapes only.", hint="Name them with --grid or --bucket."
        )
    if target is not None and device not in (None, VITISAI_DEVICE):
        raise ConfigurationError(
            f"--target {target} is for device {VITISAI_DEVICE}, not {device}.", hint="Leave out --device."
        )
    if dialect is DialectName.MICROSOFT and (target is not None or device == VITISAI_DEVICE):
        raise ConfigurationError(
            f"device {VITISAI_DEVICE} does not run ONNX Runtime's own operators.", hint="Leave out --dialect."
        )
    operators: OperatorDialect | None = dialect.value if dialect is not None else None
    requests = [
        *(ProgramRequest(FixedGrid(each), split_host, operators) for each in fixed),
        *(ProgramRequest(tower.bucket(each), split_host, operators) for each in largest),
    ]
    if dynamic or not requests:
        requests.append(ProgramRequest(AnyGrid(), dialect=operators))
    with progress(TextColumn("{task.percentage:>3.0f} %", markup=False)) as tell:
        bundle = export_bundle(
            tower,
            output,
            requests,
            source=None if Path(checkpoint).is_dir() else checkpoint,
            revision=revision,
            self_contained=self_contained,
            precision=precision.value,
            device=VITISAI_DEVICE if target is not None else device,
            companions={"vitisai_config": json_file(VITISAI_CONFIG)} if target is not None else None,
            force=force,
            progress=tell,
        )
    manifest = bundle.manifest
    seconds = round(time.perf_counter() - started, 3)
    if as_json:
        print_json({"bundle": str(output), "seconds": seconds, "manifest": manifest.model_dump(mode="json")})
        return
    table = Table("program", "takes", "precision", "file", "MB", title=f"Bundle {output}")
    for program in manifest.programs:
        size = sum(file.bytes for file in program.files) / 1e6
        table.add_row(program.name, str(program.covers()), program.precision, program.model, f"{size:.2f}")
    results.print(table)
    weights = "packed, " + _size(manifest.files) if manifest.checkpoint is None else f"in {manifest.checkpoint.source}"
    results.print(f"Weights {weights}. Written in {seconds} s.")


def frame_grid(text: str, option: str, merge_size: int) -> Grid:
    """The grid of one frame from an option's text, such as `58x74`.

    Raises:
        ConfigurationError: If it has several frames.
        GridError: If it is no grid, or not divisible by the merge size.
    """
    grid = Grid.parse(text)
    if grid.t != 1:
        raise ConfigurationError(f"{option} {text}: a program takes one frame.", hint="Write height x width, 58x74.")
    grid.check_divisible(merge_size)
    return grid


def _size(files: tuple[BundleFile, ...]) -> str:
    return f"{sum(file.bytes for file in files) / 2**30:.2f} GiB"
