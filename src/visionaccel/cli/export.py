"""Commands that write a bundle or a checkpoint: `export`, `quantize` and `strip`."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.filesize import decimal
from rich.progress import DownloadColumn, MofNCompleteColumn, TextColumn

from visionaccel.bundle import ProgramRequest, counter, export_bundle, open_bundle, strip_checkpoint
from visionaccel.bundle import as_json as json_file
from visionaccel.checkpoint import Checkpoint
from visionaccel.cli.bundles import Images, print_certificate
from visionaccel.cli.output import Device, Force, Json, Revision, print_json, print_table, progress, results
from visionaccel.core.comparison import THRESHOLDS
from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid, FixedGrid, OperatorDialect, Precision
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError

VITISAI_DEVICE = "npu"
VITISAI_CONFIG = {
    "passes": [
        {"name": "init", "plugin": "vaip-pass_init"},
        {
            "name": "vaiml_partition",
            "plugin": "vaip-pass_vaiml_partition",
            # 1 is the compiler's default; "unvectorized" is what AMD recommends for transformers.
            "vaiml_config": {"optimize_level": 1, "preferred_data_storage": "unvectorized"},
        },
    ],
    "target": "VAIML",
    "targets": [{"name": "VAIML", "pass": ["init", "vaiml_partition"]}],
}
"""Makes AMD's Vitis AI compiler convert a float32 program to bfloat16.

