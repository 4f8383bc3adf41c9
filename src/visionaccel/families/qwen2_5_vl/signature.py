"""Named inputs and outputs of the tower's programs."""

from visionaccel.contracts import TensorSpec
from visionaccel.families.qwen2_5_vl.config import VisionConfig

__all__ = ["EMBEDDINGS", "graph_inputs", "graph_outputs"]

EMBEDDINGS = "embeddings"


def graph_inputs(config: VisionConfig) -> tuple[TensorSpec, ...]:
    """Inputs of the graph: the patches and the tables of `geometry.Tables`, and the number of frames."""
    half = config.head_dim // 2
    return (
        TensorSpec("pixel_values", "float32", ("patches", config.patch_width)),
        TensorSpec("window_index", "int64", ("tokens",)),
        TensorSpec("reverse_index", "int64", ("tokens",)),
        TensorSpec("window_patches", "int64", ("windows", config.window_patches)),
        TensorSpec("window_mask", "int32", ("windows", config.window_patches)),
        TensorSpec("window_slots", "int64", ("patches",)),
        TensorSpec("rotary_cos", "float32", ("patches", half)),
        TensorSpec("rotary_sin", "float32", ("patches", half)),
        TensorSpec("frames", "int64", (1,)),
    )


def graph_outputs(config: VisionConfig) -> tuple[TensorSpec, ...]:
    """The output of the graph, in the order of the input tokens."""
    return (TensorSpec(EMBEDDINGS, "float32", ("tokens", config.out_hidden_size)),)
