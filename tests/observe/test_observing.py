"""What can be seen of encodes: their parts, the metrics, the timeline, the log of times."""

import json
import logging
import multiprocessing
import threading
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gated import gated, wait_until
from towers import random_patches
from visionaccel import open_encoder
from visionaccel.backends import Registry, call_parts, default_registry, watch_parts
from visionaccel.errors import ConfigurationError
from visionaccel.integrations.vllm import published_metrics as published
from visionaccel.integrations.vllm import shared_memory
from visionaccel.isolation.messages import Places, decoded, encoded
from visionaccel.observe import (
    SERIES,
    TIMING_PREFIX,
    Counters,
    EncoderMetrics,
    MetricsCollector,
    TimingLog,
    TraceLog,
    families,
    merged,
    timed_encodes,
)
from visionaccel.service import EmbeddingCache, EncodeService
from visionaccel.trust import ChainLink, GuardedEncoder

GRID = (1, 4, 6)


@pytest.fixture
def observed():
    """Registers observers for the test alone."""
    plugins, added = default_registry().plugins, []

    def register(observer):
        plugins.register(observer)
        added.append(observer)
        return observer

    yield register
    for observer in added:
        plugins.unregister(observer)


# The parts of an encode


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_the_parts_of_an_encode_add_up(tiny, told, isolation):
    patches = random_patches([GRID])
    with open_encoder(tiny, backend="onnxrt", isolation=isolation) as encoder:
        started = time.monotonic()
        encoder.encode(patches, [GRID], queue_seconds=1.5)
        ended = time.monotonic()
    (report,) = told.encoded
    assert started <= report.started <= ended
    assert report.queue_seconds == 1.5
    assert report.purpose == "request"
    parts = report.transfer_in_seconds + report.device_seconds + report.transfer_out_seconds
    assert report.run_seconds == pytest.approx(parts)
    total = report.check_seconds + report.prepare_seconds + report.run_seconds + report.finish_seconds
    assert 0 < total <= ended - started
    assert report.bytes_in >= patches.nbytes
    assert report.bytes_out == report.tokens * encoder.tower.out_width * 4
    moved = report.transfer_in_seconds > 0 and report.transfer_out_seconds > 0
    assert moved == (isolation == "process"), "only a child process reports transfers here"


def test_nobody_is_told_and_nothing_is_timed_where_nobody_looks(tiny, monkeypatch):
    monkeypatch.setattr("visionaccel.encoder.encoder._Clock", None)
    # A registry without observers: that of the process keeps those that tests of vLLM's processes installed.
    with open_encoder(tiny, backend="onnxrt", registry=Registry()) as encoder:
        assert encoder.encode(random_patches([GRID]), [GRID]).shape[0] == 6
    assert call_parts() is None


def test_parts_are_those_of_the_thread_that_looks():
    with watch_parts() as outer:
        call_parts().transfer_in += 1
        with watch_parts() as inner:
            call_parts().transfer_in += 2
        seen = []
        thread = threading.Thread(target=lambda: seen.append(call_parts()))
        thread.start()
        thread.join()
        call_parts().transfer_out += 4
    assert (outer.transfer_in, outer.transfer_out, inner.transfer_in, seen) == (1, 4, 2, [None])
    assert call_parts() is None


def test_what_a_process_of_its_own_took_to_write_its_answer_comes_back():
    answer = Places((), 1.5)
    assert decoded(encoded(answer)) == answer


# The log of times


def test_the_log_of_times_has_every_part_with_sizes_and_bandwidth(tiny, observed, caplog):
    observed(TimingLog())
    caplog.set_level(logging.INFO)
    with open_encoder(tiny, backend="onnxrt", isolation="process") as encoder:
        encoder.encode(random_patches([GRID]), [GRID], queue_seconds=0.25)
        encoder.encode(random_patches([GRID]), [GRID], purpose="canary")
    lines = [record.getMessage() for record in caplog.records if TIMING_PREFIX in record.getMessage()]
    first, second = (json.loads(line.partition(TIMING_PREFIX)[2]) for line in lines)
    assert set(first["ms"]) == {"queue", "check", "host_pre", "transfer_in", "device", "transfer_out", "host_post"}
    assert first["ms"]["queue"] == 250
    assert first["grids"] == ["1x4x6"]
    assert first["gb_per_s_in"] > 0
    assert first["gb_per_s_out"] > 0
    assert "queue" not in second["ms"]
    assert timed_encodes("\n".join(lines)) == [first], "canaries are not requests"


# Counting


EVENTS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["x", 'quote"d', "new\nline"]), st.floats(0, 4)), max_size=30
)


COUNTER, HISTOGRAM = "visionaccel_patches", "visionaccel_queue_seconds"


