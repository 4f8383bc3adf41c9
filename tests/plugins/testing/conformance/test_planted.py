"""The conformance kit itself: it finds each planted fault by name, and nothing in a good backend."""

import re
import sys
from datetime import date
from functools import cache

import pytest

from conformance.planted import GOOD, PLANTED, Planted, install
from conformance.planted_towers import PLANTED_IN_TOWERS
from visionaccel.backends import Registry
from visionaccel.bundle import ProgramRequest, export_bundle
from visionaccel.core.program import AnyGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError
from visionaccel.validation import validate_bundle
from visionaccel_testing.checkpoints import TINY_TOWERS, random_checkpoint
from visionaccel_testing.conformance import CHECKS, BackendUnderTest, KnownFailure, conformance_suite, run_checks


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the Python path of this process and of those that it starts."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [name for name in sys.modules if name.startswith("visionaccel_kit_")]:
        del sys.modules[name]


ALL = (*PLANTED, *PLANTED_IN_TOWERS)


@pytest.mark.parametrize("planted", ALL, ids=lambda planted: planted.name)
def test_a_planted_fault_is_found_by_the_check_that_names_it(planted: Planted, site, tmp_path):
    name = f"kit_{planted.name}"
    install(site, name, planted.source, planted.requires)
    (check,) = (check for check in CHECKS if check.name == planted.check)
    (outcome,) = run_checks(BackendUnderTest(name, source=planted.opens), tmp_path / "work", checks=[check])
    assert outcome.status == "failed"
    assert planted.says in outcome.detail


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """A function that returns a family's tower, and a bundle of its program for any grid; made once."""

    @cache
    def of(family: str):
        folder = tmp_path_factory.mktemp(family)
        tower = open_tower(random_checkpoint(folder / "checkpoint", family=family))
        return tower, export_bundle(tower, folder / "bundle", [ProgramRequest(AnyGrid())])

    return of


@pytest.mark.parametrize("planted", PLANTED_IN_TOWERS, ids=lambda planted: planted.name)
def test_a_fault_in_the_mathematics_is_found_by_validation_too(planted: Planted, site, bundles):
    name = f"kit_{planted.name}"
    install(site, name, planted.source)
    tower, bundle = bundles(planted.check.removeprefix("L2-tower-"))
    (result,) = validate_bundle(bundle, tower, backend=name, registry=Registry()).certificate.programs
    assert re.search("lowest cosine|relative error|a single repeated number", result.failure or "")
    assert ("deepstack level" in result.failure) == ("deepstack level" in planted.says)


@pytest.mark.parametrize("family", TINY_TOWERS)
def test_validation_of_a_good_backend_finds_nothing_and_says_what_the_reference_was(family, site, bundles):
    install(site, GOOD)
    tower, bundle = bundles(family)
    certificate = validate_bundle(bundle, tower, backend=GOOD, registry=Registry()).certificate
    assert certificate.programs[0].failure is None
    assert certificate.independent == (family != "dots_ocr")  # which transformers does not have


FEW = """
_probe = Backend.probe
def probe(self, program, device):
    if any(spec.name == "position_index" for spec in program.inputs):
        return Rejected("it has no learned positions.", "Choose another backend.")
    return _probe(self, program, device)
Backend.probe = probe
"""


def no_source(checkpoint, folder):
    raise ConfigurationError("its compiler takes no such tower.")


@pytest.mark.parametrize(
    ("source", "reason"), [(None, "it has no learned positions."), (no_source, "its compiler takes no such tower.")]
)
def test_the_check_of_a_tower_that_a_backend_refuses_does_not_apply(source, reason, site, tmp_path):
    install(site, "kit_few", FEW)
    (check,) = (check for check in CHECKS if check.name == "L2-tower-qwen3_vl")
    (outcome,) = run_checks(BackendUnderTest("kit_few", source=source), tmp_path / "work", checks=[check])
    assert outcome.status == "not applicable"
    assert "it does not accept a tower of family qwen3_vl" in outcome.detail
    assert reason in outcome.detail


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_found_in_a_good_backend(seed, site, tmp_path):
    install(site, GOOD)
    # The seed changes weights, images and grids. The other levels are about processes and files: one seed is enough.
    checks = [check for check in CHECKS if seed == 0 or (check.level in (1, 2, 3) and check.name != "L2-digits")]
    outcomes = run_checks(BackendUnderTest(GOOD), tmp_path / "work", checks=checks, seed=seed)
    assert {outcome.check: outcome.detail for outcome in outcomes if outcome.status == "failed"} == {}
    inapplicable = {outcome.check for outcome in outcomes if outcome.status == "not applicable"}
    # It opens checkpoints, as models in files, for any grid; and how much memory it holds is the allocator's choice.
    expected = {"L0-foreign-families", "L1-padding", "L5-tampered"} & {check.name for check in checks}
    assert inapplicable - {"L5-allocation"} == expected


