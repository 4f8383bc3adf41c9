"""Fuzzes the verification of models that an execution provider compiled."""

import atheris

with atheris.instrument_imports(include=["visionaccel", "visionaccel_onnxrt", "visionaccel_flexmlrt"]):
    from hostile import model_kinds
    from hostile.seeds import CONTEXT

from hostile.fuzzing import fuzz

if __name__ == "__main__":
    fuzz(CONTEXT, model_kinds.MODEL, model_kinds.read_context, lambda _: [])
