"""The command `visionaccel import-vitisai`, which makes bundles of artifacts of AMD's Vitis AI compiler."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TextColumn

from visionaccel.backends import hookimpl
from visionaccel.cli.export import frame_grid
from visionaccel.cli.output import Force, Json, Revision, messages, print_json, progress, results
from visionaccel.core.program import Precision
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError


@hookimpl
def visionaccel_commands(app: typer.Typer) -> None:
    """Adds the command to `visionaccel`."""
    app.command()(import_vitisai)


def import_vitisai(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Folders that the compiler wrote, one for each grid: a .rai next to its .onnx, or a cache.",
        ),
    ],
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle to write.")],
    checkpoint: Annotated[
        str, typer.Option(help="Checkpoint folder or Hugging Face repository that the artifact was made from.")
    ],
    grid: Annotated[
        str | None,
        typer.Option(
            help="Grid that it was compiled for, in patches, such as 58x74. Needed only if the model does not show it."
        ),
    ] = None,
    artifact: Annotated[
        Path | None, typer.Option(help="The .rai or cache directory in PATH, if there are several.")
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(help="The .onnx that was compiled, if there are several or it is elsewhere."),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Arithmetic of the device.")] = "bfloat16",
    host_on_onnxrt: Annotated[
        bool,
        typer.Option(
            "--host-on-onnxrt",
            help="Let ONNX Runtime run the operators around the device's part if they are not recognised.",
        ),
    ] = False,
    self_contained: Annotated[
        bool,
        typer.Option("--self-contained", help="Put the host's weights into the bundle: it then needs no checkpoint."),
    ] = False,
    revision: Revision = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn artifacts of AMD's Vitis AI compiler into a bundle, and check them against their checkpoint."""
    # Other commands should not wait for the import of onnx.
    from visionaccel_flexmlrt.vitisai import ImportRequest
    from visionaccel_flexmlrt.vitisai import import_vitisai as run_import

    started = time.perf_counter()
    tower = open_tower(checkpoint, revision)
    if len(paths) > 1 and (artifact, onnx, grid) != (None, None, None):
        raise ConfigurationError(
            "--artifact, --onnx and --grid apply to a single folder, but several were given.",
            hint="Put each artifact into a separate folder with all of its files, or import one.",
        )
    requests = [
        ImportRequest(
            path=path,
            artifact=artifact,
            model=onnx,
            grid=None if grid is None else frame_grid(grid, "--grid", tower.merge_size),
            precision=precision,
            host_on_onnxrt=host_on_onnxrt,
        )
        for path in paths
    ]
    with progress(TextColumn("{task.percentage:>3.0f} %", markup=False)) as tell:
        imported = run_import(
            tower,
            requests,
            bundle,
            self_contained=self_contained,
            source=None if Path(checkpoint).is_dir() else checkpoint,
            revision=revision,
            force=force,
            progress=tell,
        )
    manifest = imported.bundle.manifest
    seconds = round(time.perf_counter() - started, 3)
    for warning in imported.warnings:
        messages.print(f"Warning: {warning}", highlight=False, soft_wrap=True, style="yellow")
    if as_json:
        print_json(
            {
                "bundle": str(bundle),
                "seconds": seconds,
                "warnings": list(imported.warnings),
                "manifest": manifest.model_dump(mode="json"),
            }
        )
        return
    for program in manifest.programs:
        host = f"tokens in {program.host.order} order" if program.host else "by ONNX Runtime"
        results.print(
            f"Grid {program.name}: {program.format} for {program.device}, {program.precision}; host part: {host}."
        )
    results.print(f"Bundle {bundle}, written in {seconds} s.")
