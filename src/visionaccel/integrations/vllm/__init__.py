"""vLLM's door to visionaccel: the entry point of the group `vllm.general_plugins`."""

from visionaccel.settings import backend_is_named

__all__ = ["register"]


def register() -> None:
    """Called by vLLM in each of its processes. Does nothing unless the environment names a backend.

    Raises:
        ConfigurationError: If a backend is named that cannot be used; vLLM then refuses to start.
    """
    if backend_is_named():
        from visionaccel.integrations.vllm.activation import activate

        activate()
