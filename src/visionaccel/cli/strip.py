"""`visionaccel strip`: a copy of a checkpoint without its vision weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from visionaccel.bundle import StripReport, strip_checkpoint
from visionaccel.checkpoint import Checkpoint
from visionaccel.cli.output import Json, messages, print_json, results
from visionaccel.errors import ConfigurationError

__all__ = ["strip"]


def strip(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder; it is only read.")],
    output: Annotated[Path, typer.Argument(help="The folder to write, which must not exist.")],
    as_json: Json = False,
) -> None:
    """Copy a checkpoint without its vision weights, to be served with an encoder from elsewhere."""
    started = time.perf_counter()
    if not checkpoint.is_dir():
        # A repository in the cache may lack files that nothing here has read, such as the tokenizer's.
        raise ConfigurationError(
            f"{checkpoint} is not a folder.",
            hint="Pass one; a repository is downloaded whole with `hf download REPOSITORY --local-dir FOLDER`.",
        )
    source = Checkpoint(checkpoint)
    total = sum(tensor.length for tensor in source.tensors.values())
    columns = (TextColumn("Stripping"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True) as bars:
        task = bars.add_task("strip", total=total)
        report = strip_checkpoint(source, output, progress=lambda read: bars.advance(task, read))
    if as_json:
        print_json(_as_dict(report, time.perf_counter() - started))
        return
    results.print(f"Wrote {report.folder} for family {report.family}.", highlight=False, soft_wrap=True)
    before, after = report.kept_bytes + report.removed_bytes, report.kept_bytes
    removed, kept = report.removed_tensors, report.kept_tensors
    results.print(f"  weights: {decimal(before)} before, {decimal(after)} after", highlight=False)
    results.print(f"  tensors: {removed} of the vision tower removed, {kept} kept", highlight=False)
    results.print(f"  digest of the vision weights: {report.digest}", highlight=False, soft_wrap=True)
    if report.skipped:
        results.print(f"  not copied: {', '.join(report.skipped)}", highlight=False, soft_wrap=True)


def _as_dict(report: StripReport, seconds: float) -> dict[str, object]:
    return {
        "folder": str(report.folder),
        "family": report.family,
        "bytes_before": report.kept_bytes + report.removed_bytes,
        "bytes_after": report.kept_bytes,
        "removed_tensors": report.removed_tensors,
        "kept_tensors": report.kept_tensors,
        "vision_weights_digest": report.digest,
        "shards": list(report.shards),
        "skipped": list(report.skipped),
        "seconds": round(seconds, 3),
    }
