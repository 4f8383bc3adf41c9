"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from visionaccel.testing.checkpoints import random_checkpoint

# Examples run real sessions on a shared machine, so no deadline; the same examples every time.
settings.register_profile(
    "visionaccel", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("visionaccel")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of AMD's hardware run where its user says that it is there; then they fail where it is not."""
    if os.environ.get("VISIONACCEL_RYZEN_AI") == "1":
        return
    skip = pytest.mark.skip(reason="needs a Ryzen AI machine; set VISIONACCEL_RYZEN_AI=1 there")
    for item in items:
        if item.get_closest_marker("ryzen_ai") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny random vision tower, float32."""
    return random_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def digits() -> Path:
    """The trained digits checkpoint."""
    from digits_vlm import checkpoint_path

    return checkpoint_path()
