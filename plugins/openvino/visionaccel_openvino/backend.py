"""The OpenVINO backend: which programs it accepts, and how it opens them."""

import importlib.util
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from visionaccel.backends import (
    Accepted,
    Capabilities,
    Options,
    QuantizedModel,
    Rejected,
    Session,
    Verdict,
    VisionBackend,
)
from visionaccel.core.arrays import Array
from visionaccel.core.cores import thread_limit
from visionaccel.core.program import ONNX, ONNX_STANDARD, AnyGrid, Program
from visionaccel.errors import ConfigurationError, DeviceError

if TYPE_CHECKING:
    import openvino

logger = logging.getLogger(__name__)

_SCORES = {"cpu": 50, "gpu": 50, "npu": 100, "auto": 50}
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_OWN = {
    "CACHE_DIR": "use the option cache_dir",
    "INFERENCE_NUM_THREADS": "use the option threads",
    "INFERENCE_PRECISION_HINT": "use the option precision",
    "PERFORMANCE_HINT_NUM_REQUESTS": "use the option requests",
    "LP_TRANSFORMS_MODE": "it is off if int8 products would be wrong",
    "SNIPPETS_MODE": "it is off if it gives wrong answers",
}
"""Properties that users may not set, because correct answers depend on them, and what to do instead."""
_CAPABILITIES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}


class OpenVinoOptions(Options):
    """Options of the `openvino` backend."""

    precision: Literal["float32", "bfloat16", "float16"] | None = Field(
        None,
        description="Arithmetic of the device, except for a quantized program's products. Unset: the program's on cpu "
        "and auto, float16 on gpu and npu.",
    )
    threads: int | None = Field(None, ge=1, description="cpu: threads of a call. Unset: one for each available core.")
    requests: int = Field(1, ge=1, le=64, description="Calls in flight at a time; each needs separate memory.")
    cache_dir: Path | None = Field(
        None,
        description="gpu, npu: folder for compiled programs, which can take long to compile. Unset: they are not kept.",
    )
    properties: dict[str, str] = Field(
        default_factory=dict, description="Further properties of OpenVINO's device by name, as text."
    )


class OpenVinoBackend(VisionBackend):
    """Compiles ONNX programs with OpenVINO for the CPU, Intel's GPUs and NPUs, or whichever it finds best (`auto`)."""

    name = "openvino"
    formats = frozenset({ONNX, ONNX_STANDARD})
    options = OpenVinoOptions

    def devices(self) -> Sequence[str]:
        import openvino

        return (*(_ours(name) for name in openvino.Core().available_devices), "auto")

    def quantize(self, program: Program, calibration: Iterable[Mapping[str, Array]], folder: Path) -> QuantizedModel:
        from visionaccel_openvino.quantization import quantize

        return quantize(program, calibration, folder)

    def probe(self, program: Program, device: str | None) -> Verdict:
        kind = self.kind_of(device) or "cpu"
        if kind not in _SCORES:
            return Rejected(f"unknown device {device!r}.", f"Choose one of {', '.join(_SCORES)}, such as gpu:1.")
        if isinstance(program.coverage, AnyGrid) and program.format == ONNX:
            return Rejected(
                f"program {program.name!r} is written in ONNX Runtime's operators.",
                "Export it with --dialect standard, or leave out the bundle.",
            )
        if program.quantization is not None and program.format == ONNX:
            return Rejected(
                f"program {program.name!r} was quantized for ONNX Runtime.",
                "Choose backend onnxrt, or quantize the float32 bundle that it was made from with --target openvino.",
            )
        if isinstance(program.coverage, AnyGrid) and kind == "npu":
            return Rejected(
                f"an npu supports only programs of fixed shapes, but {program.name!r} serves every grid.",
                "Export a bundle with --grid and set VISIONACCEL_BUNDLE, or use device cpu or gpu.",
            )
        missing = [module for module in ("openvino", "onnx") if importlib.util.find_spec(module) is None]
        if missing:
            return Rejected(f"{' and '.join(missing)} is not installed.", f"pip install {' '.join(missing)}.")
        import openvino

        available = [_ours(name) for name in openvino.Core().available_devices]
        wanted = device or "cpu"
        if kind != "auto" and wanted not in available and f"{wanted}:0" not in available:
            return Rejected(
                f"OpenVINO {openvino.__version__} found no device {wanted!r}; it found {', '.join(available)}.",
                "Check the device's driver, or use device cpu.",
            )
        return Accepted(_SCORES[kind], f"OpenVINO {openvino.__version__}, device {_theirs(wanted)}")

    def open(self, program: Program, device: str | None, options: OpenVinoOptions) -> Session:
        import openvino

        from visionaccel_openvino.model import Mapped, read_model
        from visionaccel_openvino.session import OpenVinoSession

        shown = device or "cpu"
        if options.cache_dir is not None and self.kind_of(shown) not in ("gpu", "npu"):
            # Programs that OpenVINO 2026.4 loads from its cache for the CPU return NaN, or worse, wrong numbers.
            raise ConfigurationError(
                f"compiled programs for device {shown!r} are not cached: programs from OpenVINO's cache give "
                f"wrong answers.",
                hint="Leave out the option cache_dir; compiling for the CPU takes only seconds.",
            )
        core = openvino.Core()
        precision = _precision(core, program, shown, options)
        integers = program.quantization is not None and _computes_integers(program, shown)
        properties = _properties(program, shown, precision, integers, options)

        def make() -> tuple[openvino.CompiledModel, Mapped]:
            model, mapped = read_model(core, program)
            try:
                compiled = core.compile_model(model, _theirs(shown), properties)
            except RuntimeError as error:
                raise DeviceError(
                    f"OpenVINO {openvino.__version__} cannot compile program {program.name!r} for device {shown!r}: "
                    f"{error}",
                    hint="Check the backend's options; `visionaccel backends` lists them.",
                ) from error
            _check_precision(compiled, shown, precision)
            return compiled, mapped

        arithmetic = str(program.quantization) if integers else precision
        model = str(core.get_property(_theirs(shown), "FULL_DEVICE_NAME")) if self.kind_of(shown) == "gpu" else ""
        capabilities = Capabilities(
            device=shown,
            precision=arithmetic,
            thread_safe=True,
            max_in_flight=options.requests,
            hardware=model,
        )
        return OpenVinoSession(make, program, capabilities)


