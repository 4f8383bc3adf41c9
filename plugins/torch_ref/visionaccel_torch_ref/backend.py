"""The numerical reference behind visionaccel's contract."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from visionaccel.arrays import Array, is_tensor
from visionaccel.backends import Accepted, Capabilities, Options, Rejected, Session, Verdict, VisionBackend
from visionaccel.program import CHECKPOINT, Program

if TYPE_CHECKING:
    import torch

__all__ = ["TorchReferenceBackend", "TorchReferenceOptions", "TorchReferenceSession"]

FAMILIES = frozenset({"qwen2_5_vl"})


class TorchReferenceOptions(Options):
    """Options of the `torch_ref` backend."""

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Dtype of the weights and of the arithmetic.")
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="transformers' attention implementation.")


class TorchReferenceBackend(VisionBackend):
    """Runs the tower as transformers defines it. Others are measured against it; it is not meant to be fast."""

    name = "torch_ref"
    formats = frozenset({CHECKPOINT})
    options = TorchReferenceOptions

    def devices(self) -> Sequence[str]:
        import torch

        return ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())))

    def probe(self, program: Program, device: str | None) -> Verdict:
        missing = [module for module in ("torch", "transformers") if find_spec(module) is None]
        if missing:
            return Rejected(f"{' and '.join(missing)} is not installed.", f"pip install {' '.join(missing)}.")
        if program.family not in FAMILIES:
            return Rejected(f"it has no tower of family {program.family!r}.", "Name another backend.")
        kind, _, index = (device or "cpu").partition(":")
        if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
            return Rejected(f"it knows no device {device!r}.", "Name cpu, cuda or cuda:N.")
        if kind == "cuda":
            import torch

            if torch.cuda.device_count() <= int(index or 0):
                return Rejected(
                    f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices.",
                    "Install a CUDA build of torch and check nvidia-smi, or use device cpu.",
                )
        return Accepted(10, "the numerical reference: transformers' tower")

    def open(self, program: Program, device: str | None, options: TorchReferenceOptions) -> Session:
        from visionaccel_torch_ref.tower import load_tower

        where = device or "cpu"
        tower = load_tower(program, dtype=options.dtype, attention=options.attention, device=where)
        return TorchReferenceSession(tower, where, options.dtype)


class TorchReferenceSession(Session):
    """transformers' tower with its weights. Takes numpy arrays or tensors and answers in kind."""

    def __init__(self, tower: "torch.nn.Module", device: str, dtype: str) -> None:
        self.capabilities = Capabilities(device=device, precision=dtype, takes_tensors=True)
        self._tower: torch.nn.Module | None = tower

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        import torch

        assert self._tower is not None
        weight = next(self._tower.parameters())
        patches, given_tensor = inputs["pixel_values"], is_tensor(inputs["pixel_values"])
        if not given_tensor:
            # torch warns of read-only arrays because it could write to them; the tower does not, but must not be noisy.
            patches = torch.from_numpy(patches if patches.flags.writeable else patches.copy())
        grids = torch.from_numpy(np.array(inputs["grid_thw"]))
        # no_grad rather than inference_mode: the caller owns the result and may write to it.
        with torch.no_grad():
            out = self._tower(patches.to(weight.device, weight.dtype), grids.to(weight.device)).pooler_output
        out = out.to(torch.float32)
        return {"embeddings": out if given_tensor else out.cpu().numpy()}

    def close(self) -> None:
        self._tower = None
