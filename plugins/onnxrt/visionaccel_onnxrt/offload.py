"""How much of a program an execution provider really took, and when that is too little.

A provider can be active and run nothing: ONNX Runtime gives to the CPU what a provider does not take, without a
word. So before a session is used, something must show that the device has work.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from visionaccel.errors import DeviceError

logger = logging.getLogger(__name__)

RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
"""Session entry without which ONNX Runtime does not remember what it gave to which provider."""

MOST_ON_CPU = 0.1
"""Share of the heavy work that the CPU may be left with. One block of a tower of 32 takes 3 %."""

EP_CONTEXT_OPERATOR = "EPContext"

_HEAVY = frozenset(
    {
        *("Attention", "Conv", "Einsum", "FusedMatMul", "Gemm", "MatMul", "MultiHeadAttention"),
        # What it wraps is not to be seen. Taken for one heavy operator, it makes the CPU's share an upper bound.
        EP_CONTEXT_OPERATOR,
    }
)
"""Operators that cost what a vision tower costs: hundreds of others together take less time than one of them."""


@dataclass(frozen=True, slots=True)
class Offload:
    """Where the nodes of a program run.

    Attributes:
        device_nodes: How many the execution provider took.
        cpu_nodes: How many were left to the CPU.
        cpu_share: Share of the heavy work that was left to the CPU, from 0 to 1: of the operations where they are
            known, else of the operators that are matrix products or convolutions.
        source: What says so.
    """

    device_nodes: int
    cpu_nodes: int
    cpu_share: float
    source: str

    def __str__(self) -> str:
        nodes = self.device_nodes + self.cpu_nodes
        return (
            f"{self.device_nodes} of {nodes} nodes on the device, "
            f"{self.cpu_share:.1%} of the heavy work on the CPU ({self.source})"
        )


def counted(on_device: Iterable[str], on_cpu: Iterable[str], source: str) -> Offload:
    """The offload from the operator types of the nodes on either side."""
    device, cpu = Counter(on_device), Counter(on_cpu)
    heavy, left = (sum(n for kind, n in side.items() if kind in _HEAVY) for side in (device, cpu))
    # Without anything heavy the nodes themselves are all there is to go by.
    weight, rest = (heavy, left) if heavy or left else (device.total(), cpu.total())
    return Offload(device.total(), cpu.total(), rest / (weight + rest) if weight + rest else 1.0, source)


def assigned(session: Any, provider: str) -> Offload | None:
    """What ONNX Runtime gave to a provider; None where it does not say, as older versions do not.

    Args:
        session: An `InferenceSession` that was made with the entry `RECORD_ASSIGNMENT`.
        provider: The execution provider's name.
    """
    recorded = getattr(session, "get_provider_graph_assignment_info", None)
    if recorded is None:
        return None
    try:
        nodes = [(each.ep_name == provider, node.op_type) for each in recorded() for node in each.get_nodes()]
    except Exception as error:  # builds that leave it out raise ONNX Runtime's own errors; there are other sources
        logger.debug("ONNX Runtime does not say where nodes run: %s", error)
        return None
    if not nodes:
        return None
    on_device, on_cpu = ([kind for here, kind in nodes if here is side] for side in (True, False))
    return counted(on_device, on_cpu, "ONNX Runtime's graph assignment")


def require_offload(
    found: Iterable[Offload | None], provider: str, *, allow_cpu: bool, must_know: bool, unknown: str
) -> Offload | None:
    """The worst of what is known, once it is good enough.

    Args:
        found: What several sources say. A provider may hand to the CPU what ONNX Runtime gave to it, so they need not
            agree.
        provider: The execution provider's name.
        allow_cpu: Accept anything.
        must_know: Refuse if nothing is known.
        unknown: Why nothing may be known.

    Returns:
        The figure, or None if nothing is known and that was accepted.

    Raises:
        DeviceError: If the CPU would do the work, or that cannot be ruled out.
    """
    known = [each for each in found if each is not None]
    if not known:
        problem = f"nothing proves that {provider} runs any of the program: {unknown}."
        if must_know and not allow_cpu:
            raise DeviceError(
                problem, hint="Update the runtime that brings it, or accept this with the option allow_cpu=true."
            )
        logger.warning("%s It may run on the CPU.", problem[0].upper() + problem[1:])
        return None
    worst = max(known, key=lambda each: (each.device_nodes == 0, each.cpu_share))
    too_little = worst.device_nodes == 0 or worst.cpu_share > MOST_ON_CPU
    if too_little and not allow_cpu:
        raise DeviceError(
            f"{provider} is active and leaves too much of the program to the CPU: {worst}.",
            hint=f"At most {MOST_ON_CPU:.0%} of the heavy work may stay there. Check its driver and options, "
            "choose device cpu, or accept it with the option allow_cpu=true.",
        )
    logger.log(logging.WARNING if too_little else logging.INFO, "%s: %s.", provider, worst)
    return worst
