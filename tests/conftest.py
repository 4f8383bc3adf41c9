"""Fixtures shared by all tests."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from visionaccel.testing.checkpoints import random_checkpoint

# Examples run real sessions on a shared machine, so no deadline; the same examples every time.
settings.register_profile(
    "visionaccel", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("visionaccel")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny random vision tower, float32."""
    return random_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def digits() -> Path:
    """The trained digits checkpoint."""
    from digits_vlm import checkpoint_path

    return checkpoint_path()
