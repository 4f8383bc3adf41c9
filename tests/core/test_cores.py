"""The cores of an encoder: how they are chosen, and that every thread of every runtime stays on them."""

import contextlib
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from towers import random_patches
from visionaccel import open_encoder
from visionaccel.core import cores as module
from visionaccel.core.cores import (
    Host,
    child_environment,
    choose_cores,
    on_cores,
    parse_cores,
    process_cores,
    shown_cores,
    thread_limit,
)
from visionaccel.encoder import open_tower
from visionaccel.errors import SettingsError
from visionaccel.integrations.vllm.compat import worker
from visionaccel.service import open_guarded
from visionaccel.settings import Settings, load_settings

pytestmark = pytest.mark.skipif(len(process_cores()) < 2, reason="needs two cores")

ONE, OTHER, *_ = sorted(process_cores())
BOTH = frozenset({ONE, OTHER})
GRIDS = [(1, 8, 8)]
BIND = "VLLM_CPU_OMP_THREADS_BIND"

THREADS = """
import json, os, sys
def threads(pid="self"):
    found = {}
    for name in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{name}/status") as file:
                found[name] = next(line.split()[1] for line in file if line.startswith("Cpus_allowed_list"))
        except FileNotFoundError:  # it ended
            pass
    return found

import torch  # OpenMP binds the main thread now, if it is told to, as in vLLM's workers
from visionaccel import open_encoder
from towers import random_patches
checkpoint, backend, cores, isolation = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
patches, grids = random_patches([(1, 16, 16)]), [(1, 16, 16)]
main, before = sorted(os.sched_getaffinity(0)), threads()
encoder = open_encoder(checkpoint, backend=backend, cores=cores, isolation=isolation)
encoder.encode(patches, grids)
found = {"main": [main, sorted(os.sched_getaffinity(0))]}
if isolation == "none":
    found["new"] = [cores for name, cores in threads().items() if name not in before]
else:
    session = encoder.programs[0].session
    found["child"] = [list(threads(session.pid).values())]
    with open(f"/proc/{session.pid}/environ") as file:
        found["environment"] = file.read()
    os.kill(session.pid, 9)
    try:
        encoder.encode(patches, grids)
    except Exception:
        encoder.encode(patches, grids)
    assert session.restarts == 1
    found["child"].append(list(threads(session.pid).values()))
print(json.dumps(found))
encoder.close()
"""


def threads_of(checkpoint, backend, cores, isolation="none", bound=None):
    """Which cores threads of a fresh process may run on that has opened an encoder and called it once.

    Args:
        checkpoint: The checkpoint.
        backend: The backend.
        cores: Those of the encoder.
        isolation: As of `open_encoder`.
        bound: OpenMP is told to bind the process to this core, as vLLM tells its workers.
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    if bound is not None:
        environment |= {"OMP_NUM_THREADS": "1", "GOMP_CPU_AFFINITY": str(bound)}
    command = [sys.executable, "-c", THREADS, str(checkpoint), backend, json.dumps(sorted(cores)), isolation]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("backend", ["onnxrt", "openvino", "torch_ref"])
def test_every_thread_of_a_runtime_stays_on_its_core(tiny, backend):
    found = threads_of(tiny, backend, {OTHER})
    assert set(found["new"]) <= {str(OTHER)}
    assert found["main"] == [sorted(process_cores())] * 2, "the caller has its own cores back"


@pytest.mark.parametrize("backend", ["onnxrt", "openvino"])
def test_threads_made_by_a_bound_main_thread_are_not_bound_with_it(tiny, backend):
    found = threads_of(tiny, backend, BOTH, bound=ONE)
    assert found["main"] == [[ONE], [ONE]]
    assert set(found["new"]) == {shown_cores(BOTH)}


@pytest.fixture
def torch_threads():
    """torch has one thread for each operator, as in vLLM's engine; afterwards as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize(("options", "cores", "threads"), [({}, BOTH, 2), ({}, None, 1), ({"threads": 3}, BOTH, 3)])
