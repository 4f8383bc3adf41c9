"""The server as a context manager, with a stand-in for vLLM: how it starts, fails and ends."""

import os
import sys

import pytest

from visionaccel.errors import ConfigurationError, DeviceError
from visionaccel_bench.server import log_end, serve

HEALTHY = """
import http.server, sys

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

print("serving", sys.argv[1], flush=True)
arguments = dict(zip(sys.argv[2::2], sys.argv[3::2]))
http.server.HTTPServer((arguments["--host"], int(arguments["--port"])), Health).serve_forever()
"""


def stand_in(folder, code):
    script = folder / "server.py"
    script.write_text(code)
    return sys.executable, str(script)


def test_a_server_answers_within_the_context_and_is_gone_after_it(tmp_path):
    with serve(tmp_path / "model", {}, command=stand_in(tmp_path, HEALTHY)) as server:
        assert server.healthy()
        assert "serving" in log_end(server.log)
        os.kill(server.child.pid, 0)
    assert not server.healthy()
    with pytest.raises(ProcessLookupError):
        os.killpg(server.child.pid, 0)


def test_a_server_that_ends_says_how_and_what_it_logged(tmp_path):
    command = stand_in(tmp_path, "print('no such model'); raise SystemExit(3)")
    with (
        pytest.raises(DeviceError, match=r"(?s)ended with status 3 after .*no such model"),
        serve(tmp_path, {}, command=command),
    ):
        pass


def test_a_server_that_never_answers_is_ended(tmp_path):
    command = stand_in(tmp_path, "import time; time.sleep(600)")
    with (
        pytest.raises(DeviceError, match=r"does not answer after"),
        serve(tmp_path, {}, command=command, timeout=0.5),
    ):
        pass


def test_a_command_that_is_not_there_is_a_configuration_error(tmp_path):
    with (
        pytest.raises(ConfigurationError, match="cannot be started"),
        serve(tmp_path, {}, command=("/no/such/vllm",)),
    ):
        pass
