"""Whether OpenVINO computes int8 products correctly on this machine's CPU."""

from functools import cache

import numpy as np
import openvino
from openvino import opset13 as operators

_CHANNELS = 64


@cache
def integer_products_saturate() -> bool:
    """Return whether OpenVINO's int8 kernels give wrong sums on the CPU, by computing a product, within a second.

    Without VNNI, x86 adds pairs of 8-bit products in 16 bits and cuts off larger sums. OpenVINO 2026.4 silently uses
    such kernels: the product below is then 0.5 instead of 64.
    """
    rows = operators.parameter([-1, _CHANNELS], openvino.Type.f32)
    limits = [np.float32(value) for value in (-128 / 127, 1, -128 / 127, 1)]
    weight = operators.constant(np.full((_CHANNELS, _CHANNELS), 127, np.int8))
    scale = operators.constant(np.full((_CHANNELS, 1), 1 / 127, np.float32))
    widened = operators.multiply(operators.convert(weight, "f32"), scale)
    product = operators.matmul(operators.fake_quantize(rows, *limits, 256), widened, False, True)
    properties = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": 1,
        "ENABLE_CPU_PINNING": "NO",  # do not pin threads for this
    }
    compiled = openvino.Core().compile_model(openvino.Model([product], [rows]), "CPU", properties)
    (sums,) = compiled(np.ones((_CHANNELS, _CHANNELS), np.float32)).values()
    return bool(np.abs(sums - _CHANNELS).max() > 1)
