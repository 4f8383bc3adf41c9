"""The examples of the documentation run: blocks of Python, quick commands, and the backend that one page writes."""

import tomllib

import numpy as np
import pytest
from skimage import data
from skimage.io import imsave
from typer.testing import CliRunner

from doc_pages import PAGES, ROOT, Block, blocks, commands
from fake_plugins import install
from towers import random_patches
from visionaccel import open_encoder
from visionaccel.backends import Registry
from visionaccel.cli.app import app
from visionaccel_testing.checkpoints import random_checkpoint

PYTHON = [block for page in PAGES for block in blocks(page) if block.language == "python"]
BACKEND_PAGE = ROOT / "docs" / "writing-a-backend.md"


def place(block: Block) -> tuple[str, str | None]:
    return str(block.page.relative_to(ROOT)), block.mark


@pytest.fixture(scope="module")
def workplace(digits, tmp_path_factory):
    """A folder with the files that examples name: a checkpoint, pictures, and the examples of a checkout."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "checkpoint").symlink_to(digits)
    (folder / "examples").symlink_to(ROOT / "examples")
    imsave(folder / "page.png", data.page()[:120, :200], check_contrast=False)
    imsave(folder / "photo.jpg", data.astronaut()[:90, :160], check_contrast=False)
    return folder


def test_blocks_that_are_not_executed_here_are_known():
    """Whoever marks a block says so here too."""
    assert [place(block) for block in PYTHON if block.mark] == [
        *[("docs/adding-a-family.md", "executed in tests/e2e")] * 4,
        ("docs/ryzen-ai.md", "not executed: needs an AMD NPU"),
        ("docs/vllm.md", "executed in tests/e2e"),
    ]


@pytest.mark.parametrize("page", sorted({b.page for b in PYTHON if not b.mark}), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_pages_python_runs(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    namespace = {"__name__": "example"}
    for block in PYTHON:
        if block.page == page and not block.mark:
            # Empty lines before it put the page's own line numbers into a traceback.
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)


@pytest.mark.parametrize(
    "words",
    [
        command.words
        for page in PAGES
        for block in blocks(page)
        if block.language == "console" and block.mark == "executed"
        for command in commands(block)
    ],
    ids=" ".join,
)
def test_a_pages_command_runs(words, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    program, *arguments = words
    assert program == "visionaccel"
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_marked_commands_are_executed_somewhere():
    marked = [place(block) for page in PAGES for block in blocks(page) if block.language == "console" and block.mark]
    assert marked == [
        *[("docs/adding-a-family.md", "executed in tests/e2e")] * 2,
        *[("docs/quick-start.md", "executed")] * 3,
        *[("docs/writing-a-backend.md", "executed in tests/e2e")] * 2,
    ]


def test_the_backend_of_the_page_is_right(tmp_path, monkeypatch):
    """Installed as its own pyproject says, it answers as another backend does."""
    (code,) = (block.code for block in blocks(BACKEND_PAGE) if block.language == "python")
    (text,) = (block.code for block in blocks(BACKEND_PAGE) if block.language == "toml")
    project = tomllib.loads(text)["project"]
    ((name, module),) = project["entry-points"]["visionaccel.backends"].items()
    assert module == project["name"].replace("-", "_")
    monkeypatch.syspath_prepend(install(tmp_path, project["name"], name, code))
    registry = Registry()
    assert registry.load(name).name == name
    checkpoint = random_checkpoint(tmp_path / "checkpoint")  # its own: onnx reads no file that others have links to
    patches = random_patches([(1, 4, 12), (2, 8, 4)])
    answers = []
    for backend in (name, "onnxrt"):
        with open_encoder(checkpoint, backend=backend, registry=registry) as encoder:
            answers.append(encoder.encode(patches, [(1, 4, 12), (2, 8, 4)]))
    np.testing.assert_allclose(*answers, atol=1e-4)


def test_the_backend_of_the_page_is_short():
    (code,) = (block.code for block in blocks(BACKEND_PAGE) if block.language == "python")
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 40
