"""The cells of the fault suite: which fault, when, and in what kind of server; and what must become of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from visionaccel_bench.faultsuite.changing import Change

Fault: TypeAlias = Literal["raise", "nan", "zeros", "drift", "hang", "exit", "abort"]
"""What the simulated device does, as the option `faults` of the backend `simulated` names it."""

Moment: TypeAlias = Literal["alone", "beside", "repeated", "restart", "unopened", "both"]
"""When: to one request; to one of several while a text stream is decoded; to every encode until the breaker opens; to
one request, after which the process that replaces the dead one gives wrong answers; to one request, while the
fallback fails to open once; or to one request, while the fallback in the server's process hangs."""

Mode: TypeAlias = Literal["inline", "pipelined"]
Isolation: TypeAlias = Literal["none", "process"]

FAULTS: tuple[Fault, ...] = get_args(Fault)
MOMENTS: tuple[Moment, ...] = get_args(Moment)
_DEADLY: frozenset[Fault] = frozenset({"exit", "abort"})


@dataclass(frozen=True, slots=True)
class Serving:
    """A kind of server.

    Attributes:
        mode: Where it encodes.
        isolation: Where the device lives.
        fallback: Another backend takes over.
        faulty: The first of two fallbacks is simulated too, in the server's process.
    """

    mode: Mode
    isolation: Isolation
    fallback: bool
    faulty: bool = False

    @property
    def change(self) -> Change:
        """How the served checkpoint's weights change once the server is up; each mode has a server of either."""
        return "replaced" if self.isolation == "process" else "rewritten"

    def __str__(self) -> str:
        where = "its own process" if self.isolation == "process" else "the server's process"
        behind = "with a faulty fallback" if self.faulty else f"{'with' if self.fallback else 'without'} a fallback"
        return f"{self.mode}, device in {where}, {behind}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One planted fault.

    Attributes:
        serving: The kind of server.
        fault: The fault.
        moment: When.
    """

    serving: Serving
    fault: Fault
    moment: Moment

    @property
    def expected(self) -> str:
        """What must become of a request that it strikes: an answer, or an error where nothing can give one."""
        return "answer" if self.serving.fallback else "error"


def every_serving() -> tuple[Serving, ...]:
    """All kinds of server: both modes and isolations with a fallback, three without, both modes with a faulty one."""
    with_fallback = [Serving(mode, isolation, True) for mode in get_args(Mode) for isolation in get_args(Isolation)]
    without = (
        Serving("inline", "none", False),
        Serving("pipelined", "none", False),
        Serving("pipelined", "process", False),
    )
    faulty = (Serving(mode, "process", True, faulty=True) for mode in get_args(Mode))
    return (*with_fallback, *without, *faulty)


def cells_of(serving: Serving) -> Iterator[Cell]:
    """The cells of a kind of server.

    A fault that ends a process needs a device in its own process. Values that look right and are wrong are found by the
    canary, not by the request, and without a fallback every request fails from then on, which is what `repeated` tests.
    """
    if serving.faulty:
        yield Cell(serving, "raise", "unopened")  # first: the fallback is opened once
        yield Cell(serving, "exit", "both")
        return
    for fault in FAULTS:
        if fault in _DEADLY and serving.isolation == "none":
            continue
        for moment in ("alone", "beside", "repeated"):
            if not serving.fallback and (moment == "beside" or (fault == "drift") != (moment == "repeated")):
                continue
            yield Cell(serving, fault, moment)
    if serving.isolation == "process" and serving.fallback:
        for fault in sorted(_DEADLY):
            yield Cell(serving, fault, "restart")
