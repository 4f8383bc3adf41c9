"""vLLM's door to visionaccel: the entry point of the group `vllm.general_plugins`.

vLLM imports this module in each of its processes whether or not a backend is wanted, so it imports nothing by itself.
"""

import os

__all__ = ["BACKEND_VARIABLES", "register"]

BACKEND_VARIABLES = ("VISIONACCEL_BACKEND", "VLLM_VISION_NPU_BACKEND")
"""The variables that name a backend: the setting `backend` and its former name."""


def register() -> None:
    """Called by vLLM in each of its processes. Does nothing unless the environment names a backend.

    Raises:
        ConfigurationError: If a backend is named that cannot be used; vLLM then refuses to start.
    """
    if any(os.environ.get(name, "").strip() for name in BACKEND_VARIABLES):
        from visionaccel.integrations.vllm.activation import activate

        activate()
