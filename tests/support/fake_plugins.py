"""Plug-in distributions made on the spot: metadata and a module in a folder, as pip would leave them."""

from pathlib import Path
from textwrap import dedent

import pytest

from visionaccel.core.entry_points import ArchitectureEntries


def install(site: Path, distribution: str, name: str, source: str, group: str = "visionaccel.backends") -> Path:
    """Put a distribution with an entry point into the folder `site`, which belongs on the Python path."""
    module = distribution.replace("-", "_")
    return install_all(site, distribution, {group: {name: module}}, source)


def install_all(site: Path, distribution: str, groups: dict[str, dict[str, str]], source: str) -> Path:
    """Put a distribution into `site` with entry points in several groups, each named and with what it refers to."""
    module = distribution.replace("-", "_")
    info = site / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    sections = (
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in points.items())])
        for group, points in groups.items()
    )
    (info / "entry_points.txt").write_text("\n".join(sections) + "\n")
    (site / f"{module}.py").write_text(dedent(source))
    return site


def find_each_time(monkeypatch: pytest.MonkeyPatch, entries: ArchitectureEntries[object]) -> None:
    """Have installed entry points looked up each time, so that those of a test are found, and only by it."""
    monkeypatch.setattr(ArchitectureEntries, "_points", property(ArchitectureEntries._points.func))
    monkeypatch.setattr(entries, "_loaded", {})


ECHO = """
from visionaccel.backends import Accepted, Capabilities, Session, VisionBackend, hookimpl

class EchoSession(Session):
    capabilities = Capabilities(device="nowhere", precision="float32", simulated=True)
    def run(self, inputs):
        raise RuntimeError("echo cannot compute")
    def close(self):
        pass

class Echo(VisionBackend):
    name = "{name}"
    formats = frozenset({{"onnx", "checkpoint"}})
    def probe(self, program, device):
        return Accepted({score}, "says yes")
    def open(self, program, device, options):
        return EchoSession()

@hookimpl
def visionaccel_backends():
    return [Echo]
"""
"""A backend that accepts everything and fails at every run."""
