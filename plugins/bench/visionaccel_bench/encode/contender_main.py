"""A contender's process: opens one way to run the tower, and encodes on request.

Started as `python -m visionaccel_bench.encode.contender_main PARENT FD`, and ended with its parent. Each request on the
connection FD is a JSON object, and so is its answer: the result, or `error`. The process ends when the connection is
closed. What libraries print goes to its standard output, which is shown only if it dies.

Peers are towers of other packages, built alone with the checkpoint's weights, and measured as their users run them:
with their own layers, preparation of weights and defaults. They get patches in their dtype, as their models pass them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.backends import default_registry
from visionaccel.bundle import Bundle
from visionaccel.core.arrays import as_host_tensor, as_numpy
from visionaccel.core.child_groups import end_with_parent
from visionaccel.core.cpu import has_bfloat16
from visionaccel.core.grid import Grid
from visionaccel.core.program import CHECKPOINT
from visionaccel.encoder import open_encoder, open_source
from visionaccel.errors import ConfigurationError, UnsupportedArchitectureError
from visionaccel.families import Tower
from visionaccel_testing.process_tree import memory, processor_seconds

if TYPE_CHECKING:
    import torch  # only what needs it pays for its start-up and memory

_OUT_OF_MEMORY_SCORE = "800"
"""Added to the kernel's out-of-memory score, so that it kills a contender rather than the measuring process."""

_VLLM_FAMILY = "qwen2_5_vl"


@dataclass(frozen=True, slots=True)
class Opened:
    """A tower that is ready.

    Attributes:
        precision: Dtype of its products.
        about: Versions and settings that affect its speed.
        prepare: Converts patches float32 [P, patch_width] for `run`. Not timed.
        run: Returns the embeddings [N, out_width] of prepared patches of one grid, as any library's array of any
            dtype. Timed.
    """

    device: str
    precision: str
    about: str
    prepare: Callable[[NDArray[np.float32]], Any]
    run: Callable[[Any, Grid], Any]
    close: Callable[[], object] = lambda: None
    simulated: bool = False


