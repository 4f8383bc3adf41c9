"""What a backend plug-in implements, and how the core finds and chooses one.

Plug-ins import from here and from the core values (`visionaccel.errors`, and `arrays`, `contracts`, `cores`, `cpu`,
`grid`, `program` of `visionaccel.core`) only; those that read untrusted files, from `visionaccel.core.bounded_files`
too, those that quantize ONNX programs, from `visionaccel.backends.onnx_products`, those that run them, from
`visionaccel.backends.onnx_weights`, and those that compute with torch, from `visionaccel.core.packed_products`.
"""

from visionaccel.backends.hooks import BreakerReport, DriftReport, EncodeReport, FailureReport, Purpose, hookimpl
from visionaccel.backends.parts import CallParts, call_parts, watch_parts
from visionaccel.backends.registry import GROUP, BackendEntry, Registry, default_registry
from visionaccel.backends.selection import AUTO, Candidate, ProgramSource, Selection, select
from visionaccel.backends.spec import (
    Accepted,
    Capabilities,
    Finding,
    Isolation,
    Options,
    QuantizedModel,
    Rejected,
    Session,
    Verdict,
    VisionBackend,
)
from visionaccel.core.containment import contained

__all__ = [
    "AUTO",
    "Accepted",
    "BackendEntry",
    "BreakerReport",
    "CallParts",
    "Candidate",
    "Capabilities",
    "DriftReport",
    "EncodeReport",
    "FailureReport",
    "Finding",
    "GROUP",
    "Isolation",
    "Options",
    "ProgramSource",
    "Purpose",
    "QuantizedModel",
    "Registry",
    "Rejected",
    "Selection",
    "Session",
    "Verdict",
    "VisionBackend",
    "call_parts",
    "contained",
    "default_registry",
    "hookimpl",
    "select",
    "watch_parts",
]
