"""Opens encoders: finds a source of programs and a backend that takes them, and opens a session for each program."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Literal, TypeAlias, get_args

from visionaccel.backends import AUTO, Registry, Session, checked_options, default_registry, select
from visionaccel.backends.sessions import open_session
from visionaccel.bundle import Bundle, is_bundle, open_bundle
from visionaccel.checkpoint import locate_checkpoint
from visionaccel.core.containment import device_errors
from visionaccel.core.cores import on_cores
from visionaccel.core.defaults import DEADLINE, OPEN_DEADLINE
from visionaccel.core.safe_text import safe_logger
from visionaccel.encoder.encoder import Encoder, OpenProgram, close_programs
from visionaccel.encoder.held_weights import WantedWeights, hold_source
from visionaccel.errors import SettingsError
from visionaccel.families import Tower, tower_of

logger = safe_logger(__name__)

WantedIsolation: TypeAlias = Literal["auto", "process", "none"]
"""Whether each session runs in a separate child process; `auto` for what the backend declares."""


def open_tower(source: str | os.PathLike[str], revision: str | None = None) -> Tower:
    """Return the vision tower of a checkpoint folder or Hugging Face repository.

    Raises:
        CheckpointError: If the checkpoint is not found, incomplete or damaged.
        UnsupportedArchitectureError: If its vision tower is not implemented.
    """
    return tower_of(locate_checkpoint(source, revision))


def open_source(source: str | os.PathLike[str] | Tower | Bundle) -> Tower | Bundle:
    """Return the bundle in a folder, or else the tower of a checkpoint; an open source is returned unchanged.

    Raises:
        BundleError: If the bundle is broken.
        CheckpointError: If the checkpoint is broken, or there is neither.
        UnsupportedArchitectureError: If the vision tower is not implemented.
    """
    if isinstance(source, Tower | Bundle):
        return source
    return open_bundle(source) if is_bundle(source) else open_tower(source)


def open_encoder(
    source: str | os.PathLike[str] | Tower | Bundle,
    *,
    backend: str = AUTO,
    device: str | None = None,
    options: Mapping[str, Any] | None = None,
    registry: Registry | None = None,
    isolation: WantedIsolation = "auto",
    deadline: float = DEADLINE,
    open_deadline: float = OPEN_DEADLINE,
    cores: Iterable[int] | None = None,
    weights: WantedWeights = "private",
) -> Encoder:
    """Open a vision encoder on a backend.

    Args:
        source: A bundle folder, a checkpoint folder, a Hugging Face repository of a checkpoint, or an opened bundle or
            tower.
        backend: Name of an installed backend, or `auto` for the best that accepts.
        device: The backend's device; None for its default.
        options: The backend's options by name.
        registry: Where backends are found; the installed ones by default. Child processes look in the installed ones.
        isolation: Whether each session runs in a separate child process; `auto` for what the backend declares.
        deadline: Seconds that a call in a child process may take; then the process is ended.
        open_deadline: Seconds that starting such a process and opening a program may take, compilation included.
        cores: CPU cores for its threads, one thread for each core unless the options say otherwise. The calling thread
            runs there during this call and those of `encode`. None for the cores of the calling thread.
        weights: Where sessions read the weights: from a `private` copy in memory, which changes of the files do not
            reach, or `mapped` from the files, whose memory processes share. The files of mapped weights must not be
            written or truncated while an encoder is open.

    Raises:
        ConfigurationError: If the backend is unknown, broken, refuses the program, or does not know an option; if the
            isolation or a core is unknown.
        ArtifactError: If the bundle or checkpoint is broken or has an unsupported architecture, or changed since it was
            opened.
        DeviceError: If the device fails to open a program.
    """
    if isolation not in get_args(WantedIsolation):
        raise SettingsError(f"unknown isolation {isolation!r}.", hint="Choose auto, process or none.")
    registry = registry or default_registry()
    source = open_source(source)
    wanted = None if cores is None else frozenset(cores)
    opened: list[OpenProgram] = []
    with on_cores(wanted, strict=True):  # backends count the cores when they are first asked
        name, programs = select(registry, source, backend, device).require()
        chosen = registry.load(name)
        checked = checked_options(chosen, options or {})
        held, programs_read = source, programs
        if any(program.format not in chosen.formats_with_weights for program in programs):
            held = hold_source(source, weights)
            same = {(each.format, each.name): each for each in held.programs({each.format for each in programs})}
            programs_read = tuple(same[each.format, each.name] for each in programs)
        try:
            for program, read in zip(programs, programs_read, strict=True):
                with device_errors(
                    f"preparing the host's part of program {program.name!r}", "Export the program without --split-host."
                ):
                    host = held.tower.host(read)
                if (chosen.isolation_on(device) if isolation == AUTO else isolation) == "process":
                    from visionaccel.isolation import IsolatedSession, Limits  # needed by few; imports subprocess

                    # Validated again in the child, so with the names and values that the user gave.
                    given = checked.model_dump(by_alias=True, exclude_unset=True)
                    limits = Limits(run=deadline, opening=open_deadline)
                    session: Session = IsolatedSession(name, read, device, given, limits=limits)
                else:
                    session = open_session(chosen, read, device, checked)
                # Not `read`, whose weights are the copies: only the session that reads them should keep them.
                opened.append(OpenProgram(program, host, session))
                if session.capabilities.emulated:
                    logger.warning(
                        "Backend %r emulates %s for program %r, because device %r does not support it: float32 is "
                        "faster.", name, session.capabilities.precision, program.name, session.capabilities.device,
                    )  # fmt: skip
        except BaseException:
            with suppress(Exception):  # What failed to open says more than what then failed to close.
                close_programs(opened)
            raise
    return Encoder(source.tower, name, opened, registry, options, wanted)
