"""Fuzzes the reading of a compiled artifact's ONNX model."""

import atheris

with atheris.instrument_imports(include=["visionaccel", "visionaccel_onnxrt", "visionaccel_flexmlrt"]):
    from hostile import model_kinds
    from hostile.seeds import RAI

from hostile.fuzzing import fuzz

if __name__ == "__main__":
    fuzz(RAI, model_kinds.MODEL, model_kinds.read_artifact, lambda _: [])
