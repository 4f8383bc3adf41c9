"""What `visionaccel doctor` looks at: the machine, what is installed, the settings, each backend, a bundle, and vLLM.

A look that raises is itself a finding. What imports a vendor's code runs in a child process with a time limit, so that
a crash, an exit or a hang there is a finding too.
"""

from visionaccel.cli.diagnosis.doctor import diagnose, doctor
from visionaccel.cli.diagnosis.findings import Diagnosis, Found

__all__ = ["Diagnosis", "Found", "diagnose", "doctor"]
