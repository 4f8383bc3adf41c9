"""Opening a bundle: every file is verified, and what is unknown, missing or elsewhere is refused.

Nothing in a bundle is executed or unpickled: the manifest is JSON, weights are safetensors, programs are handed to a
backend as the bytes whose digest was checked. No path or link leads out of the folder; the one exception is a
checkpoint that the manifest declares external, whose vision weights must have the digest that the manifest states.
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
"""Files of a bundle that holds its weights that are read where they are there: each must be stated."""


class Bundle:
    """An opened bundle: verified files, and the programs in them. Holds no weights and no device.

    Attributes:
        folder: The bundle's folder.
        manifest: What it states.
        tower: The vision tower over the bundle's weights, or over those of the external checkpoint.
    """

    def __init__(self, folder: Path, manifest: Manifest, tower: Tower) -> None:
        self.folder, self.manifest, self.tower = folder, manifest, tower
        self._programs = tuple(self._program(entry) for entry in manifest.programs)

    def over(self, weights: Mapping[str, StoredTensor]) -> Bundle:
        """The same bundle with its weights read from another place."""
        return Bundle(self.folder, self.manifest, self.tower.over(weights))

    @property
    def family(self) -> str:
        """The vision tower's architecture."""
        return self.manifest.family

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """Grids of the programs with baked tables."""
        found = [p.coverage.grid for p in self._programs if isinstance(p.coverage, FixedGrid)]
        return tuple(dict.fromkeys(found))

    def files(self) -> tuple[str, ...]:
        """Every file that the manifest names, relative to the folder, without the manifest itself."""
        return tuple(dict.fromkeys(file.path for file in self.manifest.every_file()))

    def programs(self, formats: Iterable[str]) -> tuple[Program, ...]:
        """Its programs in the wanted formats, and the weights themselves if the format `checkpoint` is wanted.

        A bundle whose programs bring their weights may hold those of the host alone, which do not make a program.
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
        needed = self.tower.host_weights
        split_right = entry.host is None or entry.host.tensors == needed
        require(split_right, f"the host of a split program needs {', '.join(needed)}, no more and no less.")
        require(entry.format != CHECKPOINT, "the weights themselves are not a program of a bundle.")
        readable = entry.format not in ONNX_MODELS or self.tower.complete
        require(readable, "it reads its weights from the bundle, which does not hold all of them.")
        expected = self.tower.signature(coverage, split)
        listed = "; ".join(str(spec) for specs in expected for spec in specs)
        require((inputs, outputs) == expected, f"its tensors are not those of its coverage, {coverage}: {listed}.")
        weights_folder = self.tower.weights_folder if entry.format in ONNX_MODELS else self.folder
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
            digest=self._digest(entry),
        )

    def _digest(self, entry: ProgramEntry) -> str:
        """What identifies a program with its weights, independent of the bundle's name and other content."""
        parts = [self.manifest.weights_digest, *sorted(f"{file.path} {file.sha256}" for file in entry.files)]
        return "sha256:" + hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _model(folder: Path, entry: ProgramEntry, weights: Mapping[str, StoredTensor], weights_folder: Path) -> bytes:
    """A program's bytes, verified again as they are read, with its weights pointed at where they lie.

    A plain function: a program is sent to child processes without its bundle and its tower's family.
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
    """Whether a folder holds a manifest."""
    return Path(source, MANIFEST).is_file()


def open_bundle(
    folder: str | os.PathLike[str], *, checkpoint: Checkpoint | None = None, trust_unchanged: bool = True
) -> Bundle:
    """Open and verify a bundle.

    Args:
        folder: The bundle.
        checkpoint: Where the weights are, if the manifest declares its checkpoint external. Then what the manifest
            names is tried: a folder, or a repository in this machine's Hugging Face cache; the network is not used.
        trust_unchanged: Take the digest of files that did not change since they were last verified from memory; False
            reads every byte again.

    Raises:
        BundleError: If the manifest or a file is missing, damaged, not what is stated, or leads out of the folder; or
            the checkpoint's vision weights have another digest.
        CheckpointError: If the weights cannot be read.
        UnsupportedArchitectureError: If this visionaccel does not know the family.
        PluginError: If the plug-in that brings the family is broken.
    """
    folder = Path(folder)
    manifest = parse_manifest(folder / MANIFEST)

    def verified() -> Tower:
        states = _verify(folder, manifest, trust_unchanged=trust_unchanged)
        tower = _tower(folder, manifest, checkpoint, trust_unchanged=trust_unchanged)
        for tensor in tower.weights.values():
            if tensor.file in states and isinstance(tensor.origin, FileState):  # its header was read afterwards
                states[tensor.file].require_same(tensor.origin, tensor.file)
        return tower

    try:
        return Bundle(folder, manifest, when_steady(verified))
    except PluginError:
        raise  # a family's plug-in is broken, and not the bundle
    except (OSError, ConfigurationError, GridError) as error:
        raise BundleError(f"{folder} cannot be opened: {error}", hint=_AGAIN) from error


def tower_digest(tower: Tower, *, trust_unchanged: bool = True, progress: Callable[[int], None] | None = None) -> str:
    """Digest of a tower's weights, remembered while their files stay unchanged.

    Args:
        tower: The tower.
        trust_unchanged: As `open_bundle`.
        progress: Called with the number of bytes just read, if they are read.
    """
    weights = tower.weights
    files = sorted({tensor.file for tensor in weights.values()})
    # The digest covers the tower's names too, and two families may read one file under different ones.
    named = sorted(f"{name}\0{tensor.name}" for name, tensor in weights.items())
    kind = "weights " + hashlib.sha256("\0".join(named).encode()).hexdigest()
    return remembered_digest(kind, files, lambda: weights_digest(weights, progress), trust_unchanged=trust_unchanged)


def _verify(folder: Path, manifest: Manifest, *, trust_unchanged: bool) -> dict[Path, FileState]:
    """The state of each file, links resolved, before it was read; refuses a file that is not as stated.

    No file is read before the place and size of all are known.
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
            raise BundleError(
                f"{folder / file.path} is damaged: its SHA-256 is not what the manifest states.", hint=_AGAIN
            )
    return states


