"""The simulated device: it takes the configured time, uses no CPU while it sleeps, and fails on demand."""

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch

from gated import wait_until
from simulated import GRID, simulated_program
from towers import random_patches
from visionaccel import open_encoder
from visionaccel.backends import AUTO, Accepted, Registry, Rejected, default_registry, select
from visionaccel.bundle import ProgramRequest, export_bundle
from visionaccel.core.grid import Grid
from visionaccel.core.program import FixedGrid, HostSplit
from visionaccel.encoder import open_tower
from visionaccel.errors import BackendUnavailableError, DeviceError, DeviceLostError, OutputError, SettingsError
from visionaccel.isolation import IsolatedSession
from visionaccel.settings import parse_options
from visionaccel_testing.simulated import FaultRule, SimulatedBackend, SimulatedOptions, Target, struck

GRIDS = [(1, 4, 6)]
WRAPPED = ["onnxrt", "torch_ref"]


def simulated(source, device=None, isolation="auto", deadline=120.0, **options):
    return open_encoder(
        source, backend="simulated", device=device, options=options, isolation=isolation, deadline=deadline
    )


def session(encoder):
    return encoder.programs[0].session


def seconds(encoder, grids=GRIDS):
    """Wall and CPU seconds of one call."""
    patches = random_patches(grids)
    wall, cpu = time.monotonic(), time.process_time()
    encoder.encode(patches, grids)
    return time.monotonic() - wall, time.process_time() - cpu


@pytest.fixture
def sleeps(monkeypatch):
    """What sessions of this process sleep, which they then do not."""
    wished = []
    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=wished.append)
    monkeypatch.setattr("visionaccel_testing.simulated.session.time", clock)
    return wished


# Answers, and whose they are


def test_the_wrapped_session_begins_to_end_with_the_others(tiny, monkeypatch):
    calls = []
    encoder = simulated(tiny, "onnxrt")
    inner = session(encoder)._inner
    for name in ("begin_close", "close"):
        monkeypatch.setattr(inner, name, lambda name=name: calls.append(name))
    encoder.close()
    assert calls == ["begin_close", "close"]


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_answers_are_the_wrapped_backends(tiny, wrapped):
    grids = [(1, 6, 10), (2, 4, 4), (1, 6, 10)]
    patches = random_patches(grids)
    with simulated(tiny, wrapped) as ours, open_encoder(tiny, backend=wrapped) as theirs:
        np.testing.assert_array_equal(ours.encode(patches, grids), theirs.encode(patches, grids))


def test_tensors_go_to_a_wrapped_backend_that_takes_them(tiny):
    with simulated(tiny, "torch_ref", replay=True) as encoder:
        patches = torch.from_numpy(random_patches(GRIDS))
        first, again = encoder.encode(patches, GRIDS), encoder.encode(patches, GRIDS)
    assert isinstance(first, torch.Tensor)
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("device", "shown"),
    [
        (None, "simulated:onnxrt/cpu"),
        ("auto@2", "simulated:onnxrt/cpu@2"),
        ("onnxrt/cpu", "simulated:onnxrt/cpu"),
        ("onnxrt/cpu@1", "simulated:onnxrt/cpu@1"),
        ("torch_ref@0", "simulated:torch_ref/cpu@0"),
    ],
)
def test_a_device_names_what_it_wraps(tiny, device, shown):
    with simulated(tiny, device) as encoder:
        assert encoder.capabilities.device == shown
        assert encoder.capabilities.simulated


@pytest.mark.parametrize("text", ["", "@1", "onnxrt@", "onnxrt@x", "onnxrt/", "/cpu", "simulated", "simulated/onnxrt"])
def test_what_names_no_device_is_refused(tiny, text):
    with pytest.raises(SettingsError, match="unknown simulated device"):
        Target.parse(text)
    (candidate,) = select(default_registry(), open_tower(tiny), "simulated", text).candidates
    assert isinstance(candidate.verdict, Rejected)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("nothing", "no installed backend is named 'nothing'"),
        ("onnxrt/toaster", "onnxrt: unknown device 'toaster'"),
        ("flexmlrt", "supported formats: flexmlrt"),
    ],
)
def test_what_the_wrapped_backend_refuses_is_refused_with_its_reason(tiny, device, message):
    with pytest.raises(BackendUnavailableError, match=message):
        simulated(tiny, device)


