"""Extras that name the plug-in distributions: those beside this file in a checkout, plain names when publishing."""

import os
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

PLUGINS = {name: f"visionaccel-{name.replace('_', '-')}" for name in ("flexmlrt", "onnxrt", "openvino", "torch_ref")}


class PluginExtras(MetadataHookInterface):
    """`pip install '.[onnxrt]'` takes the plug-in of the same checkout; `make dist` sets PLAIN_EXTRAS."""

    def update(self, metadata: dict) -> None:
        extras = {
            "bench": ["matplotlib>=3.9", "openai>=1.60", "pillow>=10"],
            "testing": [
                "hypothesis>=6.100",
                "packaging>=23",
                "pytest>=8.3",
                "transformers>=5.16",
                "visionaccel-torch-ref",
            ],
            "images": ["pillow>=10", "scikit-image>=0.24", "torch>=2.5", "transformers>=5.16"],
        }
        for extra, distribution in PLUGINS.items():
            folder = Path(self.root, "plugins", extra)
            by_path = folder.is_dir() and not os.environ.get("PLAIN_EXTRAS")
            extras[extra] = [f"{distribution} @ {folder.as_uri()}" if by_path else distribution]
        metadata["optional-dependencies"] = extras