@given(events=EVENTS)
def test_several_processes_counts_add_up_to_what_one_would_have_counted(events):
    alone, apart = Counters(), [Counters() for _ in range(3)]
    for process, label, value in events:
        for counters in (alone, apart[process]):
            counters.count(COUNTER, "onnxrt", label, amount=value)
            counters.observe(HISTOGRAM, "onnxrt", label, value=value)
    snapshots = [json.loads(json.dumps(counters.snapshot())) for counters in apart]
    registries = []
    for snapshot in (alone.snapshot(), merged(snapshots)):
        registry = CollectorRegistry()
        registry.register(type("Shown", (), {"collect": lambda self, found=snapshot: families(found)})())
        text = generate_latest(registry).decode()
        samples = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[sample.name, tuple(sorted(sample.labels.items()))] = pytest.approx(sample.value, abs=1e-6)
        registries.append(samples)
    assert registries[0] == registries[1]


def test_buckets_hold_what_is_up_to_their_bound():
    counters = Counters()
    for value in (1e-4, 0.001, 0.002, 0.0025, 90.0):
        counters.observe(HISTOGRAM, "onnxrt", "cpu", value=value)
    (family,) = [family for family in families(counters.snapshot()) if family.name == HISTOGRAM]
    counts = {sample.labels["le"]: sample.value for sample in family.samples if sample.name == f"{HISTOGRAM}_bucket"}
    assert (counts["0.001"], counts["0.0025"], counts["60.0"], counts["+Inf"]) == (2, 4, 4, 5)
    (total,) = [sample.value for sample in family.samples if sample.name == f"{HISTOGRAM}_sum"]
    assert total == pytest.approx(90.0056)


@pytest.mark.parametrize(
    ("name", "labels", "shown"),
    [
        ("visionaccel_waiting_items", (), 4),
        ("visionaccel_breaker_state", ("onnxrt", "cpu"), 3),
        ("visionaccel_lowest_cosine", ("onnxrt", "cpu", "canary"), 1),
    ],
    ids=["sum", "max", "min"],
)
def test_of_gauges_what_the_series_says_is_shown_and_what_is_unknown_is_left_out(name, labels, shown):
    low, high = Counters(), Counters()
    low.set(name, *labels, value=1)
    high.set(name, *labels, value=3)
    odd = {name: [(["label", *labels], 9)], "z": [([], 1)]}
    found = merged([low.snapshot(), high.snapshot(), odd])
    assert found[name] == [(list(labels), shown)]
    assert "z" not in found


# Metrics


def values(metrics):
    registry = CollectorRegistry()
    registry.register(MetricsCollector(metrics))
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def test_metrics_tell_of_encodes_failures_fallbacks_breakers_the_queue_and_the_cache(tiny, observed):
    metrics = observed(EncoderMetrics())
    with open_encoder(tiny, backend="onnxrt") as healthy:
        guarded, gate = gated(tiny)
        guarded = GuardedEncoder(guarded.links[0], [ChainLink("onnxrt", healthy)])
        gate.fail = lambda patches: OSError("gone") if len(patches) == 32 else None
        with EncodeService([guarded]) as service:
            metrics.watch_service(service)
            for seed in (1, 1, 2):
                service.encode(random_patches([(1, 4, 4)], seed=seed), [(1, 4, 4)])
            for seed in range(6):
                service.encode(random_patches([(1, 4, 8)], seed=seed), [(1, 4, 8)])
            service.encode(random_patches([(1, 4, 4)], seed=3), [(1, 4, 4)])
            wait_until(lambda: service.counters.running == 0)
            wait_until(lambda: any(name[0] == "visionaccel_breaker_openings_total" for name in values(metrics)))
            found = values(metrics)
        after = values(metrics)
    device, fallback = (("backend", "gated"), ("device", "cpu")), (("backend", "onnxrt"), ("device", "cpu"))
    assert found["visionaccel_encode_seconds_count", *device, ("purpose", "request")] == 2
    assert found["visionaccel_encode_seconds_count", *fallback, ("purpose", "request")] == 7
    assert found["visionaccel_queue_seconds_count", *device] == 2
    assert found["visionaccel_patches_total", *device] == 32
    assert found["visionaccel_tokens_total", *fallback] == 6 * 8 + 4
    assert found["visionaccel_failures_total", *device, ("kind", "DeviceError")] == 5
    assert found["visionaccel_breaker_openings_total", *device] == 1
    assert found["visionaccel_breaker_state", *device] in (1, 2)
    assert found["visionaccel_breaker_state", *fallback] == 0
    assert found["visionaccel_fallback_items_total",] == 7
    assert found["visionaccel_failed_items_total",] == 0
    assert found["visionaccel_cache_hits_total",] == 1
    assert found["visionaccel_cache_bytes",] == 2 * 4 * 24 * 4
    assert found["visionaccel_bytes_total", *fallback, ("direction", "out")] == (6 * 8 + 4) * 24 * 4
    assert found["visionaccel_waiting_items",] == 0
    for name in ("cache_hits_total", "fallback_items_total"):  # what a closed service counted stays
        assert after[f"visionaccel_{name}",] == found[f"visionaccel_{name}",]
    for name in ("cache_bytes", "waiting_items", "running_items"):
        assert after[f"visionaccel_{name}",] == 0


