"""JSON files to report on, which may be untrusted: each is read as a whole or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pydantic import TypeAdapter, ValidationError

from visionaccel.core.bounded_files import MOST_JSON_BYTES, parse_json, read_bounded
from visionaccel.core.invalid_values import problems_of
from visionaccel.core.safe_text import one_line
from visionaccel.errors import ConfigurationError, InputError
from visionaccel_bench.encode.encode_report import EncodeReport
from visionaccel_bench.encode.placement import PlacementReport
from visionaccel_bench.faultsuite.cells import FaultSuite
from visionaccel_bench.serve.serve_report import Report as ServeReport

Benchmark: TypeAlias = EncodeReport | PlacementReport | ServeReport

_BENCHMARKS: tuple[tuple[frozenset[str], type[Benchmark], str], ...] = (
    (frozenset({"contenders", "grids"}), EncodeReport, "what `bench encode` writes"),
    (frozenset({"placements", "measured"}), PlacementReport, "what `bench placement` writes"),
    (frozenset({"modes", "plan"}), ServeReport, "what `bench serve` writes"),
)
"""What each benchmark's document has, its type, and what errors call it."""

_MOST_DIGITS = 18

T = TypeVar("T")


def read_benchmark(path: Path) -> Benchmark:
    """Read what a benchmark wrote with `--output` or `--json`. Raises as `read_text`."""
    document = read_document(path)
    for keys, kind, what in _BENCHMARKS:
        if isinstance(document, dict) and keys <= document.keys():
            return _checked(kind, document, path, what)
    raise InputError(
        f"{path} is not a benchmark.",
        hint="Name a file that `visionaccel bench encode` or `bench serve` wrote as JSON.",
    )


def read_faults(path: Path) -> FaultSuite:
    """Read what `visionaccel faults --output` wrote. Raises as `read_text`."""
    return _checked(FaultSuite, read_document(path), path, "what a fault suite writes")


def read_document(path: Path) -> Any:
    """The JSON document in a file. Raises as `read_text`."""
    text = read_text(path, MOST_JSON_BYTES)
    try:
        return parsed(text)
    except ValueError as error:
        raise InputError(
            f"{path} is not JSON: {one_line(str(error))}", hint="Name a file that visionaccel wrote."
        ) from error


def read_text(path: Path, most_bytes: int) -> str:
    """The text of a file of at most that many bytes.

    Raises:
        ConfigurationError: If it cannot be read.
        InputError: If it is not what it should be.
    """
    try:
        return read_bounded(path, most_bytes).decode("utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error}", hint="Name a file that exists.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8: {error}", hint="Name a JSON file.") from error
    except ValueError as error:
        raise InputError(
            f"{path} cannot be shown: {error}.", hint="Name a JSON file, of a shorter run if it is too large."
        ) from error


def parsed(text: str) -> Any:
    """A JSON document whose integers are no longer than figures are; a `ValueError` if the text is something else."""
    return parse_json(text, most_digits=_MOST_DIGITS)


def _checked(kind: type[T], document: Any, path: Path, what: str) -> T:
    """A value of a dataclass or model from its JSON document; an `InputError` says that it is not `what`."""
    try:
        return TypeAdapter(kind).validate_python(document)
    except (ValidationError, RecursionError, ArithmeticError) as error:
        raise InputError(
            f"{path} is not {what}: {one_line(problems_of(error))}.", hint="Name a file that this visionaccel wrote."
        ) from error
