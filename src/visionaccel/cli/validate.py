"""`visionaccel validate`: compares every program of a bundle with the float32 reference and writes its certificate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import MofNCompleteColumn
from rich.table import Table

from visionaccel.backends import AUTO
from visionaccel.bundle import MANIFEST, Bundle, Certificate, open_bundle, write_golden
from visionaccel.cli.output import (
    Backend,
    Device,
    Json,
    OptionsText,
    backend_options,
    messages,
    print_json,
    progress,
    results,
)
from visionaccel.core.cores import choose_cores, on_cores
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError
from visionaccel.settings import load_settings
from visionaccel.validation.certificate import THRESHOLDS, validate_bundle

__all__ = ["print_certificate", "validate"]


def validate(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    reference: Annotated[
        str, typer.Option(help="Checkpoint folder or Hugging Face repository that the bundle was exported from.")
    ],
    backend: Backend = None,
    device: Device = None,
    options: OptionsText = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Image file or folder of images to show. Repeatable. Default: those of scikit-image."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Lowest cosine of a token that passes. Default: "
            + ", ".join(f"{value} in {precision}" for precision, value in THRESHOLDS.items())
            + "."
        ),
    ] = None,
    no_write: Annotated[bool, typer.Option("--no-write", help="Leave the bundle as it is.")] = False,
    as_json: Json = False,
) -> None:
    """Prove a bundle: compare each of its programs with the float32 reference, and write the certificate into it.

    Exit status 1 if a program was not run, failed, or is further from the reference than the threshold allows.
    """
    settings = load_settings()
    chosen_options = backend_options(options, settings.options)
    tower = open_tower(reference)
    # A certificate is worth what was read, so no digest is taken from memory.
    opened = open_bundle(bundle, checkpoint=tower.checkpoint, trust_unchanged=False)
    if not no_write:
        _check_writable(opened)
    with on_cores(choose_cores(settings.cpu_cores).cores, strict=True), progress(MofNCompleteColumn()) as tell:
        found = validate_bundle(
            opened,
            tower,
            backend=backend or settings.backend or AUTO,
            device=device or settings.device,
            options=chosen_options,
            isolation=settings.isolation,
            deadline=settings.deadline,
            open_deadline=settings.open_deadline,
            images=images or (),
            thresholds=THRESHOLDS if threshold is None else dict.fromkeys(THRESHOLDS, threshold),
            progress=tell,
        )
    certificate = found.certificate
    if not certificate.images.get("real"):
        messages.print("No real image was shown: pass --images, or install scikit-image.", style="yellow")
    if not no_write:
        write_golden(opened, found.golden, {"certificate": certificate.model_dump(mode="json")})
    if as_json:
        stated = certificate.model_dump(mode="json")
        print_json({"bundle": str(bundle), "written": not no_write, "certificate": stated})
    else:
        print_certificate(certificate, f"{bundle} compared with the float32 reference")
        if not no_write:
            results.print(
                f"The certificate is in {bundle / MANIFEST}, and {len(found.golden)} golden images are next to it.",
                soft_wrap=True,
            )
    if not certificate.passed:
        raise typer.Exit(1)


def _check_writable(bundle: Bundle) -> None:
    """Refuse before the work rather than after it."""
    manifest = bundle.folder / MANIFEST
    if manifest.is_symlink():
        raise ConfigurationError(
            f"{manifest} is a link, as in the hub's cache, whose files are not to be changed.",
            hint="Pull the bundle with --output, or pass --no-write.",
        )
    if not os.access(bundle.folder, os.W_OK):
        raise ConfigurationError(f"{bundle.folder} cannot be written to.", hint="Pass --no-write.")


def print_certificate(certificate: Certificate, title: str) -> None:
    """The certificate as tables: cosines lowest, at the first percentile and mean; and below, what failed and why."""
    images = ", ".join(f"{count} {kind}" for kind, count in certificate.images.items())
    table = Table(title=f"{title}; images: {images}", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("program", overflow="fold", min_width=7)
    table.add_column("ran on", overflow="fold")
    for name in ("tokens", "lowest", "1st %", "mean", "error", "NaN"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for found in certificate.programs:
        table.add_row(
            found.program,
            f"{found.backend}, {found.device}" + (" (simulated)" if found.simulated else ""),
            str(found.tokens),
            f"{found.lowest_cosine:.6f}",
            f"{found.first_percentile_cosine:.6f}",
            f"{found.mean_cosine:.6f}",
            f"{found.relative_error:.1e}",
            str(found.nonfinite_rows),
            "passed" if found.failure is None else "FAILED",
            style=None if found.failure is None else "bold red",
        )
    results.print(table)
    for found in certificate.programs:
        if found.failure is not None:
            results.print(f"FAILED {found.program}: {found.failure}", highlight=False, soft_wrap=True)
    results.print("Passed." if certificate.passed else "FAILED.", style="green" if certificate.passed else "bold red")
