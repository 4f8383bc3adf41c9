"""Checkpoints that are replaced, rewritten or cut short while an encoder is open: its answers stay what they were."""

import gc
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bundles import write_bundle
from gated import wait_until
from towers import random_patches
from visionaccel import open_encoder
from visionaccel.backends.sessions import check_files
from visionaccel.bundle import bundle as opened_bundle
from visionaccel.bundle import open_bundle
from visionaccel.checkpoint import SINGLE_FILE, copy_to_memory, weights_digest
from visionaccel.core.memory_files import MemoryFile
from visionaccel.core.program import CHECKPOINT, ONNX
from visionaccel.encoder import hold_source, open_tower
from visionaccel.errors import ArtifactError, ChangedFileError, DeviceLostError, SettingsError
from visionaccel.service import numerics, open_guarded
from visionaccel.settings import Settings
from visionaccel_bench.faultsuite.suite import change_weights
from visionaccel_testing.checkpoints import TINY, random_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="copies in memory are files of Linux")

GRID = (1, 6, 10)
PATCHES = random_patches([GRID])
DRIFT = json.dumps([{"all": True, "do": "drift"}])


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """A checkpoint that the test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "served"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A checkpoint of the same shapes with other weights."""
    return random_checkpoint(tmp_path_factory.mktemp("others"), seed=1)


def rename(checkpoint, others):
    """Put other weights into the place of a checkpoint's, as downloads do."""
    new = checkpoint / "new"
    shutil.copyfile(others / SINGLE_FILE, new)
    new.replace(checkpoint / SINGLE_FILE)


def rewrite(checkpoint, others):
    """Write other weights over a checkpoint's."""
    shutil.copyfile(others / SINGLE_FILE, checkpoint / SINGLE_FILE)


def link(file):
    """Give a file one more name, as a pull of a bundle and a backup do."""
    before = file.stat().st_ctime_ns
    while file.stat().st_ctime_ns == before:
        file.with_name(f"{file.name}.{file.stat().st_nlink}").hardlink_to(file)


def protect(file):
    """Change a file's mode."""
    before = file.stat().st_ctime_ns
    while file.stat().st_ctime_ns == before:
        file.chmod(0o400)


def answer_of(folder):
    with open_encoder(folder, backend="torch_ref") as encoder:
        return encoder.encode(PATCHES, [GRID])


def guarded_by(checkpoint, switch, **settings):
    """A chain whose first encoder is a device that obeys a switch."""
    chosen = Settings(
        backend="simulated",
        device="onnxrt",
        options={"switch": str(switch)},
        fallback="torch_ref",
        canary_interval=0.0,
        **settings,
    )
    (guarded,) = open_guarded(open_tower(checkpoint), chosen, (chosen.device,))
    return guarded


# Whatever opens later


@pytest.mark.parametrize("change", [rename, rewrite])
def test_a_restarted_process_and_a_fallback_encode_with_the_weights_that_were_served(
    tiny, checkpoint, others, tmp_path, told, change
):
    exact, switch = answer_of(tiny), tmp_path / "switch"
    guarded = guarded_by(checkpoint, switch, isolation="process")
    (session,) = (opened.session for opened in guarded.primary.programs)
    change(checkpoint, others)
    os.kill(session.pid, signal.SIGKILL)
    wait_until(lambda: session.restarts == 1)
    (restarted,) = guarded.encode_items(PATCHES, [GRID])
    assert not restarted.fallback
    switch.write_text(json.dumps([{"all": True, "do": "raise"}]))
    (fallen_back,) = guarded.encode_items(PATCHES, [GRID])
    assert fallen_back.fallback
    for answer in (restarted, fallen_back):
        np.testing.assert_allclose(answer.rows, exact, rtol=0, atol=2e-5)
    assert all(report.passed for report in told.compared)
    guarded.close()


def test_a_shadow_does_not_convict_a_device_because_the_checkpoint_was_replaced(checkpoint, others, tmp_path):
    guarded = guarded_by(checkpoint, tmp_path / "switch", shadow=1.0, isolation="none")
    rename(checkpoint, others)
    guarded.encode_items(PATCHES, [GRID])
    wait_until(lambda: guarded.shadow.compared == 1)
    assert guarded.shadow.drifted == 0
    assert guarded.links[0].breaker.closed
    guarded.close()


