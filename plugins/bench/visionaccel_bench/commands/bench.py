"""`visionaccel bench serve`: vLLM servers under text streams and image requests."""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from visionaccel.backends import default_registry
from visionaccel.checkpoint import locate_checkpoint
from visionaccel.cli.output import (
    Json,
    OptionsText,
    backend_options,
    check_writable,
    messages,
    print_json,
    status,
)
from visionaccel.errors import ConfigurationError, SettingsError
from visionaccel_bench.benchmark_blocks import serve_blocks
from visionaccel_bench.blocks import print_blocks
from visionaccel_bench.commands.bench_encode import encode, placement
from visionaccel_bench.commands.options import Output, duration, require, tidy_if_terminated, write_json
from visionaccel_bench.drawing import plot_timeline
from visionaccel_bench.serve.device import TIMES, Accelerator, DeviceTime, Mode, measured, with_latency
from visionaccel_bench.serve.serve_report import Report, make_report
from visionaccel_bench.serve.serving import Plan, Taken, measure, measure_without_latency, running, started
from visionaccel_testing.simulated.backend import NAME as SIMULATED

bench = typer.Typer(name="bench", help="Measure encodes, and servers under load.", no_args_is_help=True)

_LATENCY = 0.5
_SIZE = re.compile(r"([1-9]\d{1,3})x([1-9]\d{1,3})")
_NAMED_URL = re.compile(r"(?:(?P<name>[\w.-]+)=)?(?P<url>https?://\S+)")


bench.command()(encode)
bench.command()(placement)


