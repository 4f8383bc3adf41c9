"""Opens a bundle: verifies every file, and refuses unknown, missing and outside ones.

Nothing in a bundle is executed or unpickled: the manifest is JSON, weights are safetensors, and a backend receives the
bytes of a program whose digest was checked. No path or link may point outside the folder. The exception is a checkpoint
that the manifest declares external: its vision weights must have the digest in the manifest.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path

from visionaccel.bundle.manifest import MANIFEST, BundleFile, Manifest, ProgramEntry, parse_manifest
from visionaccel.bundle.onnx_tensors import point_at_weights
from visionaccel.bundle.processor import PROCESSOR_FILES
from visionaccel.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, locate_checkpoint, weights_digest
from visionaccel.core.bounded_files import MOST_HOLE_BYTES, hole_bytes, read_bounded
from visionaccel.core.digests import file_digest, remembered_digest
from visionaccel.core.grid import Grid
from visionaccel.core.memory_files import FileState, when_steady
from visionaccel.core.program import CHECKPOINT, ONNX_MODELS, FixedGrid, Program
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import ArtifactError, BundleError, ConfigurationError, GridError, PluginError
from visionaccel.families import Tower, tower_of

_AGAIN = "Export or fetch the bundle again."
_READ = ("config.json", SINGLE_FILE, INDEX_FILE, *PROCESSOR_FILES)
"""Files that are read from a bundle with weights if they exist, so the manifest must list them."""


class Bundle:
    """An opened bundle: verified files, and the programs in them. It keeps no weights in memory and uses no device.

    Attributes:
        folder: The bundle's folder.
        manifest: Its manifest.
        tower: The vision tower with the bundle's weights, or with those of the external checkpoint.
    """

    def __init__(self, folder: Path, manifest: Manifest, tower: Tower) -> None:
        self.folder, self.manifest, self.tower = folder, manifest, tower
        self._programs = tuple(self._program(entry) for entry in manifest.programs)

    def over(self, weights: Mapping[str, StoredTensor]) -> Bundle:
        """Return the same bundle with its weights read from another place."""
        return Bundle(self.folder, self.manifest, self.tower.over(weights))

    @property
    def family(self) -> str:
        """The name of the vision tower's family."""
        return self.manifest.family

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """Grids of the programs with baked tables."""
        found = [p.coverage.grid for p in self._programs if isinstance(p.coverage, FixedGrid)]
        return tuple(dict.fromkeys(found))

    def programs(self, formats: Iterable[str]) -> tuple[Program, ...]:
        """Return its programs in the wanted formats, and its weights as a program if `checkpoint` is one of them.

        A bundle whose programs contain their weights may have only those that the host needs, which are not a program.
        """
        wanted = set(formats)
        plain = self.tower.programs([CHECKPOINT]) if CHECKPOINT in wanted and self.tower.complete else ()
        return (*(program for program in self._programs if program.format in wanted), *plain)

    def _program(self, entry: ProgramEntry) -> Program:
        def require(holds: bool, what: str) -> None:
            if not holds:
                raise BundleError(f"{self.folder / MANIFEST}: program {entry.name!r}: {what}", hint=_AGAIN)

        coverage, split = entry.covers(), entry.split
        inputs, outputs = tuple(t.spec for t in entry.inputs), tuple(t.spec for t in entry.outputs)
        try:
            self.tower.check_program(coverage, split)
        except (ConfigurationError, GridError) as error:
            require(False, error.message)
        needed, referring = self.tower.host_weights, entry.format in ONNX_MODELS
        exact = entry.host is None or entry.host.tensors == needed
        require(exact, f"the host of a split program needs {', '.join(needed)}, and no other weights.")
        require(entry.format != CHECKPOINT, "the weights themselves are not a program of a bundle.")
        require(not referring or self.tower.complete, "it reads its weights from the bundle, but some are missing.")
        expected = self.tower.signature(coverage, split)
        listed = "; ".join(str(spec) for specs in expected for spec in specs)
        require((inputs, outputs) == expected, f"its tensors must be those of coverage {coverage}: {listed}.")
        weights_folder = self.tower.weights_folder if referring else self.folder
        # Independent of the bundle's name and other content.
        identity = [self.manifest.weights_digest, *sorted(f"{file.path} {file.sha256}" for file in entry.files)]
        return Program(
            name=entry.name,
            family=self.family,
            format=entry.format,
            folder=weights_folder,
            inputs=inputs,
            outputs=outputs,
            weights=self.tower.weights,
            uniform_frames=True,
            coverage=coverage,
            precision=entry.precision,
            host=split,
            quantization=entry.quantization.dtype if entry.quantization else None,
            device=entry.device,
            model=partial(_model, self.folder, entry, self.tower.weights, weights_folder),
            artifact=self.folder / entry.model,
            companions={role: self.folder / path for role, path in entry.companions.items()},
            stored_names={t.name: t.stored_name for t in (*entry.inputs, *entry.outputs) if t.stored_name is not None},
            files={self.folder / file.path: file.sha256 for file in entry.files},
            digest="sha256:" + hashlib.sha256("\n".join(identity).encode()).hexdigest(),
        )