def test_auto_never_takes_it_but_says_how_to_get_it(tiny):
    selection = select(default_registry(), open_tower(tiny), AUTO)
    verdicts = {candidate.entry.name: candidate.verdict for candidate in selection.candidates}
    assert selection.require()[0] == "onnxrt"
    assert verdicts["simulated"] == Rejected(
        "`auto` does not choose this backend.", "Set VISIONACCEL_BACKEND=simulated."
    )


def test_nobody_is_sent_to_it_where_no_other_backend_is_installed(tiny, monkeypatch):
    from visionaccel.backends import registry

    installed = registry.entry_points
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [p for p in installed(group=group) if p.name == "simulated"]
    )
    with pytest.raises(BackendUnavailableError, match="no backend is installed") as caught:
        select(Registry(), open_tower(tiny)).require()
    assert "simulated" not in str(caught.value)


def test_the_verdict_says_that_it_is_simulated_and_who_computes(tiny):
    (candidate,) = select(default_registry(), open_tower(tiny), "simulated", "torch_ref").candidates
    assert isinstance(candidate.verdict, Accepted)
    assert "SIMULATED" in candidate.verdict.notes
    assert "torch_ref" in candidate.verdict.notes


def test_auto_inside_wraps_one_backend_for_all_programs(tiny, tmp_path):
    requests = [ProgramRequest(FixedGrid(Grid(1, 4, side))) for side in (4, 6)]
    bundle = export_bundle(open_tower(tiny), tmp_path / "bundle", requests)
    with simulated(bundle) as encoder:
        assert {each.session.capabilities.device for each in encoder.programs} == {"simulated:onnxrt/cpu"}
        assert [each.program.format for each in encoder.programs] == ["onnx", "onnx"]


def test_a_program_made_for_a_wrapped_device_runs_there(tiny, tmp_path):
    tower = open_tower(tiny)
    program = simulated_program(tower, tmp_path, GRID)

    class One:
        family = tower.family

        def programs(self, formats):
            return (program,) if program.format in formats else ()

    assert select(default_registry(), One(), "simulated", "onnxrt").chosen is None
    assert select(default_registry(), One(), "simulated", "flexmlrt").chosen is None
    chosen = select(default_registry(), One(), "simulated", "flexmlrt/simulator").chosen
    assert chosen is not None
    assert chosen.programs == (program,)
    assert SimulatedBackend().isolation_on("flexmlrt/simulator@1") == "process"


def test_options_of_the_wrapped_backend_are_its_own(tiny):
    with simulated(tiny, "torch_ref", inner={"dtype": "bfloat16"}) as encoder:
        assert encoder.capabilities.precision == "bfloat16"


def test_several_calls_and_batches_are_declared(tiny):
    with simulated(tiny, "torch_ref", max_in_flight=3) as encoder:
        capabilities = encoder.capabilities
    assert (capabilities.thread_safe, capabilities.max_in_flight) == (True, 3)


# Time


def test_a_call_takes_its_latency_and_hardly_any_cpu(tiny):
    with simulated(tiny, latency=0.3) as encoder:
        wall, cpu = seconds(encoder)
        assert session(encoder).overruns == 0
    assert wall >= 0.3
    assert cpu < 0.15


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_patches_are_added_to_the_fixed_latency_which_counts_once(tiny, sleeps, wrapped):
    grids = [(1, 4, 6), (1, 4, 6)]
    with simulated(tiny, wrapped, latency=1.0, per_patch=0.25) as encoder:
        encoder.encode(random_patches(grids), grids)
    assert sleeps == [1.0 + 48 * 0.25]


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_recorded_times_are_used_in_turn_for_each_frame(tiny, sleeps, tmp_path, wrapped):
    recorded = tmp_path / "recorded.json"
    recorded.write_text('{"4x6": [1, 2, 4], "6x6": [100]}')
    with simulated(tiny, wrapped, latency=7.0, recorded=recorded) as encoder:
        for grid in ((1, 4, 6), (2, 4, 6), (1, 4, 6), (1, 6, 6), (1, 4, 4)):
            encoder.encode(random_patches([grid]), [grid])
    assert sleeps == [1, 2 + 4, 1, 100, 7]


