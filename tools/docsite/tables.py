"""Tables of the installed backends, their options, the metrics, the conformance kit's checks, and the use of vLLM."""

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ByteSize

from visionaccel.backends import Registry, VisionBackend, default_registry
from visionaccel.families import family_for
from visionaccel.integrations.vllm.compat.architectures import ARCHITECTURES
from visionaccel.integrations.vllm.compat.contract import (
    WITHOUT,
    Entry,
    Feature,
    Need,
    entries_of,
    entries_of_model,
)
from visionaccel.observe import SERIES
from visionaccel.settings import FORMER_NAMES, PREFIX, Settings
from visionaccel_testing.conformance import CHECKS
from visionaccel_testing.conformance.check import LEVELS

__all__ = [
    "ENTRIES", "backend_options", "backend_table", "check_table", "contract_table", "feature_table", "metrics_table",
    "model_table", "settings_table",
]  # fmt: skip


_MODEL, _TOWER = "{module}:{model}", "{tower}"

ENTRIES = tuple(
    (feature, entry)
    for feature in Feature
    for entry in (*entries_of(feature), *entries_of_model(feature, _MODEL, [_TOWER]))
)
"""The contract with vLLM, row by row, with those of models for any of them."""

_CHANGING = ("patch", "subclass", "override")


def model_table() -> str:
    """Return a table of the models whose encoder is replaced, with the words that stand for their classes."""
    rows = ["| architecture | family | `{module}` | `{model}` | `{tower}` |", "|---|---|---|---|---|"]
    for architecture, row in ARCHITECTURES.items():
        module, _, model = row.model.partition(":")
        family, towers = family_for(architecture).name, ", ".join(f"`{tower}`" for tower in row.towers)
        rows.append(f"| `{architecture}` | {family} | `{module}` | `{model}` | {towers} |")
    return "\n".join([*rows, ""])


def backend_table() -> str:
    """Return a table of the installed backends: program formats, where sessions run, whether `auto` uses it."""
    rows = [
        "| backend | distribution | program formats | sessions live in | taken by `auto` |",
        "|---|---|---|---|---|",
    ]
    for name, backend in _loaded(default_registry()):
        formats = ", ".join(f"`{name}`" for name in sorted(backend.formats))
        home = "a child process" if backend.isolation == "process" else "the caller's process"
        auto = "no" if backend.only_by_name else "yes"
        distribution = default_registry().entry(name).distribution
        rows.append(f"| `{name}` | `{distribution}` | {formats} | {home} | {auto} |")
    return "\n".join(rows)


def backend_options() -> str:
    """Return a section for each installed backend with its options."""
    sections = []
    for name, backend in _loaded(default_registry()):
        rows = [f"## {name}", "", "| option | type | default | meaning |", "|---|---|---|---|"]
        for option, field in backend.options.model_fields.items():
            default = field.get_default(call_default_factory=True)
            shown = "unset" if default is None else f"`{default!r}`"
            kind = _cell(_type_name(field.annotation))
            rows.append(f"| `{field.alias or option}` | `{kind}` | {shown} | {_cell(field.description or '')} |")
        sections.append("\n".join(rows))
    return "\n\n".join(sections)


def check_table() -> str:
    """Return a table of the conformance kit's checks and what each shows."""
    rows = ["| check | level | what is right |", "|---|---|---|"]
    rows += [f"| `{check.name}` | {LEVELS[check.level]} | {check.title} |" for check in CHECKS]
    return "\n".join(rows)


def feature_table() -> str:
    """Return a table of what happens without each feature of the integration with vLLM."""
    rows = [f"| {feature} | {WITHOUT[feature]} |" for feature in Feature]
    return "\n".join(["| feature | if its part of the contract does not hold |", "|---|---|", *rows, ""])


def metrics_table() -> str:
    """Return a table of the metrics that `/metrics` shows."""
    names = [one.name + ("_total" if one.kind == "counter" else "") for one in SERIES]
    rows = [
        f"| `{name}` | {one.kind} | {', '.join(one.labels)} | {one.help} |"
        for name, one in zip(names, SERIES, strict=True)
    ]
    return "\n".join(["| metric | kind | labels | what it is |", "|---|---|---|---|", *rows, ""])


def settings_table() -> str:
    """Return a table of the settings, with their former names."""
    former = {field: f"`{old}`" for old, field in FORMER_NAMES.items()}
    rows = ["| variable | default | meaning | former name |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        # a size in the form that the variable takes
        text = default.human_readable().replace(".0", "") if isinstance(default, ByteSize) else str(default)
        shown = f"`{text}`" if default not in (None, {}, ()) else "unset"
        rows.append(f"| `{PREFIX}{name.upper()}` | {shown} | {field.description} | {former.get(name, '')} |")
    return "\n".join([*rows, ""])


def contract_table(*, changing: bool) -> str:
    """Return a table of the names of vLLM that the integration relies on.

    Args:
        changing: Only names that are patched, subclassed or overridden; otherwise only those that are called or read.
    """
    users: dict[tuple[Need, str], list[str]] = {}
    for feature, entry in ENTRIES:
        for need in entry.needs:
            if (need.use in _CHANGING) == changing:
                users.setdefault((need, _way(entry, need)), []).append(feature)
    order = sorted(users, key=lambda row: (row[0].target, row[0].use))
    rows = [
        f"| `{need.module}` | `{need.name}` | {need.use} | {_conditions(need, way)} | {', '.join(users[need, way])} |"
        for need, way in order
    ]
    return "\n".join(["| module | name | use | what must hold | for |", "|---|---|---|---|---|", *rows, ""])


def _way(entry: Entry, need: Need) -> str:
    """Return which of several ways a need belongs to; empty if there is only one."""
    if not entry.end:
        return ""
    return next(f"{entry.end}: {name}" for name, way in entry.ways.items() if need in way)


def _conditions(need: Need, way: str) -> str:
    parts = (
        ("takes", need.parameters),
        ("has", need.attributes),
        ("uses", need.mentions),
        ("abstract at most", need.implements),
    )
    shown = [f"{word} {', '.join(f'`{name}`' for name in names)}" for word, names in parts if names]
    shown += ["used if it exists"] if need.optional else []
    shown += [f"one way of: {way}"] if way else []
    return "; ".join(shown) or "exists"


def _loaded(registry: Registry) -> list[tuple[str, VisionBackend]]:
    return [(entry.name, registry.load(entry.name)) for entry in registry.entries]


def _type_name(annotation: Any) -> str:
    """Return an annotation as text, without modules, and without None, which stands for unset."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(_type_name(kind) for kind in inner if kind is not NoneType)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    name = getattr(origin or annotation, "__name__", str(annotation))
    return f"{name}[{', '.join(map(_type_name, inner))}]" if inner else name


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
