"""A bundle or checkpoint: whether it is whole, proven, and proven where it is to run."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from visionaccel.backends import Finding
from visionaccel.bundle import Bundle, Certificate, is_bundle, open_bundle, read_golden
from visionaccel.encoder import open_tower

_PROVE = "Run `visionaccel validate`."


def of_source(
    source: str, backend: str | None, devices: Collection[str], installed: Collection[str]
) -> Iterator[Finding]:
    """What is found of a bundle, every file of which is read, or of a checkpoint. The first finding is that it opens.

    Args:
        source: Its folder, or the Hugging Face repository of a checkpoint.
        backend: Name of the backend that is to run it, if one is named.
        devices: Devices that it is to run on, if some are named.
        installed: Names of the installed backends.
    """
    if not is_bundle(source):
        yield Finding("checkpoint", "pass", f"{source}, family {open_tower(source).family}")
        return
    bundle = open_bundle(source, trust_unchanged=False)
    names = [program.name for program in bundle.manifest.programs]
    programs = f"{len(names)} {'program' if len(names) == 1 else 'programs'}: {', '.join(names)}"
    yield Finding("manifest", "pass", f"{source}, family {bundle.family}, {programs}")
    sizes = {file.path: file.bytes for file in bundle.manifest.every_file()}
    yield Finding("digests", "pass", f"{len(sizes)} files of {sum(sizes.values()) / 2**20:.1f} MiB are as stated")
    certificate = bundle.manifest.certificate
    if certificate is None:
        yield Finding("certificate", "warning", "none: the programs were not compared with the reference", _PROVE)
    else:
        yield from _certificate(certificate)
        yield _ran_on(certificate, backend, devices, installed)
    yield _golden(bundle)


def _certificate(found: Certificate) -> Iterator[Finding]:
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


def _ran_on(found: Certificate, backend: str | None, devices: Collection[str], installed: Collection[str]) -> Finding:
    """Whether the certificate was made by what is to run the programs."""
    name = "certificate's device"
    places = list(dict.fromkeys((each.backend, each.device, each.simulated) for each in found.programs))
    made_on = "; ".join(f"{maker}, {device}{' (SIMULATED)' * simulated}" for maker, device, simulated in places)
    makers, kinds = {maker for maker, _, _ in places}, {_kind(device) for _, device, _ in places}
    fix = f"Run `visionaccel validate` {'here' if backend is None else f'with `--backend {backend}`'}."
    if backend is not None and makers != {backend}:
        return Finding(name, "warning", f"made on {made_on}; {backend} is to run it", fix)
    if devices and kinds != set(map(_kind, devices)):
        return Finding(name, "warning", f"made on {made_on}; {', '.join(devices)} is to run it", fix)
    if not makers <= set(installed):
        return Finding(name, "warning", f"made on {made_on}, which is not installed here", fix)
    if any(simulated for _, _, simulated in places):
        return Finding(name, "warning", f"made on {made_on}, which is not hardware", "Validate it on the hardware too.")
    return Finding(name, "pass", f"made on {made_on}")


def _kind(device: str) -> str:
    return device.partition(":")[0].strip().casefold()


def _golden(bundle: Bundle) -> Finding:
    if images := read_golden(bundle):
        return Finding("golden images", "pass", f"{len(images)}, for a canary to encode before the first request")
    return Finding("golden images", "warning", "none, so that no canary can encode any", _PROVE)
