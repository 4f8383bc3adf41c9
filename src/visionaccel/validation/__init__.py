"""Compares a bundle's programs with the float32 reference. It opens encoders, so it is a layer above them."""

from visionaccel.core.comparison import THRESHOLDS
from visionaccel.validation.certificate import (
    REFERENCE_BACKEND,
    REFERENCE_OPTIONS,
    Validation,
    open_reference,
    validate_bundle,
)
from visionaccel.validation.quantizing import quantize_bundle

__all__ = [
    "REFERENCE_BACKEND", "REFERENCE_OPTIONS", "THRESHOLDS", "Validation", "open_reference", "quantize_bundle",
    "validate_bundle",
]  # fmt: skip