def test_torch_has_a_thread_for_each_core_unless_the_option_says_otherwise(tiny, options, cores, threads):
    with open_encoder(tiny, backend="torch_ref", cores=cores, options=options) as encoder:
        encoder.encode(random_patches(GRIDS), GRIDS)
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("torch_threads")
def test_where_the_number_of_torchs_threads_belongs_to_another_it_is_asked_for_once(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)  # as vLLM's workers on the CPU do
    with open_encoder(tiny, backend="torch_ref", cores=BOTH) as encoder:
        for _ in range(3):
            encoder.encode(random_patches(GRIDS), GRIDS)
    assert asked == [2]


def test_a_child_process_and_its_successor_run_on_the_cores_whatever_its_parent_is_bound_to(tiny):
    found = threads_of(tiny, "torch_ref", {OTHER}, isolation="process", bound=ONE)
    first, second = found["child"]
    assert set(first) == set(second) == {str(OTHER)}
    assert "GOMP_CPU_AFFINITY" not in found["environment"]
    assert "OMP_NUM_THREADS" not in found["environment"]


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("0", {0}),
        ("0-3,8", {0, 1, 2, 3, 8}),
        (" 5, 2 - 4 ", {2, 3, 4, 5}),
        ("3,3", {3}),
        ("ALL", "all"),
    ],
)
def test_lists_of_cores_are_read(monkeypatch, text, cores):
    monkeypatch.setenv("VISIONACCEL_CPU_CORES", text)
    assert load_settings().cpu_cores == cores


@pytest.mark.parametrize("text", ["x", "1-", "-1", "3-1", "0,,1", ",", "0:1", "1.5", "0-99999999", "٣", "auto"])
def test_what_is_no_list_is_refused(monkeypatch, text):
    monkeypatch.setenv("VISIONACCEL_CPU_CORES", text)
    with pytest.raises(SettingsError, match=r"VISIONACCEL_CPU_CORES=.*is not a core or core range"):
        load_settings()


@given(cores=st.frozensets(st.integers(0, 300), min_size=1))
def test_cores_are_shown_as_they_are_read(cores):
    assert parse_cores(shown_cores(cores)) == cores


@pytest.mark.parametrize("host", [None, Host(BOTH, frozenset({ONE}), "why")])
def test_named_cores_are_taken_and_others_than_may_be_used_refused(host):
    assert choose_cores(frozenset({ONE}), host).cores == {ONE}
    assert choose_cores("all", host).cores == (process_cores() if host is None else BOTH)
    beyond = max(os.cpu_count(), OTHER + 1)
    with pytest.raises(
        SettingsError, match=rf"VISIONACCEL_CPU_CORES={ONE},.*may not use {beyond}, or they do not exist"
    ):
        choose_cores(frozenset({ONE, beyond}), host)


def test_without_a_language_model_nothing_is_chosen():
    assert choose_cores(None).cores is None


@pytest.mark.parametrize(
    ("taken", "cores", "why"),
    [
        ({0, 1}, {2, 3, 6, 7}, "busy"),
        ({0, 1, 2, 3}, {4, 5, 6, 7}, "busy"),
        ({0, 1, 2, 3, 4, 5, 6}, {7}, "busy"),
        (set(range(8)), set(range(8)), "busy, which leaves no other core"),
        (set(), set(range(8)), "busy"),
    ],
)
def test_the_language_models_cores_are_left_to_it_and_their_other_hardware_threads_while_others_remain(
    monkeypatch, tmp_path, taken, cores, why
):
    for core in range(8):  # four cores of two hardware threads
        place = tmp_path / f"cpu{core}" / "topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(f"{core % 4},{core % 4 + 4}\n")
    monkeypatch.setattr(module, "_TOPOLOGY", tmp_path)
    module._physical.cache_clear()
    try:
        choice = choose_cores(None, Host(frozenset(range(8)), frozenset(taken), "busy"))
        with monkeypatch.context() as patch:
            patch.setattr(module, "_allowed", lambda: frozenset(range(6)))
            assert thread_limit() == (4 if os.cpu_count() > 6 else None)
            patch.setattr(module, "cores_here", lambda: frozenset(range(6)))
            assert thread_limit() == 4, "hardware threads of one core count once"
    finally:
        module._physical.cache_clear()
    assert (choice.cores, choice.why) == (cores, why)


