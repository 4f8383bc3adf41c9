"""What a backend plug-in implements, and how the core finds and chooses one.

A plug-in imports from here, `visionaccel.errors`, and these modules of `visionaccel.core`:

- `program`, `contracts`, `grid`, `arrays`: what a session receives and returns;
- `tower_spec`, for a backend that builds the tower from its weights, and `packed_products` if it computes with torch;
- `cores`, `cpu`, `cache_folder`: cores, CPU features and cache folders of this machine;
- `bounded_files`, `onnx_graphs`: reading untrusted files.

`visionaccel.backends.onnx_weights` helps backends that run ONNX programs, `onnx_products` those that quantize them.
"""

from visionaccel.backends.hooks import BreakerReport, DriftReport, EncodeReport, FailureReport, Purpose, hookimpl
from visionaccel.backends.registry import GROUP, BackendEntry, Registry, default_registry
from visionaccel.backends.selection import AUTO, Candidate, ProgramSource, Selection, check_names, select
from visionaccel.backends.spec import (
    Accepted,
    CallParts,
    Capabilities,
    Finding,
    Isolation,
    Options,
    QuantizedModel,
    Rejected,
    Session,
    Verdict,
    VisionBackend,
    call_parts,
    checked_options,
    watch_parts,
)
from visionaccel.core.containment import contained

__all__ = [
    "AUTO", "GROUP", "Accepted", "BackendEntry", "BreakerReport", "CallParts", "Candidate", "Capabilities",
    "DriftReport", "EncodeReport", "FailureReport", "Finding", "Isolation", "Options", "ProgramSource", "Purpose",
    "QuantizedModel", "Registry", "Rejected", "Selection", "Session", "Verdict", "VisionBackend", "call_parts",
    "check_names", "checked_options", "contained", "default_registry", "hookimpl", "select", "watch_parts",
]  # fmt: skip
