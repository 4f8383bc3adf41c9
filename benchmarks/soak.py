"""Thousands of requests to a vLLM engine in the pipelined mode, whose device fails and hangs, while clients give up.

5 % of the images fail on the device, 5 % hang past the deadline, and 10 % of the requests are aborted. Sizes are
random, some prompts have two images or none, and some images are repeated. The device is simulated: it computes, sleeps
briefly, and fails as configured. All requests are first answered once without faults, to learn the correct answers.

Every request must end: with its correct answer, with its own error, or aborted. The engine runs in this process, so
that the time of its scheduler in the connector can be measured.

`python -m benchmarks.soak --requests 2000`
"""

import argparse
import ctypes
import gc
import json
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil

REQUESTS = 2000
AT_A_TIME = 24
DEADLINE = 1.0
FAILS = {"share": 0.05, "seed": 1, "do": "raise"}
HANGS = {"share": 0.05, "seed": 2, "do": "hang", "seconds": 1.3}
SETTLED_AFTER = 0.25
"""Share of the requests after which memory must not grow; a line is fitted from there on, and its growth counts."""
CALLS = (
    "ensure_cache_available", "has_cache_item", "update_state_after_alloc", "build_connector_meta", "take_failures",
    "take_unavailable_requests", "request_finished", "has_pending_push_work", "update_connector_output",
)  # fmt: skip
"""The methods of the connector that vLLM's scheduler calls."""

ABOUT_IMAGES = ("ensure_cache_available", "has_cache_item", "update_state_after_alloc")
BOUNDS = {
    "memory growth once settled, MB": 20.0,
    "descriptors gained once settled": 0.0,
    "connector calls of a step, ms (p99)": 1.0,
}
"""The maximum of each figure."""


@dataclass
class Asked:
    """One request: its contents, how it may end, and how it did.

    Attributes:
        seeds: Its images.
        aborted_after: Steps after which its client gives up; None for never.
        fails: One of its images fails on the device.
        hangs: One of its images hangs; a later request with an equal image may find the late result in the cache.
        tokens: Its answer.
        ending: How it ended.
    """

    seeds: tuple[int, ...]
    aborted_after: int | None
    fails: bool = False
    hangs: bool = False
    tokens: list[int] = field(default_factory=list)
    ending: str | None = None


class Times:
    """A histogram of durations in microseconds. Its size is bounded, because memory is measured."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Add a duration."""
        self.counts[int(seconds * 1e6)] += 1

    def quantile_ms(self, share: float) -> float:
        """Return the milliseconds that this share of the durations does not exceed."""
        left = share * self.counts.total()
        for microseconds, number in sorted(self.counts.items()):  # noqa: B007
            left -= number
            if left <= 0:
                break
        return (microseconds + 1) / 1e3


@dataclass
class Clock:
    """Time in the connector: of each call, and of each step that asked about an image."""

    calls: Times = field(default_factory=Times)
    steps: Times = field(default_factory=Times)
    _step: float = 0.0
    _media: bool = False

    def watch(self, connector: Any) -> None:
        """Time every call of a connector from now on."""
        for name in CALLS:
            setattr(connector, name, self._timed(getattr(connector, name), name in ABOUT_IMAGES))

    def step_ended(self) -> None:
        """Count the step that just ended."""
        if self._media:  # the many other steps would hide these
            self.steps.add(self._step)
        self._step, self._media = 0.0, False

    def _timed(self, call: Callable[..., Any], media: bool) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - started
                self.calls.add(seconds)
                self._step += seconds
                self._media |= media

        return timed


def measure() -> dict[str, float]:
    return soak(REQUESTS)