def test_a_thread_gets_its_cores_back_and_no_other_is_moved():
    seen, go = {}, threading.Event()

    def elsewhere():
        go.wait(60)
        seen["meanwhile"] = os.sched_getaffinity(0)

    before = os.sched_getaffinity(0)
    other = threading.Thread(target=elsewhere)
    other.start()
    with on_cores(frozenset({ONE})):
        with contextlib.suppress(KeyError), on_cores(frozenset({OTHER})):
            assert os.sched_getaffinity(0) == {OTHER}
            raise KeyError
        assert os.sched_getaffinity(0) == {ONE}
        assert thread_limit() == 1
        go.set()
        other.join()
    assert seen["meanwhile"] == before
    assert os.sched_getaffinity(0) == before


def test_an_encoder_is_not_opened_on_cores_that_there_are_not(tiny):
    with pytest.raises(SettingsError, match="cannot be pinned to cores"):
        open_encoder(tiny, backend="onnxrt", cores=[ONE, max(os.cpu_count(), OTHER + 1)])
    assert os.sched_getaffinity(0) == process_cores()


def test_only_a_child_of_an_encoder_with_cores_loses_openmps_binding(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with on_cores(BOTH):
        assert child_environment()["OMP_NUM_THREADS"] == "3", "a number alone is the user's"
    monkeypatch.setenv("OMP_PLACES", "{0}")
    assert child_environment() == dict(os.environ)
    with on_cores(BOTH):
        assert not child_environment().keys() & {"OMP_PLACES", "OMP_NUM_THREADS"}


def test_the_log_says_once_which_cores_and_why(tiny, caplog):
    caplog.set_level(logging.INFO, "visionaccel")
    settings = Settings(backend="onnxrt", cpu_cores=frozenset({OTHER}), devices=("cpu", "cpu"))
    for encoder in open_guarded(open_tower(tiny), settings, settings.wanted_devices):
        encoder.close()
    said = [record.message for record in caplog.records if "threads run on cores" in record.message]
    assert said == [f"The encoder's threads run on cores {OTHER} of the CPU: VISIONACCEL_CPU_CORES={OTHER}."]


@pytest.mark.parametrize(
    ("bind", "taken", "why"),
    [
        (None, set(), "lists none"),
        ("auto", set(), "lists none"),
        ("nobind", set(), "lists none"),
        (str(ONE), {ONE}, f"={ONE} binds the language model to {ONE}"),
        (f"{ONE}|{OTHER}", BOTH, f"binds the language model to {shown_cores(BOTH)}"),
    ],
)
def test_pipelined_what_vllm_lists_is_taken(monkeypatch, bind, taken, why):
    monkeypatch.delenv(BIND, raising=False)
    if bind is not None:
        monkeypatch.setenv(BIND, bind)
    host = worker.encoder_host("cpu", in_step=False)
    assert (host.usable, host.taken) == (process_cores(), taken)
    assert why in host.why
    assert worker.encoder_host("cuda:0", in_step=False) is None


@pytest.mark.parametrize(
    ("bind", "taken"), [("auto", set()), (shown_cores(BOTH), set()), (f"{ONE}|{OTHER}", {OTHER}), ("7000|7001", set())]
)
def test_in_the_step_only_other_workers_cores_are_taken(monkeypatch, bind, taken):
    monkeypatch.setenv(BIND, bind)
    with on_cores(frozenset({ONE})):  # the main thread, which vLLM binds
        host = worker.encoder_host("cpu", in_step=True)
    assert host.taken == taken
    assert "the language model waits" in host.why


def _worker(bind, connection):
    os.environ[BIND] = bind
    os.sched_setaffinity(0, {ONE})
    connection.send(worker.started_cores())


@pytest.mark.parametrize(("bind", "cores"), [("auto", process_cores()), ("nobind", {ONE})])
def test_a_workers_cores_are_those_of_the_engine_that_started_it(bind, cores):
    near, far = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_worker, args=(bind, far))
    process.start()
    try:
        assert near.poll(60)
        assert near.recv() == cores
    finally:
        process.join()
        near.close()
        far.close()
