"""The manifest of a bundle: the information about an encoder's programs that is needed to open one.

`visionaccel.json` is this model as JSON. Its schema has a version; unknown versions, fields and kinds are refused,
because a reader that ignores them might run the wrong program. `digest` seals the rest, so that a flipped bit in a grid
is a damaged file rather than a different grid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from visionaccel.bundle.upgrades import SCHEMA_VERSION, upgraded
from visionaccel.core.bounded_files import parse_json, read_bounded
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.digests import json_digest
from visionaccel.core.grid import Grid
from visionaccel.core.invalid_values import problems_of
from visionaccel.core.program import AnyGrid, Bucket, Coverage, FixedGrid, HostSplit, Precision
from visionaccel.errors import BundleError

MANIFEST = "visionaccel.json"
MOST_PATCHES = 2**20
"""The maximum number of patches of a program of fixed shapes, about 200 megapixels. It limits the host's tables."""


_AGAIN = "Export or fetch the bundle again."


def _inside(path: str) -> str:
    """Require a path that stays in the folder on every operating system."""
    parts = PurePosixPath(path).parts
    if (
        not parts
        or path != "/".join(parts)
        or any(part in ("..", ".", "/") for part in parts)
        or any(c in path for c in "\\:\0")
        or path.casefold() == MANIFEST
    ):
        raise ValueError("must be a plain relative path within the bundle, such as 58x74.onnx")
    return path


def _printable(text: str) -> str:
    """Require text without control characters, which a terminal would interpret."""
    if not text.isprintable():
        raise ValueError("must contain only printable characters")
    return text


