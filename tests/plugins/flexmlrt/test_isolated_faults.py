"""What ends or hangs the device's process costs the call in flight; the encoder goes on with a new process."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from simulated import GRID, simulated_program
from towers import random_patches, reference
from visionaccel.backends import default_registry
from visionaccel.encoder import Encoder, OpenProgram, open_tower
from visionaccel.errors import DeviceError, DeviceLostError, OutputError
from visionaccel.isolation import IsolatedSession, Limits

TRIPLE = [(1, GRID.h, GRID.w)]
LIMITS = Limits(run=3.0, opening=20.0)


@pytest.fixture(scope="module")
def program(tiny, tmp_path_factory):
    return simulated_program(open_tower(tiny), tmp_path_factory.mktemp("rai"), GRID)


@pytest.fixture
def encoder(program, tiny, script):
    """An encoder on the simulator in a child process, with a short deadline."""
    tower = open_tower(tiny)
    session = IsolatedSession("flexmlrt", program, "simulator", {}, limits=LIMITS)
    opened = OpenProgram(program, tower.host(program), session)
    with Encoder(tower, "flexmlrt", [opened], default_registry()) as running:
        yield running


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        ("throw", DeviceError, "DRM_IOCTL_AMDXDNA_EXEC_CMD failed"),
        ("status", DeviceError, "status 5"),
        ("nan", OutputError, "NaN or infinity in 24 of 24 rows"),
        ("zeros", OutputError, "zeros in 24 of 24 rows"),
        ("unwritten", OutputError, "left 24 of 24 rows"),
        ("partial", OutputError, "left 1 of 24 rows"),
        ("abort", DeviceLostError, "ended by SIGABRT"),
        ("segv", DeviceLostError, "ended by SIGSEGV"),
        ("hang", DeviceLostError, "within 3 s"),
    ],
)
def test_a_fault_is_an_error_that_names_it_and_the_encoder_goes_on(encoder, tiny, script, fault, error, text):
    patches = random_patches(TRIPLE)
    before = encoder.programs[0].session.pid
    script(f"forward {fault}\nprint vendor")
    with pytest.raises(error, match=text):
        encoder.encode(patches, TRIPLE)
    script("")
    np.testing.assert_allclose(encoder.encode(patches, TRIPLE), reference(tiny, patches, TRIPLE), atol=2e-5)
    assert (encoder.programs[0].session.pid == before) == (error is not DeviceLostError)


def test_latency_within_the_deadline_is_no_fault(encoder, script):
    script("latency_ms 500")
    assert len(encoder.encode(random_patches(TRIPLE), TRIPLE)) == 24


def children():
    """Processes that any thread of this one started and that are not reaped."""
    return {child for task in Path("/proc/self/task").glob("*/children") for child in task.read_text().split()}


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        ("throw", DeviceError, "the device refused the model"),
        ("bad", DeviceError, r"not good\(\)"),
        ("abort", DeviceLostError, "SIGABRT"),
        ("hang", DeviceLostError, "did not open the program within 2 s"),
    ],
)
def test_a_device_that_cannot_be_opened_is_an_error_and_nothing_is_left(program, script, fault, error, text):
    script(f"constructor {fault}")
    limits = replace(LIMITS, opening=2.0)
    before = children()  # other tests' libraries may keep some, such as multiprocessing's tracker of resources
    with pytest.raises(error, match=text):
        IsolatedSession("flexmlrt", program, "simulator", {}, limits=limits)
    assert children() <= before
    script("")
    with closing(IsolatedSession("flexmlrt", program, "simulator", {}, limits=LIMITS)) as session:
        assert session.capabilities.simulated


def test_each_process_has_a_model_of_its_own_and_spoils_no_other(encoder, program, tiny, script):
    script("second nan")
    patches = random_patches(TRIPLE)
    with closing(IsolatedSession("flexmlrt", program, "simulator", {}, limits=LIMITS)):
        np.testing.assert_allclose(encoder.encode(patches, TRIPLE), reference(tiny, patches, TRIPLE), atol=2e-5)
