"""Peak memory of loading a model whole, and without its vision tower, which an encoder replaces.

The tower has the widths of Qwen2.5-VL-7B's and a fifth of its depth; the language model is small. The checkpoint is in
bfloat16, with random weights, and the model is loaded in float32, as on a CPU. Memory is what a process has resident,
with what it has mapped of files and of other processes' memory; the interpreter and its modules are about 500 MB of it.
"""

import json
import subprocess
import sys
import tempfile
from typing import Any

from visionaccel_testing.checkpoints import QWEN2_5_VL_7B

_DEPTH = 6
_TEXT = {
    "hidden_size": QWEN2_5_VL_7B["out_hidden_size"], "intermediate_size": 4096, "num_hidden_layers": 2,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip

_WRITE = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import save_file
folder, vision, text = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
kind = transformers.Qwen2_5_VLForConditionalGeneration
config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text, architectures=[kind.__name__])
with torch.device("meta"):
    shapes = {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
tensors = {name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05) for name, shape in shapes.items()}
save_file(tensors, folder / "model.safetensors", {"format": "pt"})
(folder / "config.json").write_text(json.dumps({**config.to_dict(), "dtype": "bfloat16"}))
print(json.dumps([
    sum(4 * tensor.numel() / 1e6 for name, tensor in tensors.items() if part in name) for part in (".visual.", "")
]))
"""

_MEASURE = """
import json, psutil, sys
from pathlib import Path
def peak(process):  # not ru_maxrss, which a child inherits from its parent
    return int(Path(f"/proc/{process.pid}/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
import transformers
if sys.argv[2] == "whole":
    model = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype="float32")
else:
    from visionaccel.integrations.transformers import load
    handle = load(sys.argv[1], backend="onnxrt", settings={"isolation": sys.argv[2]}, dtype="float32")
this = psutil.Process()
print(json.dumps([peak(this), sum(map(peak, this.children(recursive=True)))]))
"""


def measure() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        vision = {**QWEN2_5_VL_7B, "depth": _DEPTH, "fullatt_block_indexes": [_DEPTH - 1]}
        tower, model = _run(_WRITE, folder, json.dumps(vision), json.dumps(_TEXT))
        (whole, _), (together, _), (own, child) = (_run(_MEASURE, folder, how) for how in ("whole", "none", "process"))
    return {
        "tower in float32, MB": tower,
        "model with its tower in float32, MB": model,
        "from_pretrained: peak, MB": whole,
        "load, encoder in this process: peak, MB": together,
        "load, encoder in a child process: peak of this process, MB": own,
        "load, encoder in a child process: peak of the child, MB": child,
        "load, encoder in a child process: both, MB": own + child,
        "load above from_pretrained without the tower, MB": own - (whole - tower),
    }


def _run(code: str, *arguments: str) -> Any:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
