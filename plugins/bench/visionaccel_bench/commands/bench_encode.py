"""`visionaccel bench encode` and `bench placement`: encodes by backends and by other towers, compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from visionaccel.bundle import Bundle
from visionaccel.checkpoint import locate_checkpoint
from visionaccel.cli.output import Json, check_writable, print_json, status
from visionaccel.core.cores import process_cores
from visionaccel.core.grid import Grid, as_grids
from visionaccel.core.program import FixedGrid
from visionaccel.encoder import open_source
from visionaccel.errors import SettingsError
from visionaccel.families import Tower
from visionaccel_bench.benchmark_blocks import encode_blocks, encode_notes, placement_blocks
from visionaccel_bench.blocks import print_blocks
from visionaccel_bench.commands.options import Output, duration, require, tidy_if_terminated, write_json
from visionaccel_bench.drawing import plot_latency
from visionaccel_bench.encode.contenders import STOCK, Contender, named_backends, named_peers
from visionaccel_bench.encode.encode_report import EncodeReport, make_encode_report
from visionaccel_bench.encode.encoding import TABLE, EncodePlan, measure_encodes
from visionaccel_bench.encode.placement import PlacementReport, advise
from visionaccel_bench.encode.presets import PRESETS, preset_checkpoint

_GRID = "58x74"
_FEW = ("16x16", "32x32", "58x74")

Source = Annotated[
    str | None,
    typer.Argument(help="Bundle folder, checkpoint folder or Hugging Face repository. Or pass --preset."),
]
Preset = Annotated[
    str | None,
    typer.Option(help=f"Random weights of a real shape instead of SOURCE: {', '.join(PRESETS)}."),
]
Depth = Annotated[int | None, typer.Option(min=1, help="Blocks of the preset, for a shorter tower.")]
Grids = Annotated[
    list[str] | None, typer.Option("--grid", metavar="HxW", help="Height and width in patches; repeatable.")
]
Backends = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        metavar="NAME[@DEVICE][?NAME=VALUE,...]",
        help="A backend with its device and options; repeatable, also for one backend with different options.",
    ),
]
Rounds = Annotated[int, typer.Option(min=1, max=999, help="Turns of each contender on each grid.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Cores and threads of each contender. Default: all cores.", show_default=False)
]
Deadline = Annotated[
    float,
    duration("Maximum seconds to open a contender, and for each of its turns; it fails if it takes longer.", least=1),
]


def encode(
    source: Source = None,
    preset: Preset = None,
    depth: Depth = None,
    grid: Grids = None,
    grids: Annotated[
        str | None,
        typer.Option(help="'table': grids of 256 to 16,384 patches, each with twice as many as the previous one."),
    ] = None,
    backend: Backends = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[?NAME=VALUE,...]",
            help="transformers or vllm, in float32 and bfloat16 unless 'dtype' chooses one; repeatable. "
            "Default: all; 'none' leaves all out. --backend accepts it too; its default is every installed backend.",
        ),
    ] = None,
    rounds: Rounds = 5,
    threads: Threads = None,
    deadline: Deadline = 600.0,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of seconds against patches.")] = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Compare encodes by backends and by other implementations: time, memory, accuracy, share of the machine's peak.

    Each contender runs in a separate process. All are opened and warmed up, and then take turns in rounds, one at a
    time. Accuracy is relative to transformers in float32. The machine's peak is the speed that packed matrix products
    of the tower's shapes reach in turns of the same rounds.

    For a contender that fails or is not installed, the report says why.
    """
    check_writable(plot, output)
    if plot is not None:
        require("matplotlib.figure")
    contenders = (*named_backends(backend or ()), *named_peers(peer or ()))
    if not contenders:
        raise SettingsError("bench encode has nothing to compare.", hint="Pass --backend or --peer.")
    report = _measured(source, preset, depth, _grids(grid, grids), contenders, rounds, threads, deadline)
    document = {**asdict(report), "plot": plot}
    write_json(document, output)  # before the picture, which may fail
    if plot is not None:
        plot_latency(report, plot)
    if as_json:
        print_json(document)
    else:
        print_blocks(encode_blocks(report))


def placement(
    source: Source = None,
    preset: Preset = None,
    depth: Depth = None,
    grid: Grids = None,
    backend: Backends = None,
    rounds: Rounds = 5,
    threads: Threads = None,
    deadline: Deadline = 600.0,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Advise whether to offload the encoder on this machine, in-line and pipelined, and say why.

    Compares the encodes of each --backend (default: every installed one) with those of stock vLLM's tower in bfloat16.
    """
    check_writable(output)
    contenders = (*named_backends(backend or ()), STOCK)
    if len(contenders) == 1:
        raise SettingsError("no backend is installed or chosen.", hint="Install one, or pass --backend.")
    report = _measured(source, preset, depth, tuple(map(Grid.parse, grid or ())), contenders, rounds, threads, deadline)
    *ours, stock = report.contenders
    advised = PlacementReport(tuple(advise(report, each, stock) for each in ours), report)
    document = asdict(advised)
    write_json(document, output)
    if as_json:
        print_json(document)
    else:
        print_blocks([*placement_blocks(advised), *encode_notes(report)])


def _measured(
    source: str | None,
    preset: str | None,
    depth: int | None,
    grids: tuple[Grid, ...],
    contenders: Sequence[Contender],
    rounds: int,
    threads: int | None,
    deadline: float,
) -> EncodeReport:
    folder, name = _folder(source, preset, depth)
    opened = open_source(folder)
    tower = opened.tower
    most = len(process_cores())
    if threads is not None and threads > most:
        raise SettingsError(f"--threads {threads} is more than the {most} cores here.", hint=f"Pass at most {most}.")
    chosen = as_grids(grids or _own_grids(opened), tower.merge_size)
    plan = EncodePlan(chosen, rounds, threads or most, deadline=deadline)
    with tidy_if_terminated(), status("starting") as tell:
        taken, peak, reference_error = measure_encodes(folder, tower, contenders, plan, tell)
    return make_encode_report(name, tower, plan, taken, peak, reference_error)


def _own_grids(source: Tower | Bundle) -> tuple[Grid, ...]:
    """Return the grids of a bundle whose programs are all of fixed grids, and otherwise a few common ones."""
    covered = [entry.covers() for entry in source.manifest.programs] if isinstance(source, Bundle) else []
    fixed = [each.grid for each in covered if isinstance(each, FixedGrid)]
    return tuple(fixed) if fixed and len(fixed) == len(covered) else tuple(map(Grid.parse, _FEW))


def _folder(source: str | None, preset: str | None, depth: int | None) -> tuple[Path, str]:
    """Return the folder that contenders open, and its name in reports."""
    if (source is None) == (preset is None):
        raise SettingsError("pass either a source or --preset, not both.", hint=f"Presets: {', '.join(PRESETS)}.")
    if preset is not None:
        with status("writing the preset's random weights, if they do not exist yet"):
            folder = preset_checkpoint(preset, depth)
        return folder, preset if depth is None else f"{preset}, {depth} blocks"
    if depth is not None:
        raise SettingsError("--depth applies only to a preset.", hint="Leave it out, or pass --preset.")
    assert source is not None
    return (Path(source) if Path(source).is_dir() else locate_checkpoint(source).folder), source


def _grids(named: Sequence[str] | None, table: str | None) -> tuple[Grid, ...]:
    if table not in (None, "table"):
        raise SettingsError(f"unknown --grids {table!r}.", hint="Choose 'table', the only set.")
    found = [*(TABLE if table else ()), *map(Grid.parse, named or (() if table else (_GRID,)))]
    return tuple(dict.fromkeys(found))
