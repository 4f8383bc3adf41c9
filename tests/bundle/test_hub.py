"""Bundles to the hub and back, between processes and a stand-in of the hub that keeps what is pushed."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from command_line import run_command
from hub_server import ATTRIBUTES, TOKEN, HubServer, Repository
from visionaccel.bundle import (
    MANIFEST,
    ProgramRequest,
    export_bundle,
    open_bundle,
    parse_manifest,
    pull_bundle,
    seal,
    write_golden,
)
from visionaccel.core.grid import Grid
from visionaccel.core.program import FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError
from visionaccel_testing.checkpoints import random_checkpoint

REPOSITORY = "someone/tower"
EXPORT_OVER = """
import sys
from pathlib import Path
from visionaccel.bundle import ProgramRequest, export_bundle
from visionaccel.checkpoint import locate_checkpoint
from visionaccel.families import tower_of
from visionaccel.core.grid import Grid
from visionaccel.core.program import FixedGrid
source, revision, output = sys.argv[1:-1]
tower = tower_of(locate_checkpoint(source, revision))
export_bundle(tower, Path(output), [ProgramRequest(FixedGrid(Grid(1, 8, 12)))], source=source, revision=revision)
print("{}")
"""
MANIFEST_ALONE = """
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], allow_patterns=sys.argv[2])
print("{}")
"""
Run = Callable[..., Any]


def export(checkpoint: Path, folder: Path, *, self_contained: bool = True) -> Path:
    requests = [ProgramRequest(FixedGrid(Grid(1, 8, 12)))]
    return export_bundle(open_tower(checkpoint), folder, requests, self_contained=self_contained).folder


@pytest.fixture(scope="session")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny, tmp_path_factory.mktemp("bundle") / "tower")


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    return export(random_checkpoint(folder / "checkpoint", seed=1), folder / "tower")


def _process(arguments: list[str], environment: dict[str, str], status: int = 0) -> "subprocess.CompletedProcess[str]":
    """Run the command, or `-c` and code, with nothing of the hub's in the environment but what is given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "VISIONACCEL_"))}
    done = run_command(*arguments, environment=inherited | environment)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def run(hub: HubServer, tmp_path: Path) -> Run:
    """Run the command as a user of the stand-in who is logged in; its JSON answer."""

    def run(*arguments: object, status: int = 0, **settings: str) -> Any:
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "XDG_CACHE_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        done = _process([*map(str, arguments), "--json"], environment | settings, status)
        return json.loads(done.stdout)

    return run