def soak(requests: int) -> dict[str, float]:
    """Run the requests and return the figures.

    Raises:
        AssertionError: A request ended in a wrong way, or something was not cleaned up.
    """
    with tempfile.TemporaryDirectory() as folder:
        switch = Path(folder, "faults.json")
        settings = {
            "VISIONACCEL_BACKEND": "simulated",
            "VISIONACCEL_DEVICE": "onnxrt",
            "VISIONACCEL_OPTIONS": json.dumps({"latency": 0.01, "switch": str(switch), "inner": {"threads": 1}}),
            "VISIONACCEL_MODE": "pipelined",
            "VISIONACCEL_DEADLINE": str(DEADLINE),
            "VISIONACCEL_CACHE_SIZE": "2MiB",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with patch.dict(os.environ, settings), patch.object(tempfile, "tempdir", folder), _engine() as engine:
            return _soak(engine, switch, requests)


@contextmanager
def _engine() -> Iterator[Any]:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from digits_vlm import checkpoint_path

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=str(checkpoint_path()),
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=16,
            limit_mm_per_prompt={"image": 2, "video": 0},
            mm_processor_kwargs={"max_pixels": 308 * 308},
            max_num_batched_tokens=512,
            mm_processor_cache_gb=0.02,
            num_gpu_blocks_override=256,  # few, so that all are soon in use: the first use of a block looks like growth
            disable_log_stats=True,
        )
    )
    try:
        yield engine
    finally:
        engine.engine_core.shutdown()


