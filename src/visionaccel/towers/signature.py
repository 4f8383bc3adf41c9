"""Named inputs and outputs of the tower's programs, by what they cover and what they leave to the host."""

from visionaccel.core.contracts import TensorSpec
from visionaccel.core.program import AnyGrid, Bucket, Coverage, FixedGrid, HostSplit
from visionaccel.families.qwen2_5_vl.config import VisionConfig

__all__ = ["EMBEDDINGS", "PATCH_EMBEDDINGS", "PATCH_KERNEL", "PIXELS", "WINDOW_EMBEDDINGS", "Signature", "signature"]

PIXELS = "pixel_values"
"""Patches in input order: the program embeds them itself."""

PATCH_EMBEDDINGS = "patch_embeddings"
"""Embedded patches in window order, those of one token together: what the host hands to a split program."""

EMBEDDINGS = "embeddings"
"""Embeddings in the order of the input tokens."""

WINDOW_EMBEDDINGS = "window_embeddings"
"""Embeddings in window order: what a split program hands back."""

PATCH_KERNEL = "patch_embed.proj.weight"
"""The tower's kernel [hidden, channels, temporal patch, patch, patch] of the patch embedding, which has no bias."""

Signature = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]


def signature(config: VisionConfig, coverage: Coverage, host: HostSplit | None) -> Signature:
    """Inputs and outputs of an ONNX program.

    Args:
        config: Sizes of the tower.
        coverage: `AnyGrid`: sizes are names and every table is an input. `Bucket`: the same tables padded to fixed
            sizes, and the masks as terms that are added to the attention scores. `FixedGrid`: no table.
        host: With a split, the patches come embedded and the embeddings go out in window order.
    """
    half = config.head_dim // 2
    patches: int | str
    tokens: int | str
    windows: int | str
    match coverage:
        case AnyGrid():
            patches, tokens, windows = "patches", "tokens", "windows"
        case Bucket():
            patches, tokens, windows = coverage.patches, coverage.patches // config.merged_patches, coverage.windows
        case FixedGrid():
            patches, tokens, windows = coverage.grid.patches, coverage.grid.tokens(config.spatial_merge_size), 0
    first = (
        TensorSpec(PATCH_EMBEDDINGS, "float32", (tokens, config.merged_patches, config.hidden_size))
        if host
        else TensorSpec(PIXELS, "float32", (patches, config.patch_width))
    )
    last = TensorSpec(WINDOW_EMBEDDINGS if host else EMBEDDINGS, "float32", (tokens, config.out_hidden_size))
    if isinstance(coverage, FixedGrid):
        return (first,), (last,)
    orders = ("window_index", "reverse_index") if host is None else ()
    order = tuple(TensorSpec(name, "int64", (tokens,)) for name in orders)
    rotary = (
        TensorSpec("rotary_cos", "float32", (patches, half)),
        TensorSpec("rotary_sin", "float32", (patches, half)),
    )
    rows = TensorSpec("window_patches", "int64", (windows, config.window_patches))
    slots = TensorSpec("window_slots", "int64", (patches,))
    if isinstance(coverage, Bucket):
        masks = (
            TensorSpec("window_bias", "float32", (windows, 1, config.window_patches)),
            TensorSpec("frame_bias", "float32", (patches,)),
        )
        return (first, *order, rows, slots, *rotary, *masks), (last,)
    mask = TensorSpec("window_mask", "int32", (windows, config.window_patches))
    return (first, *order, rows, mask, slots, *rotary, TensorSpec("frames", "int64", (1,))), (last,)