@pytest.fixture
def pushed(hub: HubServer, bundle: Path) -> str:
    """The commit of the bundle on the default branch, put there without a push."""
    hub.repositories[REPOSITORY] = repository = Repository(private=False)
    repository.commit("main", {".gitattributes": ATTRIBUTES})
    return repository.commit("main", {".gitattributes": ATTRIBUTES, **contents(bundle)})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, none of which may be a link."""
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_pulled_is_what_was_pushed(run, hub, bundle, tmp_path):
    pushed = run("push", bundle, REPOSITORY, "--message", "A tower")
    assert pushed["repository"] == REPOSITORY
    assert pushed["revision"] == "main"
    assert pushed["url"] == f"{hub.url}/{REPOSITORY}/commit/{pushed['commit']}"
    output = tmp_path / "pulled"
    assert run("pull", REPOSITORY, "--output", output) == {
        "repository": REPOSITORY,
        "commit": pushed["commit"],
        "folder": str(output),
    }
    assert contents(output) == contents(bundle)
    assert open_bundle(output).manifest == parse_manifest(bundle / MANIFEST)
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["pulled"]


def test_a_pull_into_the_cache_links_the_blobs_and_is_found_again(run, hub, bundle, pushed, tmp_path):
    folder = Path(run("pull", REPOSITORY)["folder"])
    assert contents(folder) == contents(bundle)
    blobs = {path.stat().st_ino for path in (tmp_path / "home").rglob("blobs/*")}
    assert {path.stat().st_ino for path in folder.rglob("*") if path.is_file()} <= blobs
    made = folder.stat().st_mtime_ns
    hub.requests.clear()
    assert Path(run("pull", REPOSITORY)["folder"]) == folder
    assert folder.stat().st_mtime_ns == made
    assert not any(request.startswith("GET /someone/tower/resolve") for request in hub.requests)


@pytest.mark.parametrize("change", ["a file", "a sealed manifest"])
def test_a_folder_in_the_cache_that_was_changed_is_made_again(run, bundle, pushed, change):
    folder = Path(run("pull", REPOSITORY)["folder"])
    if change == "a file":
        (folder / "config.json").unlink()
        (folder / "config.json").write_text("{}")
    else:
        write_golden(open_bundle(folder), [], {"toolchain": {"visionaccel": "0"}})
    assert Path(run("pull", REPOSITORY)["folder"]) == folder
    assert contents(folder) == contents(bundle)
    assert [path.name for path in folder.parent.iterdir()] == [pushed]


def test_pulls_of_one_commit_at_once_agree(run, bundle, pushed):
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(lambda _: run("pull", REPOSITORY), range(4)))
    assert all(answer == answers[0] for answer in answers)
    folder = Path(answers[0]["folder"])
    assert contents(folder) == contents(bundle)
    assert [path.name for path in folder.parent.iterdir()] == [pushed]


def test_names_are_names_and_no_patterns(run, bundle, tmp_path):
    folder, name = shutil.copytree(bundle, tmp_path / "bundle"), "notes/[1]*?.txt"
    (folder / "notes").mkdir()
    (folder / name).write_text("1")
    digest = f"sha256:{hashlib.sha256(b'1').hexdigest()}"
    document = json.loads((folder / MANIFEST).read_text())
    document["files"].append({"path": name, "bytes": 1, "sha256": digest})
    (folder / MANIFEST).write_text(seal(document).model_dump_json())
    run("push", folder, REPOSITORY)
    assert contents(Path(run("pull", REPOSITORY)["folder"])) == contents(folder)


def test_only_what_the_manifest_names_travels(run, hub, bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    (folder / "notes.txt").write_text("stays home")
    (folder / ".secret").write_text("stays home too")
    commit = run("push", folder, REPOSITORY)["commit"]
    files = hub.repositories[REPOSITORY].commits[commit]
    assert files == {**contents(bundle), ".gitattributes": ATTRIBUTES}
    assert contents(Path(run("pull", REPOSITORY)["folder"])) == contents(bundle)


def test_a_push_is_one_commit_and_the_same_bundle_is_none(run, hub, bundle):
    pushed = run("push", bundle, REPOSITORY)["commit"]
    assert run("push", bundle, REPOSITORY)["commit"] == pushed
    assert len(hub.repositories[REPOSITORY].commits) == 2  # the repository's own first one, and the push


def test_branches_hold_different_bundles(run, bundle, other_bundle, pushed):
    other = run("push", other_bundle, REPOSITORY, "--revision", "seed/1")
    assert other["revision"] == "seed/1"
    for revision, commit, expected in (
        ("main", pushed, bundle),
        ("seed/1", other["commit"], other_bundle),
        (pushed, pushed, bundle),
        (other["commit"], other["commit"], other_bundle),
    ):
        answer = run("pull", REPOSITORY, "--revision", revision)
        assert answer["commit"] == commit
        assert contents(Path(answer["folder"])) == contents(expected)


@pytest.mark.parametrize("settings", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline", "unreachable"])
def test_what_was_pulled_once_needs_no_hub(run, hub, bundle, pushed, tmp_path, settings):
    folder = run("pull", REPOSITORY)["folder"]
    hub.stop()
    assert run("pull", REPOSITORY, **settings)["folder"] == folder
    assert run("pull", REPOSITORY, "--revision", pushed, **settings)["folder"] == folder
    run("pull", REPOSITORY, "--output", tmp_path / "copy", **settings)
    assert contents(tmp_path / "copy") == contents(bundle)


@pytest.mark.parametrize("part", ["nothing", "another branch", "the manifest alone"])
def test_offline_without_the_bundle_in_the_cache(run, hub, other_bundle, pushed, part):
    if part == "another branch":
        run("pull", REPOSITORY)
        run("push", other_bundle, REPOSITORY, "--revision", "other")
    elif part == "the manifest alone":
        run("-c", MANIFEST_ALONE, REPOSITORY, MANIFEST)
    revision = "other" if part == "another branch" else "main"
    error = run("pull", REPOSITORY, "--revision", revision, HF_HUB_OFFLINE="1", status=2)
    assert error["error"] == "ConfigurationError"
    assert "HF_HUB_OFFLINE" in error["hint"]


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_a_file_tampered_with_on_the_hub_is_refused(run, hub, pushed, tmp_path, path):
    content = bytearray(hub.repositories[REPOSITORY].commits[pushed][path])
    content[len(content) // 2] ^= 1
    hub.tamper(REPOSITORY, "main", path, bytes(content))
    for arguments in ((), ("--output", tmp_path / "out" / "tower")):
        error = run("pull", REPOSITORY, *arguments, status=2)
        assert error["error"] == "BundleError"
        assert f": {path} is damaged: its SHA-256" in error["message"]
    assert not list((tmp_path / "out").iterdir())
    assert not list((tmp_path / "home").rglob("models--*/visionaccel/*"))


def test_a_file_that_the_hub_lost_is_refused(run, hub, pushed, tmp_path):
    del hub.repositories[REPOSITORY].commits[pushed]["config.json"]
    error = run("pull", REPOSITORY, "--output", tmp_path / "out", status=2)
    assert error["error"] == "BundleError"
    assert "config.json" in error["message"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil"])
def test_a_manifest_that_names_files_outside_its_folder_is_refused(run, hub, pushed, tmp_path, name):
    files = hub.repositories[REPOSITORY].commits[pushed]
    hub.tamper(REPOSITORY, "main", MANIFEST, files[MANIFEST].replace(b'"config.json"', json.dumps(name).encode()))
    error = run("pull", REPOSITORY, "--output", tmp_path / "out", status=2)
    assert error["error"] == "BundleError"
    assert "plain relative path" in error["message"]
    assert not (tmp_path / "out").exists()


def test_a_repository_without_a_bundle_is_refused(run, hub, pushed):
    empty = next(iter(hub.repositories[REPOSITORY].commits))
    error = run("pull", REPOSITORY, "--revision", empty, status=2)
    assert error["error"] == "BundleError"
    assert MANIFEST in error["message"]


def test_an_existing_output_is_left_alone(run, hub, pushed, tmp_path):
    hub.requests.clear()
    error = run("pull", REPOSITORY, "--output", tmp_path, status=2)
    assert error["error"] == "ConfigurationError"
    assert "exists" in error["message"]
    assert not hub.requests


def test_an_output_that_appears_during_the_download_is_left_alone(bundle, tmp_path, monkeypatch):
    snapshot, output = tmp_path / "models--someone--tower" / "snapshots" / "commit", tmp_path / "out"
    shutil.copytree(bundle, snapshot)

    def download(*_: object) -> Path:
        output.mkdir(exist_ok=True)
        return snapshot

    monkeypatch.setattr("visionaccel.bundle.hub._download", download)
    with pytest.raises(ConfigurationError, match="exists") as refused:
        pull_bundle(REPOSITORY, output=output)
    assert refused.value.hint == "Remove it.", "--force is no option of this command"
    assert list(output.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "settings", "message", "hint"),
    [
        (("pull", "someone/else"), {}, "Repository Not Found", "Check the name"),
        (("pull", "someone/else"), {"HF_TOKEN": ""}, "401", "hf auth login"),
        (("pull", REPOSITORY, "--revision", "nowhere"), {}, "Revision Not Found", "branch, tag or commit"),
        (("pull", "one/two/three"), {}, "one/two/three", "owner/name"),
        (("pull", REPOSITORY), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "refused", "HF_ENDPOINT"),
        (("push", "{bundle}", REPOSITORY), {"HF_TOKEN": ""}, "401", "hf auth login"),
        (("push", "{bundle}", REPOSITORY), {"HF_TOKEN": "hf_wrong"}, "401", "hf auth login"),
        (("push", "{bundle}", "one/two/three"), {}, "one/two/three", "owner/name"),
        (("push", "{bundle}", REPOSITORY), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "refused", "HF_ENDPOINT"),
        (("push", "{bundle}", REPOSITORY), {"HF_HUB_OFFLINE": "1"}, "offline", "HF_HUB_OFFLINE"),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(run, bundle, pushed, arguments, settings, message, hint):
    arguments = [argument.format(bundle=bundle) for argument in arguments]
    error = run(*arguments, status=2, **settings)
    assert error["error"] == "ConfigurationError"
    assert message in error["message"]
    assert hint in error["hint"]


def test_a_private_repository_is_for_those_who_are_logged_in(run, hub, bundle):
    commit = run("push", bundle, REPOSITORY, "--private")["commit"]
    assert hub.repositories[REPOSITORY].private
    assert run("pull", REPOSITORY)["commit"] == commit
    assert "401" in run("pull", REPOSITORY, "--revision", "x", HF_TOKEN="", status=2)["message"]


def test_a_private_push_to_a_public_repository_is_refused(run, hub, other_bundle, pushed):
    error = run("push", other_bundle, REPOSITORY, "--private", status=2)
    assert error["error"] == "ConfigurationError"
    assert "public" in error["message"]
    assert hub.repositories[REPOSITORY].branches["main"] == pushed


def test_what_the_repository_ignores_is_pushed_all_the_same(run, hub, other_bundle, pushed):
    hub.tamper(REPOSITORY, "main", ".gitignore", b"*.safetensors\n")
    run("push", other_bundle, REPOSITORY)
    assert contents(Path(run("pull", REPOSITORY)["folder"])) == contents(other_bundle)


def test_a_broken_bundle_is_not_pushed(run, hub, bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    (folder / "config.json").write_text("{}")
    assert run("push", folder, REPOSITORY, status=2)["error"] == "BundleError"
    assert not hub.requests


def test_a_bundle_over_a_local_checkpoint_is_not_pushed(run, hub, tiny, tmp_path):
    folder = export(tiny, tmp_path / "bundle", self_contained=False)
    error = run("push", folder, REPOSITORY, status=2)
    assert error["error"] == "ConfigurationError"
    assert "--self-contained" in error["hint"]
    assert not hub.requests


def test_a_bundle_over_a_checkpoint_on_the_hub_is_pushed(run, hub, tiny, tmp_path):
    hub.repositories["someone/whole"] = repository = Repository(private=False)
    revision = repository.commit("main", {path.name: path.read_bytes() for path in tiny.iterdir()})
    run("-c", EXPORT_OVER, "someone/whole", revision, tmp_path / "bundle")
    commit = run("push", tmp_path / "bundle", REPOSITORY)["commit"]
    assert "model.safetensors" not in hub.repositories[REPOSITORY].commits[commit]
    assert contents(Path(run("pull", REPOSITORY)["folder"])) == contents(tmp_path / "bundle")


def test_a_manifest_alone_does_not_have_a_repository_contacted(run, hub, tiny, tmp_path):
    hub.repositories["someone/whole"] = repository = Repository(private=False)
    revision = repository.commit("main", {path.name: path.read_bytes() for path in tiny.iterdir()})
    run("-c", EXPORT_OVER, "someone/whole", revision, tmp_path / "bundle")
    run("push", tmp_path / "bundle", REPOSITORY)
    elsewhere = {"HF_HOME": str(tmp_path / "elsewhere")}
    hub.requests.clear()
    for command in (["pull", REPOSITORY], ["inspect", tmp_path / "bundle"]):
        error = run(*command, status=2, **elsewhere)
        assert "'someone/whole' is neither a folder nor a repository in the Hugging Face cache" in error["message"]
        assert "--checkpoint" in error["hint"]
    assert not [request for request in hub.requests if "someone/whole" in request]
    pulled = run("pull", REPOSITORY, "--checkpoint", "someone/whole", **elsewhere)["folder"]
    assert contents(Path(pulled)) == contents(tmp_path / "bundle")
    assert [request for request in hub.requests if f"someone/whole/resolve/{revision}/model.safetensors" in request]
    assert run("pull", REPOSITORY, **elsewhere)["folder"] == pulled, "the weights are in the cache by now"


def test_a_bundle_in_the_cache_stays_when_its_checkpoint_is_missing(run, hub, tiny, tmp_path):
    hub.repositories["someone/whole"] = repository = Repository(private=False)
    revision = repository.commit("main", {path.name: path.read_bytes() for path in tiny.iterdir()})
    run("-c", EXPORT_OVER, "someone/whole", revision, tmp_path / "bundle")
    run("push", tmp_path / "bundle", REPOSITORY)
    folder = Path(run("pull", REPOSITORY)["folder"])
    made = folder.stat().st_ino
    shutil.rmtree(tmp_path / "home" / "hub" / "models--someone--whole")
    assert run("pull", REPOSITORY, status=2)["error"] == "BundleError"
    assert folder.stat().st_ino == made
    assert contents(folder) == contents(tmp_path / "bundle")


def test_a_whole_checkpoint_on_the_hub_answers(run, hub, digits, tmp_path):
    from digits_vlm.samples import held_out_images

    (sample,) = held_out_images(1)
    sample.image.save(tmp_path / "digits.png")
    hub.repositories["someone/whole"] = repository = Repository(private=False)
    repository.commit("main", {path.name: path.read_bytes() for path in digits.iterdir()})
    answer = run("chat", "someone/whole", tmp_path / "digits.png", "Read the digits.", "--backend", "onnxrt")
    assert answer["encoder"]["answer"] == sample.truth
