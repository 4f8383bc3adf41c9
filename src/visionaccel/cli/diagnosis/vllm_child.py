"""vLLM with its plug-ins, in a separate process: `python -m visionaccel.cli.diagnosis.vllm_child FILE LIMIT`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Literal

from visionaccel.backends import Finding
from visionaccel.errors import VisionAccelError
from visionaccel.isolation import answer_with, give_up_after

__all__ = ["ACTIVATION", "main"]

ACTIVATION = "activation"


def main(file: str, limit: str) -> None:
    """Load vLLM's plug-ins as its processes do, and write which class it would make the model of.

    Args:
        file: Where the answer goes.
        limit: Seconds after which nobody waits for it.
    """
    give_up_after(float(limit))
    answer_with(file, list(_findings()))


def _findings() -> Iterator[Finding]:
    try:
        import vllm
    except Exception as error:
        yield Finding(
            "import", "failure", f"vllm cannot be imported: {type(error).__name__}: {error}", "Reinstall vLLM."
        )
        return
    yield Finding("import", "pass", f"vllm {vllm.__version__}")
    from visionaccel.integrations.vllm import compat

    try:
        compat.load_plugins()
    except VisionAccelError as error:
        yield Finding(ACTIVATION, "failure", f"vLLM would not start: {error.message}", error.hint or "")
        return
    except Exception as error:
        detail = f"vLLM's plug-ins cannot be loaded: {type(error).__name__}: {error}"
        yield Finding(ACTIVATION, "failure", detail, "Uninstall the plug-in that the message names.")
        return
    known = [name for name in compat.ARCHITECTURES if compat.is_registered(name)]
    replaced = [name for name in known if compat.is_replaced(name)]
    yield from _contract(known)
    if replaced and replaced == known:
        yield Finding(ACTIVATION, "pass", f"vLLM makes {', '.join(replaced)} from visionaccel's class")
        return
    left = ", ".join(name for name in known if name not in replaced)
    yield Finding(
        ACTIVATION,
        "failure",
        f"vLLM makes {left or 'no model that is implemented'} from its own class",
        "Install visionaccel into vLLM's environment: `pip show visionaccel` with vLLM's Python shows it.",
    )


def _contract(architectures: Sequence[str | None]) -> Iterator[Finding]:
    """Which features this vLLM lacks a name for."""
    from visionaccel.integrations.vllm.compat.contract import WITHOUT, Feature
    from visionaccel.integrations.vllm.features import why_off

    off = {
        (feature, reason)
        for feature in Feature
        for architecture in (None, *architectures)
        if (reason := why_off(feature, architecture)) is not None
    }
    for feature, reason in sorted(off):
        status: Literal["warning", "failure"] = "failure" if feature is Feature.INLINE else "warning"
        detail = f"{reason}. Without it, {WITHOUT[feature]}"
        yield Finding(f"contract: {feature}", status, detail, "Install a release that docs/compatibility.md names.")
    if not off:
        yield Finding("contract", "pass", "every name of vLLM that visionaccel relies on is there")


if __name__ == "__main__":
    main(*sys.argv[1:])
