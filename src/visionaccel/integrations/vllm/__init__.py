"""The entry point of the group `vllm.general_plugins`, which every process of vLLM imports: so it imports very little.

`Architecture` is for distributions that add a model.
"""

import os

from visionaccel.integrations.vllm.architecture import Architecture

__all__ = ["BACKEND_VARIABLES", "Architecture", "register"]

BACKEND_VARIABLES = ("VISIONACCEL_BACKEND", "VLLM_VISION_NPU_BACKEND")
"""The variables that name a backend: the setting `backend` and its former name."""


def register() -> None:
    """Called by vLLM in each of its processes. Does nothing unless the environment names a backend.

    vLLM loads its plug-ins once, even if one of them raises. After an error here, it loads them again when it makes its
    next configuration, so that this raises again, or succeeds if the user has corrected the settings.

    Raises:
        ConfigurationError: If a backend is named that cannot be used; vLLM then refuses to start.
    """
    if any(os.environ.get(name, "").strip() for name in BACKEND_VARIABLES):
        try:
            from visionaccel.integrations.vllm.activation import activate

            activate()
        except BaseException:
            import vllm.plugins

            vllm.plugins.plugins_loaded = False
            raise
