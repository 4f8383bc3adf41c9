"""Sessions of ONNX Runtime behind visionaccel's contract."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from visionaccel.arrays import Array
from visionaccel.backends import Accepted, Capabilities, Options, Rejected, Session, Verdict, VisionBackend
from visionaccel.errors import ArtifactError, ConfigurationError, DeviceError
from visionaccel.program import ONNX, Program
from visionaccel_onnxrt.bfloat16 import emulate_bfloat16
from visionaccel_onnxrt.providers import CPU_PROVIDER, DEVICES, provider_for

__all__ = ["OnnxRuntimeBackend", "OnnxRuntimeOptions", "OnnxRuntimeSession"]

EXTERNAL_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
CAST_CHAIN_ELIMINATION = "optimization.enable_cast_chain_elimination"
_ERRORS_ONLY = 3


class OnnxRuntimeOptions(Options):
    """Options of the `onnxrt` backend."""

    provider: str | None = Field(None, description="Execution provider by its full name; overrides the device.")
    provider_options: dict[str, str] = Field(default_factory=dict, description="Options of the execution provider.")
    threads: int | None = Field(None, ge=1, description="Threads within an operator. Unset: one for each core.")
    optimization: Literal["all", "extended", "basic", "none"] = Field("all", description="Graph optimisation level.")


class OnnxRuntimeBackend(VisionBackend):
    """Runs ONNX programs with ONNX Runtime: on the CPU, or on the execution provider of the device."""

    name = "onnxrt"
    formats = frozenset({ONNX})
    options = OnnxRuntimeOptions

    def devices(self) -> Sequence[str]:
        import onnxruntime

        available = onnxruntime.get_available_providers()
        return tuple(device for device, provider in DEVICES.items() if provider.name in available)

    def probe(self, program: Program, device: str | None) -> Verdict:
        known = provider_for(device)
        if known is None:
            return Rejected(f"it knows no device {device!r}.", f"Name one of {', '.join(DEVICES)}, such as cuda:0.")
        provider, _ = known
        try:
            import onnxruntime
        except ImportError as error:
            return Rejected(f"onnxruntime cannot be imported: {error}.", "Reinstall it: pip install onnxruntime.")
        if provider.name not in onnxruntime.get_available_providers():
            return Rejected(
                f"this ONNX Runtime {onnxruntime.__version__} has no {provider.name}.", f"Install {provider.source}."
            )
        if provider.static_only and _is_dynamic(program):
            return Rejected(
                f"{provider.name} takes programs of fixed shapes only, and {program.name!r} serves every grid.",
                "Export a bundle with --grid and set VISIONACCEL_BUNDLE, or use device cpu.",
            )
        notes = f"ONNX Runtime {onnxruntime.__version__}, {provider.name}"
        if _is_emulated(program, provider.name):
            notes += "; bfloat16 emulated: float32 arithmetic, rounded after each operator"
        return Accepted(provider.score, notes)

    def open(self, program: Program, device: str | None, options: OnnxRuntimeOptions) -> Session:
        import onnxruntime

        known = provider_for(device)
        by_device, defaults = known if known is not None else (DEVICES["cpu"], {})
        provider = options.provider or by_device.name
        if provider != by_device.name:
            defaults = {}
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise ConfigurationError(
                f"this ONNX Runtime {onnxruntime.__version__} has no execution provider {provider!r}.",
                hint=f"Available: {', '.join(available)}.",
            )
        if _is_dynamic(program) and any(p.static_only and p.name == provider for p in DEVICES.values()):
            raise ConfigurationError(
                f"{provider} takes programs of fixed shapes only, and this one serves every grid.",
                hint="Leave out the option `provider`.",
            )
        levels = onnxruntime.GraphOptimizationLevel
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = _ERRORS_ONLY
        settings.graph_optimization_level = {
            "all": levels.ORT_ENABLE_ALL,
            "extended": levels.ORT_ENABLE_EXTENDED,
            "basic": levels.ORT_ENABLE_BASIC,
            "none": levels.ORT_DISABLE_ALL,
        }[options.optimization]
        if options.threads is not None:
            settings.intra_op_num_threads = options.threads
        settings.add_session_config_entry(EXTERNAL_DATA_FOLDER, str(program.folder))
        if program.model is None:
            raise ArtifactError(f"the ONNX program in {program.folder} has no model.", hint="Write it again.")
        model = program.model()
        if _is_emulated(program, provider):
            model = emulate_bfloat16(model)
            # Off by default; it would take a Cast to bfloat16 and back, which is the rounding, for a detour.
            settings.add_session_config_entry(CAST_CHAIN_ELIMINATION, "0")
        session = onnxruntime.InferenceSession(
            model, settings, providers=[(provider, {**defaults, **options.provider_options})]
        )
        # ONNX Runtime only warns when a provider cannot be had and goes on with the CPU.
        active = session.get_providers()
        if active[0] != provider:
            raise DeviceError(
                f"ONNX Runtime did not activate {provider}; it would run on {active[0]} instead.",
                hint="Check the provider's driver and libraries, or choose device cpu.",
            )
        shown = device or "cpu" if provider == by_device.name else provider
        return OnnxRuntimeSession(session, program, shown, on_cpu=provider == CPU_PROVIDER)


def _is_dynamic(program: Program) -> bool:
    return any(isinstance(size, str) for spec in program.inputs for size in spec.shape)


def _is_emulated(program: Program, provider: str) -> bool:
    return provider == CPU_PROVIDER and program.precision == "bfloat16"


class OnnxRuntimeSession(Session):
    """One ONNX Runtime inference session. Inputs and outputs are host arrays; outputs are fresh with every call."""

    def __init__(self, session: Any, program: Program, device: str, *, on_cpu: bool) -> None:
        # InferenceSession.run is documented as thread-safe; providers of single-owner devices are not trusted with it.
        # The CPU provider computes float16 operators in float32, and drops most of the roundings between them.
        precision = "float32" if on_cpu and program.precision == "float16" else program.precision
        self.capabilities = Capabilities(device=device, precision=precision, thread_safe=on_cpu)
        self._session: Any = session
        self._outputs = [spec.name for spec in program.outputs]

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))

    def close(self) -> None:
        self._session = None
