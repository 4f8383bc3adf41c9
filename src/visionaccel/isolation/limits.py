"""How long a device's process may take for what, and how soon it is started again."""

from __future__ import annotations

from dataclasses import dataclass, fields

from visionaccel.errors import SettingsError
from visionaccel.settings import LONGEST_SECONDS


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds, each above 0 and at most `LONGEST_SECONDS`.

    Attributes:
        run: For one call. A process that does not answer by then is killed.
        opening: For starting a process and opening the program; compilers may take minutes.
        closing: For the session to close before its process is killed.
        first_delay: Before the second restart in a row without a successful call between. The first has no delay; each
            further one doubles it.
        longest_delay: The most that the delay grows to.

    Raises:
        SettingsError: If one is not such a number.
    """

    run: float = 120.0
    opening: float = 600.0
    closing: float = 5.0
    first_delay: float = 1.0
    longest_delay: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            seconds = getattr(self, field.name)
            if not 0 < seconds <= LONGEST_SECONDS:  # not the other way round, which NaN would pass
                raise SettingsError(
                    f"{seconds} is not a time limit for {field.name!r}.",
                    hint=f"Give a number of seconds above 0 and at most {LONGEST_SECONDS:.0f}.",
                )

    def delay(self, failures: int) -> float:
        """The delay before the next start, after that many deaths or failed starts without a successful call."""
        if failures <= 1:
            return 0.0
        return min(self.first_delay * 2.0 ** min(failures - 2, 64), self.longest_delay)
