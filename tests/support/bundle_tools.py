"""What the tests of bundles share: what they export, and how they forge manifests that the package would not write."""

import hashlib
import json

import numpy as np

from bundles import document
from towers import random_patches
from visionaccel import open_encoder
from visionaccel.bundle import MANIFEST, ProgramRequest
from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid, FixedGrid

GRID, LARGEST = Grid(1, 10, 18), Grid(1, 20, 22)
FIXED, DYNAMIC = ProgramRequest(FixedGrid(GRID)), ProgramRequest(AnyGrid())
TRIPLE = [(1, 10, 18)]
CERTIFICATE = {
    "created": "2025-01-01T00:00:00Z",
    "reference": "sha256:" + "0" * 64,
    "images": {"generated": 2},
    "programs": [
        {
            "program": "10x18", "backend": "onnxrt", "device": "cpu", "simulated": False, "grids": ["1x10x18"],
            "images": 2, "tokens": 90, "lowest_cosine": 1, "first_percentile_cosine": 1, "mean_cosine": 1,
            "relative_error": 0, "nonfinite_rows": 0, "threshold": 0.99,
        }
    ],
    "toolchain": {"onnxruntime": "1"},
    "passed": True,
}  # fmt: skip


def state(folder, stated):
    """Write a manifest with a right seal, whatever else it says."""
    body = {name: value for name, value in stated.items() if name != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    (folder / MANIFEST).write_text(json.dumps({**body, "digest": sha256(text.encode())}))


def forge(folder, change=lambda stated: None):
    """Make the manifest say anything at all: sizes and digests of the files, and the seal, are right afterwards."""
    stated = document(folder)
    change(stated)
    for file in (*stated["files"], *(file for program in stated["programs"] for file in program["files"])):
        if (folder / file["path"]).is_file():
            data = (folder / file["path"]).read_bytes()
            file |= {"bytes": len(data), "sha256": sha256(data)}
    state(folder, stated)


def sha256(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def encode(source, triples=TRIPLE, patches=None, backend="onnxrt"):
    patches = random_patches(triples) if patches is None else patches
    with open_encoder(source, backend=backend) as encoder:
        return encoder.encode(patches, triples)


def assert_close(ours, exact, tolerance=2e-5):
    np.testing.assert_allclose(ours, exact, rtol=0, atol=tolerance)


def cosines(ours, exact):
    return (ours * exact).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(exact, axis=1)
