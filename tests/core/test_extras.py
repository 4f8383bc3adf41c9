"""What belongs to extras is not needed without them: the core with onnx, typer and rich out of reach."""

import os
import subprocess
import sys

import pytest

BLOCKED = "import sys; sys.modules.update(dict.fromkeys({blocked!r}));"
"""A module that is None in sys.modules cannot be imported."""


def run(code, *arguments, blocked=("onnx", "rich", "typer"), **environment):
    command = [sys.executable, "-c", BLOCKED.format(blocked=blocked) + code, *map(str, arguments)]
    given = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=given)


def test_an_encoder_on_torch_ref_needs_none_of_them(tiny):
    code = (
        "import visionaccel, numpy as np;"
        "encoder = visionaccel.open_encoder(sys.argv[1], backend='torch_ref');"
        "print(encoder.encode(np.zeros((16, encoder.tower.patch_width), np.float32), [(1, 4, 4)]).shape);"
        "assert not {'onnx', 'rich', 'typer'} & {name for name, module in sys.modules.items() if module}"
    )
    done = run(code, tiny)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(4, ")


def test_the_vllm_plug_in_needs_none_of_them(tiny):
    pytest.importorskip("vllm")
    code = (
        "import importlib, pkgutil, visionaccel.integrations.vllm as package;"
        "package.register();"
        "modules = pkgutil.walk_packages(package.__path__, package.__name__ + '.');"
        "[importlib.import_module(module.name) for module in modules]"
    )
    # vLLM itself imports the others.
    done = run(code, blocked=("onnx",), VISIONACCEL_BACKEND="torch_ref")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("blocked", "arguments", "message"),
    [
        (("typer",), ("backends",), "needs typer, which is not installed. Install it: pip install 'visionaccel[cli]'."),
        (("rich",), ("backends",), "needs rich, which is not installed. Install it: pip install 'visionaccel[cli]'."),
        (("onnx",), ("export", "{tiny}", "{tmp}/bundle", "--dynamic"), "pip install 'visionaccel[onnx]'."),
    ],
)
def test_a_command_says_in_one_line_which_extra_it_needs(tiny, tmp_path, blocked, arguments, message):
    given = [argument.format(tiny=tiny, tmp=tmp_path) for argument in arguments]
    done = run("from visionaccel.cli import main; main()", *given, blocked=blocked)
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_command_of_a_distribution_that_is_not_installed_names_its_extra():
    code = (
        "import importlib.metadata as m; found = m.entry_points;"
        "m.entry_points = lambda **k: () if k.get('group') == 'visionaccel.commands' else found(**k);"
        "from visionaccel.cli import main; main()"
    )
    done = run(code, "bench", "encode", "--help", blocked=())
    assert done.returncode == 2
    assert "pip install 'visionaccel[bench]'." in done.stderr
