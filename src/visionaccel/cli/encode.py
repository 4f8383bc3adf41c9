"""`visionaccel encode`: embeddings of image files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.table import Table

from visionaccel.backends import AUTO
from visionaccel.checkpoint import locate_checkpoint
from visionaccel.cli.output import Backend, Device, Json, OptionsText, print_json, results
from visionaccel.encoder import open_encoder
from visionaccel.errors import SettingsError
from visionaccel.families import tower_of
from visionaccel.images import image_processor, load_image
from visionaccel.settings import load_settings, parse_options

__all__ = ["encode"]


def encode(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    checkpoint: Annotated[str, typer.Option(help="Checkpoint folder or Hugging Face repository.")],
    backend: Backend = None,
    device: Device = None,
    options: OptionsText = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the embeddings to this .npz file, one array for each image.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Encode image files with a checkpoint's vision encoder."""
    settings = load_settings()
    try:
        chosen_options = parse_options(options) if options is not None else settings.options
    except ValueError as error:
        raise SettingsError(f"--options {options!r}: {error}.", hint="Write name=value,name=value.") from error
    found = locate_checkpoint(checkpoint)
    process = image_processor(found.folder)
    with open_encoder(
        tower_of(found),
        backend=backend or settings.backend or AUTO,
        device=device or settings.device,
        options=chosen_options,
    ) as encoder:
        rows: list[dict[str, Any]] = []
        arrays: dict[str, NDArray[np.float32]] = {}
        for number, path in enumerate(images):
            patches, grid = process(load_image(path))
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
        with output.open("wb") as file:  # savez would add a suffix to a name that has another
            np.savez(file, **arrays)  # type: ignore[arg-type]
    if as_json:
        print_json({**about, "images": rows, "output": output})
        return
    table = Table(
        "image", "grid", "tokens", "width", "mean norm", "encode ms", title=f"{about['backend']}, {about['device']}"
    )
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    results.print(table)
    if output is not None:
        results.print(f"Embeddings are in {output}.", markup=False)