def _model(folder: Path, entry: ProgramEntry, weights: Mapping[str, StoredTensor], weights_folder: Path) -> bytes:
    """Read a program, verify it again, and make it refer to the files of its weights.

    Not a method, because programs are sent to child processes without their bundle and family.
    """
    (stated,) = {file for file in entry.files if file.path == entry.model}
    path = folder / stated.path
    try:
        model = read_bounded(path, stated.bytes)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}", hint=_AGAIN) from error
    if "sha256:" + hashlib.sha256(model).hexdigest() != stated.sha256:
        raise BundleError(f"{path} changed since the bundle was opened.", hint=_AGAIN)
    return point_at_weights(model, weights, weights_folder) if entry.format in ONNX_MODELS else model


def is_bundle(source: str | os.PathLike[str] | Path) -> bool:
    """Return whether a folder has a manifest."""
    return Path(source, MANIFEST).is_file()


def open_bundle(
    folder: str | os.PathLike[str], *, checkpoint: Checkpoint | None = None, trust_unchanged: bool = True
) -> Bundle:
    """Open and verify a bundle.

    Args:
        folder: The bundle.
        checkpoint: A checkpoint to try first if the manifest declares its checkpoint external. Then the one in the
            manifest is tried: a folder, or a repository in this machine's Hugging Face cache; the network is not used.
        trust_unchanged: Use the remembered digests of files that did not change since they were last verified; False
            reads every byte again.

    Raises:
        BundleError: If the manifest or a file is missing, damaged, not as in the manifest, or outside the folder; or
            the checkpoint's vision weights have a different digest.
        CheckpointError: If the weights cannot be read.
        UnsupportedArchitectureError: If the family is not installed.
        PluginError: If the plug-in that provides the family is broken.
    """
    folder = Path(folder)
    manifest = parse_manifest(folder / MANIFEST)

    def verified() -> Tower:
        states = _verify(folder, manifest, trust_unchanged=trust_unchanged)
        tower = _tower(folder, manifest, checkpoint, trust_unchanged=trust_unchanged)
        for tensor in tower.weights.values():
            if tensor.file in states and isinstance(tensor.origin, FileState):  # its header was read afterwards
                states[tensor.file].require(tensor.file, tensor.origin)
        return tower

    try:
        return Bundle(folder, manifest, when_steady(verified))
    except PluginError:
        raise  # the plug-in of the family is broken, not the bundle
    except (OSError, ConfigurationError, GridError) as error:
        raise BundleError(f"{folder} cannot be opened: {error}", hint=_AGAIN) from error


def tower_digest(tower: Tower, *, trust_unchanged: bool = True, progress: Callable[[int], None] | None = None) -> str:
    """Return the digest of a tower's weights, remembered while their files stay unchanged.

    Without `trust_unchanged`, every byte is read again. `progress` is called with the number of bytes just read.
    """
    weights = tower.weights
    files = sorted({tensor.file for tensor in weights.values()})
    # The digest also covers the tower's names, and two families may use different names for the same file.
    named = sorted(f"{name}\0{tensor.name}" for name, tensor in weights.items())
    kind = "weights " + hashlib.sha256("\0".join(named).encode()).hexdigest()
    return remembered_digest(kind, files, lambda: weights_digest(weights, progress), trust_unchanged=trust_unchanged)


