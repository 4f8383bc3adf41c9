"""PyTorch behind visionaccel's contract: a fast tower, and transformers' tower as the numerical reference."""

import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import Field

from visionaccel.backends import Accepted, Capabilities, Options, Rejected, Session, Verdict, VisionBackend, call_parts
from visionaccel.core.arrays import Array, is_tensor
from visionaccel.core.cores import thread_limit
from visionaccel.core.cpu import has_bfloat16
from visionaccel.core.grid import Grid, as_grids
from visionaccel.core.program import CHECKPOINT, EMBEDDINGS, GRIDS, PIXELS, Program
from visionaccel.errors import BackendUnavailableError, ConfigurationError

if TYPE_CHECKING:
    import torch


class TorchReferenceOptions(Options):
    """Options of the `torch_ref` backend."""

    implementation: Literal["fast", "transformers"] = Field(
        "fast",
        description="This package's tower, or transformers': slower, and independent of what is compared with it.",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Dtype of the weights and of the arithmetic.")
    attention: Literal["sdpa", "eager"] = Field(
        "sdpa", description="torch's fused attention, or products and a softmax with all scores in memory."
    )
    graphs: bool = Field(
        False,
        description="cuda, fast: launch the kernels of repeated grids as one CUDA graph.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="Threads of torch on the CPU, in the whole process from the first call on. Unset: one for each "
        "core that the process was assigned; torch's default if none was.",
    )


class TorchReferenceBackend(VisionBackend):
    """Runs the tower in PyTorch: a fast form of it, or transformers', with which others are compared."""

    name = "torch_ref"
    formats = frozenset({CHECKPOINT})
    options = TorchReferenceOptions

    def devices(self) -> Sequence[str]:
        import torch

        return ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())))

    def probe(self, program: Program, device: str | None) -> Verdict:
        if find_spec("torch") is None:
            return Rejected("torch is not installed.", "pip install torch.")
        if program.spec is None:
            return Rejected(
                f"the program has no description of its {program.family} tower.", "Choose a different backend."
            )
        kind, _, index = (device or "cpu").partition(":")
        if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
            return Rejected(f"unknown device {device!r}.", "Choose cpu, cuda or cuda:N.")
        if kind == "cuda":
            import torch

            if torch.cuda.device_count() <= int(index or 0):
                return Rejected(
                    f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices.",
                    "Install a CUDA build of torch and check nvidia-smi, or use device cpu.",
                )
        return Accepted(10, "PyTorch, and the numerical reference")

    def open(self, program: Program, device: str | None, options: TorchReferenceOptions) -> Session:
        import torch

        where, dtype = device or "cpu", getattr(torch, options.dtype)
        if options.graphs and (options.implementation != "fast" or not where.startswith("cuda")):
            raise ConfigurationError(
                f"torch_ref does not support CUDA graphs for implementation {options.implementation!r} on device "
                f"{where!r}.",
                hint="Leave out the option graphs, or use implementation fast on device cuda.",
            )
        tower: _Tower
        if options.implementation == "fast":
            from visionaccel_torch_ref.linear import eager, sdpa
            from visionaccel_torch_ref.tower import FastTower

            attention = sdpa if options.attention == "sdpa" else eager
            tower = FastTower(program, dtype=dtype, attention=attention, device=where)
            if options.graphs:
                from visionaccel_torch_ref.graphs import GraphedTower, cuda_capture

                tower = GraphedTower(tower, cuda_capture(where))
        else:
            if find_spec("transformers") is None:
                raise BackendUnavailableError(
                    "torch_ref's implementation 'transformers' needs transformers, which is not installed.",
                    hint="pip install transformers.",
                )
            from visionaccel_torch_ref.reference import TransformersTower

            tower = TransformersTower(program, dtype=dtype, attention=options.attention, device=where)
        threads = options.threads or (thread_limit() if where == "cpu" else None)
        return TorchReferenceSession(tower, where, dtype, threads)


def _hardware(device: str) -> str:
    """Return the model of a GPU, which decides which kernels run, and so the last bits."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else ""


class _Tower(Protocol):
    def __call__(self, patches: "torch.Tensor", grids: Sequence[Grid]) -> "torch.Tensor":
        """Return the embeddings [N, out_width] of patches [P, patch_width] of the tower's dtype and device."""


class TorchReferenceSession(Session):
    """A tower with its weights. Accepts numpy arrays or tensors, and returns the same kind."""

    def __init__(self, tower: _Tower, device: str, dtype: "torch.dtype", threads: int | None = None) -> None:
        precision = str(dtype).removeprefix("torch.")
        self.capabilities = Capabilities(
            device=device,
            precision=precision,
            takes_tensors=True,
            hardware=_hardware(device),
            emulated=device == "cpu" and precision == "bfloat16" and not has_bfloat16(),
        )
        self._tower: _Tower | None = tower
        self._dtype, self._threads = dtype, threads

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        import torch

        assert self._tower is not None
        patches, given_tensor = inputs[PIXELS], is_tensor(inputs[PIXELS])
        if not given_tensor:
            # torch warns about read-only arrays, because it could write to them.
            patches = torch.from_numpy(patches if patches.flags.writeable else patches.copy())
        # no_grad rather than inference_mode: the caller owns the result and may write to it.
        with torch.no_grad():
            if self._threads is not None and torch.get_num_threads() != self._threads:
                torch.set_num_threads(self._threads)
                if torch.get_num_threads() != self._threads:
                    self._threads = None  # vLLM's workers do not let it change, and log each attempt
            parts = None if given_tensor or self.capabilities.device == "cpu" else call_parts()
            started = time.monotonic()
            moved = patches.to(self.capabilities.device, self._dtype)
            if parts is not None:
                torch.cuda.synchronize(self.capabilities.device)  # or the copy's time would count as the kernels'
                parts.transfer_in += time.monotonic() - started
            out = self._tower(moved, as_grids(inputs[GRIDS])).to(torch.float32)
            if parts is not None:
                torch.cuda.synchronize(self.capabilities.device)
            started = time.monotonic()
            embeddings = out if given_tensor else out.cpu().numpy()
            if parts is not None:
                parts.transfer_out += time.monotonic() - started
        return {EMBEDDINGS: embeddings}

    def close(self) -> None:
        self._tower = None
