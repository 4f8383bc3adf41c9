"""A contender's own process: opens one way to run the tower, and encodes when it is asked to.

Started as `python -m visionaccel_bench.encode.contender_main PARENT FD`, and ended with its parent. Over the socket FD
it reads one JSON object a line and answers each with one: the result, or `error`. It ends when the socket is closed.
What libraries print goes to its standard output, which is shown only if it dies.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionaccel.core.child_groups import end_with_parent
from visionaccel_testing.process_tree import memory, processor_seconds

if TYPE_CHECKING:
    import torch

_SPARED = "800"
"""The kernel's score when memory runs out: it ends a contender rather than the measuring process."""


class _Work:
    """Answers requests; `open` comes before `encode`."""

    def __init__(self) -> None:
        self._opened: Any = None
        self._prepared: tuple[str, Any] = ("", None)

    def open(
        self, kind: str, name: str, device: str | None, options: dict[str, Any], source: str, threads: int,
        deadline: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Open a contender and say what it is."""
        from visionaccel.encoder import open_source

        opened = open_source(source)
        if kind == "backend":
            self._opened = _open_backend(name, opened, device, options, threads, deadline)
        else:
            from visionaccel_bench.encode.peers import open_peer

            tower = opened.tower
            self._opened = open_peer(name, tower, options, threads)
        return {name: getattr(self._opened, name) for name in ("device", "precision", "about", "simulated")}

    def encode(self, patches: str, grid: list[int], at_least: float, save: str | None) -> dict[str, Any]:
        """Encode once, or as often as begins within `at_least` seconds; `save` names a file for the embeddings."""
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

    def products(self, shapes: list[list[int]], threads: int) -> dict[str, Any]:
        """See `rates`."""
        return {"rates": rates([(rows, inner, columns) for rows, inner, columns in shapes], threads)}

    def close(self) -> None:
        """Close what is open."""
        if self._opened is not None:
            self._opened.close()


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


def rates(shapes: Sequence[tuple[int, int, int]], threads: int) -> dict[str, list[float]]:
    """Operations a second of one product of each shape, by dtype; without dtypes that this processor does not have.

    They are products of oneDNN with weights packed once, the most that a tower made of them could reach. A first
    product of each shape is not timed.

    Args:
        shapes: Rows, inner width and columns of each product.
        threads: Threads of the products.

    Raises:
        Exception: If torch is not installed or was built without oneDNN.
    """
    import torch

    from visionaccel.core.packed_products import why_not_packed

    torch.set_num_threads(threads)
    found = {"float32": [_rate(torch.float32, *shape) for shape in shapes]}
    if why_not_packed(torch.bfloat16) is None:
        found["bfloat16"] = [_rate(torch.bfloat16, *shape) for shape in shapes]
    return found


def _rate(dtype: torch.dtype, rows: int, inner: int, columns: int) -> float:
    import torch

    from visionaccel.core.packed_products import PackedWeight

    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, inner, generator=generator).to(dtype)
    right = torch.randn(columns, inner, generator=generator).to(dtype)
    packed = PackedWeight(right, rows=rows)
    seconds = 0.0
    with torch.inference_mode():
        for _ in range(2):
            started = time.perf_counter()
            packed.unary(left)
            seconds = time.perf_counter() - started
    return 2 * rows * inner * columns / seconds


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
                request = json.loads(line)
                answer = getattr(work, request.pop("do"))(**request)
            except Exception as error:  # it becomes a row of the report
                answer = {"error": f"{type(error).__name__}: {error}"}
            lines.write(json.dumps(answer) + "\n")
            lines.flush()
    with suppress(Exception):
        work.close()
    # Some runtimes hang or crash in their own clean-up; nothing is left to be written.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
