"""What `visionaccel doctor` looks at: the machine, what is installed, the settings, each backend, a bundle, and vLLM.

Each look is isolated: one that raises is itself a finding. What imports a vendor's code runs in a child process with a
time limit, so that a crash, an exit or a hang there is a finding too.
"""

from visionaccel.cli.diagnosis.diagnosing import LIMIT, VLLM, diagnose
from visionaccel.cli.diagnosis.findings import Diagnosis, Found

__all__ = ["LIMIT", "VLLM", "Diagnosis", "Found", "diagnose"]
