"""Commands for bundles: `inspect`, `validate`, and `push` and `pull` to and from the model hub."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import MofNCompleteColumn

from visionaccel.backends import AUTO
from visionaccel.bundle import (
    MANIFEST,
    Bundle,
    Certificate,
    ProgramEntry,
    json_schema,
    open_bundle,
    pull_bundle,
    push_bundle,
    write_golden,
)
from visionaccel.checkpoint import locate_checkpoint
from visionaccel.cli.output import (
    Backend,
    Device,
    Json,
    MaxTokens,
    OptionsText,
    backend_options,
    messages,
    print_details,
    print_json,
    print_table,
    progress,
    results,
)
from visionaccel.cli.task import Margin, TaskFile, refuse_options, validate_by_task
from visionaccel.core.comparison import THRESHOLDS
from visionaccel.core.cores import choose_cores, on_cores
from visionaccel.core.program import HOST_AFTER, HOST_BEFORE, ONNX_MODELS, Program
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError
from visionaccel.settings import load_settings
from visionaccel.validation.certificate import validate_bundle

Images = Annotated[
    list[Path] | None,
    typer.Option(help="Image file or folder of images to compare on. Repeatable. Default: scikit-image's."),
]
Repository = Annotated[str, typer.Argument(help="Hugging Face repository, owner/name.")]

_THRESHOLDS = ", ".join(f"{value} in {precision}" for precision, value in THRESHOLDS.items())


def inspect(
    bundle: Annotated[Path | None, typer.Argument(help="Folder of the bundle.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Where the weights are, if they have moved.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Read all files again, even unchanged ones.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the manifest's JSON schema instead.")] = False,
    as_json: Json = False,
) -> None:
    """Verify a bundle and show its programs, tensors, operators, sizes, grids and certificate."""
    if schema:
        print_json(json_schema())
        return
    if bundle is None:
        raise ConfigurationError("no bundle was given.", hint="Pass the folder of a bundle, or --schema.")
    found = locate_checkpoint(checkpoint) if checkpoint is not None else None
    opened = open_bundle(bundle, checkpoint=found, trust_unchanged=not full)
    entries = opened.manifest.programs
    programs = {program.name: program for program in opened.programs({entry.format for entry in entries})}
    rows = [_described(entry, programs[entry.name]) for entry in entries]
    if as_json:
        print_json({"manifest": opened.manifest.model_dump(mode="json"), "programs": rows})
        return
    _print_summary(opened)
    for row in rows:
        _print_program(row)
    if (certificate := opened.manifest.certificate) is None:
        results.print("No certificate: run `visionaccel validate` before you trust it.", style="yellow")
    else:
        print_certificate(certificate, f"Certificate of {certificate.created}")


def _described(entry: ProgramEntry, program: Program) -> dict[str, Any]:
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
    """Count the operators of an ONNX program and list its opsets, without reading the weights."""
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
    weights = "in the bundle" if manifest.checkpoint is None else f"in checkpoint {manifest.checkpoint.source}"
    if not bundle.tower.complete:
        weights += ", only the host's"
    details = {
        "family": manifest.family,
        "weights": f"{weights}, {manifest.weights_digest}",
        "image processor": manifest.processor_digest or "unknown",
        "fixed grids": ", ".join(f"{grid.h}x{grid.w}" for grid in bundle.grids) or "none",
        "shared files": ", ".join(f"{f.path} ({f.bytes / 1e6:.2f} MB)" for f in manifest.files) or "none",
        "written with": ", ".join(f"{name} {version}" for name, version in manifest.toolchain.items()),
    }
    print_details(f"Bundle {bundle.folder}", details)


def _print_program(row: dict[str, Any]) -> None:
    split = f"embedding of patches, with {', '.join(row['host'])}" if row["host"] else "only tables"
    if {HOST_BEFORE, HOST_AFTER} <= set(row["companions"]):
        split = "the operators around the device's part, on ONNX Runtime"
    details = {
        "takes": row["takes"],
        "format": f"{row['format']}, {row['precision']}, device {row['device']}",
        "left to the host": split,
        "size": f"{row['bytes'] / 1e6:.2f} MB",
        "inputs": "\n".join(row["inputs"]),
        "outputs": "\n".join(row["outputs"]),
        "in the file": "\n".join(f"{name}: {stored}" for name, stored in row["stored_names"].items()),
        "files next to it": "\n".join(f"{role}: {path}" for role, path in row["companions"].items()),
    }
    if "nodes" in row:
        details["opset"] = ", ".join(f"{domain} {version}" for domain, version in row["opset"].items())
        details["nodes"] = f"{row['nodes']}: " + ", ".join(f"{op} {n}" for op, n in row["operators"].items())
    print_details(f"Program {row['name']}", details)


def validate(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    reference: Annotated[str, typer.Option(help="Folder or repository of the bundle's checkpoint.")],
    backend: Backend = None,
    device: Device = None,
    options: OptionsText = None,
    images: Images = None,
    threshold: Annotated[
        float | None, typer.Option(help=f"Lowest cosine of any token that passes. Default: {_THRESHOLDS}.")
    ] = None,
    no_write: Annotated[bool, typer.Option("--no-write", help="Do not change the bundle.")] = False,
    task: TaskFile = None,
    margin: Margin = None,
    max_tokens: MaxTokens = None,
    as_json: Json = False,
) -> None:
    """Compare each program of a bundle with the float32 reference, and write the certificate into the bundle.

    Exit status 1 if a program was not run, failed, or is further from the reference than the threshold allows.

    With --task, answer questions about images instead, with the bundle and with the model's own vision tower. Exit
    status 1 if an image could not be encoded, or accuracy is lower than the model's own by more than the margin.
    """
    settings = load_settings()
    chosen_options = backend_options(options, settings.options)
    if task is not None:
        refuse_options("--task", {"--images": images, "--threshold": threshold, "--no-write": no_write or None})
        validate_by_task(bundle, reference, task, backend, device, chosen_options, margin, max_tokens, as_json=as_json)
        return
    refuse_options("validate without --task", {"--margin": margin, "--max-tokens": max_tokens})
    tower = open_tower(reference)
    # A certificate must be about the current files, so digests are not taken from the cache.
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
        messages.print("No real image was used: pass --images, or install scikit-image.", style="yellow")
    if not no_write:
        write_golden(opened, found.golden, {"certificate": certificate.model_dump(mode="json")})
    if as_json:
        document = certificate.model_dump(mode="json")
        print_json({"bundle": str(bundle), "written": not no_write, "certificate": document})
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
    """Refuse a bundle that cannot be changed, before the work."""
    manifest = bundle.folder / MANIFEST
    if manifest.is_symlink():
        raise ConfigurationError(
            f"{manifest} is a link, probably into the hub's cache, whose files must not be changed.",
            hint="Pull the bundle with --output, or pass --no-write.",
        )
    if not os.access(bundle.folder, os.W_OK):
        raise ConfigurationError(f"{bundle.folder} is not writable.", hint="Pass --no-write.")


def print_certificate(certificate: Certificate, title: str) -> None:
    """Print a certificate as a table with the lowest, first-percentile and mean cosine; then what failed and why."""
    images = ", ".join(f"{count} {kind}" for kind, count in certificate.images.items())
    rows = [
        (
            found.program,
            f"{found.backend}, {found.device}" + (" (simulated)" if found.simulated else ""),
            found.tokens,
            f"{found.lowest_cosine:.6f}",
            f"{found.first_percentile_cosine:.6f}",
            f"{found.mean_cosine:.6f}",
            f"{found.relative_error:.1e}",
            found.nonfinite_rows,
            "passed" if found.failure is None else "FAILED",
        )
        for found in certificate.programs
    ]
    columns = ("program", "ran on", "tokens", "lowest", "1st %", "mean", "error", "NaN", "verdict")
    styles = ["" if found.failure is None else "bold red" for found in certificate.programs]
    print_table(f"{title}; images: {images}", columns, rows, styles=styles)
    if not certificate.independent:
        results.print(
            "The reference is not independent: transformers has no such tower, so it was visionaccel's own in float32.",
            style="yellow", soft_wrap=True,
        )  # fmt: skip
    for found in certificate.programs:
        if found.failure is not None:
            results.print(f"FAILED {found.program}: {found.failure}", highlight=False, soft_wrap=True)
    results.print("Passed." if certificate.passed else "FAILED.", style="green" if certificate.passed else "bold red")


def push(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    repository: Repository,
    revision: Annotated[str | None, typer.Option(help="Branch, created if needed. Default: main.")] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Create a private repository; refuse an existing public one.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    as_json: Json = False,
) -> None:
    """Verify a bundle and push it to a repository, which is created if it does not exist."""
    report = push_bundle(bundle, repository, revision=revision, private=private, message=message)
    if as_json:
        print_json(asdict(report))
        return
    results.print(f"Pushed {len(report.files)} files to {report.repository}, {report.revision}.")
    results.print(f"  {report.url}", soft_wrap=True)


def pull(
    repository: Repository,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. Default: main.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="New folder for the files. Default: the hub's cache; do not change files there.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Folder or repository of the weights, if outside the bundle.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Download the bundle of a repository and verify it."""
    report = pull_bundle(repository, revision=revision, output=output, checkpoint=checkpoint)
    answer = {"repository": report.repository, "commit": report.commit, "folder": str(report.bundle.folder)}
    if as_json:
        print_json(answer)
        return
    results.print(f"Pulled {report.repository} at {report.commit} into")
    results.print(f"  {report.bundle.folder}", soft_wrap=True)
