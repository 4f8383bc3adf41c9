"""Whether the pipelined mode works with the vLLM that is installed: tried once for each build, and remembered.

The trial takes some seconds, in a separate process, when the configuration is made: the mode decides how the model is
built and how vLLM plans memory, so that it cannot wait for the model to be loaded. What decides is the vLLM that is
there, never its release number: the verdict is kept with a digest of vLLM's files that the mode stands on, and of ours.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from visionaccel import __version__
from visionaccel.backends import Finding
from visionaccel.core.cache_folder import our_cache
from visionaccel.integrations.vllm import BACKEND_VARIABLES, compat
from visionaccel.integrations.vllm.compat import releases
from visionaccel.integrations.vllm.compat.contract import CONTRACT, Feature, needs

NAME = "self-test"
LIMIT = 180.0
"""Seconds that it may take: importing vLLM on a busy machine takes most of a minute."""

_MODULE = "visionaccel.integrations.vllm.pipelined.modelled_run"
_FOLDERS = ("vllm.v1.core", "vllm.distributed.ec_transfer")
_FEATURES = (Feature.PIPELINED, Feature.CONTAINMENT)


def problem(*, contained: bool, asynchronous: bool) -> str | None:
    """What went wrong in the self-test of the pipelined mode; None if it passed, now or for this build before.

    Args:
        contained: With this package's scheduler, and not with vLLM's own.
        asynchronous: With the asynchronous one.
    """
    kind = ("own" if contained else "stock", "async" if asynchronous else "sync")
    try:
        file = _kept(kind)
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        file = None
    known = None if file is None else _read(file)
    if known is None:
        compat.logger().info("visionaccel: testing the pipelined mode on this vLLM, which takes some seconds.")
        known, certain = _run(kind)
        if file is not None and certain:
            _write(file, known)
    return known or None


def _run(kind: tuple[str, str]) -> tuple[str, bool]:
    """Run it: what went wrong, empty if nothing did; and whether that would be the same again."""
    from visionaccel.isolation import FindingProcess

    environment = {name: value for name, value in os.environ.items() if not _ours(name)}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with FindingProcess(NAME, _MODULE, kind, LIMIT, environment) as child:
        return _verdict(child.findings())


def _verdict(found: Sequence[Finding]) -> tuple[str, bool]:
    """What a child found, as `_run` returns it: certain is only what the requests came to, so that no fix is known."""
    own = next((finding for finding in found if finding.name == NAME and not finding.fix), None)
    if own is None:
        return f"the self-test could not be run: {found[0].detail}", False
    return ("" if own.status == "pass" else own.detail), True


def _ours(name: str) -> bool:
    """Whether a variable would have the child do more than look: encode, trace, or write into the server's folder."""
    return name in BACKEND_VARIABLES or name.lstrip("_").startswith("VISIONACCEL_")


def _kept(kind: tuple[str, str]) -> Path:
    """Where the verdict for this build is kept."""
    digest = hashlib.sha256(repr((releases.release(), __version__, sys.version_info[:3], kind)).encode())
    for path in sorted(_files()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return our_cache() / "self-test" / f"{digest.hexdigest()[:32]}.json"


def _files() -> Iterator[Path]:
    """Files that the verdict stands on: of vLLM, what the mode relies on and the scheduler's parts; of ours, all."""
    for kind in ("*.py", "*.toml"):
        yield from Path(__file__).parents[1].rglob(kind)
    for folder in _FOLDERS:
        spec = find_spec(folder)
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            yield from Path(place).rglob("*.py")
    for module in {need.module for feature in _FEATURES for entry in CONTRACT[feature] for need in needs(entry)}:
        spec = find_spec(module)
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin)


def _read(file: Path) -> str | None:
    """A kept verdict; None if there is none, or none that can be read."""
    try:
        found: Any = json.loads(file.read_bytes()[:65536])
    except (OSError, ValueError, RecursionError):
        return None
    return found["problem"] if isinstance(found, dict) and isinstance(found.get("problem"), str) else None


def _write(file: Path, found: str) -> None:
    with suppress(OSError):  # It is run again then.
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as partial:
            json.dump({"vllm": releases.release(), "visionaccel": __version__, "problem": found}, partial)
        Path(partial.name).replace(file)
