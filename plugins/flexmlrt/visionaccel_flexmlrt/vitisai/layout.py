"""Reads a folder that AMD's Vitis AI compiler wrote: the artifact, the model, and the tensors at the device's edges.

Two layouts are supported: a single `.rai` next to the `.onnx` that it was compiled from, or a cache directory with
`vaiml_par_<N>/partition-info.json` and `vaiml_par_<N>/<part>/flexmlrt-hsi.json`. If the folder has neither, the `.onnx`
may contain the compiled program itself, in a node of the VitisAI execution provider.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from visionaccel.core.bounded_files import read_bounded
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.grid import Grid
from visionaccel.core.invalid_values import problems_of
from visionaccel.core.program import EP_CONTEXT, Precision
from visionaccel.errors import BundleError, ConfigurationError
from visionaccel_flexmlrt.artifact import FLEXMLRT_DIRECTORY, FLEXMLRT_RAI, SIMULATOR_FILE, made_for_simulator
from visionaccel_flexmlrt.vitisai.graph import check_link, squeezed

_INFO, _TABLE, _CONNECTIVITY = "partition-info.json", "flexmlrt-hsi.json", "connectivity_metadata.json"
_PARTITION = "vaiml_par_"
_SMALL = 10**6
"""A real `.rai` contains a tower's weights; a smaller file is most likely something else."""

_MOST_FILES = 4096

_ONE_PARTITION = "Compile so that everything between the window gathers is one partition."
_COMPILE_AGAIN = "Compile the tower again."
_REFUSE_FOLDER = "Do not use this folder."
_Name = Annotated[str, Field(min_length=1, max_length=1024)]
_Shape = Annotated[tuple[Annotated[int, Field(ge=1, le=2**31)], ...], Field(max_length=8)]
_M = TypeVar("_M", bound="_Model")


class _Model(BaseModel):
    """A JSON file of the compiler's cache; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class DeviceTensor(_Model):
    """A tensor at the device's edge, as the CPU sees it."""

    tensor_name: _Name
    cpu_shape: _Shape
    cpu_dtype: _Name


_Side: TypeAlias = Annotated[tuple[DeviceTensor, ...], Field(min_length=1, max_length=64)]


class TensorTable(_Model):
    """`flexmlrt-hsi.json`: the device's inputs and outputs."""

    inputs: _Side
    outputs: _Side


class PartitionInfo(_Model):
    """`partition-info.json`: where a partition runs, and whether its compilation finished."""

    runner_type: _Name
    status: _Name


class Edge(_Model):
    """A tensor that is passed from one partition to another."""

    source_partition: _Name
    destination_partition: _Name
    shape: _Shape


class Connectivity(_Model):
    """`connectivity_metadata.json`: the partitions of the CPU and the device, and the tensors between them."""

    execution_order: tuple[_Name, ...]
    graph_edges: tuple[Edge, ...]


