"""A short run of the soak: faults, hangs and aborts, and every request ends as it may."""

import json
import sys

import forked
from visionaccel_bench.server import quiet_environment

REQUESTS = 240


def test_every_request_ends_with_its_answer_its_own_error_or_its_abort(tmp_path, record_property):
    target, log = tmp_path / "figures.json", tmp_path / "log"
    command = [sys.executable, "-m", "benchmarks.soak", "--requests", str(REQUESTS), "--json", str(target)]
    forked.run(command, quiet_environment({}), log)
    assert target.exists(), log.read_text()[-4000:]
    figures = json.loads(target.read_text())  # its bounds are for more requests than these
    endings = {name: number for name, number in figures.items() if name.startswith("ended: ")}
    assert set(endings) == {"ended: right answer", "ended: its own error", "ended: aborted"}
    assert sum(endings.values()) == REQUESTS
    assert endings["ended: its own error"] >= 10
    assert endings["ended: aborted"] >= 10
    assert figures["of these past the deadline"] >= 5
    assert figures["images taken back"] >= 5
    assert figures["descriptors gained once settled"] == 0
    shown = "requests under faults, hangs and aborts that ended with the right answer, their own error or their abort"
    record_property(f"evidence: {shown}", REQUESTS)
