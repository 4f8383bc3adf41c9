"""Inputs of real images for a program, made anew whenever they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from visionaccel.core.arrays import Array, as_numpy
from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid, Program
from visionaccel.families import Host
from visionaccel.validation.trials import Trial, Trials

__all__ = ["Calibration"]


class Calibration:
    """The images of some trials as a program's session would be given them, one image in a call.

    Yields numpy arrays by the names of the program's inputs, with the dtypes and shapes declared there.

    Args:
        program: Decides to which grids images are fitted.
        host: Its host's part.
        trials: Has the images, and the processor that makes patches of them.

    Raises:
        BundleError: If no image fits the program.
        InputError: If an image is of an impossible aspect ratio.
    """

    def __init__(self, program: Program, host: Host, trials: Trials) -> None:
        self._host = host
        self._single = not isinstance(program.coverage, AnyGrid)
        self._trials: Sequence[Trial] = [trial for trial in trials.of(program.coverage) if trial.photograph]

    def __len__(self) -> int:
        return len(self._trials)

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        for trial in self._trials:
            grids: list[Grid] = [grid.frame for grid in trial.grids] if self._single else list(trial.grids)
            inputs = self._host.inputs(trial.patches(), grids)
            yield {name: as_numpy(array) for name, array in inputs.items()}
