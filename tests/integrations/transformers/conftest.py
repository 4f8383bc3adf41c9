"""Tiny models of every architecture, and one of them that most tests ask."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from visionaccel.backends import default_registry

ARCHITECTURE = "Qwen3VLForConditionalGeneration"
"""Of the model that most tests ask: its tower has deepstack levels."""


@pytest.fixture(autouse=True)
def no_observer_stays() -> Iterator[None]:
    """Stop the metrics and logs that a test started."""
    plugins = default_registry().plugins
    before = plugins.get_plugins()
    yield
    for observer in plugins.get_plugins() - before:
        plugins.unregister(observer)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write the tiny checkpoint of an architecture, once, and return its folder."""
    from whole_models import MODELS, write_model

    folder = tmp_path_factory.mktemp("whole")

    def write(architecture: str) -> Path:
        if not (folder / architecture).exists():
            write_model(MODELS[architecture], folder / architecture)
            if architecture.startswith("Qwen2_5Omni"):
                import torch

                torch.save({}, folder / architecture / "spk_dict.pt")  # voices, without which transformers loads none
        return folder / architecture

    return write


@pytest.fixture(scope="session")
def checkpoint(written: Callable[[str], Path]) -> Path:
    """The checkpoint that most tests ask."""
    return written(ARCHITECTURE)


@pytest.fixture
def model(checkpoint: Path) -> Any:
    """Its model, with its own tower."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def processor(checkpoint: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def inputs(processor: Any) -> Any:
    """A prompt with two images, of grids 6x8 and 10x4."""
    from questions import asked, picture
    from whole_models import MODELS

    described = MODELS[ARCHITECTURE]
    pictures = [picture(4, 3, 32, 0), picture(2, 5, 32, 0)]
    return asked(described, processor, [described.image * 2], images=pictures)
