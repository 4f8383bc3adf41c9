"""The serving benchmark: what it sends, what it makes of the answers, and what it refuses."""

import json
import sys

import pytest
from typer.testing import CliRunner

from openai_server import answering
from visionaccel.cli.app import app
from visionaccel.errors import ConfigurationError, DeviceError, SettingsError
from visionaccel_bench.serve.device import Accelerator, DeviceTime, Mode, measured, with_latency
from visionaccel_bench.serve.load import Load, Run, Trace, picture, send
from visionaccel_bench.serve.serve_report import make_report
from visionaccel_bench.serve.serving import Plan, Subject, Taken

SMALL = ("--images", "2", "--gap", "0.05", "--image-tokens", "3", "--stream-tokens", "40", "--size", "56x28")


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "serve", *map(str, arguments)])


def images(count):
    return tuple(picture([i], (56, 28)) for i in range(count))


def contents(asked):
    return [request["messages"][0]["content"] for request in asked]


def test_requests_are_sent_when_their_time_comes_whatever_became_of_those_before():
    with answering(token_seconds=0.1) as (url, _):
        run = send(url, "small", Load(images(3), image_tokens=4, gap=0.1, streams=2, stream_tokens=12))
    text, pictures = run.of("text"), run.of("image")
    assert [trace.name for trace in run.traces] == ["text 0", "text 1", "image 0", "image 1", "image 2"]
    assert [trace.sent for trace in text] == pytest.approx([0, 0], abs=0.45)
    assert pictures[1].sent < pictures[0].arrivals[-1], "sent before the one before was answered"
    assert pictures[0].sent >= 0.5
    assert pictures[2].sent - pictures[0].sent >= 0.19
    assert [(len(trace.arrivals), trace.tokens) for trace in run.traces] == [(12, 12)] * 2 + [(4, 4)] * 3


def test_one_by_one_waits_for_each_answer():
    with answering() as (url, _):
        run = send(url, "small", Load(images(3), image_tokens=4), one_by_one=True)
    for before, after in zip(run.traces, run.traces[1:], strict=False):
        assert after.sent >= before.arrivals[-1]


def test_one_by_one_waits_for_nothing_else():
    with answering() as (url, _):
        run = send(url, "small", Load(images(2), image_tokens=1, gap=60.0, streams=1, stream_tokens=4), one_by_one=True)
    assert [trace.name for trace in run.traces] == ["image 0", "image 1"]
    assert run.traces[-1].sent < 60


def test_the_event_that_tells_the_role_is_no_token_and_answers_do_not_end_early():
    with answering(token_seconds=0.2) as (url, asked):
        (trace,) = send(url, "small", Load(images(1), image_tokens=2)).traces
    assert trace.ttft >= 0.2
    assert asked[0]["ignore_eos"] is True
    assert asked[0]["temperature"] == 0


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        ("refuse", "image 1 of the prompt could not be encoded"),
        ("break off", "the engine is gone"),
        ("nothing", "has no tokens"),
    ],
)
def test_a_request_that_fails_is_named_and_ends_the_load(fail, said):
    with answering(fail=fail) as (url, _):
        load = Load(images(1), image_tokens=4, streams=1, stream_tokens=100_000)
        with pytest.raises(DeviceError, match=rf"request 'image 0'.*{said}"):
            send(url, "small", load)


def test_running_servers_are_measured(tmp_path):
    timeline, output = tmp_path / "timeline.png", tmp_path / "report.json"
    with answering() as (inline, asked), answering() as (pipelined, others):
        servers = ("--url", f"inline={inline}", "--url", f"pipelined={pipelined}", "--sequential")
        files = ("--timeline", timeline, "--output", output)
        done = bench(*servers, *SMALL, "--device-seconds", "0.2", "--repeats", "2", *files, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report == json.loads(output.read_text())
    assert timeline.read_bytes().startswith(b"\x89PNG")
    assert report["simulated"] is None
    for mode in report["modes"].values():
        assert len(mode["mixed"]["wall_seconds_each"]) == 2
        assert mode["bound"]["device_seconds"] >= 0.89, "half a second of text, and two images"
        assert mode["bound"]["seconds"] == max(mode["bound"]["device_seconds"], mode["bound"]["decode_seconds"])
        assert mode["times_bound"] == pytest.approx(mode["mixed"]["wall_seconds"] / mode["bound"]["seconds"])
        assert mode["text_only"]["images"] is None
    assert report["concurrency"]["requests"] == 2
    assert set(report["concurrency"]["modes"]) == {"inline", "pipelined"}
    pictures = [content[0]["image_url"]["url"] for content in contents(asked) if not isinstance(content, str)]
    assert len(set(pictures)) == 1 + 2 * (2 + 2 + 2), "a warm-up, and for each repetition and load its own images"
    theirs = [content[0]["image_url"]["url"] for content in contents(others) if not isinstance(content, str)]
    assert set(theirs) < set(pictures), "the same images for every server; only one gets them one by one"


def test_the_table_says_what_is_not_known():
    with answering() as (url, _):
        done = bench("--url", url, *SMALL)
    assert done.exit_code == 0, done.output
    assert "times the ideal bound" in done.stdout
    assert "Pass --device-seconds" in " ".join(done.stdout.split())


def test_a_failing_request_is_an_error_that_names_server_and_request():
    with answering(fail="refuse") as (url, _):
        done = bench("--url", f"mine={url}", *SMALL)
    assert isinstance(done.exception, DeviceError)
    assert str(done.exception).startswith("mine, warming up: request 'image 0' failed")


@pytest.mark.parametrize("module", ["openai", "matplotlib"])
def test_what_is_not_installed_is_an_error_with_the_fix(monkeypatch, module, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    done = bench("--timeline", tmp_path / "timeline.png")
    assert isinstance(done.exception, ConfigurationError)
    assert f"needs {module}" in done.exception.message
    assert "pip install 'visionaccel[bench]'" in done.exception.hint


def test_what_is_installed_and_cannot_be_imported_is_found_before_anything_is_measured(monkeypatch, tmp_path):
    (tmp_path / "openai.py").write_text("raise OSError('libssl.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openai", raising=False)
    done = bench("--output", tmp_path / "serve.json")
    assert isinstance(done.exception, ConfigurationError)
    assert done.exception.message.startswith("this command needs openai, which cannot be imported: OSError: libssl.so")


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("--size", "308"), SettingsError, "is not an image size"),
        (("--size", "0x224"), SettingsError, "is not an image size"),
        (("--url", "127.0.0.1:8000"), SettingsError, "NAME=URL"),
        (("--url", "a=http://x/v1", "--url", "a=http://y/v1"), SettingsError, "given twice"),
        (("--url", "http://127.0.0.1:9/v1"), ConfigurationError, "did not report its model"),
        (("--url", "http://x/v1", "--mode", "stock"), ConfigurationError, "Pass either --url"),
        (("--url", "http://x/v1", "--sequential"), ConfigurationError, "named inline"),
        (("--mode", "pipelined", "--sequential"), ConfigurationError, "--mode inline"),
        (("--backend", "onnxtr"), ConfigurationError, "onnxtr"),
        (("--options", "latency"), SettingsError, "name=value"),
        (("--backend", "onnxrt", "--latency", "1"), ConfigurationError, "is not simulated"),
        (("--options", "per_patch=1", "--latency", "1"), ConfigurationError, "per_patch"),
        (("--server-arguments", "'--dtype"), SettingsError, "Quote it"),
        (("--output", "/nowhere/report.json"), ConfigurationError, "not a file in an existing folder"),
        (("/nowhere",), Exception, "not a folder"),
    ],
)
def test_what_cannot_work_is_refused_before_a_server_starts(monkeypatch, arguments, error, said):
    monkeypatch.setattr("visionaccel_bench.commands.bench.started", None)
    done = bench(*arguments)
    assert isinstance(done.exception, error), done.output
    assert said in str(done.exception)


