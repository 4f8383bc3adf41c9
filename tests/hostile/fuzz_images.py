"""Fuzzes the reading of image files."""

import atheris

with atheris.instrument_imports(include=["visionaccel", "visionaccel_onnxrt", "visionaccel_flexmlrt"]):
    from hostile import image_kinds
    from hostile.seeds import IMAGE_FORMATS, IMAGES, image_bytes

from hostile.fuzzing import fuzz

if __name__ == "__main__":
    fuzz(
        IMAGES,
        image_kinds.FILE,
        image_kinds.read_image,
        lambda _: [{image_kinds.FILE: image_bytes(kind)} for kind in IMAGE_FORMATS],
    )
