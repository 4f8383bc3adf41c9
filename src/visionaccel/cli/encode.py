"""`visionaccel encode`: embeddings of image files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from visionaccel.backends import AUTO
from visionaccel.bundle import Bundle, open_bundle, require_processor
from visionaccel.checkpoint import locate_checkpoint
from visionaccel.cli.output import (
    Backend,
    Device,
    EncodingBundle,
    Json,
    OptionsText,
    backend_options,
    check_writable,
    print_json,
    print_table,
    results,
)
from visionaccel.core.cores import choose_cores
from visionaccel.encoder import open_encoder, open_source
from visionaccel.errors import ConfigurationError
from visionaccel.images import fitter_for, image_processor, load_image
from visionaccel.settings import load_settings


def encode(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or Hugging Face repository. Optional with a bundle that has a processor."),
    ] = None,
    bundle: EncodingBundle = None,
    backend: Backend = None,
    device: Device = None,
    options: OptionsText = None,
    output: Annotated[Path | None, typer.Option(help="Write the embeddings to this .npz file, by image.")] = None,
    as_json: Json = False,
) -> None:
    """Encode image files with the vision encoder of a checkpoint or bundle."""
    settings = load_settings()
    chosen_options = backend_options(options, settings.options)
    if checkpoint is None and bundle is None:
        raise ConfigurationError("no encoder was given.", hint="Pass --checkpoint or --bundle.")
    found = locate_checkpoint(checkpoint) if checkpoint is not None else None
    source = open_bundle(bundle, checkpoint=found) if bundle is not None else open_source(checkpoint or "")
    tower = source.tower
    folder = (found or tower.checkpoint).folder
    if isinstance(source, Bundle):
        require_processor(source.manifest.processor_digest, folder, source.folder)
    check_writable(output)
    process = image_processor(folder)
    with open_encoder(
        source,
        backend=backend or settings.backend or AUTO,
        device=device or settings.device,
        options=chosen_options,
        isolation=settings.isolation,
        deadline=settings.deadline,
        open_deadline=settings.open_deadline,
        cores=choose_cores(settings.cpu_cores).cores,
    ) as encoder:
        fitter = fitter_for(tower, encoder.coverages, settings.fit, process)
        rows: list[dict[str, Any]] = []
        arrays: dict[str, NDArray[np.float32]] = {}
        for number, path in enumerate(images):
            image = load_image(path)
            patches, grid = process(image if fitter is None else fitter.fit(image))
            started = time.perf_counter()
            embeddings = encoder.encode(patches, [grid])
            seconds = time.perf_counter() - started
            arrays[f"{number}_{path.stem}"] = embeddings
            norms = np.linalg.norm(embeddings, axis=1)
            rows.append(
                {
                    "image": str(path),
                    "grid": str(grid),
                    "tokens": len(embeddings),
                    "width": embeddings.shape[1],
                    "mean_norm": float(norms.mean()),
                    "encode_ms": round(1e3 * seconds, 3),
                }
            )
        about = {"backend": encoder.backend, "device": encoder.capabilities.device}
    if output is not None:
        with output.open("wb") as file:  # given a name, savez appends .npz to any other suffix
            np.savez(file, **arrays)  # type: ignore[arg-type]
    if as_json:
        print_json({**about, "images": rows, "output": output})
        return
    print_table(
        f"{about['backend']}, {about['device']}",
        ("image", "grid", "tokens", "width", "mean norm", "encode ms"),
        [[f"{v:.3f}" if isinstance(v, float) else v for v in row.values()] for row in rows],
    )
    if output is not None:
        results.print(f"Embeddings are in {output}.")
