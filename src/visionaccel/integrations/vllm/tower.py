"""The module that stands where vLLM's vision tower stood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from visionaccel.arrays import is_tensor
from visionaccel.backends import AUTO
from visionaccel.checkpoint import locate_checkpoint
from visionaccel.encoder import Encoder, open_encoder
from visionaccel.errors import ConfigurationError, VisionAccelError
from visionaccel.families import Tower, tower_of
from visionaccel.grid import as_grids
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.faults import Fault, item_key, report_fault
from visionaccel.runtime.guarded import GuardedEncoder
from visionaccel.runtime.timing import TimingLog
from visionaccel.settings import Settings, load_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["AcceleratedTower", "open_guarded"]


class AcceleratedTower(nn.Module):
    """Encodes in the engine's step. Has no parameters; nothing of a checkpoint is loaded into it.

    Attributes:
        spatial_merge_size: Patches merged into one token along each side.
        out_hidden_size: Width of an embedding.
        dtype: Dtype of the embeddings: the language model's.
        device: Device of the embeddings: the language model's.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__()
        model, vision = vllm_config.model_config, vllm_config.model_config.hf_config.vision_config
        settings = load_settings()
        source = settings.bundle or model.model
        revision = None if settings.bundle else model.revision
        tower = tower_of(locate_checkpoint(source, revision))
        _check_fit(tower, vision, str(source))
        self.spatial_merge_size: int = vision.spatial_merge_size
        self.out_hidden_size: int = vision.out_hidden_size
        self.dtype: torch.dtype = model.dtype
        self.device = torch.device(vllm_config.device_config.device)
        self.encoder = open_guarded(tower, settings)

    def forward(self, x: torch.Tensor, grid_thw: Any, **_: Any) -> torch.Tensor:
        """Embeddings of the items of one step.

        Args:
            x: [P, patch_width] in the model's dtype, the processor's pixel values.
            grid_thw: (t, h, w) of each item.

        Returns:
            [N, out_hidden_size] in the model's dtype and on its device. An item that could not be encoded is zeros, and
            the scheduler has been told to end its requests before their first token.

        Raises:
            VisionAccelError: If an item could not be encoded and no scheduler of this package listens, as at start-up.
        """
        rows = []
        for item, answer in enumerate(self.encoder.encode_items(x, grid_thw)):
            if isinstance(answer, VisionAccelError):
                answer = self._contain(x, grid_thw, item, answer)
            embeddings = answer if is_tensor(answer) else torch.from_numpy(answer)
            rows.append(embeddings.to(self.device, self.dtype))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _contain(self, x: torch.Tensor, grid_thw: Sequence[Any], item: int, error: VisionAccelError) -> torch.Tensor:
        grids = as_grids(grid_thw)
        start = sum(grid.patches for grid in grids[:item])
        grid = grids[item]
        if not report_fault(Fault(item_key(x[start : start + grid.patches], grid), str(error))):
            raise error
        return torch.zeros(grid.tokens(self.spatial_merge_size), self.out_hidden_size)


def open_guarded(tower: Tower, settings: Settings) -> GuardedEncoder:
    """The encoder that the settings ask for; its fallback if it cannot start and one is set.

    Raises:
        VisionAccelError: If neither can start; the message says why and what to do.
    """

    def fallback() -> Encoder:
        assert settings.fallback is not None
        return open_encoder(tower, backend=settings.fallback)

    try:
        primary = open_encoder(
            tower, backend=settings.backend or AUTO, device=settings.device, options=settings.options
        )
    except VisionAccelError as error:
        if settings.fallback is None:
            raise
        compat.logger().error("Starting with the fallback %r, because %s", settings.fallback, error)
        primary = fallback()
    if settings.timing:
        TimingLog.install()
    capabilities = primary.session.capabilities
    compat.logger().info(
        "visionaccel: the vision encoder runs on backend %r, device %s%s, %s arithmetic, in-line; fallback: %s",
        primary.backend,
        capabilities.device,
        " (simulated)" if capabilities.simulated else "",
        capabilities.precision,
        settings.fallback or "none",
    )
    return GuardedEncoder(primary, None if settings.fallback in (None, primary.backend) else fallback)


def _check_fit(tower: Tower, vision: Any, source: str) -> None:
    """Refuse an encoder that was made for another model than the served one."""
    served = (
        vision.out_hidden_size,
        vision.spatial_merge_size,
        int(np.prod([vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size])),
    )
    ours = (tower.out_width, tower.merge_size, tower.patch_width)
    if ours != served:
        raise ConfigurationError(
            f"the encoder in {source} has embedding width, merge size and patch width {ours}; the served model needs "
            f"{served}.",
            hint="Point VISIONACCEL_BUNDLE at the encoder of the served model.",
        )
