"""What `visionaccel report` writes: one HTML page that needs nothing else, from what was found and measured.

Every text that comes from a file, a plug-in or the machine is escaped where it becomes HTML, in `markup`; nothing else
makes HTML of text.
"""

from visionaccel_bench.reporting.making import Inputs, make_report, read_inputs
from visionaccel_bench.reporting.page import Report, Section

__all__ = ["Inputs", "Report", "Section", "make_report", "read_inputs"]
