"""Fixtures shared by all tests."""

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray

from observers import Told
from visionaccel.backends import default_registry
from visionaccel_testing.checkpoints import QWEN2_5_VL_7B, random_checkpoint

CORES = len(os.sched_getaffinity(0))

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


@pytest.fixture(autouse=True)
def records_reach_the_test() -> None:
    """A test before may have activated vLLM's plug-in in this process, which takes the package's log for vLLM's."""
    logging.getLogger("visionaccel").propagate = True


@pytest.fixture(autouse=True)
def one_thread_of_torch(request: pytest.FixtureRequest) -> None:
    """Towers of milliseconds are many times slower on several threads, above all where other processes run."""
    torch = sys.modules.get("torch")
    if torch is not None and "tests/e2e/" not in request.node.nodeid:
        torch.set_num_threads(CORES if "seven" in request.fixturenames else 1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny random vision tower, float32."""
    return random_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of the 7B tower's widths, heads and windows with random bfloat16 weights, an eighth as deep.

    A block with windows follows one with windows and one without, and is followed by both.
    `visionaccel bench encode --preset` has the whole tower.
    """
    folder = tmp_path_factory.mktemp("7b")
    if shutil.disk_usage(folder).free < 3 * 2**30:
        pytest.fail("the 7B tower's blocks need 3 GiB of disk")
    shorter = {**QWEN2_5_VL_7B, "depth": 4, "fullatt_block_indexes": [2]}
    yield random_checkpoint(folder / "checkpoint", shorter, dtype="bfloat16")
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def seven_answer(seven: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Patches of grid 58x74, and what the reference makes of them with the 7B tower's blocks."""
    import torch

    from towers import random_patches
    from visionaccel import open_encoder
    from visionaccel.validation import REFERENCE_OPTIONS

    patches = random_patches([(1, 58, 74)], QWEN2_5_VL_7B)
    torch.set_num_threads(CORES)
    with open_encoder(seven, backend="torch_ref", options=REFERENCE_OPTIONS) as encoder:
        return patches, encoder.encode(patches, [(1, 58, 74)])


@pytest.fixture(scope="session")
def digits() -> Path:
    """The trained digits checkpoint."""
    from digits_vlm import checkpoint_path

    return checkpoint_path()


@pytest.fixture
def told() -> Iterator[Told]:
    """What observers are told while the test runs."""
    plugins, observer = default_registry().plugins, Told()
    plugins.register(observer)
    yield observer
    plugins.unregister(observer)


@pytest.fixture
def ran(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Record, once, that a backend computed forms of a family's tower: `docs/matrix.md` shows them."""

    def record(family: str, backend: str, *forms: str) -> None:
        for form in forms:
            found = (f"ran: {family}: {backend}: {form}", 1)
            if found not in request.node.user_properties:
                request.node.user_properties.append(found)

    return record