def test_a_cache_that_two_services_share_is_shown_once(tiny):
    metrics, cache = EncoderMetrics(), EmbeddingCache(2**20)
    with EncodeService([gated(tiny)[0]], cache=cache) as one, EncodeService([gated(tiny)[0]], cache=cache) as other:
        metrics.watch_service(one)
        metrics.watch_service(other)
        one.encode(random_patches([(1, 4, 4)]), [(1, 4, 4)])
        assert values(metrics)["visionaccel_cache_bytes",] == 4 * 24 * 4


def test_every_metric_is_shown_with_what_it_means_before_anything_happens():
    text = generate_latest(_registry_of(EncoderMetrics())).decode()
    for series in SERIES:
        assert f"# HELP {series.name}" in text
        assert series.help.endswith(".")


def _registry_of(metrics):
    registry = CollectorRegistry()
    registry.register(MetricsCollector(metrics))
    return registry


@pytest.fixture
def shared(monkeypatch):
    """Memory of this process and those that it starts."""
    monkeypatch.setenv(shared_memory._VARIABLE, "")
    shared_memory.make_shared_memory()
    return shared_memory.shared_memory()


def _count_in_a_process(number):
    metrics = published.publish()
    metrics._counters.count("visionaccel_patches", "someone", "cpu", amount=number)
    metrics._counters.set("visionaccel_waiting_items", value=number)
    time.sleep(1.5)