def test_an_encoder_of_a_bundle_encodes_with_the_weights_that_it_was_exported_from(tiny, checkpoint, others, tmp_path):
    bundle = open_bundle(write_bundle(checkpoint, tmp_path / "bundle", "6x10"))
    exact = answer_of(tiny)
    with open_encoder(bundle, backend="onnxrt", isolation="process") as encoder:
        rename(checkpoint, others)
        (session,) = (opened.session for opened in encoder.programs)
        os.kill(session.pid, signal.SIGKILL)
        wait_until(lambda: session.restarts == 1)
        np.testing.assert_allclose(encoder.encode(PATCHES, [GRID]), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("onnxrt", {}),
        ("onnxrt", {"share_weights": True}),
        ("openvino", {}),
        ("torch_ref", {}),
        ("torch_ref", {"implementation": "transformers"}),
    ],
)
def test_weights_rewritten_in_place_change_no_answer(checkpoint, others, backend, options):
    with open_encoder(checkpoint, backend=backend, options=options) as encoder:
        before = encoder.encode(PATCHES, [GRID])
        rewrite(checkpoint, others)
        np.testing.assert_array_equal(encoder.encode(PATCHES, [GRID]), before)


@pytest.mark.parametrize(("backend", "options"), [("onnxrt", {"share_weights": True}), ("openvino", {})])
def test_a_truncated_checkpoint_does_not_end_the_process(checkpoint, backend, options):
    script = (
        "import os, sys, numpy as np\n"
        "from visionaccel import open_encoder\n"
        f"with open_encoder(sys.argv[1], backend={backend!r}, options={options!r}) as encoder:\n"
        "    patches = np.ones((60, encoder.tower.patch_width), np.float32)\n"
        f"    before = encoder.encode(patches, [{GRID}])\n"
        f"    os.truncate(os.path.join(sys.argv[1], {SINGLE_FILE!r}), 100)\n"
        f"    assert np.array_equal(encoder.encode(patches, [{GRID}]), before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, checkpoint], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("how", ["replaced", "rewritten"])
def test_the_fault_suite_changes_every_vision_weight_of_the_checkpoint_that_it_serves(tiny, tmp_path, how):
    copy = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    inode = (copy / SINGLE_FILE).stat().st_ino
    change_weights(copy, how)
    assert ((copy / SINGLE_FILE).stat().st_ino == inode) == (how == "rewritten")
    before, after = open_tower(tiny).weights, open_tower(copy).weights
    for name, stored in after.items():
        np.testing.assert_array_equal(stored.read(), -before[name].read())


# Mapped weights


def test_mapped_weights_that_changed_are_not_opened(checkpoint, others, tmp_path):
    switch = tmp_path / "switch"
    guarded = guarded_by(checkpoint, switch, isolation="process", weights="mapped")
    (session,) = (opened.session for opened in guarded.primary.programs)
    (answer,) = guarded.encode_items(PATCHES, [GRID])
    rename(checkpoint, others)
    os.kill(session.pid, signal.SIGKILL)
    wait_until(lambda: session.pid is None)
    (error,) = guarded.encode_items(PATCHES, [GRID])
    assert answer.rows.shape == (15, TINY["out_hidden_size"])
    assert "changed after it was verified" in error.message
    guarded.close()


def test_a_device_is_not_opened_from_weights_that_change_meanwhile(checkpoint, others, monkeypatch):
    from visionaccel_torch_ref.backend import TorchReferenceBackend, TorchReferenceSession

    closed = []
    real = TorchReferenceBackend.open
    monkeypatch.setattr(TorchReferenceSession, "close", lambda session: closed.append(session))
    monkeypatch.setattr(TorchReferenceBackend, "open", lambda *given: (real(*given), rewrite(checkpoint, others))[0])
    with pytest.raises(ChangedFileError, match=r"model\.safetensors changed after it was verified"):
        open_encoder(checkpoint, backend="torch_ref", weights="mapped")
    assert len(closed) == 1


def test_there_is_no_third_place_for_weights(tiny):
    with pytest.raises(SettingsError, match=r"unknown weights 'shared'.*Choose private or mapped"):
        open_encoder(tiny, backend="torch_ref", weights="shared")


# Bundles


def test_a_device_is_not_started_again_from_a_program_that_changed(checkpoint, tmp_path):
    folder = write_bundle(checkpoint, tmp_path / "bundle", "6x10")
    bundle = open_bundle(folder)
    (program,) = bundle.programs([ONNX])
    with open_encoder(bundle, backend="onnxrt", isolation="process") as encoder:
        (session,) = (opened.session for opened in encoder.programs)
        program.artifact.write_bytes(program.artifact.read_bytes() + b"\0")
        os.kill(session.pid, signal.SIGKILL)
        wait_until(lambda: session.pid is None)
        for _ in range(2):  # a call that waits for the second start is told why the first one failed
            with pytest.raises(DeviceLostError, match="changed after it was verified"):
                encoder.encode(PATCHES, [GRID])


def test_an_artifact_that_changes_while_it_is_opened_is_refused(tiny, tmp_path):
    artifact = tmp_path / "artifact"
    artifact.write_bytes(b"program")
    digest = "sha256:" + hashlib.sha256(b"program").hexdigest()
    program = replace(open_tower(tiny).programs([CHECKPOINT])[0], artifact=artifact, files={artifact: digest})
    before = check_files(program)
    artifact.write_bytes(b"another")
    for state in (None, before):
        with pytest.raises(ChangedFileError, match="artifact changed after it was verified"):
            check_files(program, state)
    artifact.unlink()
    with pytest.raises(ChangedFileError, match="artifact changed after it was verified"):
        check_files(program)


def test_weights_of_a_bundle_that_change_once_they_were_verified_are_refused(tiny, others, tmp_path, monkeypatch):
    folder = write_bundle(tiny, tmp_path / "bundle", "6x10", self_contained=True)
    other = write_bundle(others, tmp_path / "other", "6x10", self_contained=True)
    real = opened_bundle._tower

    def changing(*given, **named):
        (other / SINGLE_FILE).replace(folder / SINGLE_FILE)
        return real(*given, **named)

    monkeypatch.setattr(opened_bundle, "_tower", changing)
    with pytest.raises(ChangedFileError, match=r"model\.safetensors changed after it was verified"):
        open_bundle(folder)


def test_a_bundle_whose_files_are_linked_while_they_are_verified_is_opened(tiny, tmp_path, monkeypatch):
    folder = write_bundle(tiny, tmp_path / "bundle", "6x10", self_contained=True)
    real, left = opened_bundle._tower, [2]

    def linking(*given, **named):
        if left[0]:
            left[0] -= 1
            link(folder / SINGLE_FILE)
        return real(*given, **named)

    monkeypatch.setattr(opened_bundle, "_tower", linking)
    assert open_bundle(folder).manifest
    left[0] = 1000
    with pytest.raises(ChangedFileError, match=r"model\.safetensors changed after it was verified"):
        open_bundle(folder)
    assert left[0] == 995


@pytest.mark.parametrize("touch", [link, protect])
def test_an_artifact_that_is_only_touched_while_it_is_opened_is_opened_again(tiny, tmp_path, monkeypatch, touch):
    from visionaccel_onnxrt.backend import OnnxRuntimeBackend

    bundle = open_bundle(write_bundle(tiny, tmp_path / "bundle", "6x10"))
    (program,) = bundle.programs([ONNX])
    real, opened = OnnxRuntimeBackend.open, []

    def touching(*given):
        opened.append(real(*given))
        if len(opened) == 1:
            touch(program.artifact)
        return opened[-1]

    monkeypatch.setattr(OnnxRuntimeBackend, "open", touching)
    with open_encoder(bundle, backend="onnxrt") as encoder:
        assert encoder.encode(PATCHES, [GRID]).shape == (15, TINY["out_hidden_size"])
    assert len(opened) == 2


# The copy


@pytest.mark.parametrize("touch", [link, protect])
def test_weights_that_were_only_touched_before_they_were_copied_are_read_again(tiny, checkpoint, touch):
    tower = open_tower(checkpoint)
    assert tower.weights
    touch(checkpoint / SINGLE_FILE)
    with open_encoder(tower, backend="torch_ref") as encoder:
        np.testing.assert_array_equal(encoder.encode(PATCHES, [GRID]), answer_of(tiny))


def test_fused_weights_that_were_only_touched_are_read_again(tiny, checkpoint):
    tensors = load_file(checkpoint / SINGLE_FILE)
    for name in [name for name in tensors if ".gate_proj." in name]:
        both = tensors.pop(name), tensors.pop(name.replace("gate_proj", "up_proj"))
        tensors[name.replace("gate_proj", "gate_up_proj")] = np.concatenate(both)
    save_file(tensors, checkpoint / SINGLE_FILE)
    tower = open_tower(checkpoint)
    assert tower.weights
    link(checkpoint / SINGLE_FILE)
    with open_encoder(tower, backend="torch_ref") as encoder:
        np.testing.assert_array_equal(encoder.encode(PATCHES, [GRID]), answer_of(tiny))


def test_a_weight_that_became_shorter_is_not_read_again(checkpoint):
    tensors = load_file(checkpoint / SINGLE_FILE)
    tower = open_tower(checkpoint)
    assert tower.weights
    shorter = {name: values[:-4] if ".gate_proj." in name else values for name, values in tensors.items()}
    state = (checkpoint / SINGLE_FILE).stat()
    save_file(shorter, checkpoint / SINGLE_FILE)
    with (checkpoint / SINGLE_FILE).open("r+b") as file:
        file.truncate(state.st_size)
    os.utime(checkpoint / SINGLE_FILE, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(ChangedFileError, match=r"model\.safetensors changed after it was verified"):
        hold_source(tower)


def in_memory(tower):
    return all(isinstance(tensor.origin, MemoryFile) for tensor in tower.weights.values())


@pytest.mark.parametrize("external", [False, True])
def test_weights_of_a_bundle_that_were_touched_are_verified_again(tiny, checkpoint, others, tmp_path, external):
    folder = write_bundle(checkpoint, tmp_path / "bundle", "6x10", self_contained=not external)
    file = (checkpoint if external else folder) / SINGLE_FILE
    other = others if external else write_bundle(others, tmp_path / "other", "6x10", self_contained=True)
    bundle = open_bundle(folder)
    link(file)
    assert in_memory(hold_source(bundle).tower)
    link(file)
    bundle = open_bundle(folder)
    state = file.stat()
    file.write_bytes((other / SINGLE_FILE).read_bytes())
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(ArtifactError, match="have the digest" if external else "SHA-256 does not match the manifest"):
        hold_source(bundle)


def test_weights_that_changed_before_they_were_copied_are_refused(checkpoint, others):
    tower = open_tower(checkpoint)
    assert tower.weights
    rename(checkpoint, others)
    with pytest.raises(ChangedFileError, match=r"model\.safetensors changed after it was verified"):
        open_encoder(tower, backend="torch_ref")


def test_a_copy_is_equal_to_the_file_and_nothing_can_write_to_it(tiny):
    tower = open_tower(tiny)
    copies = copy_to_memory(tower.weights)
    assert weights_digest(copies) == weights_digest(tower.weights)
    (memory,) = {stored.origin for stored in copies.values()}
    assert memory.digest == weights_digest(tower.weights)
    for name, stored in tower.weights.items():
        np.testing.assert_array_equal(copies[name].read(), stored.read())
    again = os.open(memory.path, os.O_RDWR)
    for fd in (memory.fd, again):
        for attempt in (lambda fd: os.pwrite(fd, b"x", 100), lambda fd: os.ftruncate(fd, 0), lambda fd: mmap(fd, 100)):
            with pytest.raises(PermissionError):
                attempt(fd)
    os.close(again)
    with pytest.raises(TypeError, match="descriptor"):
        pickle.dumps(memory)


def test_a_copy_is_read_as_a_safetensors_file(tiny):
    from safetensors.numpy import load_file

    tower = open_tower(tiny)
    copies = copy_to_memory(tower.weights)
    read = load_file(next(iter(copies.values())).file)
    assert {name: array.shape for name, array in read.items()} == {n: s.shape for n, s in tower.weights.items()}


def held():
    """How many copies this process has open."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum("visionaccel-weights" in str(link.readlink()) for link in links)


def test_one_process_has_one_copy_and_frees_it(tiny):
    gc.collect()
    before = held()
    first, second = (hold_source(open_tower(tiny)) for _ in range(2))
    assert in_memory(first)
    assert held() == before + 1
    assert {s.file for s in first.weights.values()} == {s.file for s in second.weights.values()}
    del first, second
    gc.collect()
    assert held() == before
    with open_encoder(tiny, backend="torch_ref"):
        gc.collect()
        assert held() == before, "a session that has its own copy needs none"
    with open_encoder(tiny, backend="torch_ref", isolation="process"):
        gc.collect()
        assert held() == before + 1, "a process that is started again reads it"
    gc.collect()
    assert held() == before


def test_a_child_takes_nothing_but_a_sealed_file(tmp_path):
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    with pytest.raises(ValueError, match="not a sealed memory file"):
        MemoryFile.inherited(fd, "sha256:0")
    os.close(fd)


def test_equal_files_at_one_path_have_different_keys(checkpoint, others):
    keys = []
    for change in (None, rename):
        if change is not None:
            change(checkpoint, others)
        with open_encoder(checkpoint, backend="torch_ref") as encoder:
            rename(checkpoint, others)  # what was opened is known by its state then, not now
            keys += [numerics(encoder, "float32"), numerics(encoder, "float32")]
    assert len(set(keys)) == 2
