"""AMD's Vitis AI execution provider: its options, its cache, and what its compiler reports.

It compiles a program when a session is created, which takes minutes, and keeps the result in `<cache_dir>/<cache_key>`.
Documented at https://ryzenai.docs.amd.com/en/latest/modelrun.html.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from visionaccel.core.cache_folder import our_cache
from visionaccel.core.program import EP_CONTEXT, Program
from visionaccel.errors import ConfigurationError
from visionaccel_onnxrt.offload import Offload

CONFIG_COMPANION = "vitisai_config"
"""Role of the compiler's configuration among a program's companions."""

SUMMARIES = ("final-vaiml-pass-summary.txt", "preliminary-vaiml-pass-summary.txt")
"""The compiler's reports, at its end and after partitioning. Its console output and `fail_safe_summary.json` show only
what was planned."""

_CACHE = ("cache_dir", "cache_key")
_INDIFFERENT = frozenset({*_CACHE, "encryption_key", "ai_analyzer_visualization", "ai_analyzer_profiling"})
"""Options that do not change the compiled program."""

_TOOLS = ("voe", "onnxruntime-vitisai", "flexml")
_DRIVER = Path("/sys/module/amdxdna/version")

_MODEL = re.compile(r"number of operators in the model\s*:\s*([\d,]+)", re.IGNORECASE)
_OPERATORS = "number of operators {} by vaiml\\s*:\\s*([\\d,]+)"
_OPERATIONS = "gops {} by vaiml\\s*:\\s*[\\d.,]+\\s*\\(\\s*([\\d.]+)\\s*%"
_DTYPE = re.compile(r"device data type\s*:\s*(\w[\w ,]{0,60})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PassSummary:
    """The compiler's report on a program.

    Attributes:
        offload: What runs on the device.
        precision: What the device computes in; None if not reported.
    """

    offload: Offload
    precision: str | None


def compiler_options(
    program: Program, given: Mapping[str, str], cache_dir: Path | None, runtime: str
) -> dict[str, str]:
    """Provider options for a program.

    Args:
        program: A program to compile, or a compiled one.
        given: The user's options, which take precedence.
        cache_dir: Where compiled programs are kept; None for a folder in the user's cache.
        runtime: Version of ONNX Runtime.

    Raises:
        ConfigurationError: If the program has nothing that identifies it in a cache, the cache cannot be written, or
            an option does not go with the program.
    """
    config = program.companions.get(CONFIG_COMPANION)
    options = {"config_file": str(config)} if config is not None else {}
    options |= given
    if "config_file" in options and not Path(options["config_file"]).is_file():
        raise ConfigurationError(
            f"the compiler's configuration file {options['config_file']} does not exist.",
            hint="Set the provider option `config_file` to an existing file, or leave it out.",
        )
    if program.format == EP_CONTEXT:
        # The provider ends the process if the key is not the one that the program was compiled with.
        if refused := [name for name in _CACHE if name in given]:
            raise ConfigurationError(
                f"program {program.name!r} is already compiled and accepts no provider option {' or '.join(refused)}.",
                hint="Leave it out.",
            )
        return options
    folder = Path(options["cache_dir"]) if "cache_dir" in options else cache_dir or _default_cache()
    folder = folder.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"{folder} cannot be used for compiled programs: {error}", hint="Set a different cache_dir."
        ) from error
    return {
        # If kept in memory, as some targets do by default, each process compiles again and no summary is written.
        "enable_cache_file_io_in_mem": "0",
        **options,
        "cache_dir": str(folder),
        "cache_key": options.get("cache_key") or _cache_key(program, options, runtime),
    }


def pass_summaries(options: Mapping[str, str]) -> Iterator[PassSummary]:
    """Yield the compiler's reports in the cache of these provider options."""
    if not all(name in options for name in _CACHE):
        return
    for name in SUMMARIES:
        try:
            text = Path(options["cache_dir"], options["cache_key"], name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if (summary := _parse(text, name)) is not None:
            yield summary


def _parse(text: str, name: str) -> PassSummary | None:
    """Parse a report; None without the necessary counts.

    The format is not documented. In published versions it has lines such as these:

        Device data type: bfloat16
        Number of operators in the model: 493
        Number of operators supported by VAIML: 491 (99.594%)
        GOPs offloaded by VAIML: 8.096 (99.993%)
    """
    model = _MODEL.search(text)
    # Supported parts that failed to compile or were not worth it are not offloaded.
    for word in ("offloaded", "supported"):
        operators = re.search(_OPERATORS.format(word), text, re.IGNORECASE)
        if model is None or operators is None:
            continue
        total, taken = (int(found[1].replace(",", "")) for found in (model, operators))
        operations = re.search(_OPERATIONS.format(word), text, re.IGNORECASE)
        on_device = float(operations[1]) / 100 if operations else taken / total if total else 0.0
        dtype = _DTYPE.search(text)
        offload = Offload(taken, max(total - taken, 0), min(max(1 - on_device, 0.0), 1.0), name)
        return PassSummary(offload, dtype[1].strip() if dtype else None)
    return None


def _default_cache() -> Path:
    try:
        return our_cache() / "vitisai"
    except RuntimeError as error:  # no home folder
        raise ConfigurationError(
            "no folder is set for compiled programs.", hint="Set one with the option cache_dir."
        ) from error


def _cache_key(program: Program, options: Mapping[str, str], runtime: str) -> str:
    """Return the cache key of a compiled program.

    The provider's default key is a digest of the model without its external weights, and does not include the versions
    of the provider and the driver, which must not use each other's programs.
    """
    if program.digest is None:
        raise ConfigurationError(
            f"program {program.name!r} has no digest to identify its compiled form.",
            hint="Open it from a bundle, or set the provider option `cache_key`.",
        )
    config = options.get("config_file")
    parts = {
        "program": program.digest,
        "name": program.name,
        "options": {name: value for name, value in options.items() if name not in _INDIFFERENT | {"config_file"}},
        "config": hashlib.sha256(Path(config).read_bytes()).hexdigest() if config else None,
        "runtime": runtime,
        "tools": [_version(tool) for tool in _TOOLS],
        "driver": _driver(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        return _DRIVER.read_text(encoding="utf-8").strip()
    except OSError:
        return None
