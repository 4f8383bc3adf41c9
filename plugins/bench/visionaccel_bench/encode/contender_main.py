"""A contender's own process: opens one way to run the tower, and encodes when it is asked to.

Started as `python -m visionaccel_bench.encode.contender_main PARENT FD`, and ended with its parent. Over the socket FD
it reads one JSON object a line and answers each with one: what was asked for, or `error`. It ends when the socket is
closed. What libraries print goes to its standard output, which nobody reads unless it dies.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from visionaccel.core.child_groups import end_with_parent
from visionaccel_testing.process_tree import memory, processor_seconds

__all__ = ["main"]

_SPARED = "800"
"""Where memory runs out, the kernel is to end a contender rather than what measures it."""


class _Work:
    """Answers requests. One of `open` or `products` comes first."""

    def __init__(self) -> None:
        self._opened: Any = None
        self._prepared: tuple[str, Any] = ("", None)

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        kinds: dict[str, Callable[..., dict[str, Any]]] = {
            "open": self._open,
            "encode": self._encode,
            "products": self._products,
        }
        return kinds[request["do"]](**{name: value for name, value in request.items() if name != "do"})

    def _open(
        self,
        kind: str,
        name: str,
        device: str | None,
        options: dict[str, Any],
        source: str,
        threads: int,
        deadline: float,
    ) -> dict[str, Any]:
        from visionaccel.bundle import Bundle
        from visionaccel.encoder import open_source

        opened = open_source(source)
        if kind == "backend":
            self._opened = _open_backend(name, opened, device, options, threads, deadline)
        else:
            from visionaccel_bench.encode.peers import open_peer

            tower = opened.tower if isinstance(opened, Bundle) else opened
            self._opened = open_peer(name, tower, options, threads)
        found = self._opened
        return {
            "device": found.device,
            "precision": found.precision,
            "about": found.about,
            "simulated": found.simulated,
        }

    def _encode(self, patches: str, grid: list[int], at_least: float, save: str | None) -> dict[str, Any]:
        import numpy as np

        from visionaccel.core.grid import Grid

        if self._prepared[0] != patches:  # a turn must not begin with reading a file
            self._prepared = (patches, self._opened.prepare(np.load(patches)))
        prepared, wanted = self._prepared[1], Grid(*grid)
        seconds: list[float] = []
        used = processor_seconds()
        output = None
        while not seconds or sum(seconds) < at_least:
            output = None
            started = time.perf_counter()
            output = self._opened.run(prepared, wanted)
            seconds.append(time.perf_counter() - started)
        ended, used = time.monotonic(), processor_seconds() - used
        if save is not None:
            np.save(save, self._opened.read(output))
        held = memory()
        return {
            "seconds": seconds,
            "processor_seconds": used,
            "ended": ended,
            "resident_bytes": held.resident,
            "peak_bytes": held.peak,
        }

    def close(self) -> None:
        """Give back what is open."""
        if self._opened is not None:
            self._opened.close()

    def _products(self, shapes: list[list[int]], threads: int) -> dict[str, Any]:
        from visionaccel_bench.encode.matrix_peak import rates

        return {"rates": rates([(rows, inner, columns) for rows, inner, columns in shapes], threads)}


def _open_backend(
    name: str, source: Any, device: str | None, options: dict[str, Any], threads: int, deadline: float
) -> Any:
    from visionaccel.backends import default_registry
    from visionaccel.encoder import open_encoder
    from visionaccel_bench.encode.peers import Opened

    backend = default_registry().load(name)
    if "threads" in backend.options.model_fields:
        options = {"threads": threads, **options}
    encoder = open_encoder(
        source, backend=name, device=device, options=options, deadline=deadline, open_deadline=deadline
    )
    entry, found = default_registry().entry(name), encoder.capabilities
    return Opened(
        device=found.device,
        precision=found.precision,
        about=f"{entry.distribution} {entry.version}" + f", {found.precision} emulated" * found.emulated,
        prepare=lambda patches: patches,
        run=lambda patches, grid: encoder.encode(patches, [grid]),
        close=encoder.close,
        simulated=found.simulated,
    )


def main() -> None:
    """Answer until the socket is closed."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_SPARED)
    parent, descriptor = map(int, sys.argv[1:])
    end_with_parent(parent)
    work = _Work()
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rw", encoding="utf-8") as lines:
        for line in lines:
            try:
                answer = work.answer(json.loads(line))
            except Exception as error:  # Whatever a library raises is a row of the report.
                answer = {"error": f"{type(error).__name__}: {error}"}
            lines.write(json.dumps(answer) + "\n")
            lines.flush()
    with suppress(Exception):
        work.close()
    # Runtimes are known to hang or crash in their own clean-up; nothing is left to be written.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
