"""The command `visionaccel-flexmlrt`, which makes artifacts for the simulator in the layouts of AMD's compiler."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from visionaccel.cli.output import messages, results, status
from visionaccel.core.grid import Grid
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError, VisionAccelError
from visionaccel_flexmlrt.runtime import SIMULATOR, AmdEnvironment, missing
from visionaccel_flexmlrt.simulator import compile_partition
from visionaccel_flexmlrt.vitisai.writing import write_vitisai_folder

app = typer.Typer(
    name="visionaccel-flexmlrt",
    help="Tools around the FlexMLRT backend.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def _root() -> None:
    pass


@app.command()
def simulate(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or Hugging Face repository, or a bundle's folder.")],
    output: Annotated[Path, typer.Argument(help="Folder to write: the artifact, the ONNX model and their metadata.")],
    grid: Annotated[str, typer.Option(help="The grid to compile for, height x width in patches: 58x74.")],
    layout: Annotated[
        Literal["rai", "directory"], typer.Option(help="A single .rai file, or a folder for each partition.")
    ] = "rai",
    precision: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="What the simulator computes in; the NPU computes in bfloat16."),
    ] = "bfloat16",
) -> None:
    """Compile an encoder for the SIMULATOR, in a layout of AMD's compiler.

    Make a bundle of it with `visionaccel import-vitisai`, and run it with device `simulator`.
    """
    lacking = missing(SIMULATOR, AmdEnvironment())
    if lacking is not None:
        raise ConfigurationError(lacking.reason, hint=lacking.hint)
    tower = open_tower(source)
    frame = Grid.parse(grid)
    frame.check_divisible(tower.merge_size)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"{output} exists and is not an empty folder.", hint="Choose a new folder.")
    with status("compiling for the simulator"):
        write_vitisai_folder(
            tower,
            output,
            frame,
            layout=layout,
            compile=partial(compile_partition, precision=precision),
        )
    results.print(
        f"{output} contains an artifact for the SIMULATOR, in {precision}. Import it: "
        f"visionaccel import-vitisai {output} BUNDLE --checkpoint {source}",
        soft_wrap=True,
    )


def main() -> None:
    """Run the command. Errors of visionaccel become one message on stderr and exit status 2."""
    try:
        app()
    except VisionAccelError as error:
        messages.print(f"{type(error).__name__} {error}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
