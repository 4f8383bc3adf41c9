"""The ONNX Runtime backend: which programs it accepts, and how it opens them."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from visionaccel.backends import (
    Accepted,
    Capabilities,
    Isolation,
    Options,
    QuantizedModel,
    Rejected,
    Session,
    Verdict,
    VisionBackend,
)
from visionaccel.core.arrays import Array
from visionaccel.core.cores import thread_limit
from visionaccel.core.program import EP_CONTEXT, ONNX, ONNX_FUSED, ONNX_MODELS, ONNX_STANDARD, Program
from visionaccel.errors import ArtifactError, ConfigurationError, DeviceError
from visionaccel_onnxrt.bfloat16 import emulate_bfloat16
from visionaccel_onnxrt.ep_context import offload_of_context, verified_context
from visionaccel_onnxrt.offload import RECORD_ASSIGNMENT, assigned, require_offload
from visionaccel_onnxrt.providers import CPU_PROVIDER, CUDA_PROVIDER, DEVICES, VITISAI_PROVIDER, gpu_model, provider_for
from visionaccel_onnxrt.session import (
    CAST_CHAIN_ELIMINATION,
    ERRORS_ONLY,
    INT8_IN_FULL,
    SPINNING,
    UNPACKED,
    OnnxRuntimeSession,
    bind_weights,
)
from visionaccel_onnxrt.vitisai import SUMMARIES, compiler_options, pass_summaries

_EMULATED, _STANDARD = 5, 40
"""Scores of a program whose arithmetic is emulated, and of one in standard operators, which OpenVINO runs faster."""


class OnnxRuntimeOptions(Options):
    """Options of the `onnxrt` backend."""

    provider: str | None = Field(None, description="Execution provider by its full name; overrides the device.")
    provider_options: dict[str, str] = Field(default_factory=dict, description="Options of the execution provider.")
    threads: int | None = Field(
        None, ge=1, description="Threads within an operator. Unset: one for each available core."
    )
    spinning: bool = Field(
        False, description="Let idle threads wait by spinning, which takes CPU time from everything else."
    )
    share_weights: bool = Field(
        False,
        description="Read float32 weights from where they are held or mapped, instead of packing a copy for each "
        "process. Small grids take somewhat longer.",
    )
    optimization: Literal["all", "extended", "basic", "none"] = Field("all", description="Graph optimisation level.")
    allow_cpu: bool = Field(
        False, description="Accept that the execution provider leaves the work to the CPU, or may do so."
    )
    cache_dir: Path | None = Field(
        None, description="Where the npu's compiled programs are kept. Unset: a folder in the user's cache."
    )
    context_dir: Path | None = Field(
        None,
        description="Folder to write the npu's compiled programs to, as NAME.onnx with its files; existing ones are "
        "replaced.",
    )


class OnnxRuntimeBackend(VisionBackend):
    """Runs ONNX programs with ONNX Runtime, on the execution provider of the device."""

    name = "onnxrt"
    formats = frozenset({ONNX, ONNX_FUSED, ONNX_STANDARD, EP_CONTEXT})
    formats_with_weights = frozenset({EP_CONTEXT})
    options = OnnxRuntimeOptions

    def devices(self) -> Sequence[str]:
        import onnxruntime

        available = onnxruntime.get_available_providers()
        return tuple(device for device, provider in DEVICES.items() if provider.name in available)

    def isolation_on(self, device: str | None) -> Isolation:
        # AMD's provider is known to abort the process, and to mix up the outputs of two models.
        return "process" if device == "npu" else "none"

    def quantize(self, program: Program, calibration: Iterable[Mapping[str, Array]], folder: Path) -> QuantizedModel:
        from visionaccel_onnxrt.quantization import quantize

        return quantize(program, calibration, folder)

    def probe(self, program: Program, device: str | None) -> Verdict:
        known = provider_for(device)
        if known is None:
            return Rejected(f"unknown device {device!r}.", f"Choose one of {', '.join(DEVICES)}, such as cuda:0.")
        provider, _ = known
        if program.format == ONNX_FUSED and provider.name == VITISAI_PROVIDER:
            return Rejected(
                f"program {program.name!r} is written in ONNX Runtime's own operators, which an npu does not run.",
                "Export the bundle without --dialect microsoft.",
            )
        if program.format == ONNX_STANDARD and program.quantization is not None:
            return Rejected(
                f"program {program.name!r} was quantized for OpenVINO.",
                "Choose backend openvino, or quantize the float32 bundle that it was made from with --target onnxrt.",
            )
        if program.format == ONNX_STANDARD and provider.name != CPU_PROVIDER:
            return Rejected(
                f"program {program.name!r} serves every grid in standard operators, which only the cpu supports.",
                "Export it without --dialect standard, or use device cpu.",
            )
        if program.format == EP_CONTEXT and provider.name != VITISAI_PROVIDER:
            return Rejected(f"program {program.name!r} was compiled for an npu.", "Choose device npu.")
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
                f"{provider.name} supports only programs of fixed shapes, but {program.name!r} serves every grid.",
                "Export a bundle with --grid and set VISIONACCEL_BUNDLE, or use device cpu.",
            )
        notes = f"ONNX Runtime {onnxruntime.__version__}, {provider.name}"
        if _is_emulated(program, provider.name):
            notes += "; bfloat16 emulated: float32 arithmetic, rounded after each operator"
            return Accepted(_EMULATED, notes)  # slower than any other backend
        if program.format == ONNX_STANDARD:
            return Accepted(_STANDARD, notes)
        return Accepted(provider.score, notes)

    def open(self, program: Program, device: str | None, options: OnnxRuntimeOptions) -> Session:
        import onnxruntime

        provider, given = _provider(program, device, options, onnxruntime)
        kept = nullcontext() if options.context_dir is None else _kept_context(program, options.context_dir)
        with kept as context:
            return self._open(program, device, options, provider, given, context)

    def _open(
        self,
        program: Program,
        device: str | None,
        options: OnnxRuntimeOptions,
        provider: str,
        given: dict[str, str],
        context: Path | None,
    ) -> Session:
        import onnxruntime

        if provider == VITISAI_PROVIDER:
            given = compiler_options(program, given, options.cache_dir, onnxruntime.__version__)
        settings = _session_options(options, onnxruntime)
        if context is not None:
            settings.add_session_config_entry("ep.context_enable", "1")
            settings.add_session_config_entry("ep.context_file_path", str(context))
            settings.add_session_config_entry("ep.context_embed_mode", "0")
        if provider != CPU_PROVIDER:
            settings.add_session_config_entry(RECORD_ASSIGNMENT, "1")
        model = _model(program, provider, settings)
        weights = bind_weights(model, program.folder, settings) if isinstance(model, bytes) else []
        session = onnxruntime.InferenceSession(
            model,
            settings,
            providers=[(provider, given)],
            enable_fallback=0,  # otherwise the CPU runs what the provider fails at, now or in a later run
        )
        # If a provider is not available, ONNX Runtime only warns and uses the CPU.
        active = session.get_providers()
        if active[0] != provider:
            raise DeviceError(
                f"ONNX Runtime did not activate {provider}; it would run on {active[0]} instead.",
                hint="Check the provider's driver and libraries, or choose device cpu.",
            )
        known = provider_for(device)
        shown = device or "cpu" if known is not None and provider == known[0].name else provider
        if provider == CPU_PROVIDER:
            emulated = _is_emulated(program, provider)
            capabilities = _on_cpu(program, shown, thread_safe=True, emulated=emulated)
            return OnnxRuntimeSession(session, weights, program, capabilities)
        summaries = list(pass_summaries(given)) if provider == VITISAI_PROVIDER else []
        written = context or (program.artifact if program.format == EP_CONTEXT else None)
        offload = require_offload(
            [
                assigned(session, provider),
                *(summary.offload for summary in summaries),
                offload_of_context(written) if written is not None else None,
            ],
            provider,
            allow_cpu=options.allow_cpu,
            must_know=provider == VITISAI_PROVIDER,
            unknown=_unknown(provider, given, onnxruntime.__version__),
        )
        if offload is not None and offload.device_nodes == 0:
            return OnnxRuntimeSession(session, weights, program, _on_cpu(program, "cpu", thread_safe=False))
        precision: str = program.quantization or program.precision
        if provider == VITISAI_PROVIDER:
            # Its compiler converts float32 to bfloat16; the device has no float32.
            stated = next((summary.precision for summary in summaries if summary.precision), None)
            precision = stated or ("bfloat16" if precision == "float32" else precision)
        # InferenceSession.run is documented as thread-safe, but providers of devices with one owner may not be. A GPU's
        # model decides which kernels run, and so the last bits.
        hardware = gpu_model(int(given.get("device_id", 0))) if provider == CUDA_PROVIDER else ""
        capabilities = Capabilities(device=shown, precision=precision, hardware=hardware)
        return OnnxRuntimeSession(session, weights, program, capabilities)


def _provider(
    program: Program, device: str | None, options: OnnxRuntimeOptions, onnxruntime: Any
) -> tuple[str, dict[str, str]]:
    """Return the execution provider to use, and its options that do not depend on the program."""
    known = provider_for(device)
    by_device, defaults = known if known is not None else (DEVICES["cpu"], {})
    provider = options.provider or by_device.name
    if provider != by_device.name:
        defaults = {}
    if provider == VITISAI_PROVIDER != by_device.name:
        # The device decides whether the session gets a separate process.
        raise ConfigurationError(
            f"{provider} does not run on device {device or 'cpu'}.",
            hint="Choose device npu, and leave out the option `provider`.",
        )
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise ConfigurationError(
            f"this ONNX Runtime {onnxruntime.__version__} has no execution provider {provider!r}.",
            hint=f"Available: {', '.join(available)}.",
        )
    if _is_dynamic(program) and any(p.static_only and p.name == provider for p in DEVICES.values()):
        raise ConfigurationError(
            f"{provider} supports only programs of fixed shapes, but this one serves every grid.",
            hint="Leave out the option `provider`.",
        )
    if program.format == EP_CONTEXT and provider != VITISAI_PROVIDER:
        raise ConfigurationError(
            f"program {program.name!r} was compiled for {VITISAI_PROVIDER}; {provider} cannot run it.",
            hint="Choose device npu, and leave out the option `provider`.",
        )
    if options.context_dir is not None and provider != VITISAI_PROVIDER:
        raise ConfigurationError(
            f"{provider} compiles no programs that could be kept in context_dir.",
            hint="Choose device npu, or leave out the option `context_dir`.",
        )
    return provider, {**defaults, **options.provider_options}


def _session_options(options: OnnxRuntimeOptions, onnxruntime: Any) -> Any:
    levels = onnxruntime.GraphOptimizationLevel
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = ERRORS_ONLY
    settings.graph_optimization_level = {
        "all": levels.ORT_ENABLE_ALL,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "basic": levels.ORT_ENABLE_BASIC,
        "none": levels.ORT_DISABLE_ALL,
    }[options.optimization]
    settings.add_session_config_entry(SPINNING, str(int(options.spinning)))
    settings.add_session_config_entry(UNPACKED, str(int(options.share_weights)))
    settings.add_session_config_entry(INT8_IN_FULL, "1")
    threads = options.threads or thread_limit()
    if threads is not None:  # by default it starts and pins a thread for each core of the machine
        settings.intra_op_num_threads = threads
    return settings


def _model(program: Program, provider: str, settings: Any) -> bytes | str:
    """Return the model's bytes, or the path of a model that refers to files next to it."""
    if program.format == EP_CONTEXT:
        return str(verified_context(program, provider))
    if program.model is None:
        raise ArtifactError(f"the ONNX program in {program.folder} has no model.", hint="Write it again.")
    model = program.model()
    if program.format == ONNX_STANDARD:
        _require_whole_masks(model, program)
    if not _is_emulated(program, provider):
        return model
    # Off by default; it would remove the Casts to bfloat16 and back, which do the rounding.
    settings.add_session_config_entry(CAST_CHAIN_ELIMINATION, "0")
    return emulate_bfloat16(model)


