"""Makes artifacts for the simulator: ONNX partitions in a file that replaces the compiled one."""

from __future__ import annotations

import shutil
import struct
import tempfile
from pathlib import Path
from typing import Literal

from visionaccel_flexmlrt.artifact import SIMULATOR_MAGIC

_HEADER = struct.Struct("<8sIIQQQQ")
_ALIGNMENT = 4096
_PRECISIONS = {"float32": 0, "bfloat16": 1}


def compile_partition(partition: Path, target: Path, precision: Literal["float32", "bfloat16"] = "float32") -> None:
    """Write the simulated artifact of a partition.

    The file contains the partition as an OpenVINO model with its weights, uncompressed and aligned, so that the
    simulator computes from a mapped file. Its layout is described in the simulator's `container.h`.

    Args:
        partition: An ONNX model of fixed shapes, with external data in the same folder.
        target: The file to write; replaced if it exists.
        precision: The simulator's arithmetic: bfloat16 like the device, or float32 for exact comparisons.
    """
    import openvino

    model = openvino.Core().read_model(str(partition))
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        xml, weights = Path(folder, "model.xml"), Path(folder, "model.bin")
        openvino.save_model(model, str(xml), compress_to_fp16=False)
        del model  # it keeps the partition's files open
        text = xml.read_bytes()
        xml_offset = _HEADER.size
        weights_offset = -(-(xml_offset + len(text)) // _ALIGNMENT) * _ALIGNMENT
        with target.open("wb") as file:
            file.write(
                _HEADER.pack(
                    SIMULATOR_MAGIC,
                    1,
                    _PRECISIONS[precision],
                    xml_offset,
                    len(text),
                    weights_offset,
                    weights.stat().st_size,
                )
            )
            file.write(text)
            file.write(bytes(weights_offset - file.tell()))
            with weights.open("rb") as data:
                shutil.copyfileobj(data, file, 1 << 20)