TENSORS = """
import dataclasses, functools
def init(self, program):
    _init(self, program)
    self.capabilities = dataclasses.replace(self.capabilities, takes_tensors=True)
Session.__init__ = init
@functools.cache
def kind():
    import torch
    class DeviceTensor(torch.Tensor):
        def __array__(self, *_, **__):
            raise TypeError("it is on a device")
    return torch.from_numpy, DeviceTensor
def on_device(self, inputs, rows):
    from_numpy, tensor = kind()
    return from_numpy(rows).as_subclass(tensor)
on_output(on_device)
"""


def test_nothing_is_found_in_a_good_backend_that_returns_tensors(site, tmp_path):
    install(site, "kit_tensors", TENSORS)
    # The other checks of level 4 make arrays of embeddings in new processes, as these do here.
    in_this_process = ("L4-concurrent-calls", "L4-two-sessions", "L4-double-close")
    checks = [check for check in CHECKS if check.level < 4 or check.name in in_this_process]
    outcomes = run_checks(BackendUnderTest("kit_tensors"), tmp_path / "work", checks=checks)
    assert {outcome.check: outcome.detail for outcome in outcomes if outcome.status == "failed"} == {}


def test_every_check_of_a_backend_finds_something():
    """The others try what the core does around a backend, which one can break by going around the core only."""
    around = {"L1-refusals", "L5-tampered", "L5-hang"}
    assert {planted.check for planted in ALL} == {check.name for check in CHECKS} - around
    assert len({planted.name for planted in ALL}) == len(ALL) >= 15


def test_a_known_failure_is_told_apart_and_must_fail(site, tmp_path):
    install(site, "kit_known", "on_output(lambda self, inputs, rows: rows.astype(np.float64))")
    known = tuple(KnownFailure(name, date(2026, 11, 1), "the vendor's fault") for name in ("L1-rows", "L0-options"))
    checks = [check for check in CHECKS if check.name in ("L1-rows", "L0-options")]
    outcomes = run_checks(BackendUnderTest("kit_known", known_failures=known), tmp_path / "work", checks=checks)
    found = {outcome.check: outcome for outcome in outcomes}
    assert found["L1-rows"].status == "known failure"
    assert "2026-11-01: the vendor's fault" in found["L1-rows"].detail
    assert found["L0-options"].status == "failed"
    assert "remove that" in found["L0-options"].detail


def test_without_the_digits_model_its_check_fails_and_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("visionaccel_testing.conformance.numbers.find_spec", lambda name: None)
    (digits,) = (check for check in CHECKS if check.name == "L2-digits")
    (outcome,) = run_checks(BackendUnderTest("torch_ref"), tmp_path / "work", checks=[digits])
    assert outcome.status == "failed"
    assert "pip install 'visionaccel[testing]'" in outcome.detail


def test_a_known_failure_must_be_of_a_check_that_there_is_and_applies(tmp_path):
    since = date(2026, 11, 1)
    (padding,) = (check for check in CHECKS if check.name == "L1-padding")
    declared = BackendUnderTest("torch_ref", known_failures=(KnownFailure("L1-padding", since, "a reason"),))
    (outcome,) = run_checks(declared, tmp_path / "work", checks=[padding])
    assert (outcome.status, "does not apply" in outcome.detail) == ("failed", True)
    unknown = BackendUnderTest("torch_ref", known_failures=(KnownFailure("L1-paddings", since, "a reason"),))
    for use in (lambda: conformance_suite(unknown), lambda: run_checks(unknown, tmp_path / "other")):
        with pytest.raises(ConfigurationError, match="unknown check L1-paddings"):
            use()
