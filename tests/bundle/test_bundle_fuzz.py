"""Thousands of broken bundles: each is refused by an error of this package, or is not broken."""

import copy
import hashlib
import json
from collections import Counter
from contextlib import contextmanager, suppress

import huggingface_hub.constants
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from bundles import document, write_bundle
from mutations import damage, damaged, mutations, sealed
from visionaccel.bundle import MANIFEST, open_bundle
from visionaccel.checkpoint import Checkpoint
from visionaccel.errors import BundleError, VisionAccelError
from visionaccel.families import tower_of

MANIFESTS, BYTES, FILES, FORGED = 700, 300, 300, 100
"""Examples of each test, for either kind of bundle."""


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No repository is looked for; digests are remembered for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("memory")))
        yield


@pytest.fixture(scope="module", params=[True, False], ids=["contained", "referring"])
def bundle(request, tiny, tmp_path_factory):
    """A bundle with a program of each coverage, fixed ones split and whole. Every test leaves it as it was."""
    folder = tmp_path_factory.mktemp("fuzzed") / "bundle"
    return write_bundle(
        tiny, folder, "10x18", bucket="12x10", dynamic=True, split_host=True, self_contained=request.param
    )


@contextmanager
def restored(folder):
    """The bundle's files, put back in the end where they changed."""
    files = {file: file.read_bytes() for file in folder.iterdir()}
    try:
        yield
    finally:
        for file, data in files.items():
            if not file.exists() or file.read_bytes() != data:
                file.write_bytes(data)


def opened(folder):
    """All that reads a bundle before a backend does; None if it is refused."""
    try:
        bundle = open_bundle(folder)
        formats = {entry.format for entry in bundle.manifest.programs}
        programs = bundle.programs({"onnx", "checkpoint", *formats})
    except VisionAccelError:
        return None
    for program in programs:
        with suppress(VisionAccelError):
            bundle.tower.host(program)
        with suppress(VisionAccelError):
            _ = program.model and program.model()
    return bundle


@pytest.mark.parametrize("is_sealed", [False, True], ids=["edited", "sealed"])
def test_a_mutated_manifest_raises_nothing_but_this_packages_errors(bundle, is_sealed):
    original = document(bundle)
    texts, outcomes = set(), Counter()

    @given(mutations(original))
    @hypothesis_settings(max_examples=MANIFESTS)
    def check(changed):
        text = json.dumps(sealed(changed) if is_sealed else changed)
        texts.add(text)
        (bundle / MANIFEST).write_text(text)
        found = opened(bundle)
        outcomes[found is not None] += 1
        if found is not None and not is_sealed:
            assert document(bundle) == original

    with restored(bundle):
        check()
    assert outcomes.total() >= MANIFESTS
    assert len(texts) > 0.75 * MANIFESTS, "they differ"
    assert outcomes[True] > (10 if is_sealed else 0), "some changes are harmless, such as to the toolchain"


def test_a_manifest_with_damaged_bytes_opens_only_as_what_it_was(bundle):
    data, original = (bundle / MANIFEST).read_bytes(), document(bundle)
    seen = set()

    @given(st.lists(damage(len(data) - 1), min_size=1, max_size=2))
    @hypothesis_settings(max_examples=BYTES)
    def check(ways):
        changed = data
        for how in ways:
            changed = damaged(changed, *how) or b" "
        seen.add(changed)
        (bundle / MANIFEST).write_bytes(changed)
        if opened(bundle) is not None:
            assert document(bundle) == original

    with restored(bundle):
        check()
    assert len(seen) > 0.75 * BYTES, "they differ"


def test_a_truncated_or_flipped_file_never_opens(bundle):
    files = {file: file.read_bytes() for file in sorted(bundle.iterdir())}
    original = document(bundle)
    refused = Counter()

    @given(st.data())
    @hypothesis_settings(max_examples=FILES)
    def check(data):
        file = data.draw(st.sampled_from(list(files)))
        content = files[file]
        how = data.draw(st.sampled_from(["cut", "flip"]))
        place = data.draw(st.integers(0, len(content) - 1))
        try:
            file.write_bytes(damaged(content, how, place, data.draw(st.integers(0, 7))))
            if file.name == MANIFEST:
                assert opened(bundle) is None or document(bundle) == original
            else:
                with pytest.raises(BundleError, match=r"truncated|damaged"):
                    open_bundle(bundle)
        finally:
            file.write_bytes(content)
        refused[file.name] += 1

    with restored(bundle):
        check()
        open_bundle(bundle)
    assert refused.total() >= FILES
    assert refused.keys() == {file.name for file in files}


def test_damaged_files_that_the_manifest_states_as_they_are_raise_nothing_else(bundle):
    """Whoever writes a bundle can state any file; what reads it must not trust a digest to mean sense."""
    stated = document(bundle)
    every = [*stated["files"], *(file for program in stated["programs"] for file in program["files"])]
    contents = {file["path"]: (bundle / file["path"]).read_bytes() for file in every}
    headers = {"model.safetensors": 8 + int.from_bytes(contents.get("model.safetensors", b"")[:8], "little")}
    ran = Counter()

    @given(st.data())
    @hypothesis_settings(max_examples=FORGED)
    def check(data):
        forged = copy.deepcopy(stated)
        name = data.draw(st.sampled_from(sorted(contents)))
        # Weights themselves may be any numbers; what matters is the header before them.
        changed = contents[name]
        for how in data.draw(st.lists(damage(headers.get(name, len(changed)) - 1), min_size=1, max_size=2)):
            changed = damaged(changed, *how)
        for file in (*forged["files"], *(file for program in forged["programs"] for file in program["files"])):
            if file["path"] == name:
                file |= {"bytes": len(changed), "sha256": "sha256:" + hashlib.sha256(changed).hexdigest()}
        try:
            (bundle / name).write_bytes(changed)
            if name == "config.json":
                with suppress(VisionAccelError, OSError, RecursionError):
                    forged["spec"] = tower_of(Checkpoint(bundle)).spec.document()
            (bundle / MANIFEST).write_text(json.dumps(sealed(forged)))
            ran[name, opened(bundle) is not None] += 1
        finally:
            (bundle / name).write_bytes(contents[name])

    with restored(bundle):
        check()
    assert ran.total() >= FORGED
