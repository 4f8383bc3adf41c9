"""Coverage-guided fuzzing of one reader: what the targets `fuzz_*.py` share.

A target imports what it reads with under atheris' instrumentation, then calls `fuzz`. An input is the content of one
file, in a folder of the seeds. `-runs=1000` and libFuzzer's other options may be given on the command line.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import atheris

from hostile.kinds import PIPE, Changed, Files
from hostile.seeds import make_seeds
from visionaccel.errors import VisionAccelError

_LARGEST_SEED = 2**17
OPTIONS = ("-seed=1", "-timeout=5", "-rss_limit_mb=2560", "-verbosity=0", "-print_final_stats=1", f"-max_len={2**17}")


def fuzz(
    base: str,
    file: str,
    read: Callable[[Path], object],
    make: Callable[[Path], Iterable[Files]],
    **how: Callable[[bytes], bytes],
) -> None:
    """Fuzz a reader until the runs are over; an error that is none of ours ends the process with a status above 0.

    Args:
        base: The folder of the seeds.
        file: The file in it.
        read: Reads the folder.
        make: Inputs to begin with, beside the file itself. Gets the folder.
        how: `prepare` changes an input before it is written, such as to seal it.
    """
    prepare = how.get("prepare", bytes)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
        # What is remembered of files is of this run only.
        os.environ["XDG_CACHE_HOME"] = work
        make_seeds(Path(work, "seeds"))
        folder = Path(work, "seeds", base)
        corpus = Path(work, "corpus")
        corpus.mkdir()
        begin = [(folder / file).read_bytes()] if (folder / file).exists() else []
        begin += [data for files in make(folder) if (data := files.get(file)) not in (None, PIPE)]
        for number, data in enumerate(begin):
            if len(data) <= _LARGEST_SEED:
                (corpus / f"{number}").write_bytes(data)

        def read_one(data: bytes) -> None:
            try:
                with Changed(folder, {file: prepare(data)}):
                    read(folder)
            except VisionAccelError:
                return

        atheris.Setup([sys.argv[0], *OPTIONS, *sys.argv[1:], str(corpus)], read_one)
        atheris.Fuzz()