def test_programs_of_fixed_grids_and_buckets_take_the_time_of_the_frame(tiny, sleeps, tmp_path):
    tower = open_tower(tiny)
    requests = [
        ProgramRequest(FixedGrid(Grid(1, 4, 6))),
        ProgramRequest(FixedGrid(Grid(1, 4, 4)), HostSplit("grouped")),
        ProgramRequest(tower.bucket(Grid(1, 8, 8))),
    ]
    bundle = export_bundle(tower, tmp_path / "bundle", requests)
    grids = [(1, 4, 6), (1, 4, 4), (1, 6, 6)]
    with simulated(bundle, per_patch=0.5) as encoder:
        encoder.encode(random_patches(grids), grids)
    assert sorted(sleeps) == [8, 12, 18]


def test_a_call_that_computes_for_longer_is_counted_and_logged_once(tiny, caplog):
    with simulated(tiny, latency=1e-6) as encoder:
        seconds(encoder)
        seconds(encoder)
        assert session(encoder).overruns == 2
    (record,) = [record for record in caplog.records if "are too long" in record.message]
    assert "simulated:onnxrt/cpu" in record.message


def test_no_wish_is_no_overrun(tiny):
    with simulated(tiny) as encoder:
        seconds(encoder)
        assert session(encoder).overruns == 0


@pytest.mark.parametrize(("most", "rounds"), [(1, 3), (3, 1)])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_it_works_on_as_many_calls_at_a_time_as_it_says(tiny, wrapped, most, rounds):
    with simulated(tiny, wrapped, latency=0.4, max_in_flight=most) as encoder, ThreadPoolExecutor(3) as pool:
        encoder.encode(random_patches(GRIDS), GRIDS)
        started = time.monotonic()
        list(pool.map(lambda _: seconds(encoder), range(3)))
        wall = time.monotonic() - started
    assert wall >= 0.4 * rounds
    assert rounds == 3 or wall < 0.4 * 3


def test_replayed_answers_cost_no_computation(tiny):
    with simulated(tiny, replay=True) as encoder:
        patches = random_patches(GRIDS)
        first = encoder.encode(patches, GRIDS)
        expected = first.copy()
        session(encoder)._inner.run = None
        again = encoder.encode(patches, GRIDS)
        first[:] = again[:] = 0
        np.testing.assert_array_equal(encoder.encode(patches, GRIDS), expected)
        with pytest.raises(DeviceError):
            encoder.encode(patches + 1, GRIDS)


# Faults


def test_a_raise_says_that_it_is_simulated(tiny):
    with simulated(tiny, faults=[{"all": True, "do": "raise"}]) as encoder:
        with pytest.raises(DeviceError, match=r"simulated fault: call 1 .*\"do\":\"raise\"") as caught:
            seconds(encoder)
        assert "The fault is intended" in caught.value.hint


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_what_is_missing_is_caught_by_the_core_and_what_is_wrong_is_not(tiny, wrapped):
    faults = [{"call": 1, "do": "nan"}, {"call": 2, "do": "zeros"}, {"call": 3, "do": "drift"}]
    patches = random_patches(GRIDS)
    with simulated(tiny, wrapped, faults=faults, replay=True) as encoder:
        with pytest.raises(OutputError, match="NaN or infinity in 6 of 6 rows"):
            encoder.encode(patches, GRIDS)
        with pytest.raises(OutputError, match="a single repeated number in 6 of 6 rows"):
            encoder.encode(patches, GRIDS)
        wrong, right = encoder.encode(patches, GRIDS), encoder.encode(patches, GRIDS)
        np.testing.assert_array_equal(wrong[:, ::2], -right[:, ::2])
        np.testing.assert_array_equal(wrong[:, 1::2], right[:, 1::2])


