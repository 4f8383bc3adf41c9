"""The documentation's example of vLLM without a server is a script that runs."""

import sys
import tempfile

import forked
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
        environment = quiet_environment({"VLLM_RPC_BASE_PATH": sockets})
        status = forked.run([sys.executable, script], environment, tmp_path / "log", folder=tmp_path)
    said = (tmp_path / "log").read_text()
    assert status == 0, said[-4000:]
    assert "the vision encoder runs on backend 'onnxrt'" in said
    assert f"answer: {sample.truth}" in said