@bench.command()
def serve(
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="Checkpoint folder or repository to serve. Default: the digits model.", show_default=False),
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]URL",
            help="Measure this running server, such as pipelined=http://127.0.0.1:8000/v1, and start none; repeatable. "
            "One named 'stock' is assumed to encode without the device; --sequential needs one named 'inline'.",
        ),
    ] = None,
    mode: Annotated[
        list[Mode] | None, typer.Option(help="Start a server of this mode and measure it; repeatable. Default: all.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, max=999, help="Number of image requests.")] = 6,
    gap: Annotated[float, duration("Seconds from one image request to the next; 0: all at once.")] = 0.3,
    image_tokens: Annotated[int, typer.Option(min=1, help="Tokens in each answer about an image.")] = 8,
    streams: Annotated[int, typer.Option(min=1, help="Number of text streams.")] = 1,
    stream_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens in each stream; enough to last until the images are answered.")
    ] = 1800,
    size: Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="Size of the images in pixels.")] = "308x224",
    backend: Annotated[str, typer.Option(help="Backend that encodes, except in stock vLLM.")] = SIMULATED,
    device: Annotated[str | None, typer.Option(help="The backend's device. Default: the backend's own.")] = None,
    options: OptionsText = None,
    latency: Annotated[
        float | None,
        duration(
            "Seconds that the simulated device takes for each image, also when a call has several. Default: "
            f"{_LATENCY}, if --options does not say how long it takes.",
            least=0.001,
            show_default=False,
        ),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle with the encoder's programs, or a checkpoint with its weights.")
    ] = None,
    device_seconds: Annotated[
        float | None,
        duration(
            "Seconds that the device takes for one image. Default: the simulated device's time; for other backends, "
            "measured by encoding images one at a time before servers start; unknown for running servers.",
            show_default=False,
        ),
    ] = None,
    server_arguments: Annotated[
        str, typer.Option(help="More arguments for vLLM in one string, such as '--dtype bfloat16'.")
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, max=999, help="How often to send each load, with new images.")] = 1,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            help="Also send the image requests without text: one by one in-line, and all at once in each mode.",
        ),
    ] = False,
    timeline: Annotated[Path | None, typer.Option(help="Write a PNG of each server's first repetition.")] = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Compare in-line, pipelined and stock vLLM under text streams and image requests, and with an ideal server.

    Each mode runs in a real vLLM server; the servers are started one after the other. Each server is warmed up and then
    receives the text streams alone, and after that text streams and image requests together. Requests are sent at fixed
    times, whether or not earlier ones were answered. The images are the same in every mode, and new to each server.

    The ideal bound is max(device, decode). device: the earliest time at which the device can be done, if it starts each
    image as soon as it is sent and is idle only while no image waits. decode: the wall time of the load if images cost
    the device no time, the shortest of all modes. With the simulated device, decode is measured on a second server of
    each mode, whose device takes no time. Otherwise the load is sent again with the same images; they are then in the
    prefix cache too, so the true value is larger. Apart from noise, no server's wall time is below the bound.

    Stalls are the gaps over 100 ms between tokens of the text streams. A request that fails ends the command with
    status 2.
    """
    # A running server may have the images of an earlier benchmark in its caches.
    seed = secrets.randbelow(2**31) if url else 0
    plan = Plan(images, image_tokens, gap, streams, stream_tokens, _size(size), repeats, sequential, seed)
    arguments = _words(server_arguments)
    require("openai", "PIL.Image", *(["matplotlib.figure"] if timeline is not None else []))
    check_writable(timeline, output)
    chosen = list(dict.fromkeys(mode or Mode))
    if url:
        if checkpoint is not None or mode:
            raise ConfigurationError(
                "--url measures running servers; a checkpoint or --mode is for servers that the command starts.",
                hint="Pass either --url, or a checkpoint or --mode.",
            )
        subjects = _named(url)
        _require_inline(sequential, subjects)
        report, taken = _running(plan, subjects, device_seconds)
    else:
        _require_inline(sequential, chosen)
        default_registry().entry(backend)
        accelerator = Accelerator(backend, device, backend_options(options, {}), bundle)
        folder = _checkpoint(checkpoint)
        accelerator, device_time = _timed(plan, folder, accelerator, chosen, latency, device_seconds)
        report, taken = _started(plan, folder, accelerator, chosen, device_time, arguments)
    document = {**asdict(report), "timeline": timeline}
    write_json(document, output)  # before the picture, which may fail
    if timeline is not None:
        about = " (device SIMULATED)" if report.simulated else ""
        plot_timeline({name: each.mixed[0] for name, each in taken.items()}, timeline, f"Text and images{about}")
    if as_json:
        print_json(document)
    else:
        print_blocks(serve_blocks(report))


def _running(plan: Plan, urls: dict[str, str], device_seconds: float | None) -> tuple[Report, dict[str, Taken]]:
    subjects = [running(name, url) for name, url in urls.items()]
    with status("starting") as tell:
        taken = {each.name: measure(each, plan, tell, again=each.name != Mode.STOCK) for each in subjects}
    device = DeviceTime(device_seconds, "from --device-seconds" if device_seconds is not None else "unknown")
    return make_report(plan, taken, device, None, None), taken


def _started(
    plan: Plan,
    checkpoint: Path,
    accelerator: Accelerator,
    modes: Sequence[Mode],
    device: DeviceTime,
    arguments: Sequence[str],
) -> tuple[Report, dict[str, Taken]]:
    taken: dict[str, Taken] = {}
    with tidy_if_terminated(), status("starting") as tell:
        for mode in modes:
            again = mode is not Mode.STOCK and not accelerator.simulated
            with started(mode, checkpoint, accelerator, plan, arguments, tell) as subject:
                messages.print(f"{subject.name}: serving on {subject.url}", highlight=False)
                taken[mode.value] = measure(subject, plan, tell, again=again)
            if mode is not Mode.STOCK and accelerator.simulated:
                with started(mode, checkpoint, accelerator.without_latency(), plan, arguments, tell) as subject:
                    measure_without_latency(subject, plan, tell, taken[mode.value])
    return make_report(plan, taken, device, accelerator.backend, accelerator.simulated), taken


def _timed(
    plan: Plan,
    checkpoint: Path,
    accelerator: Accelerator,
    modes: Sequence[Mode],
    latency: float | None,
    stated: float | None,
) -> tuple[Accelerator, DeviceTime]:
    """Return the device as servers use it, and its time for an image."""
    if latency is not None or (accelerator.simulated and not set(TIMES) & set(accelerator.options)):
        timed, time = with_latency(checkpoint, accelerator, plan.device_images[0], latency or _LATENCY)
        return timed, time if stated is None else DeviceTime(stated, "from --device-seconds")
    if stated is not None or modes == [Mode.STOCK]:
        return accelerator, DeviceTime(stated, "from --device-seconds" if stated is not None else "not used")
    with status("measuring the device"):
        return accelerator, measured(checkpoint, accelerator, plan.device_images)


def _checkpoint(named: str | None) -> Path:
    if named is not None:
        return locate_checkpoint(named).folder
    from digits_vlm import checkpoint_path

    return Path(checkpoint_path())


def _size(text: str) -> tuple[int, int]:
    found = _SIZE.fullmatch(text)
    if found is None:
        raise SettingsError(
            f"--size {text!r} is not an image size.",
            hint="Pass WIDTHxHEIGHT in pixels, from 10 to 9999, such as 308x224.",
        )
    return int(found[1]), int(found[2])


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise SettingsError(f"--server-arguments {text!r}: {error}.", hint="Quote it as for a shell.") from error


def _named(urls: Iterable[str]) -> dict[str, str]:
    """Return URLs by name; one without a name is its own name."""
    named: dict[str, str] = {}
    for text in urls:
        found = _NAMED_URL.fullmatch(text)
        if found is None:
            raise SettingsError(
                f"--url {text!r} is not a URL.", hint="Pass URL or NAME=URL, such as http://127.0.0.1:8000/v1."
            )
        name = found["name"] or found["url"]
        if name in named:
            raise SettingsError(f"--url {text!r}: {name} is given twice.", hint="Give each server a different name.")
        named[name] = found["url"]
    return named


def _require_inline(sequential: bool, names: Iterable[str]) -> None:
    if sequential and Mode.INLINE.value not in list(names):
        raise ConfigurationError(
            "--sequential sends requests one by one to a server in mode inline, but no such server is measured.",
            hint="Add --mode inline, or a server named inline.",
        )
