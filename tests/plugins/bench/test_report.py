"""`visionaccel report`: a page with everything that it was given, which loads nothing and takes text for text."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import report_inputs as made
from bundle_tools import CERTIFICATE, forge
from bundles import write_bundle
from report_inputs import HOSTILE
from visionaccel.backends import Finding
from visionaccel.cli.app import app
from visionaccel.cli.diagnosis import Diagnosis, Found
from visionaccel.errors import ConfigurationError, InputError
from visionaccel_bench.blocks import Bar, Bars
from visionaccel_bench.drawing import draw_bars, draw_timeline, spans
from visionaccel_bench.faultsuite.cells import FaultRow, FaultSuite
from visionaccel_bench.reporting.inputs import (
    Event,
    Lane,
    Trace,
    overlap,
    read_benchmark,
    read_document,
    read_faults,
    read_inputs,
    read_trace,
)
from visionaccel_bench.reporting.page import environment, make_report

SECTIONS = ("summary", "doctor", "certificate", "benchmarks", "timelines", "faults")
VOID = {"meta", "br"}
STYLE = r"""([a-z-]+: ['\w#().,% -]+;? ?)*"""
PATH = re.compile(r"[ML] ([-\d.]+) ([-\d.]+)")


class Page(HTMLParser):
    """A page's elements with their attributes, its text by section, and whether its elements are nested correctly."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.open = [], {}, []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id")))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        opened, _ = self.open.pop()
        assert opened == tag

    def handle_data(self, data):
        section = next((key for tag, key in reversed(self.open) if tag == "section"), None)
        self.texts[section] = self.texts.get(section, "") + data


@pytest.fixture(scope="module")
def certified(tiny, tmp_path_factory):
    """A bundle whose certificate has hostile names where names may be anything that can be printed."""
    folder = write_bundle(tiny, tmp_path_factory.mktemp("report") / "bundle", "10x18", self_contained=True)

    def change(stated):
        result = {
            **CERTIFICATE["programs"][0],
            "device": "<script>alert(2)</script>",
            "failure": "digits <b>misread</b>",
        }
        stated["certificate"] = {**CERTIFICATE, "programs": [result]}

    forge(folder, change)
    return folder


def diagnosis(name=""):
    findings = (
        Found("environment", Finding("Python", "pass", f"3.11{name}")),
        Found(f"odd{name}", Finding(f"plug-in{name}", "failure", f"it died of SIGSEGV{name}", f"Reinstall it{name}.")),
        Found("vLLM", Finding("VISIONACCEL_BACKEND", "warning", "unset", "Set it.")),
    )
    return Diagnosis("0.1.0", "2026-01-02T03:04:05+00:00", findings)


def inputs(folder, certified, name=""):
    """Every kind of input, in files whose names are hostile too if `name` is."""
    label = "<script>" if name else "plain"
    bench = [
        made.write(folder / f"{label}-encode.json", asdict(made.encode_report(name))),
        made.write(folder / f"{label}-placement.json", made.placement(name)),
        made.write(folder / f"{label}-serve.json", asdict(made.serve_report(name))),
    ]
    trace = folder / f"{label}-trace.json"
    trace.write_text(made.trace_text(made.trace_events(name)))
    return read_inputs(str(certified), bench, [trace], made.write(folder / "faults.json", made.fault_suite(name)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, certified):
    return make_report(inputs(tmp_path_factory.mktemp("plain"), certified), diagnosis(), "A machine").page()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, certified):
    folder = tmp_path_factory.mktemp("hostile")
    return make_report(inputs(folder, certified, HOSTILE), diagnosis(HOSTILE), f"A machine{HOSTILE}").page()


# What is on the page


def test_every_section_is_there_with_what_was_given(plain):
    texts = Page(plain).texts
    assert tuple(key for key in texts if key) == SECTIONS
    assert "it died of SIGSEGV" in texts["doctor"]
    assert "1 failed, 1 with a warning, 1 passed." in texts["doctor"]
    assert "10x18" in texts["certificate"]
    assert "digits <b>misread</b>" in texts["certificate"]
    for expected in (
        "vllm bfloat16",
        "not compared: not installed",
        "failed: no answer",
        "Whether to offload",
        "times vLLM bf16",
    ):
        assert expected in texts["benchmarks"], expected
    for expected in ("what an ideal server needs", "times the ideal bound", "prior art, 3 requests", "SIMULATED"):
        assert expected in texts["benchmarks"], expected
    for expected in ("encoder: device 0", "engine: thread 3", "decode", "50.0%", "6.000 s", "3.000 s"):
        assert expected in texts["timelines"], expected
    assert "1 of 2 faults were handled correctly" in texts["faults"]
    assert "recovery took at most 1.25 s" in texts["faults"]


def test_the_summary_has_the_worst_first(plain):
    summary = Page(plain).texts["summary"]
    places = [summary.index(word) for word in ("Doctor", "Faults", "Benchmarks", "Timelines")]
    assert places == sorted(places)
    assert summary.startswith("Summaryfailure")


def test_what_was_not_given_has_no_section():
    page = make_report(read_inputs(), diagnosis(), "t").page()
    assert tuple(key for key in Page(page).texts if key) == ("summary", "doctor")


def test_a_bundle_without_certificate_and_a_broken_one_are_told(tiny, tmp_path):
    folder = write_bundle(tiny, tmp_path / "bundle", "10x18", self_contained=True)

    def said(source):
        report = make_report(read_inputs(str(source)), diagnosis(), "t")
        (section,) = (each for each in report.sections if each.key == "certificate")
        return section.status, section.summary

    assert said(folder)[0] == "warning"
    assert "only bundles are certified" in said(tiny)[1]
    (folder / "visionaccel.json").write_text("{")
    assert said(folder)[0] == "failure"


# Text is text, and nothing is loaded


def test_hostile_text_is_text(hostile, plain):
    page, expected = Page(hostile), Page(plain)
    assert not {tag for tag, _ in page.elements} & {"script", "img", "iframe", "link", "object", "base", "form"}
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in expected.elements}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset")], tag
        assert re.fullmatch(STYLE, attributes.get("style", "")), "of colours, widths and fonts"
    for section in SECTIONS:
        assert "<script>" in page.texts[section], f"{section} shows what it was given"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", hostile)
    hostile.encode("utf-8")


def test_the_page_loads_nothing(plain, hostile):
    for text in (plain, hostile):
        for tag, attributes in Page(text).elements:
            href = attributes.get("href")
            assert href is None or re.fullmatch(r"#[a-z]+", href), tag
            assert "xlink:href" not in attributes
            assert not [value for value in attributes.values() if value and re.search(r"https?:|//", value)], tag
        assert not re.search(r"https?:|@import|url\(", text)
        policies = {a.get("http-equiv"): a.get("content") for tag, a in Page(text).elements if tag == "meta"}
        assert policies["Content-Security-Policy"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_fragments_lead_to_sections(plain):
    elements = Page(plain).elements
    wanted = {attributes["href"][1:] for tag, attributes in elements if tag == "a"}
    assert wanted <= {attributes.get("id") for tag, attributes in elements if tag == "section"}
    assert wanted == set(SECTIONS) - {"summary"}


@given(st.text())
def test_any_text_becomes_one_piece_of_text(text):
    page = Page(environment().from_string('<p title="{{ text }}">{{ text }}</p>').render(text=text))
    ((tag, attributes),) = page.elements
    assert tag == "p"
    shown = "".join(page.texts.values())
    assert attributes["title"] == shown
    assert len(shown) <= 2000


# Traces


TIMES = st.integers(0, 60)
INTERVALS = st.lists(st.tuples(TIMES, TIMES))


def cells(intervals):
    """The unit times that intervals of whole numbers cover."""
    return {time for start, end in intervals for time in range(start, end)}


@given(INTERVALS, INTERVALS, INTERVALS, INTERVALS)
def test_the_overlap_is_the_share_of_the_devices_time_in_which_decode_steps_ran(device, host, other, decode):
    def lane(**kinds):
        return Lane(
            "a lane",
            tuple(
                Event(category, start, max(end - start, 0))
                for category, intervals in kinds.items()
                for start, end in intervals
            ),
        )

    found = overlap([lane(device=device, host=host), lane(device=other), lane(decode=decode, queue=[(0, 99)])])
    busy = (cells(device) - cells(host)) | cells(other)
    both = busy & cells(decode)
    assert found.device == pytest.approx(len(busy) / 1e6)
    assert found.decode == pytest.approx(len(cells(decode)) / 1e6)
    assert found.both == pytest.approx(len(both) / 1e6)
    assert found.share == (pytest.approx(len(both) / len(busy)) if busy else None)


def test_a_trace_that_an_encode_service_wrote_is_read(tiny, tmp_path):
    """The file that `VISIONACCEL_TRACE` names, written by the package's own tracing."""
    from visionaccel.observe import TraceLog

    log = TraceLog(tmp_path / "trace.json", "server")
    at = 10.0
    thread = log.slice("device onnxrt cpu", "device", "request 1x16x16", at, 2.0, patches=256)
    for part, category, start, seconds in (("host before", "host", at, 0.5), ("compute", "device", at + 0.5, 1.5)):
        log.within(thread, category, part, start, seconds)
    log.slice("steps", "decode", "step", 10.0, 1.0)
    trace = read_trace(tmp_path / "trace.json")
    assert [lane.name for lane in trace.lanes] == ["server: device onnxrt cpu", "server: steps"]
    found = overlap(trace.lanes)
    assert (found.device, found.decode, found.both) == pytest.approx((1.5, 1.0, 0.5))


@pytest.mark.parametrize("ending", ["]", "\n]\n", "", ",", ",\n", ',\n{"ph":"X","name":"to', ',\n{"ph":"X"'])
def test_a_trace_may_lack_its_end(tmp_path, ending):
    file = tmp_path / "trace.json"
    file.write_text("[\n" + ",\n".join(map(json.dumps, made.trace_events())) + ending)
    assert len(read_trace(file).events) == 12 * 54


def test_lanes_have_the_names_of_their_threads(tmp_path):
    file = tmp_path / "trace.json"
    file.write_text(made.trace_text(made.trace_events(), closed=False))
    names = [lane.name for lane in read_trace(file).lanes]
    assert names == ["encoder: waiting", "encoder: device 0", "process 9: thread 9", "engine: thread 3"]


EVENT = {"ph": "X", "name": "a", "cat": "device", "ts": 1, "dur": 1, "pid": 1, "tid": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a trace"),
        ("hello", "is not a trace"),
        ("{}", "is not a JSON array"),
        ("[]", "no events that took time"),
        ("[1]", "event 0 is not a JSON object"),
        (json.dumps([{**EVENT, "ts": "now"}]), "event 0: ts: Input should be a valid number"),
        (json.dumps([{**EVENT, "dur": -1}]), "event 0: dur: Input should be"),
        (json.dumps([{**EVENT, "dur": 1e30}]), "event 0: dur: Input should be"),
        (json.dumps([{**EVENT, "dur": None}]), "event 0: dur: Input should be a valid number"),
        (json.dumps([{**EVENT, "ts": True}]), "event 0: ts: Input should be a valid number"),
        (json.dumps([{**EVENT, "name": 3}]), "event 0: name: Input should be a valid string"),
        (json.dumps([{**EVENT, "pid": [1]}]), "event 0: pid"),
        ('[{"ph":"X","name":"a","cat":"device","ts":NaN,"dur":1}]', "is not a trace"),
        ('[{"ph":"X","name":"a","cat":"device","ts":1e999,"dur":1}]', "is not a trace"),
        ("[" * 100_000, "is not a trace"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, text, message):
    file = tmp_path / "trace.json"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        read_trace(file)


def test_a_trace_of_too_many_events_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("visionaccel_bench.reporting.inputs._MOST_EVENTS", 10)
    file = tmp_path / "trace.json"
    file.write_text(json.dumps([EVENT] * 11))
    with pytest.raises(InputError, match=r"has 11 events; the maximum is 10\..*shorter"):
        read_trace(file)


def test_events_that_are_nearer_than_can_be_shown_are_one_span():
    events = [Event("device", start, 2.0) for start in (0, 5, 6, 20, 20)]
    assert spans(events, 1.0) == [(0, 2), (5, 3), (20, 2)]
    assert spans(events, 4.0) == [(0, 10), (20, 4)]


def test_a_picture_of_many_events_is_small():
    events = [Event(("device", "decode", "host")[i % 3], 10.0 * i, 9.0) for i in range(50_000)]
    svg = draw_timeline(Trace((Lane("a", tuple(events)), Lane("b", tuple(events))))).svg
    assert len(svg) < 1_000_000


def test_a_picture_of_many_lanes_has_no_more_rectangles_and_loses_no_time():
    """As many lanes as are drawn, with as many events in each as are just apart, and none in the third quarter."""
    starts = (*range(0, 500_000, 1340), *range(750_000, 999_000, 1340))
    events = (*(Event("device", start, 1.0) for start in starts), Event("device", 999_000.0, 1000.0))
    assert len(spans(events, 1e6 / 1500)) * 40 > 20_000
    paths = paths_of(draw_timeline(Trace(tuple(Lane(f"{n}", events) for n in range(40)))), "fill: var(--device)")
    _, *drawn = sorted(paths, key=lambda path: min(y for _, y in path))  # the first is in the legend
    assert 80 <= len(drawn) <= 4000
    places = [[x for x, _ in path] for path in drawn]
    whole = max(map(max, places)) - min(map(min, places))
    assert sum(max(each) - min(each) for each in places) / 40 == pytest.approx(0.75 * whole, rel=0.01)


@given(
    st.lists(
        st.tuples(st.floats(-1e9, 1e9), st.floats(0, 1e9), st.sampled_from(["device", "decode", "other"])), min_size=1
    )
)
@settings(max_examples=20, deadline=None)
def test_any_trace_is_drawn_inside_its_picture(events):
    found = sorted((Event(category, start, took) for start, took, category in events), key=lambda e: e.start)
    page = Page(draw_timeline(Trace((Lane("a lane $x_{$", tuple(found)),))).svg)
    assert "a lane $x_{$" in "".join(page.texts.values())
    _, _, width, height = (float(number) for number in page.elements[0][1]["viewbox"].split())
    for tag, attributes in page.elements:
        if tag == "path":
            points = PATH.findall(attributes["d"])
            assert all(-1 <= float(x) <= width + 1 and -1 <= float(y) <= height + 1 for x, y in points)


# Bars


def paths_of(picture, style):
    """Points of the paths of a style."""
    paths = [attributes for tag, attributes in Page(picture.svg).elements if tag == "path"]
    return [
        [(float(x), float(y)) for x, y in PATH.findall(each["d"])] for each in paths if style in each.get("style", "")
    ]


def test_bars_are_as_long_as_their_values_and_marks_stand_where_they_belong():
    bars = [Bar("a", 2.0, "2 s", mark=1.0), Bar("b", 1.0, "1 s", second=True)]
    picture = draw_bars(Bars(bars, "seconds", "bound"))
    (first,), (second,) = paths_of(picture, "fill: var(--device)"), paths_of(picture, "fill: var(--second)")
    left = min(x for x, _ in first)
    long, short = (max(x for x, _ in each) - left for each in (first, second))
    assert long == pytest.approx(2 * short, rel=1e-3)
    (mark,) = paths_of(picture, "stroke: var(--failure)")
    assert [x for x, _ in mark] == pytest.approx([left + short] * 2, rel=1e-3)
    assert "bound" in "".join(Page(picture.svg).texts.values())


# Files that are not what they should be


def scaled(document, name, value):
    """A document with a figure changed wherever it is."""
    if isinstance(document, dict):
        return {key: value if key == name else scaled(each, name, value) for key, each in document.items()}
    if isinstance(document, list | tuple):
        return [scaled(each, name, value) for each in document]
    return document


def wrong_benchmarks():
    good = asdict(made.encode_report())
    serve = asdict(made.serve_report())
    yield scaled(good, "median_seconds", 1.7e308), "median_seconds: Input should be less than"
    yield scaled(serve, "wall_seconds", 1.7e308), "wall_seconds: Input should be less than"
    yield scaled(serve, "wall_seconds", -1.0), "wall_seconds: Input should be greater than"
    yield scaled(serve, "seconds", 1.7e308), "seconds: Input should be less than"
    yield [], "not a benchmark"
    yield {"contenders": 1, "grids": 1}, "is not what `bench encode` writes"
    yield {**good, "plan": {**good["plan"], "grids": [{"t": 0, "h": 1, "w": 1}]}}, "is not what `bench encode` writes"
    yield {**good, "notes": [3]}, "notes.0"
    yield {**serve, "modes": {"a": {}}}, "is not what `bench serve` writes"
    yield {**made.placement(), "placements": [{"label": 1}]}, "is not what `bench placement` writes"


@pytest.mark.parametrize(("document", "message"), list(wrong_benchmarks()))
def test_what_is_no_benchmark_is_refused(tmp_path, document, message):
    with pytest.raises(InputError, match=message):
        read_benchmark(made.write(tmp_path / "bench.json", document))


@pytest.mark.parametrize("value", [1e12, 5e-324, 0.0])
def test_figures_of_any_size_that_is_read_are_drawn(tmp_path, value):
    encode = scaled(asdict(made.encode_report()), "median_seconds", value)
    serve = scaled(scaled(asdict(made.serve_report()), "wall_seconds", value), "seconds", value)
    files = [made.write(tmp_path / f"{number}.json", each) for number, each in enumerate((encode, serve))]
    page = make_report(read_inputs(benchmarks=files), diagnosis(), "A machine").page()
    assert "less is better" in Page(page).texts["benchmarks"]


@pytest.mark.parametrize(
    "change", [{"rows": []}, {"rows": [{}]}, {"rows": 3}, {"created": None}, {"rows": [{"mode": "sideways"}]}]
)
def test_what_is_no_fault_suite_is_refused(tmp_path, change):
    with pytest.raises(InputError, match="is not what a fault suite writes"):
        read_faults(made.write(tmp_path / "faults.json", {**made.fault_suite(), **change}))


def test_what_the_fault_suite_writes_is_shown(tmp_path):
    kind = {"fault": "hang", "mode": "inline", "isolation": "none", "expected": "answer"}
    right = FaultRow(**kind, moment="alone", answered="error", lost=0, recovery_seconds=0.5, passed=True)
    wrong = FaultRow(
        **kind, moment="beside", answered="nothing", lost=1, wrong=2, recovery_seconds=None, passed=False,
        detail="It hung.",
    )  # fmt: skip
    document = asdict(FaultSuite(created="2026-01-02T03:04:05", simulated=True, rows=(right, wrong)))
    report = make_report(read_inputs(faults=made.write(tmp_path / "faults.json", document)), diagnosis(), "A machine")
    section = report.sections[-1]
    assert section.status == "failure"
    assert "1 of 2 faults were handled correctly on 2026-01-02T03:04:05, in a SIMULATED device" in section.summary
    assert "1 requests lost, 2 answers wrong" in section.summary
    shown = Page(report.page()).texts["faults"]
    assert "It hung." in shown
    assert shown.index("It hung.") < shown.rindex("0.50"), "what failed is first"


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"{", b"[" * 100_000, b"[NaN]", b"[1e400]", b"[" + b"9" * 5000 + b"]", b"[-Infinity]"]
)
def test_what_is_no_json_is_refused(tmp_path, data):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(InputError, match=r"x\.json is not"):
        read_document(tmp_path / "x.json")


def test_files_that_cannot_be_read_or_are_too_large_are_told(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_document(tmp_path / "absent.json")
    with pytest.raises(InputError, match="is not a file"):
        read_document(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a file"):
        read_document(tmp_path / "pipe")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(8 * 2**20 + 1)
    with pytest.raises(InputError, match="it is larger than 8388608 bytes"):
        read_document(tmp_path / "large.json")


# The command, and a browser


def run(*arguments, status=0):
    done = CliRunner().invoke(app, ["report", "--no-vllm", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == status, done.output
    return done.stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory, certified):
    """The page that the command writes of every kind of input, and what it printed; doctor's findings are made."""
    folder = tmp_path_factory.mktemp("written")
    encode = made.write(folder / "encode.json", asdict(made.encode_report(HOSTILE)))
    serve = made.write(folder / "serve.json", asdict(made.serve_report(HOSTILE)))
    faults = made.write(folder / "faults.json", made.fault_suite(HOSTILE))
    trace = folder / "trace.json"
    trace.write_text(made.trace_text(made.trace_events(HOSTILE), closed=False))
    page = folder / "report.html"
    arguments = ("--bench", encode, "--bench", serve, "--trace", trace, "--faults", faults, "--source", certified)
    asked = []

    def diagnose(source, *, vllm):
        asked.append((source, vllm))
        return diagnosis()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionaccel_bench.commands.report.diagnose", diagnose)
        printed = run(page, *arguments, "--title", "A <machine>", "--json")
    assert asked == [(str(certified), False)]
    return page, json.loads(printed)


def test_the_command_writes_the_page_and_says_how_it_stands(written):
    page, said = written
    assert said["report"] == str(page)
    assert said["status"] == "failure"
    assert tuple(each["section"] for each in said["sections"]) == SECTIONS[1:]
    texts = Page(page.read_text()).texts
    assert "it died of SIGSEGV" in texts["doctor"]
    assert "A <machine>" in "".join(texts[None])


def test_the_command_reads_its_files_before_it_looks_at_the_machine(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be read"):
        run(tmp_path / "out.html", "--trace", tmp_path / "absent")
    with pytest.raises(ConfigurationError, match="is not a file in an existing folder"):
        run(tmp_path / "absent" / "out.html")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("TESTS_BROWSER") == "1":
            pytest.fail("no chromium is installed")
        pytest.skip("no chromium is installed; TESTS_BROWSER=1 makes that a failure")
    return found


def browse(browser, tmp_path, page, *arguments):
    """Run the browser on a page without a network; what it printed on stdout and stderr."""
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--enable-logging=stderr", "--proxy-server=127.0.0.1:9", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1200,1600", *arguments, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def test_a_browser_shows_every_section_and_runs_nothing(browser, tmp_path, written):
    dom = browse(browser, tmp_path, written[0], "--dump-dom")
    page = Page(dom.strip())
    assert tuple(key for key in page.texts if key) == SECTIONS
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "img"} & set(tags)
    assert tags.count("svg") == len([tag for tag, _ in Page(written[0].read_text()).elements if tag == "svg"]) >= 4


@pytest.mark.parametrize("dark", [False, True])
def test_a_picture_of_the_page_is_not_blank(browser, tmp_path, dark):
    picture, page, trace = (tmp_path / name for name in ("page.png", "page.html", "trace.json"))
    trace.write_text(made.trace_text(made.trace_events()))
    page.write_text(make_report(read_inputs(traces=[trace]), diagnosis(), "A machine").page())
    scheme = ("--blink-settings=preferredColorScheme=0", "--force-dark-mode") if dark else ()
    browse(browser, tmp_path, page, f"--screenshot={picture}", *scheme)
    with Image.open(picture) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    assert pixels.shape[1] == 1200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    background = pixels[2, 2].mean()
    assert background < 60 if dark else background > 200
    # The colour of decode steps in the timeline, which no other part of the page has, is there as an area.
    orange = np.array([0xF0, 0x8A, 0x4B] if dark else [0xD9, 0x69, 0x2A])
    assert (np.abs(pixels.astype(int) - orange).max(axis=2) <= 3).sum() > 500