def test_a_mode_that_there_is_not_is_refused():
    done = bench("--mode", "fast")
    assert done.exit_code == 2
    assert "stock" in done.output


def test_a_server_without_a_model_is_refused():
    with answering(fail="models") as (url, _):
        done = bench("--url", url)
    assert "serves no model" in str(done.exception)


def test_stock_vllm_gets_no_setting_and_the_others_the_device():
    accelerator = Accelerator("simulated", "onnxrt", {"latency": 0.5})
    assert accelerator.settings(Mode.STOCK) == {}
    settings = accelerator.settings(Mode.PIPELINED)
    assert settings["VISIONACCEL_MODE"] == "pipelined"
    assert settings["VISIONACCEL_DEVICE"] == "onnxrt"
    assert json.loads(settings["VISIONACCEL_OPTIONS"]) == {"latency": 0.5}
    assert "VISIONACCEL_OPTIONS" not in accelerator.without_latency().settings(Mode.INLINE)


def test_the_simulated_latency_is_that_of_each_image_however_many_are_in_a_call(digits):
    image = picture([1], (308, 224))
    timed, time = with_latency(digits, Accelerator("simulated", "onnxrt"), image, 0.1)
    assert time.seconds_each == 0.1
    assert timed.options["per_patch"] * 16 * 22 == pytest.approx(0.1)
    found = measured(digits, timed, [image] * 3)
    assert found.seconds_each == pytest.approx(0.1, abs=0.05)


def test_a_devices_time_is_measured_with_a_bundles_programs_too(digits, tmp_path):
    bundle = tmp_path / "bundle"
    assert CliRunner().invoke(app, ["export", str(digits), str(bundle), "--grid", "8x16"]).exit_code == 0
    found = measured(digits, Accelerator("onnxrt", bundle=bundle), [picture([i], (224, 112)) for i in range(2)])
    assert found.seconds_each > 0


def test_a_simulated_device_that_computes_for_too_long_is_seen_in_the_servers_log(digits, tmp_path, caplog):
    def overran():
        (tmp_path / "log").write_text(caplog.text)
        return Subject("inline", "", "", tmp_path / "log").overran()

    images = [picture([i], (56, 28)) for i in range(2)]
    measured(digits, Accelerator("simulated", "onnxrt", {"latency": 0.3}), images)
    assert not overran()
    measured(digits, Accelerator("simulated", "onnxrt", {"latency": 1e-6}), images)
    assert overran()


def run(wall):
    return Run((Trace("text 0", "text", 0.0, (0.1, wall), 2), Trace("image 0", "image", 0.5, (1.0, 1.1), 2)))


def test_all_modes_are_held_against_the_least_decode_and_stock_against_nothing():
    plan = Plan(1, 2, 0.0, 1, 2, (56, 28))
    taken = {
        "stock": Taken([run(1.5)], [run(1.0)]),
        "inline": Taken([run(6.0)], [run(1.0)], [run(2.0)]),
        "pipelined": Taken([run(4.0)], [run(1.0)], [run(3.0)]),
    }
    report = make_report(plan, taken, DeviceTime(0.5, "as stated"), "simulated", True)
    assert report.modes["stock"].bound is None
    assert [report.modes[name].decode_seconds for name in ("inline", "pipelined")] == [2.0, 3.0]
    assert [report.modes[name].times_bound for name in ("inline", "pipelined")] == [3.0, 2.0]
    assert "SIMULATED" in report.notes[0]
    assert "second server" in report.decode_how
