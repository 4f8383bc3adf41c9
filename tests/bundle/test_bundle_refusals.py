"""What is not as the manifest states it, and manifests that state what cannot be, are refused."""

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bundle_tools import (
    CERTIFICATE,
    FIXED,
    encode,
    forge,
    state,
)
from bundles import document
from visionaccel.bundle import MANIFEST, ProgramRequest, export_bundle, is_bundle, open_bundle, seal, write_golden
from visionaccel.core.grid import Grid
from visionaccel.encoder import open_tower
from visionaccel.errors import BundleError, PluginError
from visionaccel_testing.checkpoints import random_checkpoint


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "10x18.onnx", "dynamic.onnx"])
def test_a_missing_or_changed_or_truncated_file_is_refused(bundle, name):
    path = bundle / name
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        open_bundle(bundle)
    path.write_bytes(data[:-1])
    with pytest.raises(BundleError, match="truncated"):
        open_bundle(bundle)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match="is damaged"):
        open_bundle(bundle)
    path.write_bytes(data)
    open_bundle(bundle)


def test_a_program_that_changes_after_the_bundle_was_opened_is_refused(bundle):
    (program,) = [each for each in open_bundle(bundle).programs(["onnx"]) if each.name == "10x18"]
    (bundle / "10x18.onnx").write_bytes((bundle / "dynamic.onnx").read_bytes())
    with pytest.raises(BundleError, match="changed since"):
        program.model()


def test_what_is_no_file_is_refused(bundle):
    (bundle / "dynamic.onnx").unlink()
    os.mkfifo(bundle / "dynamic.onnx")
    with pytest.raises(BundleError, match="is not a file"):
        open_bundle(bundle)
    (bundle / MANIFEST).unlink()
    os.mkfifo(bundle / MANIFEST)
    with pytest.raises(BundleError, match="not a file"):
        open_bundle(bundle)


def test_a_folder_without_a_manifest_is_no_bundle(tiny, contained):
    assert is_bundle(contained)
    assert not is_bundle(tiny)
    with pytest.raises(BundleError, match="does not exist"):
        open_bundle(tiny)


