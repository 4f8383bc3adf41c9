"""The checks of `visionaccel doctor`: the machine, what is installed, the settings, each backend, a bundle, and vLLM.

A check that raises is itself a finding. Checks that import vendor code run in a child process with a time limit, so a
crash, an exit or a hang is a finding too.
"""

from visionaccel.cli.diagnosis.checks import Diagnosis, Found
from visionaccel.cli.diagnosis.doctor import diagnose, doctor

__all__ = ["Diagnosis", "Found", "diagnose", "doctor"]