def test_what_processes_publish_is_added_up_and_stays_when_they_end(shared):
    collector = published.PublishedCollector()
    assert all(not family.samples for family in collector.collect())
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_count_in_a_process, args=(number,)) for number in (3, 4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    found = {family.name: [sample.value for sample in family.samples] for family in collector.collect()}
    assert found["visionaccel_patches"] == [7]
    assert found["visionaccel_waiting_items"] == [], "how things stood in a process that has ended no longer matters"


def test_counts_that_do_not_fit_are_warned_of_once_and_the_last_that_did_are_shown(shared, caplog, monkeypatch):
    from visionaccel.integrations.vllm import compat

    monkeypatch.setattr(compat, "logger", lambda: logging.getLogger("visionaccel"))
    metrics = EncoderMetrics()
    publisher = published._Publisher(metrics, shared)
    metrics._counters.count("visionaccel_patches", "someone", "cpu", amount=3)
    wait_until(lambda: publisher._written.count(b"someone") == 1)
    for number in range(3):
        metrics._counters.count("visionaccel_patches", f"{number}" * 200_000, "cpu")
        time.sleep(0.8)
    found = {family.name: family for family in published.PublishedCollector().collect()}
    assert [sample.value for sample in found["visionaccel_patches"].samples] == [3]
    assert caplog.text.count("a record for metrics holds at most") == 1


def test_metrics_are_shown_while_they_are_being_written(shared):
    metrics = EncoderMetrics()
    area = shared.claim(shared_memory.METRICS)
    stop = threading.Event()

    def write():
        while not stop.is_set():
            metrics._counters.count("visionaccel_patches", "someone", "cpu")
            area.append(json.dumps(metrics.snapshot()).encode())
            stop.wait(0.001)

    thread = threading.Thread(target=write)
    thread.start()
    while not area.written:
        time.sleep(0.001)
    try:
        seen = []
        for _ in range(200):
            found = {family.name: family for family in published.PublishedCollector().collect()}
            seen += [sample.value for sample in found["visionaccel_patches"].samples]
    finally:
        stop.set()
        thread.join()
    assert len(seen) == 200
    assert seen == sorted(seen), "a counter never goes back"


@pytest.mark.parametrize("several", [False, True], ids=["one API server", "several"])
def test_metrics_show_in_what_vllm_answers_from_also_when_it_is_of_several_processes(
    shared, monkeypatch, tmp_path, several
):
    pytest.importorskip("vllm")
    import prometheus_client
    from prometheus_client import multiprocess
    from vllm.v1.metrics import prometheus

    from visionaccel.integrations.vllm.compat import serving

    registry = CollectorRegistry(auto_describe=True)  # as prometheus_client's own
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    monkeypatch.setattr(prometheus, "REGISTRY", registry)
    collect = _unwrapped(multiprocess.MultiProcessCollector.collect)
    monkeypatch.setattr(multiprocess.MultiProcessCollector, "collect", collect)
    if several:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    for _ in range(2):
        serving.on_metrics(published.PublishedCollector)
        shown = generate_latest(prometheus.get_prometheus_registry()).decode()
        assert shown.count("# HELP visionaccel_encode_seconds ") == 1
    assert prometheus.get_prometheus_registry.__module__ == prometheus.__name__, "nothing of vLLM is replaced"
    registry.register(MetricsCollector(EncoderMetrics()))  # as a program may do with those of its own encoders


def _unwrapped(function):
    return getattr(function, "__wrapped__", function)


# The timeline


def events(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "["
    assert all(line.endswith(",") for line in lines[1:])
    return [json.loads(line[:-1]) for line in lines[1:]]


def test_a_timeline_shows_the_queue_the_device_and_its_parts(tiny, observed, tmp_path):
    path = tmp_path / "trace.json"
    observed(TraceLog(path, "tests"))
    started = time.monotonic()
    with open_encoder(tiny, backend="onnxrt", isolation="process") as encoder:
        for seed in range(3):
            encoder.encode(random_patches([GRID], seed=seed), [GRID], queue_seconds=0.5)
    found = events(path)
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in found if event["name"] == "thread_name"}
    assert {name.partition(" (")[0] for name in names.values()} == {"queue", "device onnxrt cpu"}
    slices = [event for event in found if event["ph"] == "X"]
    encodes = [event for event in slices if event["name"] == "request 1x4x6"]
    assert len(encodes) == 3
    assert {event["cat"] for event in slices} == {"queue", "device", "host"}
    for encode in encodes:
        parts = [
            event
            for event in slices
            if event["tid"] == encode["tid"]
            and event is not encode
            and encode["ts"] - 1 <= event["ts"] <= encode["ts"] + encode["dur"]
        ]
        assert [part["name"] for part in parts] == [
            "host before", "transfer in", "compute", "transfer out", "host after",
        ]  # fmt: skip
        assert sum(part["dur"] for part in parts) == pytest.approx(encode["dur"], abs=2)
        assert encode["ts"] >= 1e6 * started


@given(slices=st.lists(st.tuples(st.floats(0, 50), st.floats(0.001, 10)), max_size=30))
def test_what_overlaps_is_in_lanes_of_its_own(tmp_path_factory, slices):
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    trace = TraceLog(path, "tests")
    for start, seconds in slices:
        trace.slice("queue", "queue", "x", start, seconds)
    lanes = {}
    for event in events(path):
        if event["ph"] == "X":
            lanes.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert sum(map(len, lanes.values())) == len(slices)
    for times in lanes.values():
        times.sort()
        assert all(end <= start + 0.2 for (_, end), (start, _) in pairwise(times))


def _trace_in_a_process(path, number):
    trace = TraceLog(path, f"process {number}")
    for i in range(200):
        trace.slice("queue", "queue", "x" * 200, float(i), 0.5)


def test_several_processes_write_one_whole_file(tmp_path):
    path = tmp_path / "trace.json"
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_trace_in_a_process, args=(path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)  # importing this module is slow where much else runs
        assert process.exitcode == 0
    found = events(path)
    assert sum(event["ph"] == "X" for event in found) == 600
    assert len({event["pid"] for event in found}) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="VISIONACCEL_TRACE"):
        TraceLog(tmp_path / "missing" / "trace.json", "tests")


def test_a_full_disk_ends_the_timeline_and_nothing_else(tmp_path, monkeypatch, caplog):
    trace = TraceLog(tmp_path / "trace.json", "tests")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("visionaccel.observe.observers.os.write", full)
    trace.slice("queue", "queue", "x", 0.0, 1.0)
    trace.slice("queue", "queue", "x", 1.0, 1.0)
    assert caplog.text.count("The timeline stops here: No space left") == 1


def _installed_in_a_fork(queue):
    inherited = default_registry().plugins.get_plugin("EncoderMetrics")
    made = EncoderMetrics.install()
    queue.put((made is inherited, made.snapshot()["visionaccel_patches"]))


def test_a_fork_counts_anew():
    plugins = default_registry().plugins
    metrics = EncoderMetrics.install()
    metrics._counters.count("visionaccel_patches", "someone", "cpu", amount=5)
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    process = fork.Process(target=_installed_in_a_fork, args=(queue,))
    process.start()
    assert queue.get() == (False, [])
    process.join(60)
    plugins.unregister(metrics)