def test_a_hang_ends_after_its_time(tiny):
    with simulated(tiny, faults=[{"all": True, "do": "hang", "seconds": 0.2}]) as encoder:
        assert seconds(encoder)[0] >= 0.2


@pytest.mark.parametrize(
    ("which", "failed"),
    [({"call": 2}, [2]), ({"every": 2}, [2, 4]), ({"patches": 16}, [3]), ({"all": True}, [1, 2, 3, 4])],
    ids=["call", "every", "patches", "all"],
)
def test_a_rule_is_about_the_calls_it_names(tiny, which, failed):
    found = []
    with simulated(tiny, faults=[{**which, "do": "zeros"}]) as encoder:
        for call, side in enumerate((6, 6, 4, 6), start=1):
            grids = [(1, 4, side)]
            try:
                encoder.encode(random_patches(grids), grids)
            except OutputError:
                found.append(call)
    assert found == failed


def test_the_first_rule_that_applies_decides(tiny):
    with simulated(tiny, faults=[{"call": 1, "do": "drift"}, {"all": True, "do": "raise"}]) as encoder:
        seconds(encoder)
        with pytest.raises(DeviceError, match="simulated fault"):
            seconds(encoder)


@pytest.fixture(scope="module")
def plain(tiny):
    with open_encoder(tiny, backend="onnxrt") as encoder:
        yield encoder


def drifted(answer, right):
    """Whether an answer is what the fault `drift` makes of the right one."""
    wrong = right.copy()
    wrong[:, ::2] *= -1
    spoilt, well = (np.allclose(answer, each, rtol=0, atol=1e-4) for each in (wrong, right))
    assert spoilt != well
    return spoilt


RULE = FaultRule(share=0.5, seed=3, do="drift")


@pytest.mark.parametrize("device", WRAPPED)
@pytest.mark.parametrize("together", [True, False], ids=["one call", "calls of their own"])
def test_a_share_strikes_the_images_that_the_helper_predicts(tiny, plain, device, together):
    images = [random_patches(GRIDS, seed=seed) for seed in range(12)]
    right = [plain.encode(image, GRIDS) for image in images]
    with simulated(tiny, device, faults=(RULE,)) as encoder:
        if together:
            answers = np.split(encoder.encode(np.concatenate(images), GRIDS * 12), 12)
        else:
            answers = [encoder.encode(image, GRIDS) for image in images]
    predicted = [struck(image, RULE) for image in images]
    assert [drifted(*pair) for pair in zip(answers, right, strict=True)] == predicted
    assert 0 < sum(predicted) < 12


def test_a_share_strikes_an_image_in_a_bucket_as_anywhere(tiny, plain, tmp_path):
    tower = open_tower(tiny)
    bundle = export_bundle(tower, tmp_path / "bundle", [ProgramRequest(tower.bucket(Grid(1, 8, 8)))])
    images = [random_patches(GRIDS, seed=seed) for seed in range(6)]
    with simulated(bundle, faults=[RULE]) as encoder:
        for image in images:
            answer = encoder.encode(image, GRIDS)
            assert drifted(answer, plain.encode(image, GRIDS)) == struck(image, RULE)


def test_a_share_is_about_values_whatever_holds_them():
    values = random_patches(GRIDS).astype(ml_dtypes.bfloat16)
    rule = FaultRule(share=0.5, do="raise")
    same = [values, values.astype(np.float32), torch.from_numpy(values.astype(np.float32)).bfloat16()]
    assert len({struck(patches, rule) for patches in same}) == 1


