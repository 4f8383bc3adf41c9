"""Readers that do what none may, to see that the harness finds it."""

import ctypes
import time
from pathlib import Path

from hypothesis import strategies as st

from hostile.kinds import Files, Kind
from visionaccel.errors import InputError

FILE = "input"


def _kind(name: str, read: object) -> Kind:
    def one(folder: Path) -> object:
        data = (folder / FILE).read_bytes() if (folder / FILE).exists() else b""
        if data == b"refuse":
            raise InputError("refused.")
        return read() if data == b"go" else None  # type: ignore[operator]

    crafted: list[Files] = [{FILE: b"refuse"}, {FILE: b"go"}, {FILE: b"fine"}]
    return Kind(name, ".", lambda _: crafted, lambda _: st.just({FILE: b"fine"}), one, 1)


def _turn() -> None:
    while True:
        pass


def _lookup() -> None:
    raise KeyError("none of ours")


KINDS = {
    kind.name: kind
    for kind in (
        _kind("good", lambda: None),
        _kind("foreign", _lookup),
        _kind("greedy", lambda: bytes(2**31)),
        _kind("crashing", lambda: ctypes.string_at(0)),
        _kind("turning", _turn),
        _kind("waiting", lambda: time.sleep(60)),
        _kind("leaving", lambda: ctypes.CDLL(None)._exit(0)),
    )
}