@dataclass(frozen=True)
class Boundary:
    """The tensors at the device's edges, by their names in the model."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """What to import, and how.

    Attributes:
        path: The folder that the compiler wrote, or the `.rai` or `.onnx` in it.
        artifact: The `.rai`, the cache or the partition's folder in it; needed if there are several.
        model: The `.onnx`; needed if there are several or it is in a different folder.
        grid: The grid that it was compiled for; needed if the model does not determine it.
        precision: What the device computes in.
        host_on_onnxrt: Accept a host part that is not recognised, and let ONNX Runtime run it.
    """

    path: Path
    artifact: Path | None = None
    model: Path | None = None
    grid: Grid | None = None
    precision: Precision = "bfloat16"
    host_on_onnxrt: bool = False


@dataclass(frozen=True)
class VitisFolder:
    """The files of one artifact.

    Attributes:
        model: The ONNX model that was compiled.
        artifact: The file to open: the `.rai`, `partition-info.json`, or the model itself.
        files: Every file of the artifact, by its path in the program's folder of the bundle.
        boundary: The device's inputs and outputs; None if no file has them.
        device: `npu` or `simulator`.
        warnings: What a user should know.
    """

    folder: Path
    format: str
    model: Path
    artifact: Path
    files: tuple[tuple[str, Path], ...] = ()
    boundary: Boundary | None = None
    device: str = "npu"
    warnings: tuple[str, ...] = ()


def read_layout(request: ImportRequest) -> VitisFolder:
    """Find the files to import.

    Raises:
        ConfigurationError: If a file is missing, or there are several candidates for one.
        BundleError: If a file is damaged or a link that points out of the folder, the compilation did not finish, or
            the device has several partitions.
    """
    try:
        return _read(request.path, request.artifact, request.model)
    except OSError as error:
        raise ConfigurationError(f"{request.path} cannot be read: {error}", hint="Check its permissions.") from error


def _read(path: Path, artifact: Path | None, model: Path | None) -> VitisFolder:
    if path.is_file():
        if path.suffix.lower() == ".onnx":
            model = model or Path(path.name)
        else:
            artifact = artifact or Path(path.name)
        path = path.parent
    if not path.is_dir():
        raise ConfigurationError(f"{path} does not exist.", hint="Pass the folder with the compiled tower.")
    found = _given(path, artifact) if artifact is not None else _only(_artifacts(path), path, "--artifact")
    places = [path] if found is None or found.is_file() else [path, found, found.parent]
    onnx = _model(path, model, places)
    check_link(onnx, _home(onnx, path))
    if found is None:
        return VitisFolder(path, EP_CONTEXT, onnx, onnx)
    return _directory(path, found, onnx) if found.is_dir() else _single(path, found, onnx)


def _home(found: Path, folder: Path) -> Path:
    """Return the folder that must contain a file: the imported one, unless the user chose a file in a different folder.

    Links are not followed: a link in the folder is in the folder.
    """
    if Path(os.path.normpath(found.absolute())).is_relative_to(os.path.normpath(folder.absolute())):
        return folder
    return found if found.is_dir() else found.parent


def _artifacts(folder: Path) -> list[Path]:
    entries = sorted(folder.iterdir())
    singles = [entry for entry in entries if entry.suffix.lower() == ".rai" and entry.is_file()]
    caches = [entry for entry in entries if entry.is_dir() and _partitions(entry)]
    return [*singles, *([folder] if _partitions(folder) else caches)]


def _partitions(folder: Path) -> list[Path]:
    return sorted(each for each in folder.glob(f"{_PARTITION}*") if each.is_dir())


def _given(folder: Path, named: Path) -> Path:
    hint = "Pass the .rai or the cache directory."
    found = folder / named if (folder / named).exists() else named
    if not found.exists():
        raise ConfigurationError(f"{named} does not exist.", hint=hint)
    if found.is_file() or _partitions(found):
        return found
    if not _partitions(found.parent):
        raise ConfigurationError(f"{named} contains no {_PARTITION}0.", hint=hint)
    return found.parent


def _only(found: Sequence[Path], folder: Path, option: str) -> Path | None:
    if len(found) > 1:
        names = ", ".join(str(each.relative_to(folder)) for each in found)
        raise ConfigurationError(f"{folder} contains several candidates: {names}.", hint=f"Choose one with {option}.")
    return found[0] if found else None


def _model(folder: Path, named: Path | None, places: Sequence[Path]) -> Path:
    if named is not None:
        found = folder / named if (folder / named).exists() else named
        if not found.is_file():
            raise ConfigurationError(f"{named} is not a file.", hint="Pass the .onnx that was compiled.")
        return found
    for place in places:
        models = sorted(each for each in place.glob("*.onnx") if each.is_file())
        if (only := _only(models, place, "--onnx")) is not None:
            return only
    raise ConfigurationError(
        f"{folder} contains no .onnx, which is needed to check an artifact's grid and weights.",
        hint="Use --onnx to pass the model that was compiled.",
    )


def _single(folder: Path, artifact: Path, model: Path) -> VitisFolder:
    check_link(artifact, _home(artifact, folder))
    simulated, size = made_for_simulator(artifact, BundleError), artifact.stat().st_size
    doubt = f"{artifact} has only {size} bytes, which is small for a vision tower: check that the download is complete."
    return VitisFolder(
        folder=folder,
        format=FLEXMLRT_RAI,
        model=model,
        artifact=artifact,
        files=((artifact.name, artifact),),
        boundary=_boundary(folder / _TABLE) if (folder / _TABLE).exists() else None,
        device="simulator" if simulated else "npu",
        warnings=(doubt,) if size < _SMALL and not simulated else (),
    )


def _directory(folder: Path, cache: Path, model: Path) -> VitisFolder:
    partitions = _partitions(cache)
    infos = {each: read_metadata(each / _INFO, PartitionInfo) for each in partitions}
    for each, info in infos.items():
        if info.status != "completed":
            raise BundleError(
                f"{each / _INFO}: status is {info.status!r}, not 'completed': the compilation did not finish.",
                hint=_COMPILE_AGAIN,
            )
    device = [each for each, info in infos.items() if info.runner_type == "hw"]
    if not device:
        raise BundleError(
            f"{cache}: no partition runs on the device: runner_type is "
            + ", ".join(f"{info.runner_type!r} in {each.name}" for each, info in infos.items()),
            hint="Compile the tower for the device.",
        )
    partition = device[0]
    parts = sorted(partition.glob(f"*/{_TABLE}"))
    pieces = device if len(device) > 1 else [each.parent for each in parts]
    if len(pieces) > 1:
        raise several_partitions(cache, (f"{each.relative_to(cache)}" for each in pieces))
    if not parts:
        raise BundleError(
            f"{partition} has no folder with {_TABLE}, so the device's tensors are unknown.",
            hint="Fetch the whole cache directory, or compile the tower again.",
        )
    boundary = _boundary(parts[0])
    if (cache / _CONNECTIVITY).exists():
        elsewhere = {each.name for each in partitions} - {partition.name}
        _check_connectivity(cache / _CONNECTIVITY, partition.name, elsewhere, boundary)
    return VitisFolder(
        folder=folder,
        format=FLEXMLRT_DIRECTORY,
        model=model,
        artifact=partition / _INFO,
        files=_files(partition, _home(cache, folder)),
        boundary=boundary,
        device="simulator" if (partition / SIMULATOR_FILE).is_file() else "npu",
    )


def several_partitions(where: Path, names: Iterable[str]) -> BundleError:
    """Return the error for a device's part that is split up."""
    return BundleError(
        f"{where}: the device's part is split into several partitions ({', '.join(names)}), and none of them is the "
        "whole tower.",
        hint=_ONE_PARTITION,
    )


