"""Programs that a backend can run, described without loading them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from visionaccel.core.contracts import TensorSpec
from visionaccel.core.grid import Grid
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.core.tower_spec import TowerSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

ONNX = "onnx"
"""An ONNX model as bytes, with its external data under `Program.folder`. A model for any grid is written in ONNX
Runtime's operators (`com.microsoft`), one of fixed shapes in standard operators."""

ONNX_STANDARD = "onnx.standard"
"""An ONNX model for any grid in standard operators (opset 23), with a mask for each query; or one of any shapes with
int8 products between `QuantizeLinear` and `DequantizeLinear`."""

ONNX_FUSED = "onnx.fused"
"""An ONNX model of fixed shapes in ONNX Runtime's own operators (`com.microsoft`), which no other runtime supports."""

ONNX_MODELS = frozenset({ONNX, ONNX_FUSED, ONNX_STANDARD})
"""Formats that read the tower's weights by name, from the bundle or the checkpoint."""

CHECKPOINT = "checkpoint"
"""A Hugging Face checkpoint folder, for a backend that builds the tower from its weights."""

EP_CONTEXT = "onnx.ep_context"
"""An ONNX model around a program that an execution provider compiled; needs that provider."""

HOST_BEFORE = "host_before"
"""Role of the companion that ONNX Runtime runs before the device's part: an ONNX model of host operators."""

HOST_AFTER = "host_after"
"""Role of the companion that ONNX Runtime runs after the device's part."""

DEVICE_TENSORS = "device_tensors"
"""Role of the companion that lists, in JSON, the tensors between these two and the device's part."""

PIXELS = "pixel_values"
"""Patches in input order: the program embeds them itself."""

GRIDS = "grid_thw"
"""The grids of a call, for a program that makes its own tables."""

PATCH_EMBEDDINGS = "patch_embeddings"
"""Embedded patches in the program's own order, those of one token together: the input of a split program."""

EMBEDDINGS = "embeddings"
"""Embeddings in the order of the input tokens."""

WINDOW_EMBEDDINGS = "window_embeddings"
"""Embeddings in the program's own order: the output of a split program."""

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
"""Dtype of a program's weights and activations; its inputs and outputs are always float32."""

OperatorDialect: TypeAlias = Literal["microsoft", "standard"]
"""Operators of an ONNX model: ONNX Runtime's own where they are faster, or standard operators only."""


@dataclass(frozen=True, slots=True)
class AnyGrid:
    """Every grid, and several items in a call: the grid-dependent tables are inputs of any size.

    Attributes:
        most_patches: The maximum number of patches in a frame; None for no limit.
    """

    most_patches: int | None = None

    def __str__(self) -> str:
        return "any grid" if self.most_patches is None else f"any grid of up to {self.most_patches} patches"


@dataclass(frozen=True, slots=True)
class FixedGrid:
    """One frame of one grid in a call: the tables of that grid are baked in."""

    grid: Grid

    def __str__(self) -> str:
        return f"{self.grid.h}x{self.grid.w}"


@dataclass(frozen=True, slots=True)
class Bucket:
    """One frame of any grid up to fixed sizes in a call, padded: the tables and masks are inputs.

    Attributes:
        sizes: The maximum of each count that the tower makes of a frame, by the tower's name for it, such as `windows`;
            `patches` is always one of them.
    """

    sizes: Mapping[str, int]

    def __hash__(self) -> int:
        """Hash the sizes: a mapping cannot be hashed."""
        return hash(frozenset(self.sizes.items()))

    @property
    def patches(self) -> int:
        """The maximum number of patches in a frame."""
        return self.sizes["patches"]

    def __str__(self) -> str:
        return "up to " + " in ".join(f"{size} {name}" for name, size in self.sizes.items())


Coverage: TypeAlias = AnyGrid | FixedGrid | Bucket
"""Which grids a program takes, and how many items in a call."""


@dataclass(frozen=True, slots=True)
class HostSplit:
    """What a program leaves to the host: patch embedding and a reorder before it, the reverse reorder after it.

    Attributes:
        order: The order of tokens in the program's inputs and outputs, by the tower's name for it.
    """

    order: str


@dataclass(frozen=True)
class Program:
    """One artifact that computes an encoder, with named inputs and outputs.

    Attributes:
        name: Its name, unique in its bundle or checkpoint.
        family: The name of the vision tower's family.
        format: What kind of artifact it is: `onnx`, `checkpoint`, or a plug-in's own name.
        folder: The checkpoint folder (`checkpoint`), or the folder that external-data locations start from (`onnx`).
        inputs: Tensors that a session takes.
        outputs: Tensors that a session returns.
        weights: Where the tower's tensors are stored, by their names in the tower spec.
        uniform_frames: Whether all frames of one call must have the same height and width in patches.
        coverage: Which grids it takes.
        precision: Dtype of its weights and activations.
        host: What it leaves to the host; None if that is only the tables.
        quantization: Integer type of its products, such as `int8`; None if they are computed in `precision`.
        device: Kind of device that it was made for, such as `npu`; None for any.
        model: Returns the artifact's bytes; called when a session opens, never by a probe. None without an artifact.
        spec: The description of the tower, for a backend that builds it from its weights; None in other programs.
        configuration: The architectures and the vision configuration of the checkpoint's `config.json`, for a reference
            that does not use `spec`; None in other programs.
        tables: Returns the grid-dependent tables of one call by the names of a program's inputs, for a backend that
            builds the tower from its weights; None if they are baked in or are inputs. Can be pickled.
        artifact: The verified file to open, for a backend that maps or reads it itself; None without an artifact.
        companions: Further verified files by their role, such as a compiler's configuration.
        stored_names: Names of inputs and outputs inside the artifact, by their names here, where they differ.
        files: Digests of the artifact and the companions, as `sha256:` and hexadecimal digits; empty if unknown.
        digest: Identifies the artifact and its weights, for caches; None if unknown.
    """

    name: str
    family: str
    format: str
    folder: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: Mapping[str, StoredTensor] = field(compare=False, repr=False)
    uniform_frames: bool
    coverage: Coverage = AnyGrid()
    precision: Precision = "float32"
    host: HostSplit | None = None
    quantization: Literal["int8"] | None = None
    device: str | None = None
    model: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)
    spec: TowerSpec | None = field(default=None, compare=False, repr=False)
    configuration: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    tables: Callable[[Sequence[Grid]], Mapping[str, NDArray[Any]]] | None = field(
        default=None, compare=False, repr=False
    )
    artifact: Path | None = None
    companions: Mapping[str, Path] = field(default_factory=dict, compare=False, repr=False)
    stored_names: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    files: Mapping[Path, str] = field(default_factory=dict, compare=False, repr=False)
    digest: str | None = None