def _require_whole_masks(model: bytes, program: Program) -> None:
    """Refuse a program of an earlier release with ConfigurationError if its masks are not expanded to each query.

    ONNX Runtime's CPU provider does not broadcast a mask over the queries.
    """
    import onnx

    nodes = onnx.load_model_from_string(model).graph.node
    whole = {name for node in nodes if node.op_type == "Expand" for name in node.output}
    masks = {name for node in nodes if node.op_type == "Attention" for name in node.input[3:4] if name}
    if not masks <= whole:
        raise ConfigurationError(
            f"program {program.name!r} was written by an earlier release, with masks that ONNX Runtime cannot use.",
            hint="Export the bundle again, or use backend openvino.",
        )


@contextmanager
def _kept_context(program: Program, folder: Path) -> Iterator[Path]:
    """Yield the path to write the compiled program to; it replaces an earlier one if the context ends without an error.

    The path is in a temporary folder and has the final file name, because the model refers to the file next to it by
    name.
    """
    if program.format == EP_CONTEXT:
        raise ConfigurationError(
            f"program {program.name!r} is already compiled.", hint="Leave out the option `context_dir`."
        )
    folder = folder.expanduser().absolute()
    target = folder / f"{program.name}.onnx"
    if target.parent != folder:  # a bundle may contain any program name
        raise ConfigurationError(
            f"the name of program {program.name!r} cannot be used as a file name.",
            hint="Leave out the option `context_dir`.",
        )
    if target.exists():
        earlier = offload_of_context(target)
        if earlier is None or not earlier.device_nodes:
            raise ConfigurationError(
                f"{target} exists and is not a compiled program.", hint="Remove it, or choose a different context_dir."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{program.name}.partial-", dir=folder))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield work / target.name
        try:
            for file in sorted(work.iterdir(), key=lambda each: each.name == target.name):  # the model last
                file.replace(folder / file.name)
        except OSError as error:
            raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"{folder} cannot be written: {error}", hint="Choose a different context_dir.")


def _on_cpu(program: Program, device: str, *, thread_safe: bool, emulated: bool = False) -> Capabilities:
    # The CPU provider computes float16 operators in float32, and skips most of the rounding between them.
    precision = program.quantization or ("float32" if program.precision == "float16" else program.precision)
    return Capabilities(device=device, precision=precision, thread_safe=thread_safe, emulated=emulated)


def _unknown(provider: str, given: Mapping[str, str], runtime: str) -> str:
    reason = f"ONNX Runtime {runtime} does not report which nodes it assigned to it"
    if provider != VITISAI_PROVIDER or "cache_key" not in given:
        return reason
    return f"{reason}, and {Path(given['cache_dir'], given['cache_key'])} has no {' or '.join(SUMMARIES)}"


def _is_dynamic(program: Program) -> bool:
    return any(isinstance(size, str) for spec in program.inputs for size in spec.shape)


def _is_emulated(program: Program, provider: str) -> bool:
    return provider == CPU_PROVIDER and program.precision == "bfloat16" and program.format in ONNX_MODELS
