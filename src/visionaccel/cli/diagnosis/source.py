"""A bundle or checkpoint: whether it is whole, proven, and proven where it is to run."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from visionaccel.backends import Finding
from visionaccel.bundle import Bundle, Certificate, is_bundle, open_bundle, read_golden
from visionaccel.encoder import open_tower

OPENED = ("checkpoint", "manifest")
"""Names of the findings that say that a checkpoint or a bundle could be opened."""

_PROVE = "Run `visionaccel validate`."


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to run the programs.

    Attributes:
        backend: Name of the backend; None if none is named.
        devices: Its devices; none if none is named.
        installed: Names of the installed backends.
    """

    backend: str | None
    devices: tuple[str, ...]
    installed: Collection[str]


def of_source(source: str, wanted: Wanted) -> Iterator[Finding]:
    """What is found of a bundle or checkpoint. Every file of a bundle is read, even one that is known to be unchanged.

    Args:
        source: Its folder, or the Hugging Face repository of a checkpoint.
        wanted: What is to run it.

    Raises:
        ArtifactError: If it is broken.
    """
    if not is_bundle(source):
        tower = open_tower(source)
        yield Finding(OPENED[0], "pass", f"{source}, family {tower.family}")
        return
    bundle = open_bundle(source, trust_unchanged=False)
    yield Finding(OPENED[1], "pass", f"{source}, family {bundle.family}, {_programs(bundle)}")
    files = bundle.manifest.every_file()
    size = sum({file.path: file.bytes for file in files}.values())
    yield Finding("digests", "pass", f"{len({f.path for f in files})} files of {size / 2**20:.1f} MiB are as stated")
    yield from _certificate(bundle.manifest.certificate, wanted)
    yield _golden(bundle)


def _programs(bundle: Bundle) -> str:
    names = [program.name for program in bundle.manifest.programs]
    return f"{len(names)} {'program' if len(names) == 1 else 'programs'}: {', '.join(names)}"


def _certificate(found: Certificate | None, wanted: Wanted) -> Iterator[Finding]:
    if found is None:
        yield Finding("certificate", "warning", "none: the programs were not compared with the reference", _PROVE)
        return
    failed = [each.program for each in found.programs if each.failure is not None]
    if not found.passed:
        detail = f"not passed on {found.created}: {', '.join(failed) or 'its answers differ'}"
        yield Finding("certificate", "failure", detail, "Do not serve it. Export or import it again, and validate it.")
    else:
        lowest = min(each.lowest_cosine for each in found.programs)
        yield Finding("certificate", "pass", f"passed on {found.created}, lowest cosine {lowest:.6f}")
    if not found.independent:
        detail = "visionaccel's own tower in float32, as transformers has none: a fault of the family does not show"
        yield Finding("certificate's reference", "warning", detail, "Compare embeddings with the model's own code.")
    yield _ran_on(found, wanted)


def _ran_on(found: Certificate, wanted: Wanted) -> Finding:
    """Whether the certificate was made by what is to run the programs."""
    name = "certificate's device"
    places = list(dict.fromkeys((each.backend, each.device, each.simulated) for each in found.programs))
    made_on = "; ".join(f"{backend}, {device}{' (SIMULATED)' * simulated}" for backend, device, simulated in places)
    here = "here" if wanted.backend is None else f"with `--backend {wanted.backend}`"
    fix = f"Run `visionaccel validate` {here}."
    backends = {backend for backend, _, _ in places}
    if wanted.backend is not None and backends != {wanted.backend}:
        return Finding(name, "warning", f"made on {made_on}; {wanted.backend} is to run it", fix)
    kinds = {_kind(device) for _, device, _ in places}
    if wanted.devices and kinds != {_kind(device) for device in wanted.devices}:
        return Finding(name, "warning", f"made on {made_on}; {', '.join(wanted.devices)} is to run it", fix)
    if not backends <= set(wanted.installed):
        return Finding(name, "warning", f"made on {made_on}, which is not installed here", fix)
    if any(simulated for _, _, simulated in places):
        return Finding(name, "warning", f"made on {made_on}, which is not hardware", "Validate it on the hardware too.")
    return Finding(name, "pass", f"made on {made_on}")


def _kind(device: str) -> str:
    return device.partition(":")[0].strip().casefold()


def _golden(bundle: Bundle) -> Finding:
    images = read_golden(bundle)
    if images:
        return Finding("golden images", "pass", f"{len(images)}, for a canary to encode before the first request")
    return Finding("golden images", "warning", "none, so that no canary can encode any", _PROVE)
