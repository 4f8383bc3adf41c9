"""`python -m benchmarks [NAME...]`: run all benchmarks, or those named; `--json FILE` writes the figures."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import (
    adapter_overhead,
    bridge_overhead,
    graph_writer,
    host_part,
    import_time,
    loading,
    soak,
    trust_overhead,
)

BENCHMARKS = {
    "import_time": import_time.measure,
    "graph_writer": graph_writer.measure,
    "host_part": host_part.measure,
    "adapter_overhead": adapter_overhead.measure,
    "bridge_overhead": bridge_overhead.measure,
    "trust_overhead": trust_overhead.measure,
    "loading": loading.measure,
    "soak": soak.measure,
}

BOUNDS = {
    "import visionaccel, ms": 100,
    "first graph, imports included, s": 2,
    "nodes for 58x74": 3016,
    "peak memory above the interpreter's own, GiB": 0.5,
    "host part in float32, times the fastest way": 1.5,
    "host part in bfloat16, times the fastest way": 1.5,
    "adapter's own, % of the encode (median)": 1,
    "bridge's own, ms (median)": 1,
    "guard of 1073x3584, ms": 0.2,
    "load above from_pretrained without the tower, MB": 0,
    "timing off, microseconds an encode": 1,
    "guard, metrics on and timing off, % of the encode": 1,
    **soak.BOUNDS,
}
"""Figures that the project promises not to exceed. If one does, the exit status is 1."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}. Choose {', '.join(BENCHMARKS)}.")
    console, figures = Console(), {}
    for name in arguments.names or BENCHMARKS:
        with console.status(name):
            figures[name] = BENCHMARKS[name]()
        table = Table("figure", "value", title=name)
        for figure, value in figures[name].items():
            table.add_row(figure, f"{value:.4g}" if isinstance(value, float) else str(value))
        console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    missed = [
        f"{figure}: {value:.4g}, bound {BOUNDS[figure]}"
        for values in figures.values()
        for figure, value in values.items()
        if figure in BOUNDS and value > BOUNDS[figure]
    ]
    for line in missed:
        console.print(f"[bold red]missed[/] {line}")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
