"""Golden images and the canary: a device that gets them wrong is not given a request, at the start or later."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from bundles import reseal, write_bundle
from gated import wait_until
from towers import lowest_cosine, random_patches, reference
from visionaccel import open_encoder
from visionaccel.bundle import GOLDEN_FILE, Golden, open_bundle, read_golden, write_golden
from visionaccel.bundle import folder as folder_module
from visionaccel.cli.app import app
from visionaccel.core.grid import Grid
from visionaccel.errors import BundleError, ChangedFileError, ConfigurationError, DeviceError
from visionaccel.service import open_guarded
from visionaccel.settings import Settings
from visionaccel.trust import Canary, ChainLink, Shadow, drift_of
from visionaccel_testing.checkpoints import TINY_TOWERS, random_checkpoint

GRID = (1, 6, 10)


def validated(checkpoint, folder, *grids, status=0, **kinds):
    """A bundle with a certificate and golden images."""
    write_bundle(checkpoint, folder, *grids, self_contained=True, **kinds)
    command = ["validate", str(folder), "--reference", str(checkpoint), "--backend", "onnxrt"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == status, done.output
    return folder


@pytest.fixture(scope="module")
def bundle(tiny, tmp_path_factory):
    return validated(tiny, tmp_path_factory.mktemp("golden") / "bundle", "6x10", dynamic=True)


def opened(bundle, tmp_path, rules=(), **settings):
    """A guarded encoder on a simulated device that obeys a switch, and the switch."""
    switch = tmp_path / "switch.json"
    switch.write_text(json.dumps(list(rules)))
    wanted = {"canary_interval": 0.0, "breaker_seconds": 0.05, "isolation": "none", **settings}
    options = {"switch": str(switch)}
    chosen = Settings(backend="simulated", device="onnxrt", options=options, **wanted)
    (guarded,) = open_guarded(open_bundle(bundle), chosen, (chosen.device,))
    return guarded, switch


DRIFT = [{"all": True, "do": "drift"}]


# Golden images


def test_validate_puts_golden_images_of_every_program_into_the_bundle(bundle, tiny):
    images = read_golden(open_bundle(bundle))
    assert {image.program for image in images} == {"6x10", "dynamic"}
    for image in images:
        grids = [grid.thw for grid in image.grids]
        np.testing.assert_allclose(image.embeddings, reference(tiny, image.patches, grids), rtol=0, atol=2e-5)
        assert image.threshold == 0.9999
        assert not image.patches.flags.writeable
    patches = sorted(len(image.patches) for image in images if image.program == "dynamic")
    assert patches[-1] > 4 * patches[0], "a usual one and a large one"


def test_validating_again_replaces_them_and_a_bundle_can_lose_them(tiny, tmp_path):
    folder = validated(tiny, tmp_path / "bundle", "6x10")
    before = (folder / GOLDEN_FILE).read_bytes()
    assert CliRunner().invoke(app, ["validate", str(folder), "--reference", str(tiny)]).exit_code == 0
    assert (folder / GOLDEN_FILE).read_bytes() == before
    stated = [file.path for file in open_bundle(folder).manifest.files]
    assert stated.count(GOLDEN_FILE) == 1
    assert read_golden(write_golden(open_bundle(folder), [], {})) == ()
    assert not (folder / GOLDEN_FILE).exists()
    assert read_golden(open_bundle(folder)) == ()


def test_the_bundle_opens_whichever_write_of_new_golden_images_fails(tiny, tmp_path, monkeypatch):
    validated(tiny, tmp_path / "bundle", "6x10")
    write_file, left = folder_module.write_file, 0

    def write(path, data):
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= 1
        write_file(path, data)

    monkeypatch.setattr(folder_module, "write_file", write)
    for written in range(4):
        bundle = open_bundle(shutil.copytree(tmp_path / "bundle", tmp_path / f"copy {written}"))
        images, left = [replace(image, threshold=0.5) for image in read_golden(bundle)], written
        if written < 3:
            with pytest.raises(ConfigurationError, match="No space left"):
                write_golden(bundle, images, {})
        else:
            write_golden(bundle, images, {})
        thresholds = {image.threshold for image in read_golden(open_bundle(bundle.folder))}
        assert thresholds == ({0.9999}, set(), set(), {0.5})[written]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors, entries: tensors.pop("0.patches"), "no patches of"),
        (lambda tensors, entries: tensors.update({"0.patches": tensors["0.patches"][:-4]}), "not float32"),
        (lambda tensors, entries: tensors.update({"0.embeddings": tensors["0.embeddings"] * np.nan}), "NaN"),
        (lambda tensors, entries: entries[0].update(grids=[[1, 5, 5]]), "grid"),
        (lambda tensors, entries: entries[0].update(grids=[]), "grids"),
        (lambda tensors, entries: entries[0].update(threshold=2), "threshold"),
        (lambda tensors, entries: entries[0].update(code="import os"), "code"),
        (lambda tensors, entries: entries.extend(entries * 300), "at most 256"),
        (lambda tensors, entries: entries.append("x"), "golden images"),
    ],
    ids=["missing", "cut", "NaN", "odd grid", "no grid", "threshold", "unknown", "too many", "no entry"],
)
def test_golden_images_that_are_none_are_refused(tiny, tmp_path, spoil, message):
    folder = validated(tiny, tmp_path / "bundle", "6x10")
    path = folder / GOLDEN_FILE
    tensors = load_file(path)
    entries = [
        {"name": image.name, "program": image.program, "grids": [grid.thw for grid in image.grids], "threshold": 0.99}
        for image in read_golden(open_bundle(folder))
    ]
    spoil(tensors, entries)
    save_file(tensors, path, {"golden": json.dumps(entries)})
    reseal(folder)
    with pytest.raises(BundleError, match=message):
        read_golden(open_bundle(folder))


def test_changed_golden_images_are_found_when_the_bundle_is_opened(tiny, tmp_path):
    folder = validated(tiny, tmp_path / "bundle", "6x10")
    opened_before = open_bundle(folder)
    data = bytearray((folder / GOLDEN_FILE).read_bytes())
    data[-1] ^= 1
    (folder / GOLDEN_FILE).write_bytes(data)
    with pytest.raises(BundleError, match=r"digest|SHA"):
        open_bundle(folder)
    with pytest.raises(ChangedFileError, match=r"golden\.safetensors changed after it was verified"):
        read_golden(opened_before)


# At the start


def test_a_device_that_passes_is_taken_and_the_comparison_is_told(bundle, tmp_path, told):
    guarded, _ = opened(bundle, tmp_path, fallback="torch_ref")
    assert guarded.primary.backend == "simulated"
    (report,) = told.compared
    assert report.passed
    assert report.source == "canary"
    assert 0.9999 < report.lowest_cosine <= 1
    guarded.close()


@pytest.mark.parametrize("canary", ["on", "strict"])
@pytest.mark.parametrize("fallback", ["none", "torch_ref"])
def test_a_device_that_misreads_images_is_refused_with_the_numbers_or_replaced(
    bundle, tiny, tmp_path, caplog, canary, fallback
):
    if fallback == "torch_ref" and canary == "on":
        guarded, _ = opened(bundle, tmp_path, DRIFT, fallback=fallback, canary=canary)
        assert guarded.primary.backend == "torch_ref"
        assert "Starting with the fallback 'torch_ref', because backend 'simulated' failed its canary" in caplog.text
        patches = random_patches([GRID])
        (answer,) = guarded.encode_items(patches, [GRID])
        np.testing.assert_allclose(answer.rows, reference(tiny, patches, [GRID]), rtol=0, atol=2e-5)
        guarded.close()
        return
    numbers = r"golden image .* lowest cosine -?0\.\d+ is under 0\.9999, at token \d+, as are \d+ of"
    with pytest.raises(DeviceError, match=numbers):
        opened(bundle, tmp_path, DRIFT, fallback=fallback, canary=canary)


@pytest.mark.parametrize("do", ["raise", "nan", "zeros"])
def test_a_device_that_cannot_encode_them_is_refused(bundle, tmp_path, do):
    with pytest.raises(DeviceError, match="could not be encoded"):
        opened(bundle, tmp_path, [{"all": True, "do": do}])


def test_without_a_canary_it_is_trusted_blindly(bundle, tmp_path, told):
    guarded, _ = opened(bundle, tmp_path, DRIFT, canary="off")
    assert guarded.primary.backend == "simulated"
    assert told.compared == []
    guarded.close()


# Later


def test_a_device_that_goes_wrong_later_is_found_on_the_timer_and_comes_back(bundle, tiny, tmp_path, told):
    guarded, switch = opened(bundle, tmp_path, canary_interval=0.05, fallback="torch_ref")
    patches = random_patches([GRID])
    exact = reference(tiny, patches, [GRID])
    switch.write_text(json.dumps(DRIFT))
    wait_until(lambda: not guarded.links[0].breaker.closed)
    (answer,) = guarded.encode_items(patches, [GRID])
    assert answer.fallback
    np.testing.assert_allclose(answer.rows, exact, rtol=0, atol=2e-5)
    switch.write_text("")
    wait_until(lambda: guarded.links[0].breaker.closed)
    (answer,) = guarded.encode_items(patches, [GRID])
    assert not answer.fallback
    np.testing.assert_allclose(answer.rows, exact, rtol=0, atol=2e-5)
    wait_until(lambda: told.breakers[-1].state == "closed")
    states = [report.state for report in told.breakers]
    assert states[0] == "open"
    assert states[-2:] == ["half-open", "closed"]
    assert "its canary failed: golden image" in told.breakers[0].reason
    guarded.close()


@pytest.mark.parametrize("golden", [True, False], ids=["golden images", "its own answer"])
def test_a_process_that_came_back_wrong_answers_nobody(bundle, tiny, tmp_path, told, golden):
    source = bundle if golden else write_bundle(tiny, tmp_path / "plain", "6x10", self_contained=True)
    guarded, switch = opened(source, tmp_path, isolation="process", fallback="torch_ref")
    patches = random_patches([GRID])
    exact = reference(tiny, patches, [GRID])
    (answer,) = guarded.encode_items(patches, [GRID])
    assert not answer.fallback
    (session, *_) = {opened.session for opened in guarded.primary.programs}
    switch.write_text(json.dumps(DRIFT))
    for each in {opened.session for opened in guarded.primary.programs}:
        os.kill(each.pid, signal.SIGKILL)
    for _ in range(3):
        (answer,) = guarded.encode_items(patches, [GRID])
        assert answer.fallback
        np.testing.assert_allclose(answer.rows, exact, rtol=0, atol=2e-5)
    wait_until(lambda: session.restarts >= 1)
    (answer,) = guarded.encode_items(patches, [GRID])
    assert answer.fallback
    assert any(report.source == "canary" and not report.passed for report in told.compared)
    switch.write_text("")
    wait_until(lambda: guarded.links[0].breaker.closed)
    (answer,) = guarded.encode_items(patches, [GRID])
    assert not answer.fallback
    guarded.close()


def test_a_canary_without_golden_images_holds_a_device_to_its_first_answer(tiny, tmp_path):
    switch = tmp_path / "switch.json"
    with open_encoder(tiny, backend="simulated", device="onnxrt", options={"switch": str(switch)}) as encoder:
        canary = Canary()
        assert canary.check(encoder, encoder.encode, quick=False).failure is None
        assert canary.check(encoder, encoder.encode, quick=True).failure is None
        switch.write_text(json.dumps(DRIFT))
        result = canary.check(encoder, encoder.encode, quick=False)
        assert "was encoded incorrectly" in result.failure
        assert result.report.lowest_cosine < 0.9
        switch.write_text("")
        assert canary.check(encoder, encoder.encode, quick=False).failure is None


def test_a_quick_canary_encodes_one_image_of_each_program(bundle):
    opened_bundle = open_bundle(bundle)
    with open_encoder(opened_bundle, backend="onnxrt") as encoder:
        canary, encoded = Canary(read_golden(opened_bundle)), []

        def encode(patches, grids):
            encoded.append(len(patches))
            return encoder.encode(patches, grids)

        assert canary.check(encoder, encode, quick=False).failure is None
        assert len(encoded) == len(read_golden(opened_bundle))
        assert canary.check(encoder, encode, quick=True).failure is None
        assert len(encoded) == len(read_golden(opened_bundle)) + 2


def test_lengths_count_too_and_shapes():
    rows = np.random.default_rng(0).standard_normal((4, 32), dtype=np.float32)
    assert drift_of(rows, rows, 0.99, 32)[1] is None
    cosine, failure = drift_of(2 * rows, rows, 0.99, 32)
    assert cosine > 0.999
    assert "the length of token 0 is off by 100.00%; the limit is 14.14%" in failure
    assert "have shape [3, 32], but the reference has [4, 32]" in drift_of(rows[:3], rows, 0.99, 32)[1]


def test_a_level_that_is_wrong_does_not_hide_behind_a_much_larger_embedding():
    rows = np.random.default_rng(0).standard_normal((4, 24), dtype=np.float32)
    rows[:, :8] *= 1000
    swapped, longer = rows.copy(), rows.copy()
    swapped[2, 8:] = np.roll(rows[2, 8:], 8)
    longer[1, 16:] *= 2
    assert "at token 2, deepstack level 1, as are 1 of 4 tokens" in drift_of(swapped, rows, 0.9, 8)[1]
    assert "the length of token 1, deepstack level 2 is off by 100.00%" in drift_of(longer, rows, 0.9, 8)[1]
    assert drift_of(swapped, rows, 0.9, 24)[1] is None, "as one row, the embedding outweighs the levels"


def test_a_canary_and_a_shadow_find_a_level_that_is_that_of_other_tokens(tmp_path):
    loud = {"merger.linear_fc2.weight": 1000.0}  # only the embedding's, not the levels'
    folder, grid = random_checkpoint(tmp_path / "checkpoint", family="qwen3_vl", scales=loud), Grid(1, 6, 10)
    patches, width = random_patches([grid.thw], TINY_TOWERS["qwen3_vl"]), 24

    def wrong(*arguments):
        rows = np.array(encoder.encode(*arguments))
        rows[:, width : 2 * width] = rows[::-1, width : 2 * width]
        return rows

    with open_encoder(folder, backend="torch_ref") as exact, open_encoder(folder, backend="onnxrt") as encoder:
        rows = np.asarray(exact.encode(patches, [grid]))
        assert lowest_cosine(wrong(patches, [grid]), rows) > 0.9999, "the embedding outweighs the level"
        image = Golden("an image", "", (grid,), patches, rows, 0.9999)
        assert Canary([image]).check(encoder, encoder.encode, quick=False).failure is None
        failure = Canary([image]).check(encoder, wrong, quick=False).failure
        assert re.search(r"lowest cosine -?0\.\d+ is under 0\.9999, at token \d+, deepstack level 1", failure)

        link, shadow = ChainLink("onnxrt", encoder), Shadow(1.0, 0.9999, ChainLink("exact", exact))
        for offered, drifted in ((encoder.encode, 0), (wrong, 1)):
            shadow.offer(link, patches, grid, offered(patches, [grid]))
            wait_until(lambda number=drifted: shadow.compared == number + 1)
            assert (shadow.drifted, link.breaker.closed) == (drifted, not drifted)
        shadow.close()


def test_closing_ends_what_looks_after_the_device(bundle, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    guarded, _ = opened(bundle, tmp_path, canary_interval=0.01)
    guarded.close()
    time.sleep(0.1)
    assert "is disabled" not in caplog.text