def _boundary(path: Path) -> Boundary:
    table = read_metadata(path, TensorTable)

    def specs(field: str, tensors: Sequence[DeviceTensor]) -> tuple[TensorSpec, ...]:
        for number, tensor in enumerate(tensors):
            if tensor.cpu_dtype != "fp32":
                raise BundleError(
                    f"{path}: {field}.{number}.cpu_dtype is {tensor.cpu_dtype!r}, but the host needs fp32.",
                    hint="Compile the tower with float32 inputs and outputs.",
                )
        if len({tensor.tensor_name for tensor in tensors}) != len(tensors):
            raise BundleError(f"{path}: {field} contains one tensor twice.", hint=_COMPILE_AGAIN)
        return tuple(TensorSpec(tensor.tensor_name, "float32", tensor.cpu_shape) for tensor in tensors)

    return Boundary(specs("inputs", table.inputs), specs("outputs", table.outputs))


def _check_connectivity(path: Path, partition: str, elsewhere: Set[str], boundary: Boundary) -> None:
    """Check that the partitions are those of the folder, and the device's tensors those of its table."""
    connectivity = read_metadata(path, Connectivity)
    named = [name for name in connectivity.execution_order if name.startswith(_PARTITION)]
    device = [name for name in named if name not in elsewhere]
    if device != [partition]:
        raise BundleError(
            f"{path}: execution_order has the device partitions {', '.join(device) or 'none'}, but the folder contains "
            f"{partition}.",
            hint=_ONE_PARTITION,
        )
    edges = connectivity.graph_edges
    sides = {
        "takes": ({edge.shape for edge in edges if edge.destination_partition == partition}, boundary.inputs),
        "returns": ({edge.shape for edge in edges if edge.source_partition == partition}, boundary.outputs),
    }
    for verb, (shapes, tensors) in sides.items():
        listed = {squeezed(shape) for shape in shapes}
        for tensor in tensors:
            if squeezed(tensor.shape) not in listed:
                raise BundleError(
                    f"{path}: graph_edges does not list {tensor}, which {partition} {verb}.",
                    hint="The files come from different compilations; fetch or compile the tower again.",
                )


def _files(partition: Path, home: Path) -> tuple[tuple[str, Path], ...]:
    """Return every file in a partition's folder, by its path below the cache; none may be outside of `home`."""
    files: list[tuple[str, Path]] = []
    for folder, folders, names in os.walk(partition):
        for inner in (partition, *(Path(folder, name) for name in folders)):
            if inner.is_symlink():
                raise BundleError(
                    f"{inner} is a link to another folder, whose files would be missing.",
                    hint="Replace the link with the folder.",
                )
        for file in (Path(folder, name) for name in sorted(names)):
            try:
                regular = stat.S_ISREG(file.stat().st_mode)
            except OSError as error:
                raise BundleError(
                    f"{file} cannot be read: {error.strerror}.", hint="Fetch the folder again."
                ) from error
            if not regular:
                raise BundleError(f"{file} is not a file.", hint=_REFUSE_FOLDER)
            check_link(file, home)
            files.append((file.relative_to(partition.parent).as_posix(), file))
        if len(files) > _MOST_FILES:
            raise BundleError(f"{partition} contains more than {_MOST_FILES} files.", hint=_REFUSE_FOLDER)
    return tuple(sorted(files))


def read_metadata(path: Path, kind: type[_M]) -> _M:
    """Read one JSON file; BundleError with the file and the field if it is missing, too large or malformed."""
    hint = "Fetch the folder again, or compile the tower again."
    try:
        return kind.model_validate_json(read_bounded(path))
    except ValidationError as error:
        raise BundleError(f"{path} is not in the compiler's format: {problems_of(error)}.", hint=hint) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BundleError(f"{path} cannot be read: {reason}.", hint=hint) from error
