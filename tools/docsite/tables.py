"""Tables of the installed backends and of their options."""

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from visionaccel.backends import Registry, VisionBackend, default_registry

__all__ = ["backend_options", "backend_table"]


def backend_table() -> str:
    """Every installed backend: program formats, where its sessions live, whether `auto` takes it."""
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
    """A section for each installed backend with its options, as its model declares them."""
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


def _loaded(registry: Registry) -> list[tuple[str, VisionBackend]]:
    return [(entry.name, registry.load(entry.name)) for entry in registry.entries]


def _type_name(annotation: Any) -> str:
    """An annotation as one reads it: without modules, and without the None that stands for unset."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(_type_name(kind) for kind in inner if kind is not NoneType)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    name = getattr(origin or annotation, "__name__", str(annotation))
    return f"{name}[{', '.join(map(_type_name, inner))}]" if inner else name


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
