"""The documentation's example of vLLM without a server is a script that runs."""

import os
import subprocess
import sys
import tempfile

from digits_vlm.samples import held_out_images
from doc_pages import ROOT, blocks
from visionaccel_bench.server import quiet_environment


def test_the_offline_example_reads_an_image(digits, tmp_path):
    (block,) = (block for block in blocks(ROOT / "docs" / "vllm.md") if block.mark == "executed in tests/e2e")
    (sample,) = held_out_images(1)
    sample.image.save(tmp_path / "page.png")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "checkpoint").symlink_to(digits)
    script = tmp_path / "offline.py"
    script.write_text(block.code)
    with tempfile.TemporaryDirectory() as sockets:  # short, as socket names must be
        done = subprocess.run(
            [sys.executable, script],
            cwd=tmp_path,
            env=quiet_environment({}) | {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "VLLM_RPC_BASE_PATH": sockets},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "the vision encoder runs on backend 'onnxrt'" in done.stdout
    assert f"answer: {sample.truth}" in done.stdout
