"""Names of vLLM's image processing, from their homes."""

from __future__ import annotations

from importlib import import_module

from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from visionaccel.errors import InputError

__all__ = ["MULTIMODAL_REGISTRY", "REFUSAL", "ImageSize"]

REFUSAL: type = getattr(import_module("vllm.exceptions"), "VLLMValidationError", InputError)
"""The error that vLLM answers with status 400; not in every release."""
