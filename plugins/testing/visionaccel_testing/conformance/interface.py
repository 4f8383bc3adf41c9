"""Level 0: a plug-in can be found, probed and rejected on any machine, with its device or without."""

from __future__ import annotations

import importlib.metadata
import sys
from contextlib import suppress
from dataclasses import fields, replace
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import psutil

from visionaccel.backends import (
    GROUP,
    Accepted,
    Capabilities,
    Options,
    Registry,
    Rejected,
    VisionBackend,
    select,
)
from visionaccel.core.program import Program
from visionaccel.encoder import open_source
from visionaccel.errors import BackendUnavailableError, SettingsError
from visionaccel_testing.conformance.check import CheckFailedError, Checks, NotApplicableError, must_raise
from visionaccel_testing.conformance.fresh_process import in_fresh_process
from visionaccel_testing.conformance.kit import Kit

INTERFACE = Checks(0)

_NEEDED = ("numpy", "ml_dtypes", "pydantic_core")
"""Packages with compiled modules that the core imports."""

_PLAIN_DEVICES = ("/dev/null", "/dev/pts", "/dev/tty", "/dev/urandom")
_HEAVY = ("torch", "vllm", "onnxruntime", "openvino", "transformers", "tensorflow", "jax")


@INTERFACE.add
def light_import(kit: Kit) -> None:
    """Importing the plug-in loads no vendor's library and opens no device."""
    loaded = in_fresh_process(_loaded_by, kit.declared.backend)
    if loaded:
        raise CheckFailedError(
            f"importing the plug-in loads {', '.join(loaded[:5])}. Import a vendor's library in `probe` and `open`: "
            "every command that lists backends imports the plug-in, even if the library is broken or missing."
        )


@INTERFACE.add
def registration(kit: Kit) -> None:
    """The hook returns one class, the same each time, with the entry point's name; creating an instance is free."""
    name = kit.declared.backend
    first, again = Registry().load(name), Registry().load(name)
    if type(first) is not type(again):
        raise CheckFailedError(f"registering {name!r} twice gives two classes: make the class once, not in the hook.")
    kind = type(first)
    kind()  # as the core does in each process
    if not isinstance(kind.formats, frozenset) or not kind.formats:
        raise CheckFailedError(f"`formats` is {kind.formats!r}; it must be a frozenset of program formats.")
    for device in (None, "cpu"):
        if not first.formats_on(device) <= kind.formats:
            raise CheckFailedError(f"`formats_on({device!r})` has formats that `formats` lacks.")


@INTERFACE.add
def options(kit: Kit) -> None:
    """Options are described, cannot change, and unknown ones are refused."""
    kind = Registry().load(kit.declared.backend).options
    if not issubclass(kind, Options):
        raise CheckFailedError(f"`options` is {kind!r}; it must be a subclass of visionaccel.backends.Options.")
    if not kind.model_config.get("frozen") or kind.model_config.get("extra") != "forbid":
        raise CheckFailedError("options must be frozen and forbid unknown names, as in the base class.")
    bare = [name for name, field in kind.model_fields.items() if not field.description]
    if bare:
        raise CheckFailedError(f"options without a description: {', '.join(bare)}; `visionaccel backends` prints it.")
    with must_raise(SettingsError, "an option that does not exist was taken instead of refused."):
        replace(kit.subject, options={"no_such_option": 1}).open().close()


@INTERFACE.add
def probe(kit: Kit) -> None:
    """Two probes return the same verdict, and an unknown device is rejected with a reason and a hint."""
    backend, program = _backend_and_program(kit)
    device = kit.declared.device
    first, second = (backend.probe(program, device) for _ in range(2))
    if first != second:
        raise CheckFailedError(f"two probes of one program differ: {first!r}, {second!r}.")
    if isinstance(first, Accepted) and not 0 < first.score <= 100:
        raise CheckFailedError(f"its score is {first.score}, not over 0 and up to 100; see `Accepted`.")
    _refused(backend, program, "no-such-device:7", "a device that does not exist")


@INTERFACE.add
def foreign_families(kit: Kit) -> None:
    """A backend that builds the tower itself rejects a tower of an unknown family without a description."""
    backend, program = _backend_and_program(kit)
    if program.model is not None or program.artifact is not None:
        raise NotApplicableError("its programs are in files, whose inputs and outputs have names.")
    unknown = replace(program, family="no_such_family", spec=None)
    _refused(backend, unknown, kit.declared.device, "a tower of an unknown family that is not described")