class Work:
    """Answers requests; `open` must come before `encode`."""

    def __init__(self) -> None:
        self.opened: Opened | None = None
        self._prepared: tuple[str, Any] = ("", None)

    def open(
        self, kind: str, name: str, device: str | None, options: dict[str, Any], source: str, threads: int,
        deadline: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Open a contender and describe it."""
        given = open_source(source)
        if kind == "backend":
            self.opened = _open_backend(name, given, device, options, threads, deadline)
        else:
            self.opened = open_peer(name, given.tower, options, threads)
        return {name: getattr(self.opened, name) for name in ("device", "precision", "about", "simulated")}

    def encode(self, patches: str, grid: list[int], at_least: float, save: str | None) -> dict[str, Any]:
        """Encode once, or as often as begins within `at_least` seconds; `save` is a file for the embeddings."""
        assert self.opened is not None
        if self._prepared[0] != patches:  # a turn must not begin with reading a file
            self._prepared = (patches, self.opened.prepare(np.load(patches)))
        prepared, wanted = self._prepared[1], Grid(*grid)
        seconds: list[float] = []
        used = processor_seconds()
        output = None
        while not seconds or sum(seconds) < at_least:
            output = None
            started = time.perf_counter()
            output = self.opened.run(prepared, wanted)
            seconds.append(time.perf_counter() - started)
        ended, used = time.monotonic(), processor_seconds() - used
        if save is not None:
            np.save(save, as_numpy(output).astype(np.float32))
        held = memory()
        return {
            "seconds": seconds,
            "processor_seconds": used,
            "ended": ended,
            "resident_bytes": held.resident,
            "peak_bytes": held.peak,
        }

    def products(self, shapes: list[tuple[int, int, int]], threads: int) -> dict[str, Any]:
        """Return the most operations a second of a product of any shape, by each dtype that this processor has.

        They are products by oneDNN with weights packed once: a tower made of them cannot be faster. A first product of
        each shape is not timed. Shapes are rows, inner width and columns.
        """
        import torch

        from visionaccel.core.packed_products import why_not_packed

        torch.set_num_threads(threads)
        dtypes = {"float32": torch.float32}
        if why_not_packed(torch.bfloat16) is None:
            dtypes["bfloat16"] = torch.bfloat16
        return {"rates": {name: max(_rate(dtype, *shape) for shape in shapes) for name, dtype in dtypes.items()}}


def _open_backend(
    name: str, source: Tower | Bundle, device: str | None, options: dict[str, Any], threads: int, deadline: float
) -> Opened:
    backend, entry = default_registry().load(name), default_registry().entry(name)
    if "threads" in backend.options.model_fields:
        options = {"threads": threads, **options}
    encoder = open_encoder(
        source, backend=name, device=device, options=options, deadline=deadline, open_deadline=deadline
    )
    found = encoder.capabilities
    return Opened(
        device=found.device,
        precision=found.precision,
        about=f"{entry.distribution} {entry.version}" + f", {found.precision} emulated" * found.emulated,
        prepare=lambda patches: patches,
        run=lambda patches, grid: encoder.encode(patches, [grid]),
        close=encoder.close,
        simulated=found.simulated,
    )


def open_peer(name: str, tower: Tower, options: Mapping[str, Any], threads: int) -> Opened:
    """Build a peer's tower with its `dtype` and other options, load its weights, and set the threads of its products.

    Raises a `ConfigurationError` if the peer cannot run this tower, and any error of the peer's code.
    """
    import torch

    torch.set_num_threads(threads)
    openers = {"transformers": _transformers, "vllm": _vllm}
    return openers[name](tower, options)


def _transformers(tower: Tower, options: Mapping[str, Any]) -> Opened:
    """Build the tower of the model class that the checkpoint names."""
    import torch
    import transformers

    from visionaccel_torch_ref.reference import TransformersTower

    name, attention = options["dtype"], options.get("attention", "sdpa")
    dtype = getattr(torch, name)
    (program,) = tower.programs([CHECKPOINT])
    try:
        module = TransformersTower(program, dtype=dtype, attention=attention, device="cpu")
    except UnsupportedArchitectureError as error:
        raise ConfigurationError(f"the peer transformers: {error.message}", hint="Leave the peer out.") from error

    def run(patches: Any, grid: Grid) -> Any:
        with torch.inference_mode():
            return module(patches, [grid])

    about = f"transformers {transformers.__version__}, torch {torch.__version__}, {attention}{_emulated(name)}"
    return Opened("cpu", name, about, lambda patches: torch.from_numpy(patches).to(dtype), run)


def _vllm(tower: Tower, options: Mapping[str, Any]) -> Opened:
    """Build the tower of vLLM's Qwen2.5-VL as its worker does, only once in a process: process groups are global."""
    if tower.family != _VLLM_FAMILY:
        raise ConfigurationError(
            f"the peer vllm supports only towers of family {_VLLM_FAMILY}; this one belongs to {tower.family}.",
            hint="Leave the peer out.",
        )
    import torch
    import vllm
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import process_weights_after_loading
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer
    from vllm.utils.torch_utils import set_default_torch_dtype

    name, eager = options["dtype"], options.get("enforce_eager", False)
    dtype, folder = getattr(torch, name), str(tower.checkpoint.folder)
    settings = EngineArgs(
        model=folder, dtype=name, skip_tokenizer_init=True, enforce_eager=eager
    ).create_engine_config()
    priority = getattr(getattr(settings, "kernel_config", None), "ir_op_priority", None)
    if priority is not None:  # as its workers do at start, since 0.31
        priority.set_default()
    with ExitStack() as stack:
        store = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(set_current_vllm_config(settings))
        # Its layers use the process groups even with a single process.
        parallel_state.init_distributed_environment(1, 0, f"file://{Path(store, 'store')}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        config = Qwen2_5_VLVisionConfig.from_dict(dict(tower.configuration))
        epsilon = getattr(settings.model_config.hf_config, "rms_norm_eps", 1e-6)
        with set_default_torch_dtype(dtype):
            module = Qwen2_5_VisionTransformer(config, norm_eps=epsilon, prefix="visual")
        module.load_weights(
            (key, as_host_tensor(stored.read(), stored.dtype).to(dtype)) for key, stored in tower.weights.items()
        )
        process_weights_after_loading(module, settings.model_config, torch.device("cpu"))  # packs for its products
        module.eval()
        close = stack.pop_all().close

    def run(patches: Any, grid: Grid) -> Any:
        with torch.inference_mode():
            return module(patches, grid_thw=[list(grid.thw)])

    attention = getattr(module.attn_backend, "name", str(module.attn_backend))
    about = f"vLLM {vllm.__version__}, {attention}{', eager' if eager else ''}{_emulated(name)}"
    return Opened("cpu", name, about, lambda patches: torch.from_numpy(patches).to(dtype), run, close)


def _emulated(dtype: str) -> str:
    """Return what to add to `about` if this CPU has no instructions for a dtype."""
    return ", bfloat16 emulated" if dtype == "bfloat16" and not has_bfloat16() else ""


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
    """Answer requests until the connection is closed."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OUT_OF_MEMORY_SCORE)
    parent, descriptor = map(int, sys.argv[1:])
    end_with_parent(parent)
    work = Work()
    with Connection(descriptor) as connection, suppress(EOFError, OSError):
        while True:
            request = json.loads(connection.recv_bytes())
            try:
                answer = getattr(work, request.pop("do"))(**request)
            except Exception as error:  # it becomes a row of the report
                answer = {"error": f"{type(error).__name__}: {error}"}
            connection.send_bytes(json.dumps(answer).encode())
    with suppress(Exception):
        if work.opened is not None:
            work.opened.close()
    # Without clean-up, in which some runtimes hang or crash.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