def _ours(name: str) -> str:
    """Our name for a device of OpenVINO: `gpu:1` for `GPU.1`."""
    return name.lower().replace(".", ":")


def _theirs(device: str) -> str:
    return device.upper().replace(":", ".")


def _precision(core: "openvino.Core", program: Program, device: str, options: OpenVinoOptions) -> str:
    """Return the arithmetic to request, after a check that the device has it.

    Raises:
        ConfigurationError: If it does not; OpenVINO would silently use a different one.
    """
    kind = device.partition(":")[0]
    wanted = options.precision or ("float16" if kind in ("gpu", "npu") else program.precision)
    if kind == "auto":
        if _needs_no_snippets(program, wanted):
            raise ConfigurationError(
                f"device 'auto' may give wrong answers in {wanted} for program {program.name!r}, which has "
                f"fixed shapes.",
                hint="Choose a device, such as cpu, or set the option precision=float32.",
            )
        return wanted
    known = core.get_property(_theirs(device), "OPTIMIZATION_CAPABILITIES")
    if _CAPABILITIES[wanted] in known:
        return wanted
    if options.precision is None and "FP32" in known:
        return "float32"
    offered = ", ".join(name for name, theirs in _CAPABILITIES.items() if theirs in known)
    raise ConfigurationError(
        f"OpenVINO's device {device!r} does not compute in {wanted} here; it offers {offered}.",
        hint="Set the option precision to one of these, or leave it out.",
    )


def _needs_no_snippets(program: Program, precision: str) -> bool:
    """Return whether OpenVINO's code generator for attention (snippets) must be off on the CPU.

    For fixed shapes in bfloat16, that of OpenVINO 2026.4 silently gives wrong answers: if masks are added to the
    scores, rows have a cosine of 0.4 to 0.9 to the correct ones. Its other implementations are correct, and graphs for
    any grid do not use it. Device `auto` does not pass the property that turns it off to the CPU.
    """
    return precision != "float32" and not isinstance(program.coverage, AnyGrid)


def _computes_integers(program: Program, device: str) -> bool:
    """Return whether to compute a quantized program's products in integers, and not in floats of the same values.

    Raises:
        ConfigurationError: If the device needs the setting for floats and does not accept it.
    """
    from visionaccel_openvino.integer_products import integer_products_saturate

    kind = device.partition(":")[0]
    if kind not in ("cpu", "auto") or not integer_products_saturate():
        return True
    if kind == "auto":
        raise ConfigurationError(
            f"device 'auto' may give wrong answers for the int8 program {program.name!r}: this CPU has no VNNI.",
            hint="Choose a device, such as cpu.",
        )
    logger.warning(
        "OpenVINO's int8 products are incorrect on a CPU without VNNI. The products of program %r are computed in "
        "float32: as exact as in int8, and about as fast as the float32 program that it was made from.",
        program.name,
    )
    return False


def _properties(
    program: Program, device: str, precision: str, integers: bool, options: OpenVinoOptions
) -> dict[str, Any]:
    """OpenVINO's properties for the compilation.

    Raises:
        ConfigurationError: If the user's properties include one that an option replaces.
    """
    for name in sorted(_OWN.keys() & options.properties.keys()):
        raise ConfigurationError(
            f"{name} cannot be set in the option properties: {_OWN[name]}.",
            hint="Leave it out.",
        )
    kind = device.partition(":")[0]
    properties: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY" if options.requests == 1 else "THROUGHPUT",
        "PERFORMANCE_HINT_NUM_REQUESTS": options.requests,
        "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
    }
    if kind == "cpu":
        limit = thread_limit()
        if limit is not None:
            # OpenVINO would use all cores of the process, and pin its threads to some that may not be this thread's.
            properties |= {"INFERENCE_NUM_THREADS": limit, "ENABLE_CPU_PINNING": "NO"}
        if options.threads is not None:
            properties["INFERENCE_NUM_THREADS"] = options.threads
        if _needs_no_snippets(program, precision):
            properties["SNIPPETS_MODE"] = "DISABLE"
        if program.quantization is not None:
            properties["LP_TRANSFORMS_MODE"] = integers
    if options.cache_dir is not None:
        properties["CACHE_DIR"] = str(options.cache_dir.expanduser().absolute())
    return {**properties, **options.properties}


def _check_precision(compiled: "openvino.CompiledModel", device: str, precision: str) -> None:
    """Raise DeviceError if the device does not compute in the requested precision."""
    if device.partition(":")[0] != "cpu":
        return  # other devices do not report what they use
    actual = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if actual != _PRECISIONS[precision]:
        raise DeviceError(
            f"OpenVINO computes in {actual}, but {precision} was requested.",
            hint="Set a different value for the option precision.",
        )