@INTERFACE.add
def requirement(kit: Kit) -> None:
    """The distribution declares which releases of visionaccel it supports, and this is one of them."""
    from packaging.requirements import Requirement

    name = kit.declared.backend
    (point,) = (point for point in importlib.metadata.entry_points(group=GROUP) if point.name == name)
    if point.dist is None or point.dist.name == "visionaccel":
        return
    wanted = [Requirement(text) for text in point.dist.requires or ()]
    core = [each for each in wanted if each.name == "visionaccel" and each.marker is None]
    here = importlib.metadata.version("visionaccel")
    if not core or not any(clause.operator in ("<", "<=", "~=", "==") for clause in core[0].specifier):
        raise CheckFailedError(
            f"{point.dist.name} must require visionaccel with an upper bound, such as visionaccel>=0.1,<0.2, so that a "
            "release with another contract does not run it."
        )
    if not core[0].specifier.contains(here, prereleases=True):
        raise CheckFailedError(f"{point.dist.name} requires {core[0]}, and visionaccel {here} is installed.")


@INTERFACE.add
def capabilities(kit: Kit) -> None:
    """An open session declares its capabilities, and they are those that the author declared."""
    for opened in kit.encoder.programs:
        found = opened.session.capabilities
        if not isinstance(found, Capabilities):
            raise CheckFailedError(f"a session's `capabilities` is {found!r}.")
        if found.max_in_flight > 1 and not found.thread_safe:
            raise CheckFailedError("max_in_flight is over 1 and thread_safe is False, which means one call at a time.")
        if not found.device or not found.precision:
            raise CheckFailedError("`device` or `precision` is empty; they must say what it runs on and computes in.")
        known = {field.name for field in fields(Capabilities)}
        for name, value in kit.declared.capabilities.items():
            if name not in known:
                raise CheckFailedError(f"unknown capability {name!r}. Choose from {', '.join(sorted(known))}.")
            if getattr(found, name) != value:
                raise CheckFailedError(f"the session declares {name}={getattr(found, name)!r}; expected {value!r}.")


def _backend_and_program(kit: Kit) -> tuple[VisionBackend, Program]:
    """Return the backend, and the first of the kit's programs that it accepts."""
    registry, name = Registry(), kit.declared.backend
    try:
        _, programs = select(registry, open_source(kit.subject.source), name, kit.declared.device).require()
    except BackendUnavailableError as error:
        raise CheckFailedError(
            f"each of the kit's programs is rejected: {error.message} If the backend opens no checkpoints, set what it "
            "opens with BackendUnderTest(source=...)."
        ) from error
    return registry.load(name), programs[0]


def _refused(backend: VisionBackend, program: Program, device: str | None, what: str) -> None:
    verdict = backend.probe(program, device)
    if not isinstance(verdict, Rejected):
        raise CheckFailedError(f"{what} is accepted: {verdict!r}.")
    if not verdict.reason or not verdict.hint:
        raise CheckFailedError(f"{what} is rejected without a reason or without a hint: {verdict!r}.")


def _loaded_by(name: str) -> list[str]:
    """Return the extension modules, runtimes, libraries and devices that loading a backend adds to the core's."""
    registry = Registry()
    before, opened = set(sys.modules), _mapped_and_open()
    backend = registry.load(name)
    _ = (backend.name, backend.formats, backend.options.model_json_schema())
    modules = [
        module for module in sorted(set(sys.modules) - before) if module in _HEAVY or _is_foreign_extension(module)
    ]
    return modules + sorted(_mapped_and_open() - opened)


def _is_foreign_extension(module: str) -> bool:
    """Return whether a module is compiled, and belongs neither to Python nor to a package that the core needs."""
    root, file = module.partition(".")[0], getattr(sys.modules[module], "__file__", None) or ""
    return file.endswith(tuple(EXTENSION_SUFFIXES)) and root not in {*sys.stdlib_module_names, *_NEEDED}


def _mapped_and_open() -> set[str]:
    """Return this process's open devices, and loaded libraries that are not the system's, Python's or the core's."""
    process, found = psutil.Process(), set[str]()
    with suppress(AttributeError, psutil.Error):  # only on Linux
        found = {each.path for each in process.memory_maps() if ".so" in each.path and not _is_basic(Path(each.path))}
    with suppress(OSError):
        for file in Path("/proc/self/fd").iterdir():
            with suppress(OSError):
                path = str(file.readlink())
                if path.startswith("/dev/") and not path.startswith(_PLAIN_DEVICES):
                    found.add(path)
    return found


def _is_basic(library: Path) -> bool:
    """Return whether a library is the system's, Python's, or of a package that the core needs."""
    folders = [place for place, part in enumerate(library.parts) if part in ("site-packages", "dist-packages")]
    if folders:
        return library.parts[folders[-1] + 1].removesuffix(".libs") in _NEEDED
    return library.is_relative_to(sys.base_prefix) or str(library).startswith(("/lib/", "/lib64/", "/usr/lib"))
