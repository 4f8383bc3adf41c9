"""`visionaccel quantize`: int8 programs from a bundle of float32 ones, kept only if they are close enough."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn

from visionaccel.bundle import open_bundle
from visionaccel.cli.output import Device, Force, Json, print_json, progress, results
from visionaccel.cli.validate import print_certificate
from visionaccel.encoder import open_tower
from visionaccel.validation.certificate import THRESHOLDS, Validation

__all__ = ["quantize"]


def quantize(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle of float32 programs.")],
    output: Annotated[Path, typer.Option(help="Folder of the bundle to write.")],
    calibrate: Annotated[
        list[Path], typer.Option(help="Image file or folder of images such as will be encoded. Repeatable.")
    ],
    target: Annotated[str, typer.Option(help="Backend that quantizes, and that the programs are for.")],
    reference: Annotated[
        str | None,
        typer.Option(help="Checkpoint that the bundle was exported from. Default: the one that it refers to."),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Image file or folder to judge by. Repeatable. Default: those of `visionaccel validate`."),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Lowest cosine of a token that is kept.")] = THRESHOLDS["int8"],
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Quantize a bundle's programs to int8, compare them with the float32 reference, and keep them if they pass."""
    from visionaccel.validation import quantize_bundle

    started = time.perf_counter()
    tower = open_tower(reference) if reference is not None else None
    opened = open_bundle(bundle, checkpoint=tower.checkpoint if tower is not None else None)
    validations: list[Validation] = []
    with progress(MofNCompleteColumn()) as tell:
        made = quantize_bundle(
            opened,
            output,
            calibrate,
            target=target,
            reference=tower,
            device=device,
            threshold=threshold,
            judged_by=images or (),
            force=force,
            progress=tell,
            report=validations.append,
        )
    seconds = round(time.perf_counter() - started, 3)
    if as_json:
        print_json({"bundle": str(output), "seconds": seconds, "manifest": made.manifest.model_dump(mode="json")})
        return
    for found in validations:
        print_certificate(found.certificate, f"{output} compared with the float32 reference")
    size = sum(file.bytes for program in made.manifest.programs for file in program.files) / 2**20
    results.print(f"Bundle {output}: {size:.1f} MiB of int8 programs, in {seconds} s.")
