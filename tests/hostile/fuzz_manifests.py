"""Fuzzes the reading of bundles' manifests, with the right seal where they are documents at all."""

import atheris

with atheris.instrument_imports(include=["visionaccel", "visionaccel_onnxrt", "visionaccel_flexmlrt"]):
    from hostile import bundle_kinds
    from hostile.seeds import BUNDLE
    from visionaccel.bundle import MANIFEST

from hostile.fuzzing import fuzz

if __name__ == "__main__":
    fuzz(BUNDLE, MANIFEST, bundle_kinds.read_bundle, lambda _: [], prepare=bundle_kinds.resealed)
