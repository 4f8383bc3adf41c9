"""What is written into a bundle's folder: files that are on the disk, a sealed manifest, and all of it or nothing."""

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
    """The manifest of a bundle whose files are in `folder`, for `write_manifest`.

    Args:
        folder: The bundle's folder.
        tower: The tower that the programs compute.
        digest: The `weights_digest` of the tower.
        files: Files that all programs share.
        programs: The manifest's entries of the programs.
        checkpoint: As `external_checkpoint`; None for a bundle that holds the weights.
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
    """Seal a manifest and put it into a bundle's folder, in the place of one that is there.

    Raises:
        BundleError: If it is not a valid manifest.
        ConfigurationError: If the folder cannot be written.
    """
    manifest = seal(document)
    replace_file(folder / MANIFEST, as_json(manifest.model_dump(mode="json")))
    return manifest


@contextmanager
def appearing(output: Path, *, force: bool | None = None) -> Iterator[Path]:
    """A folder next to `output` that takes its place in the end, and leaves no trace if anything fails before.

    With `force` it may replace a bundle; None is as False, for commands without that option.

    A bundle that is there already is moved aside first and deleted last, so that there is always the old one, none, or
    the new one.
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
            _check_replaceable(output, force=force)  # it may have appeared since
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
            f"{output} cannot be written: {error}", hint="Choose a folder with enough space that may be written."
        ) from error


def _check_replaceable(output: Path, *, force: bool | None) -> None:
    if output.exists() and not force:
        option = "" if force is None else ", or pass --force to replace a bundle"
        raise ConfigurationError(f"{output} exists.", hint=f"Remove it{option}.")
    if output.exists() and not (output / MANIFEST).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"{output} exists and is not a bundle.", hint="Name another folder.")


def stated_file(folder: Path, path: Path) -> dict[str, Any]:
    """A file of a bundle in `folder` as the manifest states it."""
    return {
        "path": path.relative_to(folder).as_posix(),
        "bytes": path.stat().st_size,
        "sha256": file_digest(path, trust_unchanged=False),
    }


def toolchain(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of visionaccel, Python and those of the distributions that are installed."""
    found = {"visionaccel": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def external_checkpoint(tower: Tower, source: str | None, revision: str | None) -> dict[str, Any]:
    """How the manifest states the checkpoint that holds a bundle's weights."""
    return {"source": source or str(tower.checkpoint.folder.absolute()), "revision": revision}


def require_space(folder: Path, needed: int, what: str, hint: str) -> None:
    """Refuse, with a ConfigurationError, what takes more bytes than are free where a folder lies."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigurationError(
            f"{what} takes {needed / 2**30:.2f} GiB, and {folder} has {free / 2**30:.2f} GiB free.", hint=hint
        )


def write_description(tower: Tower, folder: Path) -> None:
    """Write what says which tower it is and what makes its patches: configuration and image processor."""
    write_file(folder / "config.json", as_json(tower.description))
    for name in PROCESSOR_FILES:
        if (tower.checkpoint.folder / name).exists():
            write_file(folder / name, (tower.checkpoint.folder / name).read_bytes())


def as_json(value: Mapping[str, Any]) -> bytes:
    """An object as the text of a JSON file."""
    return (json.dumps(value, indent=1) + "\n").encode()


def write_file(path: Path, data: bytes) -> None:
    """Write a file that is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a bundle's file in the place of one that is there; a ConfigurationError if that is not possible."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            write_file(partial, data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written: {error}", hint="Free some space, or use a folder that may be written."
        ) from error


def _sync(folder: Path) -> None:
    """Make a renaming durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
