"""Tests once for each build of vLLM whether the pipelined mode works with it, and remembers the verdict.

The test takes some seconds in a child process. It runs when the configuration is made, because the mode decides how the
model is built and how vLLM plans memory. The verdict is remembered by a digest of the files that the mode relies on.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from visionaccel import __version__
from visionaccel.backends import Finding
from visionaccel.core.digests import remembered_digest
from visionaccel.integrations.vllm import BACKEND_VARIABLES, compat
from visionaccel.integrations.vllm.compat import contract, release
from visionaccel.integrations.vllm.compat.architectures import source_files
from visionaccel.integrations.vllm.compat.contract import Feature, entries_of

NAME = "self-test"
LIMIT = 180.0
"""Seconds that it may take; importing vLLM alone takes most of a minute on a busy machine."""

_MODULE = "visionaccel.integrations.vllm.pipelined.modelled_run"
_PACKAGES = ("visionaccel.integrations.vllm", "vllm.v1.core", "vllm.distributed.ec_transfer")


def problem(*, contained: bool, asynchronous: bool) -> str | None:
    """Return what went wrong in the self-test, in this or an earlier process; None if it passed.

    It runs with this package's scheduler if `contained`, and otherwise with vLLM's own.
    """
    kind = ("own" if contained else "stock", "async" if asynchronous else "sync")
    try:
        return remembered_digest(_key(kind), (), partial(_run, kind)) or None
    except _NoVerdictError as error:
        return f"the self-test could not be run: {error}"


class _NoVerdictError(Exception):
    """The self-test could not be run, so its result is unknown and is not saved."""


def _run(kind: tuple[str, str]) -> str:
    """Return what went wrong; empty if the test passed."""
    from visionaccel.isolation import CheckProcess

    compat.logger().info("visionaccel: testing the pipelined mode on this vLLM, which takes a few seconds.")
    # The child must not encode, trace, or use the server's memory.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in BACKEND_VARIABLES and not name.lstrip("_").startswith("VISIONACCEL_")
    }
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with CheckProcess(NAME, _MODULE, kind, LIMIT, environment) as child:
        return _verdict(child.findings())


def _verdict(found: Sequence[Finding]) -> str:
    """Return the verdict among a child's findings; a finding with a fix is about the machine, and is not a verdict."""
    own = next((finding for finding in found if finding.name == NAME and not finding.fix), None)
    if own is None:
        raise _NoVerdictError(found[0].detail)
    return "" if own.status == "pass" else own.detail


def _key(kind: tuple[str, str]) -> str:
    """Return the key of the verdict for this build."""
    digest = hashlib.sha256(repr((release(), __version__, sys.version_info[:3], kind)).encode())
    for path in sorted(set(filter(Path.is_file, _files()))):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return f"{NAME} {digest.hexdigest()}"


def _files() -> Iterator[Path]:
    """Yield the files of vLLM that the mode relies on, those of its scheduler, and all of this integration's."""
    yield Path(contract.__file__).with_name("contract.toml")
    entries = (*entries_of(Feature.PIPELINED), *entries_of(Feature.CONTAINMENT))
    for module in {*_PACKAGES, *(need.module for entry in entries for need in entry.needs)}:
        yield from source_files(module)
