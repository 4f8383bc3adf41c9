"""Families are found by entry point, and a broken one affects only its own architecture."""

import pickle
import subprocess
import sys
from dataclasses import replace

import pytest

from bundles import write_bundle
from fake_plugins import find_each_time, install_all
from visionaccel.bundle import Bundle, open_bundle
from visionaccel.checkpoint import Checkpoint
from visionaccel.core.program import CHECKPOINT, ONNX, ONNX_STANDARD
from visionaccel.errors import CheckpointError, PluginError, UnsupportedArchitectureError
from visionaccel.families import GROUP, Tower, family_named, registry, supported_architectures, tower_of
from visionaccel.families.qwen2_5_vl import FAMILY
from visionaccel.towers import Norm, VisionConfiguration

OURS = "Qwen2_5_VLForConditionalGeneration"
SAME = "from visionaccel.families.qwen2_5_vl import FAMILY"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the Python path; families in it are found from now on."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    for module in ("third_party", "broken_family", "first_family", "second_family"):  # an earlier test's
        monkeypatch.delitem(sys.modules, module, raising=False)
    find_each_time(monkeypatch, registry._FAMILIES)
    return tmp_path / "site"


def add(site, distribution, architecture, source):
    install_all(site, distribution, {GROUP: {architecture: f"{distribution.replace('-', '_')}:FAMILY"}}, source)


def test_ours_is_one_of_them():
    assert OURS in supported_architectures()
    assert family_named(FAMILY.name) is FAMILY


def test_listing_imports_none():
    code = (
        "import sys; from visionaccel.families import supported_architectures as s; s(); "
        "sys.exit('visionaccel.families.qwen2_5_vl' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_third_partys_family_makes_towers(site, tiny, tmp_path):
    add(site, "third-party", "OtherForConditionalGeneration", SAME)
    assert "OtherForConditionalGeneration" in supported_architectures()
    checkpoint = Checkpoint(tiny)
    checkpoint.config = {**checkpoint.config, "architectures": ["Unknown", "OtherForConditionalGeneration"]}
    assert tower_of(checkpoint).spec == tower_of(Checkpoint(tiny)).spec


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('no such library')", "RuntimeError: no such library"),
        ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
        ("FAMILY = 3", "is not a"),
        ("from visionaccel.families import Family; FAMILY = Family('x', None, prefixes='visual.')", "must be a tuple"),
        ("from visionaccel.families import Family; FAMILY = Family('x', None, prefixes=(1,))", "non-empty strings"),
        ("from visionaccel.families import Family; FAMILY = Family('x', None, prefixes=('',))", "non-empty strings"),
        (
            "from visionaccel.families import Family; FAMILY = Family('x', None, config='vision')",
            "config of family 'x'",
        ),
        ("from visionaccel.families import Family; FAMILY = Family('x', None, config=(1,))", "config of family 'x'"),
        ("from visionaccel.families import Family; FAMILY = Family('x', None, config=())", "config of family 'x'"),
        ("from visionaccel.families import Family; FAMILY = Family('x', None, names={1: 'a'})", "TypeError"),
    ],
)
def test_a_broken_one_is_an_error_of_its_architecture_alone(site, tiny, source, said):
    add(site, "broken-family", "BrokenModel", source)
    assert tower_of(Checkpoint(tiny)).family == FAMILY.name
    assert family_named(FAMILY.name) is FAMILY
    checkpoint = Checkpoint(tiny)
    checkpoint.config = {**checkpoint.config, "architectures": ["BrokenModel"]}
    with pytest.raises(PluginError, match=rf"broken_family:FAMILY of broken-family 1\.0.*BrokenModel.*{said}"):
        tower_of(checkpoint)


def _exits(config):
    raise SystemExit("no licence")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"spec": lambda config: 1 / 0}, "failed to describe the tower: ZeroDivisionError"),
        ({"spec": lambda config: config.sizes}, "failed to describe the tower: AttributeError"),
        ({"spec": _exits}, "failed to describe the tower: RuntimeError: SystemExit: no licence"),
        ({"spec": lambda config: {}["gelu_new"]}, "failed to describe the tower: KeyError: 'gelu_new'"),
        ({"spec": lambda config: len(config.whole("depth"))}, "failed to describe the tower: TypeError"),
        ({"spec": lambda config: 2.0**10000}, "failed to describe the tower: OverflowError"),
        ({"spec": lambda config: None}, "returned a NoneType instead of a TowerSpec"),
    ],
)
def test_what_a_familys_code_raises_is_its_fault_and_names_it(tiny, changed, said):
    family = replace(FAMILY, name="third", **changed)
    with pytest.raises(PluginError, match=f"family 'third' {said}"):
        _ = Tower(family, Checkpoint(tiny)).weights


