"""Writes a bundle's folder: durable files and a sealed manifest, as a whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from visionaccel import __version__
from visionaccel.bundle.manifest import MANIFEST, Manifest, seal
from visionaccel.bundle.processor import PROCESSOR_FILES, processor_digest
from visionaccel.bundle.upgrades import SCHEMA_VERSION
from visionaccel.core.digests import file_digest
from visionaccel.core.orphans import guarded_folder
from visionaccel.errors import ConfigurationError
from visionaccel.families import Tower

_TOOLS = ("onnx", "numpy", "ml_dtypes")


def new_manifest(
    folder: Path,
    tower: Tower,
    digest: str,
    files: Iterable[Path],
    programs: Sequence[Mapping[str, Any]],
    checkpoint: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Make the manifest of a bundle whose files are in `folder`, for `write_manifest`.

    `digest` is the tower's `weights_digest`, `files` are those that all programs share, `programs` are the manifest's
    entries, and `checkpoint` is the result of `external_checkpoint`, or None for a bundle with weights.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "family": tower.family,
        "spec": tower.spec.document(),
        "weights_digest": digest,
        "processor_digest": processor_digest(tower.checkpoint.folder),
        "checkpoint": checkpoint,
        "files": [stated_file(folder, file) for file in files],
        "programs": programs,
        "toolchain": toolchain(_TOOLS),
        "certificate": None,
    }


def write_manifest(folder: Path, document: Mapping[str, Any]) -> Manifest:
    """Seal a manifest and write it into a bundle's folder, where it replaces any other.

    Raises:
        BundleError: If it is not a valid manifest.
        ConfigurationError: If the folder cannot be written.
    """
    manifest = seal(document)
    replace_file(folder / MANIFEST, as_json(manifest.model_dump(mode="json")))
    return manifest


@contextmanager
def appearing(output: Path, *, force: bool | None = None) -> Iterator[Path]:
    """Yield a folder next to `output` that becomes `output` at the end; if anything fails, it is removed.

    With `force` it may replace a bundle, which is moved aside first and deleted last, so that `output` is always the
    old bundle, missing, or the new one. None is the same as False, for commands without a --force option.

    Raises:
        ConfigurationError: If `output` exists and may not be replaced, or something cannot be written.
    """
    try:
        _check_replaceable(output, force=force)
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = output.with_name(f".{output.name}.partial-{secrets.token_hex(4)}")
        folder.mkdir()
        aside = folder.with_name(folder.name.replace(".partial-", ".replaced-"))
        try:
            with guarded_folder(folder):
                yield folder
                _sync(folder)
            _check_replaceable(output, force=force)  # another program may have made it in between
            if output.exists():
                output.rename(aside)
            folder.rename(output)
            _sync(output.parent)
        except BaseException:
            if aside.exists() and not output.exists():
                aside.rename(output)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ConfigurationError(
            f"{output} cannot be written: {error}", hint="Choose a writable folder with enough space."
        ) from error


def _check_replaceable(output: Path, *, force: bool | None) -> None:
    if output.exists() and not force:
        option = "" if force is None else ", or pass --force to replace a bundle"
        raise ConfigurationError(f"{output} already exists.", hint=f"Remove it{option}.")
    if output.exists() and not (output / MANIFEST).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"{output} already exists and is not a bundle.", hint="Choose a different folder.")


def stated_file(folder: Path, path: Path) -> dict[str, Any]:
    """Return the manifest's entry of a file of the bundle in `folder`."""
    return {
        "path": path.relative_to(folder).as_posix(),
        "bytes": path.stat().st_size,
        "sha256": file_digest(path, trust_unchanged=False),
    }


def toolchain(distributions: Iterable[str]) -> dict[str, str]:
    """Return the versions of visionaccel, Python and the given distributions, without those that are not installed."""
    found = {"visionaccel": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def external_checkpoint(tower: Tower, source: str | None, revision: str | None) -> dict[str, Any]:
    """Return the manifest's entry of the checkpoint that contains a bundle's weights."""
    return {"source": source or str(tower.checkpoint.folder.absolute()), "revision": revision}


def require_space(folder: Path, needed: int, what: str, hint: str) -> None:
    """Raise a ConfigurationError if `what` needs more bytes than are free on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigurationError(
            f"{what} needs {needed / 2**30:.2f} GiB, but {folder} has {free / 2**30:.2f} GiB free.", hint=hint
        )


def write_description(tower: Tower, folder: Path) -> None:
    """Write the configurations of a tower and of its image processor into a folder."""
    write_file(folder / "config.json", as_json(tower.description))
    for name in PROCESSOR_FILES:
        if (tower.checkpoint.folder / name).exists():
            write_file(folder / name, (tower.checkpoint.folder / name).read_bytes())


def as_json(value: Mapping[str, Any]) -> bytes:
    """Return an object as a JSON file."""
    return (json.dumps(value, indent=1) + "\n").encode()


def write_file(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a bundle's file, which replaces any other; a ConfigurationError if that is not possible."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            write_file(partial, data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written: {error}", hint="Free some space, or choose a writable folder."
        ) from error


def _sync(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