def _verify(folder: Path, manifest: Manifest, *, trust_unchanged: bool) -> dict[Path, FileState]:
    """Verify the manifest's files; return the state of each before it was read, by its path with links resolved.

    No file is read before the paths and sizes of all are checked.
    """
    places = [(_place(folder, file), file) for file in manifest.every_file()]
    states = {path: FileState.of(path) for path, _ in places}
    holes = 0
    for path, file in dict(places).items():
        holes += hole_bytes(path, 0, file.bytes)
        if holes > MOST_HOLE_BYTES:
            raise BundleError(
                f"{path} is sparse: more than {MOST_HOLE_BYTES >> 30} GiB of the bundle's files are not on the disk.",
                hint="Do not use this bundle.",
            )
    for path, file in places:
        if file_digest(path, trust_unchanged=trust_unchanged) != file.sha256:
            raise BundleError(f"{folder / file.path} is damaged: its SHA-256 does not match the manifest.", hint=_AGAIN)
    return states


def _place(folder: Path, file: BundleFile) -> Path:
    """Return the path of a file with links resolved; require a regular file in the folder, of the manifest's size."""
    path = folder / file.path
    try:
        resolved = path.resolve(strict=True)
        status = resolved.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise BundleError(f"{path} is missing: {error}", hint=_AGAIN) from error
    if not resolved.is_relative_to(folder.resolve()):
        raise BundleError(f"{path} points outside the bundle, to {resolved}.", hint="Do not use this bundle.")
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path} is not a file.", hint=_AGAIN)
    if status.st_size != file.bytes:
        raise BundleError(
            f"{path} has {status.st_size} bytes, but the manifest says {file.bytes}: it is truncated or a different "
            "file.",
            hint=_AGAIN,
        )
    return resolved


def _tower(folder: Path, manifest: Manifest, given: Checkpoint | None, *, trust_unchanged: bool) -> Tower:
    if manifest.checkpoint is None:
        _require_listed(folder, manifest, (folder / name for name in _READ if (folder / name).exists()))
        # Without an index, other safetensors files in the folder, such as golden images, are not weights.
        checkpoint = Checkpoint(folder, files=None if (folder / INDEX_FILE).exists() else [folder / SINGLE_FILE])
        _require_listed(folder, manifest, checkpoint.files)
        tower = tower_of(checkpoint)
    else:
        tower = _external_tower(folder, manifest, given, trust_unchanged=trust_unchanged)
    if tower.family != manifest.family:
        raise BundleError(
            f"{folder} belongs to family {manifest.family!r}, but its configuration to {tower.family!r}.", hint=_AGAIN
        )
    described = tower.spec.document()
    if described != manifest.spec:
        names = described.keys() | manifest.spec.keys()
        differing = sorted(name for name in names if described.get(name) != manifest.spec.get(name))
        raise BundleError(
            f"{folder / MANIFEST} and {tower.checkpoint.folder}/config.json have different vision configurations: "
            f"{', '.join(differing)} differ.",
            hint=_AGAIN,
        )
    return tower


def _require_listed(folder: Path, manifest: Manifest, files: Iterable[Path]) -> None:
    """Refuse files that will be read although the manifest does not list them, so that they were not verified."""
    listed = {(folder / file.path).resolve() for file in manifest.every_file()}
    if missing := sorted({file.resolve() for file in files} - listed):
        raise BundleError(f"{folder / MANIFEST} does not list {', '.join(map(str, missing))}.", hint=_AGAIN)


def _external_tower(folder: Path, manifest: Manifest, given: Checkpoint | None, *, trust_unchanged: bool) -> Tower:
    external = manifest.checkpoint
    assert external is not None
    refusals = []
    for place in dict.fromkeys((given, None)):  # None for the checkpoint in the manifest
        try:
            checkpoint = place or locate_checkpoint(external.source, external.revision, download=False)
            tower = tower_of(checkpoint)
            found = tower_digest(tower, trust_unchanged=trust_unchanged)
        except (ArtifactError, OSError) as error:  # OSError: a source that cannot be a path, such as a very long one
            refusals.append(error.message if isinstance(error, ArtifactError) else f"{error}.")
            continue
        if found == manifest.weights_digest:
            return tower
        refusals.append(f"the vision weights of {checkpoint.folder} have a different digest.")
    raise BundleError(
        f"{folder} needs the vision weights of the checkpoint {external.source!r} that it was exported from: "
        + " ".join(refusals),
        hint="Pass that checkpoint with --checkpoint or to open_bundle; the one in the manifest is not downloaded. Or "
        "export the bundle with --self-contained.",
    )
