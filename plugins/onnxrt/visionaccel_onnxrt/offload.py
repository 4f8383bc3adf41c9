"""How much of a program an execution provider really runs, and when that is too little.

A provider can be active and run nothing: ONNX Runtime silently assigns to the CPU what a provider does not support. So
before a session is used, something must show that the device runs the program.
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
"""The session entry that makes ONNX Runtime record which nodes it assigned to which provider."""

MOST_ON_CPU = 0.1
"""The largest share of the heavy work that may stay on the CPU. One block of a tower of 32 takes 3 %."""

EP_CONTEXT_OPERATOR = "EPContext"

_HEAVY = frozenset(
    {
        *("Attention", "Conv", "Einsum", "FusedMatMul", "Gemm", "MatMul", "MultiHeadAttention"),
        # It hides what it contains. Counting it as one heavy operator makes the CPU's share an upper bound.
        EP_CONTEXT_OPERATOR,
    }
)
"""The operators that dominate the time of a vision tower: hundreds of others take less time than one of these."""


@dataclass(frozen=True, slots=True)
class Offload:
    """Where the nodes of a program run.

    Attributes:
        device_nodes: Number of nodes that the execution provider runs.
        cpu_nodes: Number of nodes that the CPU runs.
        cpu_share: Share of the heavy work on the CPU, from 0 to 1: of the operations if they are known, otherwise of
            the matrix products and convolutions.
        source: Where these figures come from.
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
    """Return the offload by the operator types of the nodes on the device and on the CPU."""
    device, cpu = Counter(on_device), Counter(on_cpu)
    heavy, left = (sum(n for kind, n in side.items() if kind in _HEAVY) for side in (device, cpu))
    # Without heavy operators, count all nodes.
    weight, rest = (heavy, left) if heavy or left else (device.total(), cpu.total())
    return Offload(device.total(), cpu.total(), rest / (weight + rest) if weight + rest else 1.0, source)


def assigned(session: Any, provider: str) -> Offload | None:
    """Return what ONNX Runtime assigned to a provider; None if it does not report it, as in older versions.

    Args:
        session: An `InferenceSession` that was made with the entry `RECORD_ASSIGNMENT`.
        provider: The execution provider's name.
    """
    recorded = getattr(session, "get_provider_graph_assignment_info", None)
    if recorded is None:
        return None
    try:
        nodes = [(each.ep_name == provider, node.op_type) for each in recorded() for node in each.get_nodes()]
    except Exception as error:  # builds without it raise errors of ONNX Runtime; there are other sources
        logger.debug("ONNX Runtime does not report where nodes run: %s", error)
        return None
    if not nodes:
        return None
    on_device, on_cpu = ([kind for here, kind in nodes if here is side] for side in (True, False))
    return counted(on_device, on_cpu, "ONNX Runtime's graph assignment")


def require_offload(
    found: Iterable[Offload | None], provider: str, *, allow_cpu: bool, must_know: bool, unknown: str
) -> Offload | None:
    """Return the worst of the known figures, if it is good enough; None if none is known and that is accepted.

    Args:
        found: The figures of several sources. A provider may pass nodes on to the CPU, so they need not agree.
        provider: The execution provider's name.
        allow_cpu: Accept anything.
        must_know: Refuse if no figure is known.
        unknown: Why no figure may be known.

    Raises:
        DeviceError: If the CPU would do the work, or may do so.
    """
    known = [each for each in found if each is not None]
    if not known:
        problem = f"nothing proves that {provider} runs any part of the program: {unknown}."
        if must_know and not allow_cpu:
            raise DeviceError(
                problem, hint="Update the runtime that contains it, or accept this with the option allow_cpu=true."
            )
        logger.warning("%s It may run on the CPU.", problem[0].upper() + problem[1:])
        return None
    worst = max(known, key=lambda each: (each.device_nodes == 0, each.cpu_share))
    too_little = worst.device_nodes == 0 or worst.cpu_share > MOST_ON_CPU
    if too_little and not allow_cpu:
        raise DeviceError(
            f"{provider} is active but leaves too much of the program to the CPU: {worst}.",
            hint=f"At most {MOST_ON_CPU:.0%} of the heavy work may stay there. Check its driver and options, "
            "choose device cpu, or accept it with the option allow_cpu=true.",
        )
    logger.log(logging.WARNING if too_little else logging.INFO, "%s: %s.", provider, worst)
    return worst
