"""The faults of a simulated device: which calls fail, and how."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from visionaccel.core.arrays import Array, as_numpy
from visionaccel.core.invalid_values import problems_of
from visionaccel.errors import DeviceError, SettingsError
from visionaccel_testing.simulated.latency import Frame

_CHILD = "visionaccel.isolation.child"
_WANTED = "The fault is intended: see the options `faults` and `switch` of the simulated device."
_APART = "Set VISIONACCEL_ISOLATION=process."


class FaultRule(BaseModel):
    """What fails, and how: calls by exactly one of `patches`, `call`, `every`, `share` and `all`, or an `opening`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patches: int | None = Field(None, ge=1, description="Calls with that many patches.")
    call: int | None = Field(
        None, ge=1, description="The call of that number, from 1; a restarted process counts from 1 again."
    )
    every: int | None = Field(None, ge=1, description="Every call whose number is a multiple of it.")
    share: float | None = Field(
        None, ge=0, le=1, description="That share of frames, by a digest of their patches (see `struck`)."
    )
    seed: int = Field(0, description="Which frames `share` picks.")
    all: bool = Field(False, description="Every call.")
    opening: int | None = Field(
        None, ge=1, description="The opening of that number in this process, from 1: it raises or hangs."
    )
    do: Literal["raise", "nan", "zeros", "drift", "hang", "exit", "abort"] = Field(
        description="`raise` a DeviceError; answer NaN or zeros; `drift`: give a wrong answer, with numbers that look "
        "right; `hang`; end the process by `exit` or `abort`, in a child process only."
    )
    seconds: float = Field(
        3600.0, ge=0, allow_inf_nan=False, description="How long a `hang` takes; the call then goes on."
    )

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        ways = [self.patches, self.call, self.every, self.share, self.all or None, self.opening]
        if sum(way is not None for way in ways) != 1:
            raise ValueError("name exactly one of patches, call, every, share, all and opening")
        if self.opening is not None and self.do not in ("raise", "hang"):
            raise ValueError("an opening raises or hangs")
        if "seed" in self.model_fields_set and self.share is None:
            raise ValueError("seed goes with share")
        if "seconds" in self.model_fields_set and self.do != "hang":
            raise ValueError("seconds go with hang")
        return self

    def hits(self, call: int, frames: Sequence[Frame]) -> tuple[bool, ...]:
        """Return which frames of a call, numbered from 1, the rule applies to; all or none, unless it has a share."""
        if self.share is not None:
            return tuple(struck(frame.rows, self) for frame in frames)
        hit = (
            self.all
            or (self.patches is not None and sum(frame.patches for frame in frames) == self.patches)
            or (self.call is not None and call == self.call)
            or (self.every is not None and call % self.every == 0)
        )
        return (hit,) * len(frames)

    def happen(self, call: int) -> None:
        """Fail at the start of a call; faults of the answer do nothing here.

        Raises:
            DeviceError: If that is the fault, or if the rule would end a process that is not a device's child process.
        """
        match self.do:
            case "raise":
                raise DeviceError(f"simulated fault: call {call} failed by rule {self}.", hint=_WANTED)
            case "hang":
                time.sleep(self.seconds)
            case "exit" | "abort" if not _in_device_process():
                raise DeviceError(
                    f"simulated fault: rule {self} would end a process other than the device's.", hint=_APART
                )
            case "exit":
                os._exit(1)
            case "abort":
                os.abort()

    def spoil(self, rows: NDArray[Any]) -> None:
        """Overwrite rows of an answer, if that is the fault."""
        match self.do:
            case "nan":
                rows[...] = np.nan
            case "zeros":
                rows[...] = 0
            case "drift":
                rows[..., ::2] *= -1

    def __str__(self) -> str:
        return self.model_dump_json(exclude_unset=True)


def struck(patches: Array, rule: FaultRule) -> bool:
    """Return whether a rule with a share applies to an image: the same in every process, batch and dtype.

    A video fails if any of its frames does; each is decided by its patches. The session of a split program receives
    patches that the host embedded, so pass those for such a program.

    Args:
        patches: [patches, patch_width] of one image or frame, numpy or torch, of any floating dtype. Their float32
            values decide: patches that were rounded to bfloat16 are a different image.
        rule: A rule with a `share`; ValueError if it has none.
    """
    if rule.share is None:
        raise ValueError(f"rule {rule} has no share.")
    digest = hashlib.blake2b(f"{rule.seed} ".encode(), digest_size=8)
    digest.update(np.ascontiguousarray(as_numpy(patches), dtype=np.float32).reshape(-1).view(np.uint8).data)
    return int.from_bytes(digest.digest()) < rule.share * 2**64


class FaultScript:
    """The rules of a session: those it was opened with, then those of the file `switch`, read at each call.

    Raises:
        SettingsError: If the file does not contain rules, or a rule ends a process that is not a device's child.
    """

    def __init__(self, rules: Sequence[FaultRule], switch: Path | None) -> None:
        self._rules, self._switch = tuple(rules), switch
        for rule in self.rules():
            if rule.do in ("exit", "abort") and not _in_device_process():
                raise SettingsError(
                    f"the simulated fault {rule} would end a process other than the device's.", hint=_APART
                )

    def rules(self) -> tuple[FaultRule, ...]:
        """Return the current rules; SettingsError if the file does not contain rules."""
        if self._switch is None:
            return self._rules
        try:
            text = self._switch.read_bytes()
        except FileNotFoundError:
            return self._rules
        except OSError as error:
            raise SettingsError(
                f"simulated faults cannot be read: {error}.", hint="See the option `switch`."
            ) from error
        if not text.strip():
            return self._rules
        try:
            return (*self._rules, *_RULES.validate_json(text))
        except ValidationError as error:
            raise SettingsError(
                f"{self._switch} is not a list of fault rules: {problems_of(error)}.",
                hint='Write a JSON list of rules, such as [{"every": 3, "do": "raise"}].',
            ) from error

    def opening(self) -> None:
        """Count the opening of a session; DeviceError if a rule makes it fail."""
        number = next(_OPENINGS)
        for rule in self.rules():
            if rule.opening == number:
                rule.happen(number)

    def fault(self, call: int, frames: Sequence[Frame]) -> tuple[FaultRule, tuple[bool, ...]] | None:
        """Return the first rule that applies to a call, and which of the frames it applies to; None if no rule does."""
        found = ((rule, rule.hits(call, frames)) for rule in self.rules())
        return next(((rule, hits) for rule, hits in found if True in hits), None)


_OPENINGS = itertools.count(1)
_RULES = TypeAdapter(tuple[FaultRule, ...])


def _in_device_process() -> bool:
    """Return whether this is a device's child process, which its parent restarts."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec is not None and spec.name == _CHILD
