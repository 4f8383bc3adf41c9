"""No code of this repository unpickles what others wrote, runs texts as code, or gives a text to a shell."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "plugins", "examples", "benchmarks", "tools")
FILES = sorted(
    path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if "build" not in path.relative_to(ROOT).parts
)

UNPICKLING = {"pickle.load", "pickle.loads", "pickle.Unpickler"}
FORBIDDEN = {
    "eval", "exec", "__import__", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load",
    "marshal.load", "marshal.loads", "shelve.open", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads",
    "joblib.load", "pandas.read_pickle", "tempfile.mktemp", "subprocess.getoutput", "subprocess.getstatusoutput",
    "tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive", "telnetlib.Telnet", "xml.etree.ElementTree.parse",
    *UNPICKLING,
}  # fmt: skip
"""What must not be called, by its whole name; archives too, since nothing here reads one."""

PARENT_TO_CHILD = "src/visionaccel/isolation/child.py"
"""The child unpickles what its parent wrote into memory that no other process opens. The parent unpickles nothing."""

TEST_RESULTS = "tools/docsite/evidence.py"
"""It reads the XML that pytest has just written."""

ARCHIVES = {"tools/distributions/run.py", "tools/distributions/contents.py", "tools/vllm_matrix/run.py"}
"""They open distributions that were just built, or that pip downloaded from a package index."""


def violations(text, name="file.py"):
    """Calls that must not be, as text."""
    tree = ast.parse(text)
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {each.asname: each.name for each in node.names if each.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            known |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    found = []
    for node in ast.walk(tree):
        called = spelled(node, known) if isinstance(node, ast.Name | ast.Attribute) else None
        if isinstance(node, ast.Call):
            keywords = {each.arg: each.value for each in node.keywords}
            shell = keywords.get("shell")
            if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
                found.append(f"{name}:{node.lineno} shell=")
            allowed = keywords.get("allow_pickle")
            if allowed is not None and not (isinstance(allowed, ast.Constant) and allowed.value is False):
                found.append(f"{name}:{node.lineno} allow_pickle=")
            trusted = keywords.get("trust_remote_code")
            if trusted is not None and not (isinstance(trusted, ast.Constant) and trusted.value is False):
                found.append(f"{name}:{node.lineno} trust_remote_code=")
        elif called in FORBIDDEN:  # named at all: a function that is handed on is called elsewhere
            found.append(f"{name}:{node.lineno} {called}")
    return found


def spelled(node, known):
    """The whole name of what a node names, through imports; None if it is none."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = spelled(node.value, known) if isinstance(node.value, ast.Name | ast.Attribute) else None
        return None if base is None else f"{base}.{node.attr}"
    return None


def test_nothing_forbidden_is_called():
    assert len(FILES) > 150, "they are found"
    found = []
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        found += [
            each
            for each in violations(path.read_text(), name)
            if not (name == PARENT_TO_CHILD and each.endswith("pickle.load"))
            and not (name == TEST_RESULTS and each.endswith("ElementTree.parse"))
            and not (name in ARCHIVES and each.endswith(("zipfile.ZipFile", "tarfile.open")))
        ]
    assert not found


def test_only_the_child_unpickles():
    unpickling = {path.relative_to(ROOT).as_posix() for path in FILES if UNPICKLING & _named(path)}
    assert unpickling == {PARENT_TO_CHILD}


def _named(path):
    return {each.rpartition(" ")[2] for each in violations(path.read_text())}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\npickle.loads(x)", "from pickle import loads\nloads(x)", "import pickle as p\np.load(f)",
        "import torch\ntorch.load(f)", "eval(x)", "exec(x)", "import os\nos.system(x)", "import yaml\nyaml.load(f)",
        "import subprocess\nsubprocess.run(x, shell=True)", "import subprocess\nsubprocess.run(x, shell=wanted)",
        "import marshal\nmarshal.loads(x)", "import shelve\nshelve.open(x)", "import tempfile\ntempfile.mktemp()",
        "import numpy as np\nnp.load(f, allow_pickle=True)", "load(f, trust_remote_code=True)",
        "import pickle\nfunction = pickle.loads",
    ],
)  # fmt: skip
def test_a_forbidden_call_is_seen(text):
    assert len(violations(text)) == 1


@pytest.mark.parametrize(
    "text", ["model.eval()", "import pickle\npickle.dumps(x)", "run(x, shell=False)", "my.exec(x)"]
)
def test_a_call_that_is_allowed_is_not(text):
    assert violations(text) == []


def test_every_exception_from_bandit_has_its_reason():
    lines = [line for path in FILES for line in path.read_text().splitlines() if "nosec" in line]
    assert lines
    assert [line for line in lines if not re.search(r"# nosec B\d{3} # \w+", line)] == []


def test_temporary_folders_and_shared_memory_are_for_this_user_alone(tmp_path):
    """What the modules that are used for them promise."""
    import os
    import tempfile

    old = os.umask(0)
    try:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        handle, file = tempfile.mkstemp(dir=tmp_path)
        os.close(handle)
    finally:
        os.umask(old)
    assert (folder.stat().st_mode & 0o777, Path(file).stat().st_mode & 0o777) == (0o700, 0o600)
    shared = [path for path in FILES if "multiprocessing.shared_memory" in path.read_text()]
    assert not shared, "shared memory of that module has a name, and whatever mode the umask leaves"
