"""The cost of the output guard, metrics and disabled timing, compared with an encode of the 7B tower.

Lower bound of the guard: every byte of the output must be read once, 15.4 MB for 1073x3584 float32; in 0.2 ms that is
77 GB/s on one core. The figure next to it is the time of BLAS' scalar product for the same bytes, the fastest read of
one core here. Disabled timing must cost less than a microsecond: one check whether there are observers.

The parts are measured in turns with and without them, on a session that answers immediately: a difference of
microseconds does not show in an encode of seconds. That encode, of 1,024 patches, is measured for the share.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from visionaccel import open_encoder
from visionaccel.backends import Capabilities, Session, default_registry
from visionaccel.core.arrays import Array
from visionaccel.core.contracts import TensorSpec, check_embeddings, check_output
from visionaccel.core.cores import on_cores
from visionaccel.core.grid import Grid, GridLike
from visionaccel.core.program import ONNX
from visionaccel.encoder import Encoder, OpenProgram, open_tower
from visionaccel.observe import EncoderMetrics
from visionaccel.trust import ChainLink, GuardedEncoder
from visionaccel_testing.checkpoints import QWEN2_5_VL_7B, random_checkpoint

GRID = (1, 32, 32)
TURNS, ENCODES = 200, 3


class _Instant(Session):
    """Answers immediately with plausible rows."""

    capabilities = Capabilities(device="cpu", precision="float32")

    def __init__(self, rows: Array) -> None:
        self._outputs = {"embeddings": rows}

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:  # noqa: ARG002
        return self._outputs

    def close(self) -> None:
        pass


class _Nothing(Encoder):
    """Encodes nothing, so that the code around an encode can be measured."""

    def _encode(self, patches: Array, grids: Iterable[GridLike], lap: object = None) -> tuple[Array, tuple[Grid, ...]]:  # noqa: ARG002
        return patches, ()


def measure() -> dict[str, float]:
    figures = _guard()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = random_checkpoint(Path(folder, "7b"), QWEN2_5_VL_7B, dtype="bfloat16")
        patches = np.random.default_rng(0).standard_normal((1024, 1176), dtype=np.float32)
        figures |= _parts(checkpoint, patches)
        with open_encoder(checkpoint, backend="onnxrt") as encoder:
            encoder.encode(patches, [GRID])
            seconds = statistics.median(_timed(lambda: encoder.encode(patches, [GRID]), ENCODES))
    added = figures["guard and metrics, ms an encode of 1,024 patches"]
    figures["encode of 1,024 patches on onnxrt, s"] = seconds
    figures["guard, metrics on and timing off, % of the encode"] = 100 * added / (1e3 * seconds)
    return figures


def _guard() -> dict[str, float]:
    rows = np.random.default_rng(0).standard_normal((1073, 3584), dtype=np.float32)
    spec, flat = TensorSpec("embeddings", "float32", ("tokens", 3584)), rows.reshape(-1)
    guard, read = _in_turns(lambda: _look(spec, rows), lambda: np.vdot(flat, flat))
    return {
        "guard of 1073x3584, ms": 1e3 * guard,
        "one read of it, ms": 1e3 * read,
        "guard, times one read": guard / read,
        "that read, GB/s": rows.nbytes / read / 1e9,
    }


def _parts(checkpoint: Path, patches: Array) -> dict[str, float]:
    tower = open_tower(checkpoint)
    (program,) = tower.programs([ONNX])
    rows = np.random.default_rng(1).standard_normal((256, tower.out_width), dtype=np.float32)
    opened = OpenProgram(program, tower.host(program), _Instant(rows))
    encoder = Encoder(tower, "instant", [opened], default_registry())
    guarded = GuardedEncoder(ChainLink("instant", encoder))

    def bare() -> None:
        encoder._encode(patches, [GRID])

    assert not encoder.hooks.visionaccel_encoded.get_hookimpls(), "there are no observers"
    programs = [OpenProgram(program, tower.host(program), _Instant(rows))]
    nothing = _Nothing(tower, "nothing", programs, default_registry())
    asked, unasked = _in_turns(lambda: nothing.encode(patches, [GRID]), lambda: _unasked(nothing, patches), 20_000)
    off = asked - unasked
    plugins, metrics = default_registry().plugins, EncoderMetrics()
    with ExitStack() as stack:
        plugins.register(metrics)
        stack.callback(plugins.unregister, metrics)
        guard = _median(lambda: _look(program.outputs[0], rows))
        on, unseen = _in_turns(lambda: guarded.encode_items(patches, [GRID]), bare)
    return {
        "timing off, microseconds an encode": 1e6 * off,
        "guard and metrics, ms an encode of 1,024 patches": 1e3 * (on - unseen + guard),
    }


def _unasked(encoder: Encoder, patches: Array) -> None:
    """`Encoder.encode` without the check whether there are observers."""
    with on_cores(None):
        encoder._encode(patches, [GRID])


def _look(spec: TensorSpec, rows: Array) -> None:
    check_output("x", spec, rows, {"tokens": len(rows)})
    check_embeddings("x", rows, rows.shape[1])


def _in_turns(one: Callable[[], object], other: Callable[[], object], turns: int = TURNS) -> tuple[float, float]:
    """Return the median seconds of each call, measured in turns."""
    one()
    other()
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns):
        for call, seconds in zip((one, other), found, strict=True):
            seconds += _timed(call, 1)
    return statistics.median(found[0]), statistics.median(found[1])


def _median(call: Callable[[], object]) -> float:
    call()
    return statistics.median(_timed(call, TURNS))


def _timed(call: Callable[[], object], times: int) -> list[float]:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found