Source: https://github.com/amd/RyzenAI-SW, `Transformer-examples/DistilBERT_text_classification_bf16`.
"""


def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or Hugging Face repository.")],
    output: Annotated[Path, typer.Argument(help="Folder of the bundle to write.")],
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="A program of fixed shapes for this grid, height x width in patches, such as 58x74. Repeatable."
        ),
    ] = None,
    bucket: Annotated[
        list[str] | None,
        typer.Option(help="A program of fixed shapes for every grid within this one, padded and masked. Repeatable."),
    ] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="One program for every grid; the default.")] = False,
    split_host: Annotated[
        bool,
        typer.Option("--split-host", help="Leave patch embedding and order of windows of fixed shapes to the host."),
    ] = False,
    self_contained: Annotated[bool, typer.Option("--self-contained", help="Pack the weights into the bundle.")] = False,
    precision: Annotated[
        Precision, typer.Option(help="Dtype of weights and activations; inputs and outputs stay float32.")
    ] = "float32",
    dialect: Annotated[
        OperatorDialect | None,
        typer.Option(
            help="Operators to write. standard: those that every runtime supports, the default for fixed shapes. "
            "microsoft: ONNX Runtime's own, the default for every grid, which onnxrt runs faster on cpu and cuda."
        ),
    ] = None,
    target: Annotated[
        Literal["vitisai"] | None,
        typer.Option(
            help="Compiler that the programs are for. Sets the device, and adds the compiler's configuration."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device kind that the programs are for, such as npu. Default: any.")
    ] = None,
    revision: Revision = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a bundle: programs of a checkpoint's vision encoder, with a manifest that describes them."""
    started = time.perf_counter()
    tower = open_tower(checkpoint, revision)
    fixed = [frame_grid(text, "--grid", tower.merge_size) for text in grid or ()]
    largest = [frame_grid(text, "--bucket", tower.merge_size) for text in bucket or ()]
    if split_host and not (fixed or largest):
        raise ConfigurationError("--split-host needs a program of fixed shapes.", hint="Add --grid or --bucket.")
    if target is not None and (dynamic or not (fixed or largest)):
        raise ConfigurationError(
            f"--target {target} supports only programs of fixed shapes.", hint="Pass --grid or --bucket."
        )
    if target is not None and device not in (None, VITISAI_DEVICE):
        raise ConfigurationError(
            f"--target {target} is for device {VITISAI_DEVICE}, not {device}.", hint="Leave out --device."
        )
    if dialect == "microsoft" and (target is not None or device == VITISAI_DEVICE):
        raise ConfigurationError(
            f"device {VITISAI_DEVICE} does not run ONNX Runtime's own operators.", hint="Leave out --dialect."
        )
    requests = [
        *(ProgramRequest(FixedGrid(each), split_host, dialect) for each in fixed),
        *(ProgramRequest(tower.bucket(each), split_host, dialect) for each in largest),
    ]
    if dynamic or not requests:
        requests.append(ProgramRequest(AnyGrid(), dialect=dialect))
    with progress(TextColumn("{task.percentage:>3.0f} %", markup=False)) as tell:
        bundle = export_bundle(
            tower,
            output,
            requests,
            source=None if Path(checkpoint).is_dir() else checkpoint,
            revision=revision,
            self_contained=self_contained,
            precision=precision,
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
    rows = [
        (each.name, each.covers(), each.precision, each.model, f"{sum(file.bytes for file in each.files) / 1e6:.2f}")
        for each in manifest.programs
    ]
    print_table(f"Bundle {output}", ("program", "takes", "precision", "file", "MB"), rows)
    packed = f"packed, {sum(file.bytes for file in manifest.files) / 2**30:.2f} GiB"
    weights = packed if manifest.checkpoint is None else f"in {manifest.checkpoint.source}"
    results.print(f"Weights {weights}. Written in {seconds} s.")


def frame_grid(text: str, option: str, merge_size: int) -> Grid:
    """Parse the grid of one frame from an option's text, such as `58x74`, and check it against the merge size."""
    grid = Grid.parse(text)
    if grid.t != 1:
        raise ConfigurationError(
            f"{option} {text}: a program encodes one frame.", hint="Write height x width, such as 58x74."
        )
    grid.check_divisible(merge_size)
    return grid


def quantize(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle of float32 programs.")],
    output: Annotated[Path, typer.Option(help="Folder of the bundle to write.")],
    calibrate: Annotated[
        list[Path], typer.Option(help="Image file or folder of images like those to encode. Repeatable.")
    ],
    target: Annotated[str, typer.Option(help="Backend that quantizes the programs and will run them.")],
    reference: Annotated[
        str | None,
        typer.Option(help="Checkpoint that the bundle was exported from. Default: the one that it refers to."),
    ] = None,
    images: Images = None,
    threshold: Annotated[float, typer.Option(help="Lowest cosine of any token that passes.")] = THRESHOLDS["int8"],
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Quantize a bundle's programs to int8, compare them with the float32 reference, and keep them if they pass."""
    from visionaccel.validation import quantize_bundle

    started = time.perf_counter()
    tower = open_tower(reference) if reference is not None else None
    opened = open_bundle(bundle, checkpoint=tower.checkpoint if tower is not None else None)
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
        )
    seconds = round(time.perf_counter() - started, 3)
    if as_json:
        print_json({"bundle": str(output), "seconds": seconds, "manifest": made.manifest.model_dump(mode="json")})
        return
    assert made.manifest.certificate is not None
    print_certificate(made.manifest.certificate, f"{output} compared with the float32 reference")
    size = sum(file.bytes for program in made.manifest.programs for file in program.files) / 2**20
    results.print(f"Bundle {output}: {size:.1f} MiB of int8 programs, in {seconds} s.")


def strip(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder; it is only read.")],
    output: Annotated[Path, typer.Argument(help="Folder to write, which must not exist.")],
    as_json: Json = False,
) -> None:
    """Copy a checkpoint without its vision weights, to serve it with a separate encoder."""
    started = time.perf_counter()
    if not checkpoint.is_dir():
        # A repository in the cache may lack files that were never downloaded, such as the tokenizer's.
        raise ConfigurationError(
            f"{checkpoint} is not a folder.",
            hint="Pass a folder; `hf download REPOSITORY --local-dir FOLDER` downloads a whole repository.",
        )
    source = Checkpoint(checkpoint)
    total = sum(tensor.length for tensor in source.tensors.values())
    with progress(DownloadColumn()) as tell:
        report = strip_checkpoint(source, output, progress=counter("Stripping", total, tell))
    if as_json:
        seconds = round(time.perf_counter() - started, 3)
        print_json({**asdict(report), "folder": str(report.folder), "seconds": seconds})
        return
    results.print(f"Wrote {report.folder} for family {report.family}.", highlight=False, soft_wrap=True)
    sizes = f"{decimal(report.bytes_before)} before, {decimal(report.bytes_after)} after"
    tensors = f"{report.removed_tensors} of the vision tower removed, {report.kept_tensors} kept"
    results.print(f"  weights: {sizes}", highlight=False)
    results.print(f"  tensors: {tensors}", highlight=False)
    results.print(f"  digest of the vision weights: {report.vision_weights_digest}", highlight=False, soft_wrap=True)
    if report.skipped:
        results.print(f"  not copied: {', '.join(report.skipped)}", highlight=False, soft_wrap=True)
