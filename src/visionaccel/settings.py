"""Settings from the environment, as one model from which the table in the documentation is generated."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from visionaccel.core.bounded_files import parse_json
from visionaccel.core.cores import WantedCores, parse_cores
from visionaccel.core.defaults import CACHE_SIZE, DEADLINE, LONGEST_SECONDS, OPEN_DEADLINE, QUEUE_SIZE
from visionaccel.core.invalid_values import problems_of
from visionaccel.core.safe_text import one_line, safe_logger
from visionaccel.errors import SettingsError

logger = safe_logger(__name__)

PREFIX = "VISIONACCEL_"

_OUT_OF_RANGE = frozenset({"greater_than", "greater_than_equal", "less_than_equal", "finite_number"})
_MOST_SHOWN = 200
_SAID = "_VISIONACCEL_WARNINGS_SAID"
_MOST_NESTED = 32
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?\s*(?:[kmgtp]i?)?)b?", re.IGNORECASE)


def parse_options(value: Any) -> Any:
    """Parse backend options: a JSON object, or `name=value,name=value` with values in JSON or plain text.

    Anything but text is returned unchanged.

    Raises:
        ValueError: If the text is neither, names an option twice, or has a number that is not finite or an object that
            is nested too deeply.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("{"):
        options = parse_json(text)
    else:
        options = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, equals, item = part.partition("=")
            name = name.strip()
            if not equals or not name:
                raise ValueError(f"{part!r} is not of the form name=value")
            if name in options:
                raise ValueError(f"option {name!r} is given twice")
            options[name] = _option(item.strip())
    _check_depth(options, _MOST_NESTED)
    return options


def _check_depth(value: Any, levels: int) -> None:
    """Raise ValueError for a value that is nested so deeply that other readers may fail on it."""
    if levels == 0:
        raise ValueError("it is nested too deeply")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, levels - 1)


def _option(text: str) -> Any:
    """Parse the value of an option: JSON if it is valid JSON, otherwise plain text."""
    try:
        return parse_json(text)
    except ValueError:
        if text.startswith(("{", "[")):
            raise  # meant as JSON
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        raise ValueError(f"{one_line(text, _MOST_SHOWN)} is not a finite number")
    return text