RelativePath: TypeAlias = Annotated[
    str, StringConstraints(max_length=512), AfterValidator(_inside), AfterValidator(_printable)
]
Digest: TypeAlias = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Name: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_printable)]
Text: TypeAlias = Annotated[str, StringConstraints(max_length=4096), AfterValidator(_printable)]
Size: TypeAlias = Annotated[int, Field(ge=1, le=2**40)]
FrameSize: TypeAlias = Annotated[int, Field(ge=1, le=MOST_PATCHES)]
Cosine: TypeAlias = Annotated[float, Field(ge=-1.000001, le=1.000001)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


class BundleFile(_Model):
    """A file of the bundle."""

    path: RelativePath
    bytes: int = Field(ge=0, le=2**62)
    sha256: Digest


class Tensor(_Model):
    """A named input or output."""

    name: Name
    dtype: Literal["float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"]
    shape: tuple[Size | Name, ...] = Field(description="Sizes; a text is the name of a size that varies between calls.")
    stored_name: Name | None = Field(None, description="Its name inside the program's file; null: the same.")

    @property
    def spec(self) -> TensorSpec:
        """The tensor as programs declare it."""
        return TensorSpec(self.name, self.dtype, self.shape)


class FixedCoverage(_Model):
    """One grid, whose tables are constants of the program."""

    kind: Literal["fixed"]
    grid: tuple[Literal[1], FrameSize, FrameSize] = Field(
        description="t, h, w in patches; t is 1: one frame in a call."
    )

    @model_validator(mode="after")
    def _bounded(self) -> FixedCoverage:
        if math.prod(self.grid) > MOST_PATCHES:
            raise ValueError(f"a grid of {math.prod(self.grid)} patches is larger than {MOST_PATCHES}")
        return self


class BucketCoverage(_Model):
    """Any frame within these sizes, padded to them; tables and masks are inputs."""

    kind: Literal["bucket"]
    sizes: dict[Name, FrameSize] = Field(
        description="The maximum of each count of a frame: `patches`, and `windows` if the tower has them."
    )

    @model_validator(mode="after")
    def _counts_patches(self) -> BucketCoverage:
        if "patches" not in self.sizes:
            raise ValueError("the sizes of a bucket do not include patches")
        return self


class DynamicCoverage(_Model):
    """Any grid; tables are inputs of any size."""

    kind: Literal["dynamic"]
    most_patches: Size | None = Field(None, description="The maximum number of patches of a frame; null: no limit.")


class HostEntry(_Model):
    """What the program leaves to the host: patch embedding and a reorder before, the reverse reorder after."""

    order: Name = Field(description="Order of the tokens in the program's inputs and outputs: the tower's name for it.")
    tensors: tuple[Name, ...] = Field(description="The tower's weights that the host needs.")


class QuantizationEntry(_Model):
    """How a program's matrix products were quantized."""

    dtype: Literal["int8"] = Field(description="Integer type of the products' operands.")
    method: Text = Field(description="A description of the method.")
    target: Name = Field(description="The backend that quantized it.")
    calibration_images: int = Field(ge=1, description="Number of calibration images.")


class ProgramEntry(_Model):
    """One program."""

    name: Name
    format: Name = Field(description="`onnx`, or a format of a backend plug-in.")
    model: RelativePath = Field(description="The file to open; one of `files`.")
    files: tuple[BundleFile, ...] = Field(min_length=1)
    companions: dict[Name, RelativePath] = Field(
        default_factory=dict, description="Those of `files` that a backend needs with the model, by their role."
    )
    inputs: tuple[Tensor, ...] = Field(min_length=1)
    outputs: tuple[Tensor, ...] = Field(min_length=1)
    coverage: Annotated[FixedCoverage | BucketCoverage | DynamicCoverage, Field(discriminator="kind")]
    precision: Precision
    quantization: QuantizationEntry | None = Field(
        None, description="null: matrix products have `precision`, like everything else."
    )
    device: Name | None = Field(None, description="Kind of device that it was made for, such as `npu`; null: any.")
    host: HostEntry | None = Field(None, description="null: only the tables are left to the host.")

    @model_validator(mode="after")
    def _consistent(self) -> ProgramEntry:
        if self.model not in {file.path for file in self.files}:
            raise ValueError(f"model {self.model!r} is not among the program's files")
        if not set(self.companions.values()) <= {file.path for file in self.files}:
            raise ValueError("a companion is not among the program's files")
        for tensors in (self.inputs, self.outputs):
            if len({tensor.name for tensor in tensors}) != len(tensors):
                raise ValueError("two tensors have the same name")
            if len({tensor.stored_name or tensor.name for tensor in tensors}) != len(tensors):
                raise ValueError("two tensors have the same name inside the program's file")
        return self

    def covers(self) -> Coverage:
        """Return the coverage as programs declare it."""
        match self.coverage:
            case FixedCoverage(grid=grid):
                return FixedGrid(Grid(*grid))
            case BucketCoverage(sizes=sizes):
                return Bucket(sizes)
            case DynamicCoverage(most_patches=most):
                return AnyGrid(most)

    @property
    def split(self) -> HostSplit | None:
        """What is left to the host, as programs declare it."""
        return HostSplit(self.host.order) if self.host else None


class ExternalCheckpoint(_Model):
    """The checkpoint with the weights of a bundle that has none; its weights must have the manifest's digest."""

    source: Annotated[Text, StringConstraints(min_length=1)] = Field(
        description="A folder or a Hugging Face repository."
    )
    revision: Name | None = None


class ProgramResult(_Model):
    """The validation of one program."""

    program: Name
    backend: Name
    device: Name
    simulated: bool
    grids: tuple[Name, ...] = Field(description="Grids that were run, as TxHxW.")
    images: int = Field(ge=1, description="Number of encodes compared.")
    tokens: int = Field(ge=1, description="Number of embeddings compared.")
    lowest_cosine: Cosine
    first_percentile_cosine: Cosine
    mean_cosine: Cosine
    relative_error: float = Field(ge=0, description="Norm of the difference divided by that of the reference.")
    nonfinite_rows: int = Field(ge=0, description="Embeddings with NaN or infinity; they count as cosine -1.")
    threshold: Cosine = Field(description="The lowest cosine that passes.")
    failure: Text | None = Field(None, description="Why it could not be run, or how it differs; null: it passed.")


class Certificate(_Model):
    """How much the programs differ from the float32 reference, and on which devices and images."""

    created: Name = Field(description="Time in ISO 8601.")
    reference: Digest = Field(description="Digest of the reference's vision weights.")
    independent: bool = Field(
        True,
        description="Whether the reference was transformers' own tower. Otherwise it was visionaccel's in float32, "
        "which uses the same description of the tower as the programs, so an error in it goes unnoticed.",
    )
    images: dict[Name, int] = Field(description="Number of images by kind: generated, real.")
    programs: tuple[ProgramResult, ...] = Field(min_length=1)
    toolchain: dict[Name, Name] = Field(description="Versions of the software that ran.")
    passed: bool


class Manifest(_Model):
    """A bundle: an encoder's programs, with everything needed to run them correctly or to refuse them."""

    schema_version: Literal[2]
    family: Name
    spec: dict[str, Any] = Field(description="The complete description of the vision tower.")
    weights_digest: Digest = Field(description="Digest of the vision weights that the programs were made from.")
    processor_digest: Digest | None = Field(description="Digest of the image processor's configuration.")
    checkpoint: ExternalCheckpoint | None = Field(description="null: the bundle contains the weights itself.")
    files: tuple[BundleFile, ...] = Field(description="Files that all programs share.")
    programs: tuple[ProgramEntry, ...] = Field(min_length=1, description="Of equal coverages, the preferred first.")
    toolchain: dict[Name, Name] = Field(description="Versions of the software that wrote it.")
    certificate: Certificate | None = None
    digest: Digest = Field(description="SHA-256 of this document without this field; see `seal`.")

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        names = [program.name for program in self.programs]
        if len(set(names)) != len(names):
            raise ValueError("two programs have the same name")
        seen: dict[str, BundleFile] = {}
        for file in self.every_file():
            if seen.setdefault(file.path, file) != file:
                raise ValueError(f"file {file.path!r} has two different entries")
        return self

    def every_file(self) -> tuple[BundleFile, ...]:
        """Return the files of the bundle and of its programs; a file that programs share may occur twice."""
        return (*self.files, *(file for program in self.programs for file in program.files))


def stated_coverage(coverage: Coverage) -> FixedCoverage | BucketCoverage | DynamicCoverage:
    """Return the manifest's entry of a program's coverage."""
    match coverage:
        case FixedGrid(grid=grid):
            return FixedCoverage(kind="fixed", grid=(1, grid.h, grid.w))
        case Bucket(sizes=sizes):
            return BucketCoverage(kind="bucket", sizes=dict(sizes))
        case AnyGrid(most_patches=most):
            return DynamicCoverage(kind="dynamic", most_patches=most)


def seal(document: Mapping[str, Any]) -> Manifest:
    """Make a manifest from its JSON document, and compute its digest.

    Raises:
        BundleError: If the document is not a valid manifest.
    """
    body = {name: value for name, value in document.items() if name != "digest"}
    manifest = _validated({**body, "digest": json_digest(body)}, "the manifest")
    # Readers compute the digest of the written form, which has the defaults, and 1.0 where a float was given as 1.
    written = manifest.model_dump(mode="json", exclude={"digest"})
    return manifest.model_copy(update={"digest": json_digest(written)})


def parse_manifest(path: Path) -> Manifest:
    """Read a manifest of schema version 1 or 2, and return it in version 2.

    Raises:
        BundleError: If it is missing or damaged, or has an unknown schema version, field or kind.
        CheckpointError: If a manifest of version 1 has an incomplete or impossible vision configuration.
        UnsupportedArchitectureError: If a manifest of version 1 has an unknown family.
    """
    try:
        document = parse_json(read_bounded(path).decode("utf-8"))
    except FileNotFoundError:
        raise BundleError(
            f"{path} does not exist.", hint="Pass a bundle folder; `visionaccel export` writes one."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}", hint=_AGAIN) from error
    if not isinstance(document, dict):
        raise BundleError(f"{path} is not a JSON object.", hint=_AGAIN)
    manifest = _validated(upgraded(document, str(path)), str(path))
    stated = {name: value for name, value in document.items() if name != "digest"}
    if manifest.digest != json_digest(stated):
        raise BundleError(f"{path} does not match its digest: it was damaged or edited.", hint=_AGAIN)
    return manifest if stated["schema_version"] == SCHEMA_VERSION else seal(manifest.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the manifest, which the documentation includes."""
    return Manifest.model_json_schema()


def _validated(document: dict[str, Any], where: str) -> Manifest:
    try:
        # From JSON, so that strict checks accept lists for tuples.
        return Manifest.model_validate_json(json.dumps(document))
    except (ValidationError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{where} is not a manifest that this visionaccel supports: {problems_of(error)}.",
            hint="Export the bundle again, or use the visionaccel that wrote it.",
        ) from error
