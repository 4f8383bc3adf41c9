"""Files for `visionaccel report` to read, with names that a page must not take for markup."""

import json
from dataclasses import asdict, replace

from visionaccel.core.grid import Grid
from visionaccel_bench.encode.encode_report import (
    ContenderReport,
    EncodeReport,
    GridOperations,
    GridReport,
    Machine,
)
from visionaccel_bench.encode.encoding import Accuracy, EncodePlan
from visionaccel_bench.encode.placement import advise
from visionaccel_bench.serve.device import DeviceTime
from visionaccel_bench.serve.load import Run, Trace
from visionaccel_bench.serve.serve_report import make_report
from visionaccel_bench.serve.serving import Plan, Taken

HOSTILE = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>&lt;\ud800\x1b[31m\x00"
"""What an untrusted file may hold in any text."""


def write(path, value):
    path.write_text(json.dumps(value, default=str))
    return path


def encode_report(name=""):
    """Two contenders that encoded, and one that did not."""
    accuracy = Accuracy(0.99991, 0.99999, 1.2e-4, 0)
    on = GridReport(
        "1x16x16", 0.5, 0.45, 0.61, (0.5, 0.52), 4, 512.0, 1953.0, 1.9, 0.42, 0.71, 0.8, accuracy, None
    )  # fmt: skip
    slower = replace(on, median_seconds=0.704, most_seconds=0.81)
    broken = replace(on, median_seconds=None, accuracy=None, error=f"no answer {name}")
    make = {"precision": "float32", "about": "1.0", "simulated": False, "startup_seconds": 3.2}
    memory = {"resident_bytes": 2**30, "peak_bytes": 2**31}
    contenders = (
        ContenderReport(f"onnxrt{name}", "backend", "onnxrt", f"cpu{name}", grids=(on,), error=None, **make, **memory),
        ContenderReport(
            f"vllm bfloat16{name}", "peer", "vllm", "cpu", grids=(slower,), error=None,
            **make, **memory,
        ),
        ContenderReport(f"odd{name}", "backend", "odd", "cpu", grids=(broken,), error=None, **make, **memory),
        ContenderReport(
            f"gone{name}", "backend", "gone", None, grids=(), error=f"not installed {name}",
            **dict.fromkeys(make, None) | {"simulated": True}, **dict.fromkeys(memory, None),
        ),
    )  # fmt: skip
    return EncodeReport(
        f"a checkpoint{name}",
        EncodePlan((Grid(1, 16, 16),), 2, 2),
        Machine(f"a processor{name}", 2, "Linux", {"float32": 1.3e11}),
        (GridOperations("1x16x16", 256, 64, 123_000_000_000, 0.1),),
        contenders,
        (f"busy{name}",),
    )


def placement(name=""):
    """What `bench placement` writes."""
    report = encode_report(name)
    ours, stock, *_ = report.contenders
    return {"placements": [asdict(advise(report, ours, stock))], "measured": asdict(report)}


def serve_report(name=""):
    """Two modes; pipelined stalls less."""

    def run(stall):
        text = Trace("text 0", "text", 0.0, (0.1, 0.15, 0.15 + stall, 3.0 + stall), 4)
        return Run((Trace("image 0", "image", 0.5, (1.5, 1.6 + stall), 2), text))

    taken = {
        "inline": Taken([run(0.9)], [run(0.0)], [run(0.8)], [run(0.4)], [run(0.3)], [run(0.3)], f"onnxrt{name}"),
        f"pipelined{name}": Taken([run(0.2)], [run(0.0)], [run(0.1)], [], [run(0.1)], [run(0.1)]),
    }
    plan = Plan(1, 2, 0.3, 1, 4, (308, 224), sequential=True)
    return make_report(plan, taken, DeviceTime(1.0, f"as stated{name}"), f"simulated{name}", True)


def trace_events(name=""):
    """A process with a device and another that decodes: half of the device's time overlaps."""
    for tid, thread in ((1, "device 0"), (2, "waiting")):
        yield {"ph": "M", "name": "thread_name", "pid": 7, "tid": tid, "args": {"name": f"{thread}{name}"}}
    yield {"ph": "M", "name": "process_name", "pid": 7, "tid": 1, "args": {"name": f"encoder{name}"}}
    yield {"ph": "M", "name": "process_name", "pid": 8, "tid": 3, "args": {"name": "engine"}}
    for index in range(12):
        start, at = 1_000_000 * index, {"pid": 7, "tid": 1, "args": {"grid": f"1x16x16{name}"}}
        yield {"ph": "X", "name": f"wait{name}", "cat": "queue", "ts": start, "dur": 400_000, "pid": 7, "tid": 2}
        yield {"ph": "X", "name": "tables", "cat": "host", "ts": start + 300_000, "dur": 100_000, **at}
        yield {"ph": "X", "name": f"encode{name}", "cat": "device", "ts": start + 400_000, "dur": 500_000, **at}
        yield {"ph": "X", "name": "pixels", "cat": f"processor{name}", "ts": start, "dur": 90_000, "pid": 9, "tid": 9}
        for step in range(50):
            moment = {"ts": start + 5_000 * step + 400_000, "dur": 5_000, "pid": 8, "tid": 3}
            yield {"ph": "X", "name": "step", "cat": "decode", **moment}
    yield {"ph": "i", "name": "an instant", "ts": 5, "pid": 7, "tid": 1}


def trace_text(events, closed=True):
    """As they are recorded: one a line."""
    return "[\n" + ",\n".join(map(json.dumps, events)) + ("\n]\n" if closed else ",\n")


def fault_suite(name=""):
    row = {
        "fault": f"the device hangs{name}", "moment": f"encode{name}", "mode": "pipelined", "isolation": "process",
        "expected": f"error{name}", "answered": f"error{name}", "lost": 0, "recovery_seconds": 1.25, "passed": True,
        "detail": name,
    }  # fmt: skip
    worse = {**row, "fault": f"wrong answers{name}", "lost": 2, "recovery_seconds": None, "passed": False}
    return {"created": f"2026-01-02T03:04:05{name}", "rows": [row, worse]}
