"""Extras that name the other distributions: those beside this file in a checkout, published ones otherwise."""

import os
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

PLUGINS = {
    name: f"visionaccel-{name.replace('_', '-')}"
    for name in ("bench", "flexmlrt", "onnxrt", "openvino", "testing", "torch_ref")
}


class PluginExtras(MetadataHookInterface):
    """`pip install '.[onnxrt]'` takes the plug-in of the same checkout; `make dist` sets PLAIN_EXTRAS."""

    def update(self, metadata: dict) -> None:
        version = metadata["version"]
        plugins = {extra: self._beside(f"plugins/{extra}", name, version) for extra, name in PLUGINS.items()}
        digits = self._beside("examples/digits_vlm", "visionaccel-digits-vlm", version)
        testing = [plugins["testing"], plugins["torch_ref"], digits]
        metadata["optional-dependencies"] = {
            "cli": ["rich>=13.7", "typer>=0.19"],
            "images": ["pillow>=10", "scikit-image>=0.24", "torch>=2.5", "transformers>=5.18"],
            "onnx": ["onnx>=1.19"],
            "transformers": ["pillow>=10", "torch>=2.5", "transformers>=5.18"],
            **{extra: [requirement] for extra, requirement in plugins.items()},
            # In a checkout, those of this repository that it requires are taken from there too.
            "bench": [plugins["bench"], *testing],
            "testing": testing,
        }

    def _beside(self, place: str, name: str, version: str) -> str:
        folder = Path(self.root, place)
        if folder.is_dir() and not os.environ.get("PLAIN_EXTRAS"):
            return f"{name} @ {folder.as_uri()}"
        return f"{name}~={version}"
