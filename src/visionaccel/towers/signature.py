"""Named inputs and outputs of a tower's programs, by what they cover and what they leave to the host."""

from visionaccel.core.contracts import TensorSpec
from visionaccel.core.program import Bucket, Coverage, FixedGrid, HostSplit
from visionaccel.core.tower_spec import TowerSpec

__all__ = [
    "EMBEDDINGS", "GRIDS", "PATCH_EMBEDDINGS", "PIXELS", "WINDOW_EMBEDDINGS", "Signature", "checkpoint_signature",
    "signature",
]  # fmt: skip

PIXELS = "pixel_values"
"""Patches in input order: the program embeds them itself."""

GRIDS = "grid_thw"
"""The grids of a call, for a program that makes its own tables."""

PATCH_EMBEDDINGS = "patch_embeddings"
"""Embedded patches in the program's own order, those of one token together: what the host hands to a split program."""

EMBEDDINGS = "embeddings"
"""Embeddings in the order of the input tokens."""

WINDOW_EMBEDDINGS = "window_embeddings"
"""Embeddings in the program's own order: what a split program hands back."""

Signature = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]


def signature(spec: TowerSpec, coverage: Coverage, host: HostSplit | None) -> Signature:
    """Inputs and outputs of an ONNX program.

    Args:
        spec: The tower.
        coverage: `AnyGrid`: sizes are names and every table is an input. `Bucket`: the same tables padded to fixed
            sizes, and the masks as terms that are added to the attention scores. `FixedGrid`: no table.
        host: With a split, the patches come embedded and the embeddings go out in the program's own order.
    """
    patches: int | str = "patches"
    tokens: int | str = "tokens"
    windows: int | str = "windows"
    match coverage:
        case Bucket():
            patches, tokens = coverage.patches, coverage.patches // spec.merged
            windows = coverage.sizes.get("windows", 0)
        case FixedGrid():
            patches, tokens = coverage.grid.patches, coverage.grid.tokens(spec.merge)
    first = (
        TensorSpec(PATCH_EMBEDDINGS, "float32", (tokens, spec.merged, spec.hidden))
        if host
        else TensorSpec(PIXELS, "float32", (patches, spec.patch_width))
    )
    last = TensorSpec(WINDOW_EMBEDDINGS if host else EMBEDDINGS, "float32", (tokens, spec.out_width))
    if isinstance(coverage, FixedGrid):
        return (first,), (last,)
    found, masked = [first], isinstance(coverage, Bucket)
    if spec.window is not None:
        width = spec.window_patches
        if host is None:
            found += [TensorSpec(name, "int64", (tokens,)) for name in ("window_index", "reverse_index")]
        found.append(TensorSpec("window_patches", "int64", (windows, width)))
        found += [] if masked else [TensorSpec("window_mask", "int32", (windows, width))]
        found.append(TensorSpec("window_slots", "int64", (patches,)))
    found += [TensorSpec(name, "float32", (patches, spec.head_dim // 2)) for name in ("rotary_cos", "rotary_sin")]
    if masked:
        if spec.window is not None:
            found.append(TensorSpec("window_bias", "float32", (windows, 1, spec.window_patches)))
        found.append(TensorSpec("frame_bias", "float32", (patches,)))
    else:
        found.append(TensorSpec("frames", "int64", (1,)))
    if spec.positions is not None and host is None:
        taps = spec.positions.taps
        found.append(TensorSpec("position_index", "int64", (taps, patches)))
        found.append(TensorSpec("position_weight", "float32", (taps, patches, 1)))
    return tuple(found), (last,)


def checkpoint_signature(spec: TowerSpec) -> Signature:
    """Inputs and outputs of the program of the weights themselves."""
    inputs = TensorSpec(PIXELS, "float32", ("patches", spec.patch_width)), TensorSpec(GRIDS, "int64", ("images", 3))
    return inputs, (TensorSpec(EMBEDDINGS, "float32", ("tokens", spec.out_width)),)
