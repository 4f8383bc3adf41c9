"""What `visionaccel report` writes: one self-contained HTML page of what was found and measured."""

from visionaccel_bench.reporting.page import Report, Section
from visionaccel_bench.reporting.sections import Inputs, make_report, read_inputs

__all__ = ["Inputs", "Report", "Section", "make_report", "read_inputs"]
