"""A device's process needs no network: it opens and encodes where there is none at all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1] / "support"


def without_network(*command):
    """Run a command in a separate network namespace, which has no interface but an unused loopback."""
    return subprocess.run(
        ["unshare", "--map-root-user", "--net", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )


def possible():
    return shutil.which("unshare") is not None and without_network("true").returncode == 0


SCRIPT = """
import json, os, socket, sys
from pathlib import Path
import numpy as np
from towers import random_patches
from visionaccel import open_encoder

interfaces = [line.split(":")[0].strip() for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]]
try:
    socket.create_connection(("127.0.0.1", 9), 1)
    reached = "a server"
except OSError as error:
    reached = error.strerror
with open_encoder(sys.argv[1], backend="onnxrt", isolation="process") as encoder:
    embeddings = encoder.encode(random_patches([(1, 8, 12)]), [(1, 8, 12)])
found = {"interfaces": interfaces, "reached": reached, "rows": len(embeddings), "sum": float(embeddings.sum())}
print(json.dumps(found))
"""


@pytest.mark.skipif(not possible(), reason="needs unprivileged user namespaces: `unshare --map-root-user --net true`")
def test_a_devices_process_encodes_without_a_network(tiny):
    done = without_network(sys.executable, "-c", SCRIPT, str(tiny))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["interfaces"] == ["lo"]
    assert found["reached"] == "Network is unreachable"
    assert found["rows"] == 24
    connected = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )
    assert json.loads(connected.stdout.splitlines()[-1])["sum"] == found["sum"]
