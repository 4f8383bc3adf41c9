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
from visionaccel.errors import CheckpointError, ConfigurationError, InputError, SettingsError
from visionaccel.families import tower_of
from visionaccel.grid import Grid, as_grids
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
    process = _image_processor(found.folder)
    with open_encoder(
        tower_of(found),
        backend=backend or settings.backend or AUTO,
        device=device or settings.device,
        options=chosen_options,
    ) as encoder:
        rows: list[dict[str, Any]] = []
        arrays: dict[str, NDArray[np.float32]] = {}
        for number, path in enumerate(images):
            patches, grid = process(path)
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


def _image_processor(folder: Path) -> Any:
    """A function from an image file to float32 patches [P, width] and their grid, by the checkpoint's own processor."""
    try:
        from PIL import Image, UnidentifiedImageError
        from transformers import AutoImageProcessor
    except ImportError as error:
        raise ConfigurationError(
            f"image files need transformers and Pillow, and {error.name} is missing.",
            hint="pip install 'visionaccel[images]'.",
        ) from error
    try:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"the image processor of {folder} cannot be loaded: {error}",
            hint="The folder needs preprocessor_config.json or processor_config.json.",
        ) from error

    def process(path: Path) -> tuple[NDArray[np.float32], Grid]:
        try:
            with Image.open(path) as image:
                inputs = processor(images=[image.convert("RGB")], return_tensors="np")
        except (OSError, UnidentifiedImageError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read as an image: {error}", hint="Pass a complete image file."
            ) from error
        return np.asarray(inputs["pixel_values"], dtype=np.float32), as_grids(inputs["image_grid_thw"])[0]

    return process
