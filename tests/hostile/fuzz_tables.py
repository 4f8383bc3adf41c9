"""Fuzzes the reading of the compiler's table of the device's tensors."""

import atheris

with atheris.instrument_imports(include=["visionaccel", "visionaccel_onnxrt", "visionaccel_flexmlrt"]):
    from hostile import model_kinds
    from hostile.seeds import RAI

from hostile.fuzzing import fuzz

if __name__ == "__main__":
    fuzz(RAI, "flexmlrt-hsi.json", model_kinds.read_artifact, lambda _: [])
