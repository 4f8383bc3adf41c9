"""Faults in the mathematics of a family's tower: the backend returns plausible numbers, but one step is wrong."""

from conformance.planted import Planted

__all__ = ["PLANTED_IN_TOWERS"]

PLANTED_IN_TOWERS = (
    Planted(
        "gelu_for_quick_gelu", "L2-tower-qwen2_vl", "cosine",
        'replaced("QuickGelu", "Gelu")',
    ),
    Planted(
        "dropped_bias", "L2-tower-qwen2_vl", "cosine",
        """
        def change(graph):
            (bias,) = (each for each in graph.initializer if each.name == "blocks.1.attn.proj.bias")
            (node,) = (each for each in graph.node if bias.name in each.input)
            node.input.remove(bias.name)
            graph.initializer.remove(bias)
        on_graph(change)
        """,
    ),
    Planted(
        "quick_gelu_for_gelu", "L2-tower-qwen2_5_vl", "cosine",
        'replaced("Gelu", "QuickGelu", alpha=1.702)',
    ),
    Planted(
        "swapped_queries_and_keys", "L2-tower-qwen2_5_omni", "cosine",
        """
        def change(graph):
            swapped = {"blocks.0.attn.q.weight": "blocks.0.attn.k.weight"}
            swapped |= {other: name for name, other in swapped.items()}
            for node in graph.node:
                node.input[:] = [swapped.get(name, name) for name in node.input]
        on_graph(change)
        """,
    ),
    Planted(
        "gelu_for_tanh", "L2-tower-qwen3_5", "less exact than the precision promises",
        'replaced("FastGelu", "Gelu")',
    ),
    Planted(
        "tanh_for_gelu", "L2-tower-qwen3_5", "less exact than the precision promises",
        'replaced("Gelu", "FastGelu")',
    ),
    Planted(
        "transposed_positions", "L2-tower-qwen3_vl", "cosine",
        """
        def run(self, inputs):
            row, column = np.divmod(inputs["position_index"], 12)
            return _run(self, {**inputs, "position_index": 12 * column + row})
        Session.run = run
        """,
    ),
    Planted(
        "missing_level", "L2-tower-qwen3_vl", "first in row 0, deepstack level 2",
        """
        def change(self, inputs, rows):
            rows = rows.copy()
            rows[:, 48:] = 0
            return rows
        on_output(change)
        """,
    ),
    Planted(
        "level_of_other_tokens", "L2-tower-qwen3_vl", ", deepstack level 1.",
        """
        def change(self, inputs, rows):
            rows = rows.copy()
            rows[:, 24:48] = rows[::-1, 24:48]
            return rows
        on_output(change)
        """,
    ),
    Planted(
        "swapped_levels", "L2-tower-qwen3_omni", ", deepstack level",
        "on_output(lambda self, inputs, rows: np.concatenate([rows[:, :24], rows[:, 48:], rows[:, 24:48]], axis=1))",
    ),
    Planted(
        "transposed_kernel", "L2-tower-glm4v", "cosine",
        """
        def change(graph):
            for node in graph.node:
                for attribute in node.attribute:
                    if attribute.name == "perm" and list(attribute.ints) == [0, 2, 3, 1]:
                        attribute.ints[:] = [0, 3, 2, 1]
        on_graph(change)
        """,
    ),
    Planted(
        "nearest_positions", "L2-tower-glm4v", "cosine",
        """
        def run(self, inputs):
            weight = inputs["position_weight"]
            nearest = weight == weight.max(axis=0, keepdims=True)
            return _run(self, {**inputs, "position_weight": nearest.astype(np.float32)})
        Session.run = run
        """,
    ),
    Planted(
        "no_patch_norm", "L2-tower-dots_ocr", "cosine",
        """
        def change(graph):
            node = next(node for node in graph.node if node.op_type == "Div")
            node.op_type = "Identity"
            del node.input[1]
        on_graph(change)
        """,
    ),
)  # fmt: skip