def _soak(engine: Any, switch: Path, requests: int) -> dict[str, float]:
    scheduler = engine.engine_core.engine_core.scheduler
    connector, clock = scheduler.ec_connector, Clock()
    plan = _plan(requests)
    right = [request.tokens for request in _run(engine, [Asked(each.seeds, None) for each in plan])]
    assert all(right), "without faults every request is answered"

    assert scheduler.reset_prefix_cache()
    engine.reset_encoder_cache()
    connector._service.cache.clear()
    before = connector._service.counters
    switch.write_text(json.dumps([FAILS, HANGS]))
    clock.watch(connector)
    memory: list[tuple[int, float]] = []
    descriptors: list[int] = []

    def at(finished: int) -> None:
        if finished % max(1, requests // 40) == 0:
            gc.collect()
            _return_free_memory()
            memory.append((finished, _memory()))
            descriptors.append(len(list(Path("/proc/self/fd").iterdir())))

    started = time.monotonic()
    answered = _run(engine, plan, clock, at)
    seconds = time.monotonic() - started
    after = connector._service.counters

    endings = Counter(_verdict(request, expected) for request, expected in zip(answered, right, strict=True))
    wrong = {name: number for name, number in endings.items() if name.startswith("wrong")}
    assert not wrong, endings
    assert sum(endings.values()) == requests
    assert (after.waiting, after.running, len(connector._pending_images._pending), connector._items) == (0, 0, 0, {})
    settled = [size for finished, size in memory if finished >= SETTLED_AFTER * requests]
    places = np.linspace(0.0, 1.0, len(settled))
    engine.engine_core.shutdown()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("visionaccel-")]
    left = [name for name in left if name != "visionaccel-background"]  # it publishes until the process ends
    assert not left, f"threads are left: {left}"
    return {
        "requests": requests,
        "seconds": seconds,
        **{f"ended: {name}": number for name, number in sorted(endings.items())},
        "images encoded": after.encoded - before.encoded,
        "images that failed": after.failed - before.failed,
        "of these past the deadline": after.expired - before.expired,
        "images taken back": after.cancelled - before.cancelled,
        "images from the cache or an equal one": after.cached + after.merged - before.cached - before.merged,
        "memory growth once settled, MB": float(np.polyfit(places, settled, 1)[0]),
        "memory once settled, MB (least)": min(settled),
        "memory once settled, MB (most)": max(settled),
        "descriptors gained once settled": descriptors[-1] - descriptors[len(descriptors) // 4],
        "connector calls": clock.calls.counts.total(),
        "a connector call, ms (p99)": clock.calls.quantile_ms(0.99),
        "a connector call, ms (worst)": clock.calls.quantile_ms(1),
        "connector calls of a step, ms (p99)": clock.steps.quantile_ms(0.99),
        "connector calls of a step, ms (worst)": clock.steps.quantile_ms(1),
    }


def _plan(requests: int) -> list[Asked]:
    chance = random.Random(7)
    plan = []
    for number in range(requests):
        images = chance.choices((0, 1, 2), (0.1, 0.7, 0.2))[0]
        seeds = tuple(
            chance.randrange(max(1, 2 * number)) if chance.random() < 0.1 else 2 * number + place
            for place in range(images)
        )
        plan.append(Asked(seeds, chance.randrange(12) if chance.random() < 0.1 else None))
    return plan


def _run(
    engine: Any, plan: list[Asked], clock: Clock | None = None, at: Callable[[int], None] = lambda _: None
) -> list[Asked]:
    """Send all requests, some at a time, until all have ended."""
    scheduler = engine.engine_core.engine_core.scheduler
    waiting = list(enumerate(plan))[::-1]
    going: dict[str, tuple[Asked, int]] = {}
    steps = finished = 0
    end = time.monotonic() + 60 + len(plan)
    while waiting or going:
        assert time.monotonic() < end, f"requests do not end: {list(going)}"
        while waiting and len(going) < AT_A_TIME:
            number, request = waiting.pop()
            name = f"request{number}-{steps}"
            known = set(scheduler.requests)
            _add(engine, name, number, request)
            (inner,) = set(scheduler.requests) - known
            for feature in scheduler.requests[inner].mm_features:
                pixels = feature.data["pixel_values"].data
                request.fails |= _struck(pixels, FAILS)
                request.hangs |= _struck(pixels, HANGS)
            going[name] = (request, steps)
        outputs = engine.step()
        steps += 1
        if clock is not None:
            clock.step_ended()
        for output in outputs:
            if output.finished and output.request_id in going:
                request, _ = going.pop(output.request_id)
                (completion,) = output.outputs
                request.tokens, request.ending = list(completion.token_ids), completion.finish_reason
                finished += 1
                at(finished)
        for name, (request, since) in list(going.items()):
            if request.aborted_after is not None and steps - since > request.aborted_after:
                engine.abort_request([name])
                del going[name]
                request.ending = "abort"
                finished += 1
                at(finished)
        if not outputs:
            time.sleep(0.001)  # as vLLM's own loop does
    return plan


def _add(engine: Any, name: str, number: int, request: Asked) -> None:
    from vllm import SamplingParams

    from digits_vlm.samples import digits_image, random_size

    images = []
    for seed in request.seeds:
        chance = np.random.default_rng(seed)
        images.append(digits_image(chance, "held_out", random_size(chance, 308)).image)
    media = "<|vision_start|><|image_pad|><|vision_end|>" * len(images)
    prompt = f"<|im_start|>user\n{number}{media}Read the digits.<|im_end|>\n<|im_start|>assistant\n"
    data = {"prompt": prompt, "multi_modal_data": {"image": images}} if images else {"prompt": prompt}
    engine.add_request(name, data, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))


def _struck(pixels: Any, rule: dict[str, Any]) -> bool:
    from visionaccel_testing.simulated import FaultRule, struck

    return struck(pixels, FaultRule(**rule))


def _verdict(request: Asked, right: list[int]) -> str:
    """Return how a request ended, with `wrong` if it must not end that way."""
    answered = request.tokens == right
    match request.ending:
        case "length" if answered and request.fails:
            return "wrong: answered though its image fails"
        case "length" if answered:
            return "right answer"
        case "error" if request.fails or request.hangs:
            return "its own error"
        case "abort" if request.aborted_after is not None:
            return "aborted"
        case other:
            return f"wrong: {other}, {'right' if answered else 'another'} answer"


def _return_free_memory() -> None:
    """Make the C library return its free memory to the system: its fragments would look like a leak.

    Without this, resident memory grows by about 30 MB over the same requests, in steps, and stays there.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc's
        trim(0)


def _memory() -> float:
    """Return the anonymous memory of this process and its children in MB; other processes do not affect it."""
    total = 0
    for process in (os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                total += int(line.split()[1])
    return total / 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    figures = soak(arguments.requests)
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures))
    missed = [name for name, most in BOUNDS.items() if figures[name] > most]
    raise SystemExit(f"missed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