def test_shares_are_about_as_large_as_they_say_and_seeds_pick_others():
    images = np.random.default_rng(0).standard_normal((1000, 4, 6), dtype=np.float32)
    hit = {seed: [struck(image, FaultRule(share=0.2, seed=seed, do="raise")) for image in images] for seed in (0, 1)}
    assert all(150 < sum(each) < 250 for each in hit.values())
    assert hit[0] != hit[1]
    assert not any(struck(image, FaultRule(share=0, do="raise")) for image in images)
    assert all(struck(image, FaultRule(share=1, do="raise")) for image in images)


def test_only_a_share_can_be_asked_about_an_image():
    with pytest.raises(ValueError, match="has no share"):
        struck(random_patches(GRIDS), FaultRule(all=True, do="raise"))


def test_a_switch_turns_faults_on_and_off_while_it_runs(tiny, tmp_path):
    switch = tmp_path / "switch.json"
    with simulated(tiny, switch=switch) as encoder:
        seconds(encoder)
        switch.write_text('[{"all": true, "do": "raise"}]')
        with pytest.raises(DeviceError, match="simulated fault"):
            seconds(encoder)
        switch.write_text("")
        seconds(encoder)
        switch.write_text("[{")
        with pytest.raises(SettingsError, match="is not a list of fault rules"):
            seconds(encoder)
        switch.unlink()
        seconds(encoder)


@pytest.mark.parametrize("do", ["exit", "abort"])
def test_this_process_is_never_ended(tiny, tmp_path, do):
    rules = [{"all": True, "do": do}]
    with pytest.raises(SettingsError, match="would end a process") as caught:
        simulated(tiny, faults=rules)
    assert "VISIONACCEL_ISOLATION=process" in caught.value.hint
    switch = tmp_path / "switch.json"
    with simulated(tiny, switch=switch) as encoder:
        switch.write_text(json.dumps(rules))
        with pytest.raises(DeviceError, match="would end a process other than the device's"):
            seconds(encoder)


# In a child process


def test_it_is_the_same_in_a_process_of_its_own(tiny, tmp_path):
    recorded = tmp_path / "recorded.json"
    recorded.write_text('{"4x6": [0.2]}')
    patches = random_patches(GRIDS)
    options = {
        "recorded": recorded,
        "faults": [{"call": 2, "do": "raise"}, FaultRule(share=0.0, seed=1, do="nan")],
        "switch": str(tmp_path / "switch.json"),
        "inner": {"threads": 1},
    }
    with simulated(tiny, "onnxrt@1", "process", **options) as apart, open_encoder(tiny, backend="onnxrt") as here:
        assert isinstance(session(apart), IsolatedSession)
        assert apart.capabilities.device == "simulated:onnxrt/cpu@1"
        started = time.monotonic()
        np.testing.assert_allclose(apart.encode(patches, GRIDS), here.encode(patches, GRIDS), rtol=0, atol=1e-6)
        assert time.monotonic() - started >= 0.2
        with pytest.raises(DeviceError, match="simulated fault: call 2"):
            apart.encode(patches, GRIDS)


@pytest.mark.parametrize(
    ("rule", "fate"),
    [
        ({"do": "exit"}, "ended with status 1"),
        ({"do": "abort"}, "SIGABRT"),
        ({"do": "hang"}, "did not answer within 2 s"),
    ],
    ids=["exit", "abort", "hang"],
)
def test_what_ends_the_device_costs_one_call(tiny, tmp_path, rule, fate):
    switch = tmp_path / "switch.json"
    with simulated(tiny, "onnxrt", "process", deadline=2.0, switch=switch) as encoder:
        seconds(encoder)
        former = session(encoder).pid
        switch.write_text(json.dumps([{"all": True, **rule}]))
        with pytest.raises(DeviceLostError, match=fate):
            seconds(encoder)
        switch.unlink()
        wait_until(lambda: session(encoder).restarts)
        seconds(encoder)
        assert session(encoder).pid != former


# Options


