"""The command as users run it, in a process; or in a fork, which has that process's libraries already."""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

COMMAND = [sys.executable, "-c", "from visionaccel.cli import main; main()"]
"""`visionaccel`, by this interpreter and from this checkout; its arguments follow."""

_LIMIT = 120
_IMPORTED = [
    "numpy",
    "onnx",
    "onnxruntime",
    "pluggy",
    "pydantic",
    "pytest",
    "rich",
    "torch",
    "torchvision",
    "transformers",
    "typer",
]


def run_command(
    *arguments: object, environment: Mapping[str, str], folder: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run `visionaccel` in a fork of a process that has imported other libraries and nothing of visionaccel.

    Args:
        arguments: Those of the command, or `-c`, code and the code's arguments.
        environment: The whole environment of the process.
        folder: Its working directory; unset: this process's.
    """
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(_IMPORTED)
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as outputs:
        process = forking.Process(target=_run, args=(words, dict(environment), folder or Path.cwd(), Path(outputs)))
        process.start()
        process.join(_LIMIT)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, _LIMIT)
        out, err = (Path(outputs, name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(words, process.exitcode, out, err)


def _run(arguments: list[str], environment: dict[str, str], folder: Path, outputs: Path) -> None:
    gc.freeze()
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        with Path(outputs, name).open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]  # it reads the environment while it is imported
    if arguments[0] == "-c":
        sys.argv[:] = arguments[:1] + arguments[2:]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        from visionaccel.cli import main

        sys.argv[1:] = arguments
        main()