@pytest.mark.parametrize(
    "read", [VisionConfiguration.__getitem__, VisionConfiguration.whole, VisionConfiguration.wholes]
)
def test_what_a_configuration_does_not_state_is_named(tiny, read):
    family = replace(FAMILY, spec=lambda config: read(config, "swiglu_limit"))
    with pytest.raises(CheckpointError, match="vision_config has no 'swiglu_limit'"):
        Tower(family, Checkpoint(tiny))


def test_programs_are_sent_to_other_processes_without_the_family(tiny, tmp_path):
    local = replace(FAMILY, spec=lambda config: FAMILY.spec(config), defaults={**FAMILY.defaults, "f": lambda: None})
    tower = Tower(local, Checkpoint(tiny))
    bundle = open_bundle(write_bundle(tiny, tmp_path / "bundle", "6x10"))
    for source in (tower, Bundle(bundle.folder, bundle.manifest, tower)):
        for program in source.programs([ONNX, ONNX_STANDARD, CHECKPOINT]):
            sent = pickle.loads(pickle.dumps(program))
            assert sent == program
            assert sent.model is None or sent.model() == program.model()


def test_two_for_one_architecture_are_an_error_of_it_alone(site, tiny):
    add(site, "first-family", "TwiceModel", SAME)
    add(site, "second-family", "TwiceModel", SAME)
    assert tower_of(Checkpoint(tiny)).family == FAMILY.name
    checkpoint = Checkpoint(tiny)
    checkpoint.config = {**checkpoint.config, "architectures": ["TwiceModel"]}
    with pytest.raises(PluginError, match=r"provided by both (first|second)-family"):
        tower_of(checkpoint)


def test_an_unknown_architecture_and_an_unknown_name_say_what_is_supported(tiny):
    checkpoint = Checkpoint(tiny)
    checkpoint.config = {**checkpoint.config, "architectures": ["UnknownModel"]}
    with pytest.raises(UnsupportedArchitectureError, match=rf"UnknownModel.*{OURS}"):
        tower_of(checkpoint)
    with pytest.raises(UnsupportedArchitectureError, match="unknown tower family 'unknown'"):
        family_named("unknown")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prefixes": ("visual",)}, "prefixes of family 'third': 'visual' must end with a dot"),
        (
            {"names": {"layers.{n}.mlp": "blocks.mlp"}},
            r"names of family 'third': 'layers\.{n}\.mlp' and 'blocks\.mlp' must both contain {n} once",
        ),
        ({"names": {"layers.{i}.mlp": "blocks.{i}.mlp"}}, "or no braces"),
        ({"names": {"layers.{n}.{n}": "blocks.{n}.{n}"}}, "names of family 'third'"),
        ({"fused": {"blocks.{n}.gate_up": ("blocks.{n}.gate", "blocks.up")}}, "fused of family 'third'.*'blocks.up'"),
    ],
)
def test_names_and_prefixes_that_match_nothing_are_refused_when_the_family_is_made(changed, said):
    with pytest.raises(ValueError, match=said):
        replace(FAMILY, name="third", **changed)


def _with(**changed):
    """A family whose description differs from Qwen2.5-VL's."""
    return replace(FAMILY, name="third", spec=lambda config: replace(FAMILY.spec(config), **changed))


@pytest.mark.parametrize(
    ("family", "said"),
    [
        (
            replace(FAMILY, name="third", prefixes=("vision.",)),
            r"contains no vision weights: no tensor name starts with 'vision\.'; names start with 'visual\.blocks', ",
        ),
        (
            _with(norm1=Norm("norm_1", "rms", 32)),
            r"unknown weight 'visual\.blocks\.0\.norm1\.weight', while 'blocks\.0\.norm_1\.weight' and 2 more are",
        ),
        (
            replace(FAMILY, name="third", names={"merger.ln_q": "merger.norm"}),
            r"'visual\.merger\.ln_q\.weight', read as 'merger\.norm\.weight', while 'merger\.ln_q\.weight' is missing",
        ),
    ],
)
def test_a_weight_that_the_description_does_not_have_is_named_as_stored_and_as_read(tiny, family, said):
    with pytest.raises(CheckpointError, match=said):
        _ = Tower(family, Checkpoint(tiny)).weights
