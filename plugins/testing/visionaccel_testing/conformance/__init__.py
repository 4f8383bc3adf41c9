"""Conformance kit: does a backend keep the contract? For the authors of backends, and for those who choose one.

`pytest --visionaccel-backend=NAME` runs every check on an installed backend. A test file of two lines does the same and
can say more about the backend, such as how exact it is meant to be:

    from visionaccel_testing.conformance import BackendUnderTest, conformance_suite

    TestConformance = conformance_suite(BackendUnderTest("mine", options={"threads": 1}))

Needs `pip install 'visionaccel[testing]'`.
"""

from visionaccel_testing.conformance.check import CheckFailedError, NotApplicableError
from visionaccel_testing.conformance.declaration import BackendUnderTest, KnownFailure, Tolerance
from visionaccel_testing.conformance.suite import CHECKS, Outcome, conformance_suite, run_checks

__all__ = [
    "CHECKS",
    "BackendUnderTest",
    "CheckFailedError",
    "KnownFailure",
    "NotApplicableError",
    "Outcome",
    "Tolerance",
    "conformance_suite",
    "run_checks",
]
