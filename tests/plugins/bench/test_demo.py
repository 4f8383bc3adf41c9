"""What the demo makes of answers. It asks two real servers in the test of an author's first ten minutes."""

import json
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from PIL import Image
from typer.testing import CliRunner

import visionaccel_bench.commands.demo as module
from visionaccel.cli.app import app
from visionaccel_bench.server import VllmServer, ask


@pytest.mark.parametrize(("ours", "status"), [("42", 0), ("43", 1)])
def test_any_different_answer_fails_the_demo(monkeypatch, ours, status):
    def ask(title, checkpoint, settings, pictures):
        return [(ours, 1.0) if settings else ("42", None) for _ in pictures]

    monkeypatch.setattr(module, "_ask", ask)
    result = CliRunner().invoke(app, ["demo", "--images", "3"])
    assert result.exit_code == status
    assert f"agreement: {0 if status else 3} of 3" in result.stdout
    printed = CliRunner().invoke(app, ["demo", "--images", "3", "--json"])
    assert printed.exit_code == status
    found = json.loads(printed.stdout)
    assert found["agreement"] == 1 - status
    assert [row["onnxrt"] for row in found["images"]] == [ours] * 3
    assert all(row["encode_ms"] > 0 for row in found["images"])


@contextmanager
def answering_after(seconds):
    """The URL of a server whose answers take that long."""

    class Slow(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(seconds)
            body = json.dumps({"choices": [{"message": {"content": "42"}, "token_ids": [4, 2]}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_question_is_lost_after_the_time_that_it_may_take():
    with answering_after(0.5) as url:
        assert ask(url, "digits", Image.new("RGB", (8, 8)), timeout=0.1).lost
        assert ask(url, "digits", Image.new("RGB", (8, 8)), timeout=30.0).text == "42"


def test_the_demo_waits_for_an_encode_that_compiles_first(monkeypatch, tmp_path):
    waited = []

    def asked(url, model, image, *, timeout=60.0):
        waited.append(timeout)
        return ask(url, model, image, timeout=timeout)

    monkeypatch.setattr(module, "ask", asked)
    (tmp_path / "log").touch()
    with answering_after(0.0) as url:
        server = VllmServer(url=url, model="digits", log=tmp_path / "log", child=None)
        assert module._one(server, Image.new("RGB", (8, 8)), timed=False) == ("42", None)
    assert waited == [600.0]
