"""An encoder that answers item by item: one image's fault never costs another its embeddings."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from visionaccel.arrays import Array
from visionaccel.encoder import Encoder
from visionaccel.errors import DeviceError, InputError, UnfitGridError, VisionAccelError
from visionaccel.grid import Grid, GridLike, as_grids, total_patches

__all__ = ["Embedded", "GuardedEncoder"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Embedded:
    """One item's embeddings and where they come from.

    Attributes:
        rows: float32 [tokens, out_width], numpy or torch; the caller's.
        fallback: The fallback computed them.
    """

    rows: Array
    fallback: bool = False


class GuardedEncoder:
    """Encodes several items in one call where that works, and one by one where it does not.

    Args:
        primary: The chosen encoder.
        fallback: Opens the encoder that takes over items on which the primary's device fails, and those that none of
            its programs takes; None for no other. Called at most once, when first needed, and a failure to open is
            remembered.

    Attributes:
        fallback_items: Items that the fallback encoded so far.
        failed_items: Items that no encoder could encode so far.
    """

    def __init__(self, primary: Encoder, fallback: Callable[[], Encoder] | None = None) -> None:
        self.primary = primary
        self._open_fallback = fallback
        self._fallback: Encoder | VisionAccelError | None = None
        self._lock = threading.Lock()
        self.fallback_items = 0
        self.failed_items = 0

    @property
    def has_fallback(self) -> bool:
        """Whether another encoder would take over."""
        return self._open_fallback is not None

    def encode_items(self, patches: Array, grids: Sequence[GridLike]) -> list[Embedded | VisionAccelError]:
        """Embeddings of each item, or the error that this item alone must answer for. Never raises for bad data.

        Args:
            patches: float32, float16 or bfloat16 [P, patch_width] of all items.
            grids: (t, h, w) of each item.

        Returns:
            One entry for each grid: its embeddings, or the error.
        """
        merge = self.primary.tower.merge_size
        try:
            checked = as_grids(grids, merge)
            if total_patches(checked) != len(patches):
                # Which rows belong to which item is unknown, so the error is everybody's.
                found = self._attempt(self.primary, patches, checked)
                assert isinstance(found, VisionAccelError)  # the encoder refuses what disagrees
                return self._failed(found, len(checked))
        except InputError as error:
            return self._failed(error, len(grids))
        whole = self._attempt(self.primary, patches, checked)
        ends = np.cumsum([grid.patches for grid in checked]).tolist()
        if not isinstance(whole, VisionAccelError):
            stops = np.cumsum([grid.tokens(merge) for grid in checked]).tolist()
            return [Embedded(whole[start:stop]) for start, stop in zip([0, *stops], stops, strict=False)]
        return [
            self._one(patches[start:end], grid, whole if len(checked) == 1 else None)
            for start, end, grid in zip([0, *ends], ends, checked, strict=False)
        ]

    def close(self) -> None:
        """Close every encoder that was opened."""
        self.primary.close()
        if isinstance(self._fallback, Encoder):
            self._fallback.close()

    def _one(self, patches: Array, grid: Grid, known: VisionAccelError | None) -> Embedded | VisionAccelError:
        """One item alone: the primary unless its error is known, then the fallback unless the item is at fault."""
        answer = known or self._attempt(self.primary, patches, [grid])
        if not isinstance(answer, VisionAccelError):
            return Embedded(answer)
        wrong_input = isinstance(answer, InputError) and not isinstance(answer, UnfitGridError)
        if wrong_input or self._open_fallback is None:
            return self._failed(answer, 1)[0]
        fallback = self._second()
        second = fallback if isinstance(fallback, VisionAccelError) else self._attempt(fallback, patches, [grid])
        if isinstance(second, VisionAccelError):
            both = DeviceError(f"{answer.message} The fallback failed too: {second.message}", hint=second.hint)
            return self._failed(both, 1)[0]
        self.fallback_items += 1
        logger.warning(
            "Backend %r failed on grid %s; the fallback took over, for the %d. time: %s",
            self.primary.backend,
            grid,
            self.fallback_items,
            answer,
        )
        return Embedded(second, fallback=True)

    def _second(self) -> Encoder | VisionAccelError:
        with self._lock:
            if self._fallback is None:
                assert self._open_fallback is not None
                try:
                    self._fallback = self._open_fallback()
                except VisionAccelError as error:
                    self._fallback = error
                except Exception as error:  # Opened in the engine's step, which must survive it.
                    self._fallback = DeviceError(f"opening the fallback failed with {type(error).__name__}: {error}")
            return self._fallback

    def _failed(self, error: VisionAccelError, items: int) -> list[Embedded | VisionAccelError]:
        self.failed_items += items
        return [error] * items

    def _attempt(self, encoder: Encoder, patches: Array, grids: Sequence[Grid]) -> Array | VisionAccelError:
        try:
            return encoder.encode(patches, grids)
        except VisionAccelError as error:
            return error
        except Exception as error:  # The engine's step must survive whatever a vendor's stack raises.
            return DeviceError(f"encoding failed with {type(error).__name__}: {error}")