def test_a_link_that_leads_out_of_the_folder_is_refused(bundle, tmp_path):
    (bundle / "model.safetensors").rename(tmp_path / "weights")
    (bundle / "model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(BundleError, match="points outside the bundle"):
        open_bundle(bundle)


def test_a_link_within_the_folder_is_fine(bundle, contained):
    (bundle / "files").mkdir()
    for name in ("model.safetensors", "10x18.onnx"):
        (bundle / name).rename(bundle / "files" / name)
        (bundle / name).symlink_to(Path("files", name))
    np.testing.assert_array_equal(encode(bundle), encode(contained))


def test_a_loop_of_links_is_refused(bundle):
    (bundle / "10x18.onnx").unlink()
    (bundle / "10x18.onnx").symlink_to("10x18.onnx")
    with pytest.raises(BundleError, match="missing"):
        open_bundle(bundle)


def test_an_image_processor_must_be_stated(bundle):
    (bundle / "processor_config.json").write_text(json.dumps({"image_processor": {"image_mean": [0.0, 0.0, 0.0]}}))
    with pytest.raises(BundleError, match=r"does not list .*processor_config\.json"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_weights_and_configuration_must_be_stated(bundle, name):
    def leave_out(stated):
        stated["files"] = [file for file in stated["files"] if file["path"] != name]

    forge(bundle, leave_out)
    with pytest.raises(BundleError, match=f"does not list .*{name}"):
        open_bundle(bundle)


def test_an_index_of_the_weights_and_their_parts_must_be_stated(bundle):
    weights = load_file(bundle / "model.safetensors")
    (bundle / "model.safetensors").unlink()
    save_file(weights, bundle / "part.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "part.safetensors")}
    (bundle / "model.safetensors.index.json").write_text(json.dumps(index))
    part = {"path": "part.safetensors"}
    keep_config = lambda stated: [file for file in stated["files"] if file["path"] == "config.json"]  # noqa: E731
    forge(bundle, lambda stated: stated.update(files=[*keep_config(stated), part]))
    with pytest.raises(BundleError, match=r"does not list .*index\.json"):
        open_bundle(bundle)
    listed = [{"path": "model.safetensors.index.json"}]
    forge(bundle, lambda stated: stated.update(files=[*keep_config(stated), *listed]))
    with pytest.raises(BundleError, match=r"does not list .*part\.safetensors"):
        open_bundle(bundle)
    # A part that holds nothing of the tower is read as well, so it must be stated too; here it would be waited for.
    os.mkfifo(bundle / "leak.safetensors")
    (bundle / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {**index["weight_map"], "lm_head.weight": "leak.safetensors"}})
    )
    listed.append(part)
    forge(bundle, lambda stated: stated.update(files=[*keep_config(stated), *listed]))
    with pytest.raises(BundleError, match=r"does not list .*leak\.safetensors"):
        open_bundle(bundle)
    (bundle / "model.safetensors.index.json").write_text(json.dumps(index))
    forge(bundle, lambda stated: stated.update(files=[*keep_config(stated), *listed]))
    open_bundle(bundle)


def test_an_edited_manifest_is_refused(bundle):
    text = (bundle / MANIFEST).read_text()
    (bundle / MANIFEST).write_text(text.replace('"precision": "float32"', '"precision": "float16"', 1))
    with pytest.raises(BundleError, match="damaged or edited"):
        open_bundle(bundle)


def test_the_seal_is_of_the_content_and_not_of_the_layout(bundle):
    (bundle / MANIFEST).write_text(json.dumps(document(bundle), sort_keys=True))
    open_bundle(bundle)


def test_a_field_that_is_not_known_is_refused_wherever_it_is(bundle):
    complete = {**document(bundle), "certificate": seal({**document(bundle), "certificate": CERTIFICATE}).model_dump(
        mode="json")["certificate"]}  # fmt: skip
    complete["programs"][0]["host"] = None
    state(bundle, complete)
    open_bundle(bundle)

    def objects(node, path=()):
        if isinstance(node, dict):
            yield path
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            yield from objects(value, (*path, key))

    places = list(objects(complete))
    assert len(places) > 30
    for place in places:
        changed = node = copy.deepcopy(complete)
        for key in place:
            node = node[key]
        node["surprise"] = None
        state(bundle, changed)
        with pytest.raises(BundleError):
            open_bundle(bundle)


@pytest.mark.parametrize("version", [0, 3, "1", 1.5, True, None, 10**30])
def test_another_schema_version_is_refused_as_such(bundle, version):
    forge(bundle, lambda stated: stated.update(schema_version=version))
    with pytest.raises(BundleError, match="schema version"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "coverage",
    [
        {"kind": "polar"},
        {},
        {"kind": "fixed", "grid": [2, 10, 18]},
        {"kind": "fixed", "grid": [1, 10]},
        {"kind": "fixed", "grid": [1, 0, 18]},
        {"kind": "fixed", "grid": [1, 5, 36]},
        {"kind": "fixed", "grid": [1, 10, 18.0]},
        {"kind": "fixed", "grid": [1, 2**11, 2**11]},
        {"kind": "bucket", "sizes": {"patches": 181, "windows": 6}},
        {"kind": "bucket", "sizes": {"patches": 2**40, "windows": 6}},
        {"kind": "bucket", "sizes": {"patches": 180}},
        {"kind": "bucket", "sizes": {"windows": 6}},
        {"kind": "bucket", "sizes": {"patches": 180, "windows": 6, "levels": 1}},
        {"kind": "bucket", "sizes": {"patches": 180, "windows": 2**20}},
        {"kind": "bucket", "patches": 180, "windows": 6},
        {"kind": "dynamic", "grid": [1, 10, 18]},
    ],
    ids=json.dumps,
)
def test_a_coverage_that_cannot_be_is_refused(bundle, coverage):
    forge(bundle, lambda stated: stated["programs"][0].update(coverage=coverage))
    with pytest.raises(BundleError):
        open_bundle(bundle)


def test_a_coverage_of_other_shapes_than_the_programs_is_refused(bundle):
    forge(bundle, lambda stated: stated["programs"][0]["coverage"].update(grid=[1, 10, 20]))
    with pytest.raises(BundleError, match=r"10x20: pixel_values: float32\[200, 96\]"):
        open_bundle(bundle)


def test_a_coverage_of_the_same_shapes_opens(bundle):
    """Whether the tables in a program are those of its grid, only running it can tell."""
    forge(bundle, lambda stated: stated["programs"][0]["coverage"].update(grid=[1, 18, 10]))
    assert open_bundle(bundle).grids == (Grid(1, 18, 10),)


@pytest.mark.parametrize(
    "host",
    [
        {"order": "raster", "tensors": ["patch_embed.proj.weight"]},
        {"order": "grouped", "tensors": ["patch_embed.proj.weight"]},
        {"order": "spiral", "tensors": []},
    ],
    ids=lambda host: host["order"],
)
def test_a_whole_program_stated_as_split_is_refused(bundle, host):
    for number in range(3):
        forge(bundle, lambda stated, number=number: stated["programs"][number].update(host=host))
        with pytest.raises(BundleError):
            open_bundle(bundle)
        forge(bundle, lambda stated, number=number: stated["programs"][number].update(host=None))


@pytest.mark.parametrize("tensors", [[], ["patch_embed.proj.weight"] * 2, ["merger.ln_q.weight"]])
def test_a_split_program_states_the_weights_that_the_host_needs(tiny, tmp_path, tensors):
    requests = [ProgramRequest(FIXED.coverage, split_host=True)]
    folder = export_bundle(open_tower(tiny), tmp_path / "bundle", requests, self_contained=True).folder
    forge(folder, lambda stated: stated["programs"][0]["host"].update(tensors=tensors))
    with pytest.raises(BundleError, match=r"needs patch_embed\.proj\.weight"):
        open_bundle(folder)


def test_the_weights_themselves_are_no_program_of_a_bundle(bundle):
    forge(bundle, lambda stated: stated["programs"][0].update(format="checkpoint"))
    with pytest.raises(BundleError, match="not a program of a bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "path",
    [
        "../10x18.onnx", "a/../10x18.onnx", "/etc/passwd", "..", ".", "", "./10x18.onnx", "a//10x18.onnx",
        "a\\10x18.onnx", "C:10x18.onnx", "10x18.onnx\0", "10x18.onnx/", MANIFEST, MANIFEST.upper(), "x" * 600,
    ],
)  # fmt: skip
def test_a_path_that_could_lead_elsewhere_is_refused(bundle, path):
    def rename(stated):
        stated["programs"][0]["model"] = stated["programs"][0]["files"][0]["path"] = path

    stated = document(bundle)
    rename(stated)
    state(bundle, stated)
    with pytest.raises(BundleError, match="is not a manifest that this visionaccel supports"):
        open_bundle(bundle)


def test_programs_and_tensors_and_files_are_stated_once(bundle):
    original = document(bundle)
    for change in (
        lambda stated: stated["programs"].append(stated["programs"][0]),
        lambda stated: stated["programs"][0]["inputs"].append(stated["programs"][0]["inputs"][0]),
        lambda stated: stated["files"].append({**stated["files"][0], "bytes": 7}),
        lambda stated: stated["programs"][0].update(model="dynamic.onnx"),
        lambda stated: stated.update(programs=[]),
    ):
        stated = copy.deepcopy(original)
        change(stated)
        state(bundle, stated)
        with pytest.raises(BundleError):
            open_bundle(bundle)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda text: text.replace('"device": null', '"device": "npu", "device": null', 1), "given twice"),
        (lambda text: text.replace('"most_patches": null', '"most_patches": NaN'), "NaN is not a number"),
        (lambda text: text.replace('"most_patches": null', '"most_patches": -Infinity'), "-Infinity is not a number"),
        (lambda text: text.replace('"activation": "silu"', '"activation": 1e999'), "1e999 is too large"),
        (lambda text: text.replace('"device": null', f'"device": {"[" * 100_000}', 1), "nested too deeply"),
        (lambda text: text.replace('"device": null', f'"device": {"[" * 500}{"]" * 500}', 1), "recursion"),
        (lambda text: text.replace('"silu"', f'{"[" * 990}{"]" * 990}'), "nested too deeply"),
        (lambda text: text.replace("431", "1" + "0" * 5000, 1), "4300 digits"),
        (lambda text: text.replace("qwen2_5_vl", "\\ud800"), "hex escape"),
        (lambda text: text.replace("qwen2_5_vl", "\0"), "control character"),
        (lambda text: text.encode("utf-16"), "utf-8"),
        (lambda text: b"\xff" + text.encode(), "utf-8"),
        (lambda text: text + " " * 2**24, "larger than"),
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: f"[{text}]", "JSON object"),
        (lambda text: "", "cannot be read"),
    ],
    ids=[
        "name twice", "NaN", "infinity", "1e999", "open brackets", "nested", "nested in a free field", "long number",
        "surrogate", "control character", "UTF-16", "no UTF-8", "16 MiB", "half", "a list", "empty",
    ],
)  # fmt: skip
def test_what_is_no_plain_json_is_refused(bundle, edit, complaint):
    text = (bundle / MANIFEST).read_text()
    edited = edit(text)
    assert edited != text
    (bundle / MANIFEST).write_bytes(edited if isinstance(edited, bytes) else edited.encode())
    with pytest.raises(BundleError, match=complaint):
        open_bundle(bundle)


