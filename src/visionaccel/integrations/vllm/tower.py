"""The module that stands where vLLM's vision tower stood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from visionaccel.arrays import as_host_tensor, dtype_name, is_tensor
from visionaccel.backends import AUTO
from visionaccel.bundle import Bundle
from visionaccel.encoder import Encoder, open_encoder
from visionaccel.errors import (
    BackendUnavailableError,
    ConfigurationError,
    DeviceError,
    InputError,
    PluginError,
    VisionAccelError,
)
from visionaccel.families import Tower
from visionaccel.grid import as_grids
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.faults import Fault, report_fault
from visionaccel.integrations.vllm.source import open_served_source
from visionaccel.runtime.guarded import GuardedEncoder
from visionaccel.runtime.keys import item_key
from visionaccel.runtime.timing import TimingLog
from visionaccel.settings import Settings, load_settings

__all__ = ["AbsentTower", "AcceleratedTower", "open_guarded"]


class AbsentTower(nn.Module):
    """Stands in where prompts may hold no image and no video: no encoder is opened."""


class AcceleratedTower(nn.Module):
    """Encodes in the engine's step. Has no parameters; nothing of a checkpoint is loaded into it.

    Attributes:
        spatial_merge_size: Patches merged into one token along each side.
        out_hidden_size: Width of an embedding.
        dtype: Dtype of the embeddings: the language model's.
        device: Device of the embeddings: the language model's.
    """

    def __init__(self, served: compat.ServedModel) -> None:
        super().__init__()
        settings = load_settings()
        source = open_served_source(served.source, served.revision, settings)
        tower = source.tower if isinstance(source, Bundle) else source
        _check_fit(tower, served.vision, str(settings.bundle or served.source))
        self.spatial_merge_size = tower.merge_size
        self.out_hidden_size = tower.out_width
        self.dtype = served.dtype
        self.device = torch.device(served.device)
        # vLLM builds models under a default device, which is no business of the backend's.
        with torch.device("cpu"):
            self.encoder = open_guarded(source, settings)

    def forward(self, x: torch.Tensor, grid_thw: Any, **_: Any) -> torch.Tensor:
        """Embeddings of the items of one step.

        Args:
            x: [P, patch_width] in the model's dtype, the processor's pixel values.
            grid_thw: (t, h, w) of each item.

        Returns:
            [N, out_hidden_size] in the model's dtype and on its device. An item that could not be encoded is zeros, and
            the scheduler has been told to end its requests before their first token.

        Raises:
            VisionAccelError: If an item could not be encoded and no scheduler of this package listens, as at start-up;
                or if patches and grids disagree so that no item's rows are known, which vLLM's processor rules out.
        """
        rows = []
        for item, answer in enumerate(self.encoder.encode_items(x, grid_thw)):
            if isinstance(answer, VisionAccelError):
                answer = self._contain(x, grid_thw, item, answer)
            embeddings = answer if is_tensor(answer) else as_host_tensor(answer, dtype_name(self))
            rows.append(embeddings.to(self.device, self.dtype))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _contain(self, x: torch.Tensor, grid_thw: Sequence[Any], item: int, error: VisionAccelError) -> torch.Tensor:
        try:
            grids = as_grids(grid_thw, self.spatial_merge_size)
        except InputError:
            raise error from None
        start = sum(grid.patches for grid in grids[:item])
        grid = grids[item]
        if not report_fault(Fault(item_key(x[start : start + grid.patches], grid), str(error))):
            raise error
        return torch.zeros(grid.tokens(self.spatial_merge_size), self.out_hidden_size)


def open_guarded(source: Tower | Bundle, settings: Settings) -> GuardedEncoder:
    """The encoder that the settings ask for; its fallback if it cannot run here and one is set.

    The fallback runs on the weights, so that it takes every grid whatever programs a bundle has.

    Raises:
        VisionAccelError: If neither can start, or a setting is wrong; the message says why and what to do.
    """
    name = settings.fallback
    tower = source.tower if isinstance(source, Bundle) else source

    def open_fallback() -> Encoder:
        return open_encoder(
            tower,
            backend=name or AUTO,
            isolation=settings.isolation,
            deadline=settings.deadline,
            open_deadline=settings.open_deadline,
        )

    try:
        primary = open_encoder(
            source,
            backend=settings.backend or AUTO,
            device=settings.device,
            options=settings.options,
            isolation=settings.isolation,
            deadline=settings.deadline,
            open_deadline=settings.open_deadline,
        )
        second = open_fallback if name is not None else None
    except (BackendUnavailableError, PluginError, DeviceError) as error:
        if name is None:
            raise
        compat.logger().error("Starting with the fallback %r, because %s", name, error)
        primary, second = open_fallback(), None
    if settings.timing:
        TimingLog.install()
    capabilities = primary.capabilities
    compat.logger().info(
        "visionaccel: the vision encoder runs on backend %r, device %s%s, %s arithmetic, in-line, and takes %s; "
        "fallback: %s",
        primary.backend,
        capabilities.device,
        " (simulated)" if capabilities.simulated else "",
        capabilities.precision,
        ", ".join(str(opened.program.coverage) for opened in primary.programs),
        name if second is not None else "none",
    )
    return GuardedEncoder(primary, second)


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