def _read_bytes(value: Any) -> Any:
    """Check a size such as `512MiB` or `1.5 GB`: pydantic would read `1,5GiB` as 1."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("a size is a number with a unit, such as 512MiB, 1.5GiB or 2GB")
    return f"{match[1]}b"


def _printable_only(value: Any) -> Any:
    """Refuse text with control characters, which a terminal would obey."""
    if not str(value).isprintable():
        raise ValueError("it has characters that cannot be printed")
    return value


def _read_names(value: Any) -> Any:
    """Split names at commas; `none` and None give no names."""
    if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
        return ()
    return tuple(filter(None, (name.strip() for name in value.split(",")))) if isinstance(value, str) else value


def _read_cores(value: Any) -> Any:
    return parse_cores(value) if isinstance(value, str) else value


_Text = Annotated[str, AfterValidator(_printable_only)]
_Path = Annotated[Path, AfterValidator(_printable_only)]
_Names = Annotated[tuple[_Text, ...], NoDecode, BeforeValidator(_read_names)]
_Seconds = Annotated[float, Field(gt=0, le=LONGEST_SECONDS, allow_inf_nan=False)]


class Settings(BaseSettings):
    """The settings. Each field is read from the variable `VISIONACCEL_` and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    backend: _Text | None = Field(
        None,
        description="Backend that runs the vision encoder: a name that `visionaccel backends` lists, or `auto` for the "
        "best one here. Unset: vLLM runs its own encoder.",
    )
    device: _Text | None = Field(
        None, description="Device of that backend, such as `cpu`, `cuda:0` or `npu`. Unset: the backend's default."
    )
    devices: _Names = Field(
        (),
        description="Several such devices, separated by commas, instead of `VISIONACCEL_DEVICE`: each has a separate "
        "encoder, and images go to a free device. In-line mode uses only the first.",
    )
    bundle: _Path | None = Field(
        None,
        description="Folder of the encoder: a bundle, or a checkpoint with the vision weights. Unset: the served "
        "checkpoint.",
    )
    fit: Literal["letterbox", "stretch", "none"] = Field(
        "letterbox",
        description="How images are fitted to the grids of a bundle whose programs do not accept every grid: padded, "
        "distorted, or not at all. An image that fits no program goes to the fallback; without one, its request fails.",
    )
    mode: Literal["auto", "pipelined", "inline"] = Field(
        "auto",
        description="When the encoder runs. `pipelined`: while the language model decodes for other requests. "
        "`inline`: inside the engine's step. `auto`: pipelined where it is available; the choice is logged with its "
        "reason.",
    )
    queue_size: int = Field(
        QUEUE_SIZE,
        gt=0,
        le=65_536,
        description="Pipelined mode: the maximum number of images that wait for the encoder; others are held back.",
    )
    cache_size: Annotated[ByteSize, BeforeValidator(_read_bytes)] = Field(
        ByteSize(CACHE_SIZE),
        ge=0,
        le=2**50,
        description="Pipelined mode: host memory for embeddings of images that were seen before, such as `2GiB`. As "
        "much again may be used for requests that are waiting.",
    )
    fallback: _Names = Field(
        (),
        description="Backend that takes over when the chosen one cannot start, fails on an image or gives wrong "
        "answers; or several, separated by commas, which are tried in that order. Unset or `none`: no other backend is "
        "ever used.",
    )
    canary: Literal["on", "strict", "off"] = Field(
        "on",
        description="Golden images are encoded before the first request, on a timer, and after each restart of a "
        "device's process. A device that gets them wrong is disabled. With `strict` the server does not start in that "
        "case, even if there is a fallback. See [Trust](docs/trust.md).",
    )
    canary_interval: Annotated[float, Field(ge=0, le=LONGEST_SECONDS, allow_inf_nan=False)] = Field(
        600.0, description="Seconds between two canaries on the timer; `0`: none."
    )
    shadow: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        0.0,
        description="Share of the images, 0 to 1, that `torch_ref` encodes too, in the background, for comparison.",
    )
    shadow_limit: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Lowest allowed cosine of a token in that comparison; a lower one disables the device. Unset: the "
        "certificate's threshold, or that of the device's precision.",
    )
    breaker_failures: int = Field(
        5,
        gt=0,
        le=1_000_000,
        description="Failures in a row after which a device is disabled until its canary passes again.",
    )
    breaker_seconds: _Seconds = Field(
        1.0,
        description="Seconds until that canary runs. The time doubles after each failure, up to a minute.",
    )
    options: Annotated[dict[str, Any], NoDecode, BeforeValidator(parse_options)] = Field(
        default_factory=dict,
        description="Options of the backend, which `visionaccel backends` lists: `name=value,name=value` or a JSON "
        "object.",
    )
    weights: Literal["private", "mapped"] = Field(
        "private",
        description="Where the encoder reads its weights. `private`: from a copy in memory, which stays as it was when "
        "the server started, even if the files change. `mapped`: from the files, whose memory processes share; nothing "
        "may write to them while the server runs. See [Files that change](docs/trust.md#files-that-change).",
    )
    isolation: Literal["auto", "process", "none"] = Field(
        "auto",
        description="Whether the device runs in a child process, which is restarted when it crashes or hangs. `auto`: "
        "if the backend asks for it.",
    )
    deadline: _Seconds = Field(
        DEADLINE,
        description="Seconds that a call of a device or a fallback may take for each of its images. After that the "
        "next fallback takes over, and the device's child process, if there is one, is ended.",
    )
    open_deadline: _Seconds = Field(
        OPEN_DEADLINE,
        description="Seconds for starting such a process and opening a program, including compilation, and for each "
        "image of the first canary.",
    )
    cpu_cores: Annotated[WantedCores, NoDecode, BeforeValidator(_read_cores)] = Field(
        None,
        description="CPU cores for the encoder's threads, such as `0-3,8`, or `all` cores that the process may use. "
        "Unset: next to a language model on the CPU, [those that it leaves free](docs/pipelined.md#cores); otherwise "
        "the runtime chooses.",
    )
    timing: bool = Field(False, description="Log the time of each part of every encode.")
    trace: _Path | None = Field(
        None,
        description="File for a timeline of the processor, the queue, the devices and the engine's steps, to open in "
        "Perfetto. It grows as long as the server runs.",
    )
    metrics: bool = Field(True, description="Show the encoder's metrics in vLLM's `/metrics`.")

    @model_validator(mode="after")
    def _one_way_to_name_devices(self) -> Self:
        if self.device is not None and self.devices:
            raise ValueError("set VISIONACCEL_DEVICE or VISIONACCEL_DEVICES, not both")
        return self

    @property
    def wanted_devices(self) -> tuple[str | None, ...]:
        """The devices that get an encoder, at least one; None stands for the backend's default."""
        return self.devices or (self.device,)


