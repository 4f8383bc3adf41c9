"""Fuzzes the reading of safetensors headers."""

import atheris

with atheris.instrument_imports(include=["visionaccel", "visionaccel_onnxrt", "visionaccel_flexmlrt"]):
    from hostile import bundle_kinds
    from hostile.seeds import CHECKPOINT

from hostile.fuzzing import fuzz

if __name__ == "__main__":
    fuzz(CHECKPOINT, bundle_kinds.WEIGHTS, bundle_kinds.read_weights, bundle_kinds.crafted_headers)