def test_options_are_written_as_json_in_the_environment():
    given = parse_options('{"latency": 7.5, "faults": [{"share": 0.01, "do": "raise"}], "switch": "/run/faults.json"}')
    options = SimulatedOptions.model_validate(given)
    assert options.faults == (FaultRule(share=0.01, do="raise"),)
    again = SimulatedOptions.model_validate(options.model_dump(by_alias=True, exclude_unset=True))
    assert again == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": -1}, "latency: .*greater than or equal to 0"),
        ({"latency": float("inf")}, "latency: .*finite"),
        ({"lag": 1}, "Supported options: latency, per_patch, recorded"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"faults": [{"do": "raise"}]}, "exactly one of patches, call"),
        ({"faults": [{"do": "raise", "call": 1, "every": 2}]}, "exactly one of patches, call"),
        ({"faults": [{"do": "raise", "share": 1.5}]}, "share: .*less than or equal to 1"),
        ({"faults": [{"do": "explode", "all": True}]}, "do: .*'raise', 'nan'"),
        ({"faults": [{"do": "nan", "all": True, "seed": 1}]}, "seed goes with share"),
        ({"faults": [{"do": "nan", "all": True, "seconds": 1}]}, "seconds go with hang"),
        ({"inner": {"thread": 1}}, "wrapped backend 'onnxrt': thread: .*Supported options: provider"),
        ({"recorded": "/nowhere.json"}, "recorded times .*cannot be read"),
    ],
)
def test_invalid_options_are_refused(tiny, options, message):
    with pytest.raises(SettingsError, match=message):
        simulated(tiny, "onnxrt", **options)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"4x6": 1}', '{"4x6": []}', '{"4x6": [-1]}', '{"4x6": [1e999]}', '{"4*6": [1]}', '{"0x6": [1]}']
)
def test_invalid_recorded_times_are_refused(tiny, tmp_path, text):
    recorded = tmp_path / "recorded.json"
    recorded.write_text(text)
    with pytest.raises(SettingsError, match=r"recorded times .*HEIGHTxWIDTH"):
        simulated(tiny, recorded=recorded)


def test_a_switch_that_holds_no_rules_is_refused_at_once(tiny, tmp_path):
    switch = tmp_path / "switch.json"
    switch.write_text('[{"do": "raise"}]')
    with pytest.raises(SettingsError, match="exactly one of"):
        simulated(tiny, switch=switch)


def test_the_example_in_the_documentation_is_valid():
    page = (Path(__file__).parents[3] / "docs" / "simulated.md").read_text()
    written = [line.partition("=")[2] for line in page.splitlines() if line.startswith("VISIONACCEL_OPTIONS=")]
    for text in written:
        SimulatedOptions.model_validate(parse_options(text.strip("'")))
    assert written


def test_an_opening_fails_by_its_number_and_the_next_one_works(tiny, tmp_path, monkeypatch):
    """In a fallback, which takes no options: the environment names its switch."""
    monkeypatch.setattr("visionaccel_testing.simulated.faults._OPENINGS", itertools.count(1))
    switch = tmp_path / "switch.json"
    switch.write_text('[{"opening": 1, "do": "raise"}]')
    monkeypatch.setenv("SIMULATED_SWITCH", str(switch))
    with pytest.raises(DeviceError, match="simulated fault"):
        open_encoder(tiny, backend="simulated", device="onnxrt")
    with open_encoder(tiny, backend="simulated", device="onnxrt") as encoder:
        assert encoder.encode(random_patches([(1, 4, 4)]), [(1, 4, 4)]).shape == (4, 24)


def test_a_device_may_want_a_process_while_others_live_in_this_one(tiny):
    for device, isolated in (("onnxrt@1+process", True), ("onnxrt@1", False)):
        with simulated(tiny, device) as encoder:
            (opened,) = encoder.programs
            assert isinstance(opened.session, IsolatedSession) is isolated
            assert opened.session.capabilities.device == "simulated:onnxrt/cpu@1"
