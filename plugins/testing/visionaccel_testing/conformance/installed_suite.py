"""The suite that `pytest --visionaccel-backend=NAME` collects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from visionaccel.settings import parse_options
from visionaccel_testing.conformance.declaration import BackendUnderTest
from visionaccel_testing.conformance.suite import conformance_suite

if TYPE_CHECKING:
    import pytest


def _named(config: pytest.Config) -> BackendUnderTest:
    return BackendUnderTest(
        config.getoption("--visionaccel-backend"),
        device=config.getoption("--visionaccel-device"),
        options=parse_options(config.getoption("--visionaccel-options") or ""),
    )


TestConformance = conformance_suite(_named)