VARIABLES = tuple(PREFIX + name.upper() for name in Settings.model_fields)
"""Names of the variables that are settings."""

FORMER_NAMES = {
    "VLLM_VISION_NPU_BACKEND": "backend",
    "VLLM_VISION_NPU_DEVICE": "device",
    "VLLM_VISION_NPU_CACHE": "bundle",
    "VLLM_NPU_TIMING": "timing",
    "VLLM_NPU_ASYNC_PIPELINE": "mode",
}
"""Variables of the published prior art, and the settings that replace them."""

_FORMER_MODES = {"0": "inline", "false": "inline", "1": "auto", "true": "auto"}


def load_settings(**chosen: Any) -> Settings:
    """Read the settings from the environment; former names are accepted and logged as deprecated.

    Values `chosen` by field name take precedence; None leaves a setting to the environment.

    A variable that starts with `VISIONACCEL_` but is not a setting is probably a typing error: it is logged as ignored.

    Raises:
        SettingsError: If a value is invalid; the message names the variable and the values that it takes.
    """
    for name, near in unknown_variables().items():
        _warn_once(name, "%s is not a setting and is ignored.%s", f" Did you mean {near}?" if near else "")
    given: dict[str, Any] = {}
    for old, field in FORMER_NAMES.items():
        value, new = os.environ.get(old, ""), PREFIX + field.upper()
        if value.strip():
            _warn_once(old, "%s is deprecated; set %s instead.", new)
            if not os.environ.get(new):
                given[field] = _FORMER_MODES.get(value.strip().lower(), value) if field == "mode" else value
    return make_settings(**given | {name: value for name, value in chosen.items() if value is not None})


def unknown_variables() -> dict[str, str | None]:
    """Return the variables that start with `VISIONACCEL_` but are not settings, and the setting that each may mean."""
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in VARIABLES)
    return {name: next(iter(get_close_matches(name, VARIABLES, 1)), None) for name in unknown}


def make_settings(**given: Any) -> Settings:
    """Make settings of values by field name; those not given come from the environment.

    Raises:
        SettingsError: If a value is invalid; the message names the variable and the values that it takes.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        raise SettingsError(
            f"Invalid settings: {problems_of(error, _describe)}.", hint="See the table in docs/settings.md."
        ) from error


def _warn_once(name: str, text: str, more: str) -> None:
    """Log a line about a variable, once for this process and the children that inherit its environment."""
    said = os.environ.get(_SAID, "").split(",")
    if name not in said:
        logger.warning(text, name, more)
        os.environ[_SAID] = ",".join(filter(None, [*said, name]))


def _describe(problem: Mapping[str, Any]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:  # a problem of several settings together
        return message
    name = str(problem["loc"][0])
    if problem["type"] in _OUT_OF_RANGE:
        message = _range(name)
    return f"{PREFIX}{name.upper()}={one_line(repr(problem['input']), _MOST_SHOWN)}: {message}"


def _range(name: str) -> str:
    """Describe the numbers that a setting takes, as a clause."""
    limits = Settings.model_fields[name].metadata
    bounds = [
        f"{words} {float(bound):.16g}"
        for attribute, words in (("gt", "above"), ("ge", "at least"), ("le", "at most"))
        for limit in limits
        if (bound := getattr(limit, attribute, None)) is not None
    ]
    return f"it must be a number that is {' and '.join(bounds)}"
