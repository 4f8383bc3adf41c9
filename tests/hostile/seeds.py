"""Real files that hostile input is made from, and what tiny checkpoint, bundle and artifacts they belong to."""

from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
from PIL import Image

from bundles import write_bundle
from visionaccel.bundle import Golden, open_bundle, write_golden
from visionaccel.core.grid import Grid
from visionaccel.encoder import open_tower
from visionaccel_flexmlrt.simulator import compile_partition
from visionaccel_flexmlrt.vitisai.writing import write_vitisai_folder
from visionaccel_testing.checkpoints import random_checkpoint

CHECKPOINT, BUNDLE, RAI, PARTITION, CONTEXT, IMAGES = "checkpoint", "bundle", "rai", "partition", "context", "images"
"""Folders of the seeds."""

GRID = Grid(1, 8, 12)
PROVIDER = "VitisAIExecutionProvider"
IMAGE_FORMATS = ("bmp", "gif", "jpeg", "png", "tiff", "webp")
OTHER_FORMATS = ("ppm", "ico", "tga", "pcx", "jpeg2000", "eps", "dds")


def make_seeds(folder: Path) -> None:
    """Write the seeds into a folder, which is only read from then on."""
    checkpoint = random_checkpoint(folder / CHECKPOINT)
    (checkpoint / "preprocessor_config.json").write_text('{"patch_size": 4, "merge_size": 2, "do_resize": true}')
    tower = open_tower(checkpoint)
    write_bundle(
        checkpoint, folder / BUNDLE, "10x18", bucket="12x10", dynamic=True, split_host=True, self_contained=True
    )
    _write_golden(folder / BUNDLE)
    write_vitisai_folder(tower, folder / RAI, GRID, layout="rai", compile=compile_partition, metadata=True)
    write_vitisai_folder(tower, folder / PARTITION, GRID, layout="directory", compile=compile_partition)
    _write_context(folder / CONTEXT)
    (folder / IMAGES).mkdir()


def _write_golden(folder: Path) -> None:
    bundle = open_bundle(folder)
    grid = Grid(1, 10, 18)
    patches = np.ones((grid.patches, bundle.tower.patch_width), np.float32)
    embeddings = np.ones((grid.tokens(bundle.tower.merge_size), bundle.tower.out_width), np.float32)
    write_golden(bundle, [Golden("ones", "10x18", (grid,), patches, embeddings, 0.99)], {})


def _write_context(folder: Path) -> None:
    """A model as the VitisAI provider writes it, with its compiled part in a file."""
    folder.mkdir()
    float32 = onnx.TensorProto.FLOAT
    node = onnx.helper.make_node(
        "EPContext", ["x"], ["y"], name="device", domain="com.microsoft", source=PROVIDER, embed_mode=0,
        main_context=1, ep_cache_context="context.bin",
    )  # fmt: skip
    graph = onnx.helper.make_graph(
        [node], "main_graph",
        [onnx.helper.make_tensor_value_info("x", float32, [4, 4])],
        [onnx.helper.make_tensor_value_info("y", float32, [4, 4])],
    )  # fmt: skip
    (folder / "vision.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    (folder / "context.bin").write_bytes(bytes(range(256)))


def picture(width: int = 40, height: int = 24, mode: str = "RGB") -> Image.Image:
    """A picture with every level in it."""
    rows = np.arange(height)[:, None] * 5 + np.arange(width)[None] * 3
    pixels = np.stack([rows, rows * 2, rows * 3, rows * 5], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def image_bytes(kind: str, **settings: object) -> bytes:
    """A file of one of the formats, with metadata where the format has it, which is parsed as well."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    metadata: dict[str, dict[str, object]] = {
        "jpeg": {"exif": exif, "icc_profile": b"profile" * 9},
        "png": {"exif": exif, "icc_profile": b"profile" * 9},
        "webp": {"exif": exif},
    }
    buffer = BytesIO()
    picture().save(buffer, kind, **{**metadata.get(kind, {}), **settings})
    return buffer.getvalue()
