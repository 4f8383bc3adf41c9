"""Open sessions on the simulator, and what switches its faults."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from simulated import GRID, simulated_program
from visionaccel.encoder import open_tower
from visionaccel_flexmlrt import FlexMLRTBackend
from visionaccel_flexmlrt.backend import FlexMLRTOptions


@pytest.fixture(scope="module")
def tower(tiny):
    return open_tower(tiny)


@pytest.fixture(scope="module", params=["rai", "directory"])
def program(request, tower, tmp_path_factory):
    """A simulated program of `GRID`, in both layouts."""
    return simulated_program(tower, tmp_path_factory.mktemp(request.param), GRID, layout=request.param)


@pytest.fixture
def script(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Tells the simulator what to do wrong from now on; "" for nothing."""
    file = tmp_path / "script"
    file.write_text("")
    monkeypatch.setenv("FLEXMLRT_SIMULATOR_SCRIPT", str(file))

    def write(text: str) -> Path:
        file.write_text(text)
        return file

    return write


@pytest.fixture
def inputs(program):
    (spec,) = program.inputs
    rng = np.random.default_rng(0)
    return {spec.name: rng.standard_normal(spec.shape, dtype=np.float32)}


@pytest.fixture
def session(program, script):
    """An open session in this process."""
    with closing(FlexMLRTBackend().open(program, "simulator", FlexMLRTOptions())) as opened:
        yield opened
