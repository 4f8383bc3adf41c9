"""Extras that name the plug-in distributions: beside this file in a checkout, by plain name anywhere else."""

from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

PLUGINS = {"onnxrt": "visionaccel-onnxrt", "torch_ref": "visionaccel-torch-ref"}


class PluginExtras(MetadataHookInterface):
    """`pip install '.[onnxrt]'` takes the plug-in beside it; a wheel made from the sdist names it plainly."""

    def update(self, metadata: dict) -> None:
        extras = {}
        for extra, distribution in PLUGINS.items():
            folder = Path(self.root, "plugins", extra)
            extras[extra] = [f"{distribution} @ {folder.as_uri()}" if folder.is_dir() else distribution]
        metadata["optional-dependencies"] = extras