def test_other_weights_of_the_same_shapes_are_not_this_bundles(bundle, tmp_path):
    other = random_checkpoint(tmp_path / "other", seed=1)
    shutil.copy(other / "model.safetensors", bundle / "model.safetensors")
    with pytest.raises(BundleError):
        open_bundle(bundle)


def test_the_configuration_must_be_the_stated_one(bundle):
    forge(bundle, lambda stated: stated["spec"].update(full_blocks=[2]))
    with pytest.raises(BundleError, match="different vision configuration"):
        open_bundle(bundle)


def test_a_changed_manifest_keeps_everything_else(bundle):
    before = {file.name: file.read_bytes() for file in bundle.iterdir()}
    changed = write_golden(open_bundle(bundle), [], {"certificate": CERTIFICATE})
    after = {file.name: file.read_bytes() for file in bundle.iterdir()}
    assert {name for name in after if before.get(name) != after[name]} == {MANIFEST}
    assert before.keys() == after.keys()
    old, new = json.loads(before[MANIFEST]), json.loads(after[MANIFEST])
    assert {name for name in new if old[name] != new[name]} == {"certificate", "digest"}
    assert open_bundle(bundle).manifest == changed.manifest
    assert changed.manifest.certificate.passed
    write_golden(changed, [], {"certificate": None})
    assert {file.name: file.read_bytes() for file in bundle.iterdir()} == before


def test_what_earlier_releases_certified_of_the_digits_model_is_ignored(bundle):
    answers = [{"fit": "letterbox", "images": 1, "accuracy": 1, "agreement": 1}]
    forge(bundle, lambda stated: stated.update(certificate={**CERTIFICATE, "answers": answers, "failure": None}))
    certificate = open_bundle(bundle).manifest.certificate
    assert certificate.passed
    assert not {"answers", "failure"} & certificate.model_dump().keys()


def test_a_change_that_makes_no_manifest_changes_nothing(bundle):
    before = (bundle / MANIFEST).read_bytes()
    with pytest.raises(BundleError):
        write_golden(open_bundle(bundle), [], {"surprise": 1})
    assert (bundle / MANIFEST).read_bytes() == before


def test_a_broken_plug_in_of_its_family_is_not_the_bundles_fault(bundle, monkeypatch):
    def broken(checkpoint):
        raise PluginError("the family cannot be loaded.")

    monkeypatch.setattr("visionaccel.bundle.bundle.tower_of", broken)
    with pytest.raises(PluginError, match="cannot be loaded"):
        open_bundle(bundle)
