"""TinyVLM's tower in plain PyTorch, of one frame at a time: written from the paper, not from the family."""

import torch
from torch.nn import functional


def reference(weights, heads, patches, h, w):
    """Return the embeddings of a frame of h x w patches."""

    def linear(x, name):
        return functional.linear(x, weights[f"{name}.weight"].flatten(1), weights.get(f"{name}.bias"))

    def norm(x, name):
        return functional.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], 1e-6)

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    x = linear(patches, "patch_embedding")
    blocks = h // 2, w // 2, 2, 2  # patches are ordered by blocks of 2 x 2
    row = torch.arange(h).view(h // 2, 1, 2, 1).expand(blocks).reshape(-1, 1)
    column = torch.arange(w).view(1, w // 2, 1, 2).expand(blocks).reshape(-1, 1)
    quarter = x.shape[1] // heads // 4
    frequencies = 10000.0 ** -(torch.arange(quarter) / quarter)
    angles = torch.cat([row * frequencies, column * frequencies], dim=1).repeat(1, 2)
    for layer in range(sum(name.endswith("attention.out.bias") for name in weights)):
        mixed = linear(norm(x, f"layers.{layer}.attention_norm"), f"layers.{layer}.attention.qkv")
        q, k, v = mixed.view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        attended = functional.scaled_dot_product_attention(rotate(q), rotate(k), v)
        x = x + linear(attended.transpose(0, 1).flatten(1), f"layers.{layer}.attention.out")
        inner = functional.silu(linear(norm(x, f"layers.{layer}.mlp_norm"), f"layers.{layer}.mlp.up"))
        x = x + linear(inner, f"layers.{layer}.mlp.down")
    merged = norm(x, "merger.norm").view(len(x) // 4, -1)
    return linear(functional.gelu(linear(merged, "merger.up")), "merger.down")