def _place(folder: Path, file: BundleFile) -> Path:
    """Where a file lies, links resolved; it is a plain file within the folder, of the stated size."""
    path = folder / file.path
    try:
        resolved = path.resolve(strict=True)
        status = resolved.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise BundleError(f"{path} is missing: {error}", hint=_AGAIN) from error
    if not resolved.is_relative_to(folder.resolve()):
        raise BundleError(f"{path} leads out of the bundle, to {resolved}.", hint="Do not use this bundle.")
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path} is not a file.", hint=_AGAIN)
    if status.st_size != file.bytes:
        raise BundleError(
            f"{path} has {status.st_size} bytes, and the manifest states {file.bytes}: it is truncated or another.",
            hint=_AGAIN,
        )
    return resolved


def _tower(folder: Path, manifest: Manifest, given: Checkpoint | None, *, trust_unchanged: bool) -> Tower:
    if manifest.checkpoint is None:
        stated = {(folder / file.path).resolve() for file in manifest.every_file()}
        _require_stated(folder, {(folder / name).resolve() for name in _READ if (folder / name).exists()} - stated)
        # Without an index, what else lies in the folder, such as golden images, holds no weights.
        checkpoint = Checkpoint(folder, files=None if (folder / INDEX_FILE).exists() else [folder / SINGLE_FILE])
        _require_stated(folder, {file.resolve() for file in checkpoint.files} - stated)
        tower = tower_of(checkpoint)
    else:
        tower = _external_tower(folder, manifest, given, trust_unchanged=trust_unchanged)
    if tower.family != manifest.family:
        raise BundleError(
            f"{folder} is of family {manifest.family!r}, and its configuration is of {tower.family!r}.", hint=_AGAIN
        )
    described = tower.spec.document()
    if described != manifest.spec:
        names = described.keys() | manifest.spec.keys()
        differing = sorted(name for name in names if described.get(name) != manifest.spec.get(name))
        raise BundleError(
            f"{folder / MANIFEST} states another vision configuration than {tower.checkpoint.folder}/config.json: "
            f"{', '.join(differing)} differ.",
            hint=_AGAIN,
        )
    return tower


def _require_stated(folder: Path, unstated: Iterable[Path]) -> None:
    """What a bundle that holds its weights is made of must be among the files that were verified."""
    if names := sorted(map(str, unstated)):
        raise BundleError(f"{folder / MANIFEST} does not state {', '.join(names)}.", hint=_AGAIN)


def _external_tower(folder: Path, manifest: Manifest, given: Checkpoint | None, *, trust_unchanged: bool) -> Tower:
    external = manifest.checkpoint
    assert external is not None
    refusals = []
    for place in dict.fromkeys((given, None)):  # None for what the manifest names
        try:
            checkpoint = place or locate_checkpoint(external.source, external.revision, download=False)
            tower = tower_of(checkpoint)
            found = tower_digest(tower, trust_unchanged=trust_unchanged)
        except (ArtifactError, OSError) as error:  # OSError: a source that cannot be a path, such as a very long one
            refusals.append(error.message if isinstance(error, ArtifactError) else f"{error}.")
            continue
        if found == manifest.weights_digest:
            return tower
        refusals.append(f"the vision weights of {checkpoint.folder} have another digest.")
    raise BundleError(
        f"{folder} needs the vision weights of the checkpoint {external.source!r} that it was exported from: "
        + " ".join(refusals),
        hint="Pass that checkpoint with --checkpoint or to open_bundle: what a manifest names is not downloaded. "
        "Or export the bundle with --self-contained.",
    )
