"""Quantization of a bundle's programs, by a backend, proved before it is kept."""

from visionaccel.quantization.quantizing import quantize_bundle

__all__ = ["quantize_bundle"]
