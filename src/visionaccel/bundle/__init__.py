"""Bundles: folders with an encoder's programs, and with everything needed to run them correctly or to refuse them."""

from visionaccel.bundle.bundle import Bundle, is_bundle, open_bundle, tower_digest
from visionaccel.bundle.export import ProgramRequest, Progress, counter, export_bundle, program_name
from visionaccel.bundle.folder import (
    appearing,
    as_json,
    external_checkpoint,
    new_manifest,
    require_space,
    stated_file,
    toolchain,
    write_description,
    write_file,
    write_manifest,
)
from visionaccel.bundle.golden import GOLDEN_FILE, Golden, read_golden, write_golden
from visionaccel.bundle.hub import pull_bundle, push_bundle
from visionaccel.bundle.manifest import (
    MANIFEST,
    MOST_PATCHES,
    BundleFile,
    Certificate,
    Manifest,
    ProgramEntry,
    ProgramResult,
    json_schema,
    parse_manifest,
    seal,
    stated_coverage,
)
from visionaccel.bundle.onnx_tensors import check_names, point_at_weights
from visionaccel.bundle.processor import processor_digest, require_processor
from visionaccel.bundle.stripping import STRIP_NOTE, read_strip_note, strip_checkpoint
from visionaccel.bundle.upgrades import SCHEMA_VERSION

__all__ = [
    "GOLDEN_FILE", "MANIFEST", "MOST_PATCHES", "SCHEMA_VERSION", "STRIP_NOTE", "Bundle", "BundleFile", "Certificate",
    "Golden", "Manifest", "ProgramEntry", "ProgramRequest", "ProgramResult", "Progress", "appearing", "as_json",
    "check_names", "counter", "export_bundle", "external_checkpoint", "is_bundle", "json_schema", "new_manifest",
    "open_bundle", "parse_manifest", "point_at_weights", "processor_digest", "program_name", "pull_bundle",
    "push_bundle", "read_golden", "read_strip_note", "require_processor", "require_space", "seal",
    "stated_coverage", "stated_file", "strip_checkpoint", "toolchain", "tower_digest", "write_description",
    "write_file", "write_golden", "write_manifest",
]  # fmt: skip
