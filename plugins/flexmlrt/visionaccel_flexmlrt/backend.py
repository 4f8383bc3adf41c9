"""FlexMLRT behind visionaccel's contract."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from visionaccel.backends import (
    Accepted,
    Capabilities,
    Finding,
    Isolation,
    Options,
    Rejected,
    Session,
    Verdict,
    VisionBackend,
)
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.program import Program
from visionaccel.errors import ArtifactError, ConfigurationError, DeviceError
from visionaccel_flexmlrt.artifact import FLEXMLRT_DIRECTORY, FLEXMLRT_RAI, Artifact, open_settings
from visionaccel_flexmlrt.runtime import NPU, SIMULATOR, AmdEnvironment, load, missing, sdk_version, simulator_faults
from visionaccel_flexmlrt.session import FlexMLRTSession, HostGraphs, device_tensors


class FlexMLRTOptions(Options):
    """Options of the `flexmlrt` backend."""

    device_name: str | None = Field(None, description="The SDK's name of the device. Unset: by the SDK's version.")
    subgraph: str | None = Field(None, description="The subgraph to open. Unset: by the artifact's layout.")
    execute_mode: int = Field(2, ge=0, description="The SDK's executeMode.")
    preemption: bool | None = Field(None, description="The SDK's enable_preemption. Unset: the SDK's default.")
    cache_dir: Path | None = Field(None, description="Where the SDK may write. Unset: the artifact's folder.")
    any_version: bool = Field(False, description="Accept a different version of the SDK than this was built with.")
    simulator_script: Path | None = Field(None, description="Faults of the simulator; see the documentation.")


class FlexMLRTBackend(VisionBackend):
    """Runs compiled encoders on a Ryzen AI NPU, or on a simulator of it if that device is chosen by name."""

    name = "flexmlrt"
    formats = formats_with_weights = frozenset({FLEXMLRT_RAI, FLEXMLRT_DIRECTORY})
    options = FlexMLRTOptions
    isolation: ClassVar[Isolation] = "process"

    @property
    def _amd(self) -> AmdEnvironment:
        return AmdEnvironment.read(os.environ)

    def devices(self) -> Sequence[str]:
        return tuple(device for device in (NPU, SIMULATOR) if missing(device, self._amd) is None)

    def checks(self, programs: Sequence[Program]) -> Sequence[Finding]:
        from visionaccel_flexmlrt.checks import check_artifacts, check_machine

        return [*check_machine(self._amd), *check_artifacts(programs)]

    def probe(self, program: Program, device: str | None) -> Verdict:
        device = device or NPU
        if device not in (NPU, SIMULATOR):
            return Rejected(f"unknown device {device!r}.", f"Choose {NPU} or {SIMULATOR}.")
        try:
            artifact = Artifact.of(program)
        except ArtifactError as error:
            return Rejected(error.message, error.hint or "")
        if artifact.device != device:
            return Rejected(_elsewhere(program, artifact), f"Set VISIONACCEL_DEVICE={artifact.device}.")
        lacking = missing(device, self._amd)
        if lacking is not None:
            return lacking
        if device == SIMULATOR:
            return Accepted(1, "SIMULATOR on the CPU, no NPU; " + _layout(artifact))
        return Accepted(100, "FlexMLRT on a Ryzen AI NPU; " + _layout(artifact))

    def open(self, program: Program, device: str | None, options: FlexMLRTOptions) -> Session:
        device = device or NPU
        artifact = Artifact.of(program)
        if artifact.device != device:  # it may have changed since it was probed
            raise ConfigurationError(_elsewhere(program, artifact), hint=f"Set VISIONACCEL_DEVICE={artifact.device}.")
        amd = self._amd
        module = load(device, amd, any_version=options.any_version)
        if device != SIMULATOR and options.simulator_script is not None:
            raise ConfigurationError(
                "simulator_script is an option of the simulator only.", hint=f"Set VISIONACCEL_DEVICE={SIMULATOR}."
            )
        apart = device_tensors(program)
        inputs, outputs = apart or (program.inputs, program.outputs)
        names = program.stored_names if apart is None else {}
        host = HostGraphs(program) if apart is not None else None
        settings = open_settings(artifact, sdk_version(device, module, amd))
        try:
            with simulator_faults(options.simulator_script):
                model = module.Model(
                    path=str(artifact.path),
                    single_file=artifact.single_file,
                    inputs=[_as_stored(spec, names) for spec in inputs],
                    outputs=[_as_stored(spec, names) for spec in outputs],
                    device_name=settings["device_name"] if options.device_name is None else options.device_name,
                    subgraph=settings["subgraph"] if options.subgraph is None else options.subgraph,
                    cache_dir=str(options.cache_dir or artifact.path.parent),
                    execute_mode=options.execute_mode,
                    preemption=options.preemption,
                )
        except (module.BridgeError, UnicodeDecodeError) as error:  # its text may quote bytes of the artifact
            raise DeviceError(
                f"{device} cannot open program {program.name!r}: {error}",
                hint="Run `visionaccel doctor` to see what this machine lacks.",
            ) from error
        capabilities = Capabilities(device=device, precision=program.precision, simulated=device == SIMULATOR)
        return FlexMLRTSession(model, module.BridgeError, capabilities, inputs, outputs, host, options.simulator_script)


def _as_stored(spec: TensorSpec, names: Mapping[str, str]) -> tuple[str, str, list[Any]]:
    """Return a tensor for the compiled module: its name inside the artifact, dtype and shape."""
    return names.get(spec.name, spec.name), spec.dtype, list(spec.shape)


def _elsewhere(program: Program, artifact: Artifact) -> str:
    return f"program {program.name!r} was made for device {artifact.device!r}."


def _layout(artifact: Artifact) -> str:
    return "a .rai file" if artifact.single_file else "the folder of a partition"
