"""The files that vLLM loads a model from, according to its own loader, which downloads missing ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionaccel.errors import CheckpointError, ConfigurationError

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, VllmConfig

_REMEMBERED = "_visionaccel_load_config"
_OTHER_LOADER = (
    "Use --load-format auto, hf, safetensors, fastsafetensors or instanttensor with safetensors files, or unset "
    "VISIONACCEL_BACKEND. This also applies with VISIONACCEL_BUNDLE, because the bundle is compared with the files."
)


def remember_load_config(config: VllmConfig) -> None:
    """Store how a model is loaded in its configuration, as processors only get that."""
    config.model_config.__dict__[_REMEMBERED] = config.load_config


def load_config_of(model: ModelConfig) -> LoadConfig | None:
    """Return what `remember_load_config` stored."""
    return model.__dict__.get(_REMEMBERED)


def weight_files(source: str, revision: str | None, load: LoadConfig | None) -> tuple[Path, ...]:
    """Return the safetensors files that vLLM loads a model's weights from, downloaded if necessary.

    For `--load-format dummy`, which reads no weights, these are the default loader's. Other loaders and formats are
    refused.
    """
    loader = require_default_loader(load)
    try:
        found = loader._prepare_weights(source, None, revision, True, None)
    except Exception as error:  # vLLM's own, the hub client's and its HTTP library's
        raise CheckpointError(
            f"vLLM found no weights for {source!r}: {error}",
            hint="Check the name, the revision, the network and --load-format.",
        ) from error
    files, are_safetensors = found[1], found[2]
    if not are_safetensors:
        raise CheckpointError(
            f"vLLM loads the weights of {source!r} from {files[0]}, which is not a safetensors file.",
            hint="Serve a checkpoint in safetensors files, with --load-format auto.",
        )
    return tuple(sorted(map(Path, files)))


def require_default_loader(load: LoadConfig | None) -> Any:
    """VLLM's default loader. Another one that reads weights is refused, because it may read other files."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load = load or LoadConfig()
    if load.load_format == "dummy":
        return DefaultModelLoader(LoadConfig(download_dir=load.download_dir))
    try:
        loader = get_model_loader(load)
    except Exception as error:  # each loader checks its options in its own way
        raise ConfigurationError(
            f"vLLM cannot create the loader for --load-format {load.load_format}: {type(error).__name__}: {error}",
            hint=_OTHER_LOADER,
        ) from error
    if type(loader) is not DefaultModelLoader:
        raise ConfigurationError(
            f"with --load-format {load.load_format}, vLLM loads the weights with its {type(loader).__name__}, which "
            "may read different files, so the vision encoder could belong to a different model.",
            hint=_OTHER_LOADER,
        )
    return loader


def settings_folder(source: str, revision: str | None) -> Path:
    """Return the folder with the configurations of a model and its image processor, downloaded if necessary.

    For a repository, the weights may be in another folder.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from vllm.model_executor.model_loader.weight_utils import maybe_download_from_modelscope

    try:
        folder = maybe_download_from_modelscope(source, revision)
        if folder is None:
            folder = snapshot_download(source, revision=revision, allow_patterns="*.json", ignore_patterns="*/*")
    except Exception as error:  # the hub clients' and their HTTP library's
        raise CheckpointError(
            f"the configuration of {source!r} cannot be downloaded: {error}",
            hint="Check the name, the revision and the network.",
        ) from error
    return Path(folder)
