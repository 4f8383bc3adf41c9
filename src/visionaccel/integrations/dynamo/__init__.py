"""NVIDIA Dynamo: a custom encoder for its vLLM worker, which is given the path of `VisionAccelEncoder`."""

from visionaccel.errors import ConfigurationError

try:
    from visionaccel.integrations.dynamo.encoder import VisionAccelEncoder
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] == "visionaccel":
        raise
    raise ConfigurationError(
        f"{__name__} needs Dynamo's vLLM worker, but {error.name} is not installed.",
        hint="Install Dynamo: pip install 'ai-dynamo[vllm]'.",
    ) from error

__all__ = ["VisionAccelEncoder"]
