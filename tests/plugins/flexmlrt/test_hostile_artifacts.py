"""Artifacts that are not what they seem are refused by an error of this package."""

import os

import pytest

from simulated import GRID, simulated_program
from visionaccel.errors import ArtifactError, ConfigurationError, DeviceError
from visionaccel_flexmlrt import FlexMLRTBackend
from visionaccel_flexmlrt.backend import FlexMLRTOptions


def opened(program):
    return FlexMLRTBackend().open(program, "simulator", FlexMLRTOptions())


def test_an_error_that_quotes_bytes_of_the_artifact_is_a_device_error(tower, tmp_path):
    """The library's text then is no UTF-8."""
    program = simulated_program(tower, tmp_path, GRID)
    data = program.artifact.read_bytes()
    program.artifact.write_bytes(data.replace(b'element_type="f32"', b'element_type="f\x98"', 1))
    with pytest.raises(DeviceError, match="cannot open program 'simulated'"):
        opened(program)


def test_a_named_pipe_is_refused_at_once(tower, tmp_path):
    program = simulated_program(tower, tmp_path, GRID)
    program.artifact.unlink()
    os.mkfifo(program.artifact)
    with pytest.raises(ArtifactError, match="not a file"):
        opened(program)


def test_the_folder_of_another_device_is_not_opened(tower, tmp_path):
    program = simulated_program(tower, tmp_path, GRID, layout="directory")
    binary = program.artifact.with_name("simulator.rai")
    binary.unlink()
    os.mkfifo(binary)
    with pytest.raises(ConfigurationError, match="made for device 'npu'"):
        opened(program)
