"""The C++ bridge and the simulator behind the contract, in this process."""

import gc
import logging
import os
import signal
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from simulated import GRID, simulated_program, small_model
from towers import random_patches, reference
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.program import Program
from visionaccel.errors import ArtifactError, ConfigurationError, DeviceError, OutputError
from visionaccel_flexmlrt import FlexMLRTBackend
from visionaccel_flexmlrt.artifact import FLEXMLRT_DIRECTORY, FLEXMLRT_RAI
from visionaccel_flexmlrt.backend import FlexMLRTOptions
from visionaccel_flexmlrt.runtime import simulator_faults
from visionaccel_flexmlrt.simulator import compile_partition
from visionaccel_testing.simulated import SimulatedBackend

OUTPUT = "window_embeddings"


def open_session(program, **options):
    return FlexMLRTBackend().open(program, "simulator", FlexMLRTOptions(**options))


def test_the_answer_is_the_reference_s(session, program, tower, tiny):
    patches = random_patches([GRID])
    host = tower.host(program)
    embeddings = host.embeddings(session.run(host.inputs(patches, [GRID])), [GRID])
    np.testing.assert_allclose(embeddings, reference(tiny, patches, [(1, GRID.h, GRID.w)]), atol=2e-5)


def test_a_script_that_an_option_names_is_about_its_own_session(program, inputs, tmp_path, monkeypatch):
    monkeypatch.delenv("FLEXMLRT_SIMULATOR_SCRIPT", raising=False)
    (tmp_path / "script").write_text("forward throw")
    with closing(open_session(program, simulator_script=tmp_path / "script")) as broken:
        for _ in range(2):
            with pytest.raises(DeviceError):
                broken.run(inputs)
    with closing(open_session(program)) as whole:
        assert whole.run(inputs)
    assert "FLEXMLRT_SIMULATOR_SCRIPT" not in os.environ


def test_scripts_of_two_threads_hold_one_after_the_other(monkeypatch):
    monkeypatch.delenv("FLEXMLRT_SIMULATOR_SCRIPT", raising=False)
    seen = []

    def other():
        with simulator_faults(Path("other")):
            seen.append(os.environ["FLEXMLRT_SIMULATOR_SCRIPT"])
            between.wait(10)
        seen.append("ended")

    between = threading.Event()
    thread = threading.Thread(target=other)
    with simulator_faults(Path("first")):
        thread.start()
        thread.join(0.3)
        assert os.environ["FLEXMLRT_SIMULATOR_SCRIPT"] == "first"
    between.set()
    thread.join()
    assert seen == ["other", "ended"]
    assert "FLEXMLRT_SIMULATOR_SCRIPT" not in os.environ


def test_a_variable_that_is_removed_in_a_scripts_context_stays_removed(monkeypatch):
    monkeypatch.delenv("FLEXMLRT_SIMULATOR_SCRIPT", raising=False)
    with simulator_faults(Path("script")):
        del os.environ["FLEXMLRT_SIMULATOR_SCRIPT"]
    assert "FLEXMLRT_SIMULATOR_SCRIPT" not in os.environ


def test_the_simulated_device_takes_the_formats_of_compiled_artifacts():
    taken = {name for name in SimulatedBackend.formats if name.startswith("flexmlrt.")}
    assert taken == {FLEXMLRT_RAI, FLEXMLRT_DIRECTORY}


def test_every_report_says_that_it_is_a_simulator(session, program):
    assert session.capabilities.simulated
    assert session.capabilities.device == "simulator"
    assert "SIMULATOR" in FlexMLRTBackend().probe(program, "simulator").notes


@pytest.mark.parametrize("device", [None, "npu"])
def test_the_simulator_must_be_asked_for_by_name(program, device):
    verdict = FlexMLRTBackend().probe(program, device)
    assert "was made for device 'simulator'" in verdict.reason
    assert "VISIONACCEL_DEVICE=simulator" in verdict.hint


def test_the_caller_owns_what_it_got(session, inputs):
    first = session.run(inputs)[OUTPUT]
    kept = first.copy()
    others = [session.run({name: array + step for name, array in inputs.items()}) for step in (1, 2, 3)]
    np.testing.assert_array_equal(first, kept)
    session.close()
    del others
    gc.collect()
    np.testing.assert_array_equal(first, kept)
    first[:] = 0  # writable


def test_contiguous_input_is_passed_as_it_is(session, inputs, monkeypatch):
    (array,) = inputs.values()
    array.flags.writeable = False
    before, passed, model = array.copy(), [], session._model

    class Watched:
        def run(self, arrays):
            passed.extend(arrays)
            return model.run(arrays)

    monkeypatch.setattr(session, "_model", Watched())
    session.run(inputs)
    monkeypatch.undo()
    assert passed[0] is array
    np.testing.assert_array_equal(array, before)
    with pytest.raises(ValueError, match="C-contiguous"):
        session._model.run([np.asfortranarray(array)])


def test_input_that_is_not_contiguous_gives_the_same_answer(session, inputs):
    expected = session.run(inputs)[OUTPUT]
    strided = {name: np.repeat(array, 2, axis=1)[:, ::2] for name, array in inputs.items()}
    assert not any(array.flags.c_contiguous for array in strided.values())
    np.testing.assert_array_equal(session.run(strided)[OUTPUT], expected)


@pytest.mark.parametrize("wrong", [lambda a: a[:-1], lambda a: a.astype(np.float64), lambda a: a.ravel()])
def test_another_shape_or_dtype_is_refused_without_a_cast(session, inputs, wrong):
    with pytest.raises(ValueError, match=r"expected patch_embeddings: float32\[24, 4, 32\]"):
        session.run({name: wrong(array) for name, array in inputs.items()})


def test_other_python_threads_run_while_the_device_works(session, inputs, script):
    script("latency_ms 300")
    ticks = []
    running = threading.Event()
    running.set()

    def tick():
        while running.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.01)

    thread = threading.Thread(target=tick)
    thread.start()
    started = time.monotonic()
    session.run(inputs)
    ended = time.monotonic()
    running.clear()
    thread.join()
    assert sum(started < tick < ended for tick in ticks) >= 5


def test_one_call_is_in_flight(session, inputs, script):
    script("latency_ms 100")
    started = time.monotonic()
    threads = [threading.Thread(target=session.run, args=(inputs,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        ("throw", DeviceError, "DRM_IOCTL_AMDXDNA_EXEC_CMD failed"),
        ("status", DeviceError, "status 5"),
        ("unwritten", OutputError, "left 24 of 24 rows of 'window_embeddings' unwritten"),
        ("partial", OutputError, "left 1 of 24 rows of 'window_embeddings' unwritten"),
        ("zeros", OutputError, "returned zeros in 24 of 24 rows"),
    ],
)
def test_a_fault_is_an_error_that_names_it_and_the_next_call_is_right(session, inputs, script, fault, error, text):
    expected = session.run(inputs)[OUTPUT]
    script(f"forward {fault}")
    with pytest.raises(error, match=text):
        session.run(inputs)
    script("order shuffled")
    np.testing.assert_array_equal(session.run(inputs)[OUTPUT], expected)


@pytest.mark.parametrize(("fault", "text"), [("throw", "the device refused the model"), ("bad", r"not good\(\)")])
def test_a_model_that_is_refused_is_an_error_and_the_next_opens(program, inputs, script, fault, text):
    script(f"constructor {fault}")
    with pytest.raises(DeviceError, match=text):
        open_session(program)
    script("")
    with closing(open_session(program)) as session:
        session.run(inputs)


def test_a_second_model_in_the_process_is_refused_before_it_spoils_the_first(session, program, inputs, script):
    expected = session.run(inputs)[OUTPUT]
    script("second nan")
    with pytest.raises(DeviceError, match="has a FlexMLRT model already"):
        open_session(program)
    np.testing.assert_array_equal(session.run(inputs)[OUTPUT], expected)


def test_tensors_are_bound_by_their_stored_names(program, script):
    (spec,) = program.inputs
    renamed = replace(program, stored_names={spec.name: "/elsewhere/Gather_output_0"})
    with pytest.raises(DeviceError, match=r"no input /elsewhere/Gather_output_0.*the model's inputs are: patch_emb"):
        open_session(renamed)


def test_tensors_of_another_shape_are_refused_when_opened(program, script):
    (spec,) = program.inputs
    wrong = replace(program, inputs=(replace(spec, shape=(spec.shape[0] * 2, *spec.shape[1:])),))
    with pytest.raises(DeviceError, match=r"float32\[48, 4, 32\] of 24576 bytes is expected"):
        open_session(wrong)


def test_messages_go_to_python_s_logging_and_nothing_to_the_terminal(program, inputs, script, caplog, capfd):
    with caplog.at_level(logging.DEBUG, "visionaccel.flexmlrt"), closing(open_session(program)) as session:
        session.run(inputs)
    assert any("opened" in record.message for record in caplog.records)
    assert capfd.readouterr() == ("", "")


def test_a_fork_may_drop_a_model_of_its_parent_but_not_run_it(session, inputs):
    child = os.fork()
    if child == 0:
        try:
            session.run(inputs)
        except DeviceError as error:
            refused = "open it after the fork" in str(error)
            session._model = None  # dropped
            os._exit(0 if refused else 1)
        os._exit(2)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(ended[1]) == 0


def test_a_git_lfs_pointer_is_named_as_one(program, tmp_path):
    pointer = tmp_path / "vision.rai"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3000000000\n")
    verdict = FlexMLRTBackend().probe(replace(program, format="flexmlrt.rai", artifact=pointer), "npu")
    assert "Git LFS pointer" in verdict.reason
    assert "git lfs pull" in verdict.hint


@pytest.mark.parametrize("damage", [lambda data: data[:5000], lambda data: data[:16] + bytes(32) + data[48:]])
def test_a_damaged_artifact_is_an_error_of_opening(tower, tmp_path, damage, script):
    program = simulated_program(tower, tmp_path, GRID)
    program.artifact.write_bytes(damage(program.artifact.read_bytes()))
    with pytest.raises(DeviceError, match="truncated or damaged"):
        open_session(program)


def test_a_missing_artifact_is_an_artifact_error(program, tmp_path):
    with pytest.raises(ArtifactError, match="cannot be read"):
        open_session(replace(program, format="flexmlrt.rai", artifact=tmp_path / "absent.rai"))


def test_without_the_sdk_the_npu_says_what_is_missing(tower, tmp_path):
    program = simulated_program(tower, tmp_path, GRID)
    program.artifact.write_bytes(b"real" * (1 << 19))
    verdict = FlexMLRTBackend().probe(replace(program, device="npu"), "npu")
    assert "FlexMLRT SDK" in verdict.reason or "libflexmlrt.so was not found" in verdict.reason
    assert "FLEXMLRT_ROOT" in verdict.hint or "RYZEN_AI_INSTALLATION_PATH" in verdict.hint
    with pytest.raises(ConfigurationError, match=r"FlexMLRT SDK|libflexmlrt"):
        FlexMLRTBackend().open(replace(program, device="npu"), "npu", FlexMLRTOptions())


def test_hundreds_of_cycles_do_not_leak_a_model_each(tmp_path, script, caplog):
    caplog.set_level(logging.ERROR)
    program = small_program(tmp_path)
    inputs = {spec.name: np.ones(spec.shape, np.float32) for spec in program.inputs}

    def cycle(times):
        for _ in range(times):
            with closing(open_session(program)) as session:
                session.run(inputs)
        gc.collect()

    cycle(50)
    before = resident_kib()
    cycle(250)
    assert resident_kib() - before < 512  # a leaked model takes at least 4 KiB


def small_program(folder):
    """A program of one product, so that hundreds of openings take seconds."""
    inputs, outputs = (TensorSpec("x", "float32", (8, 16)),), (TensorSpec("y", "float32", (8, 4)),)
    onnx.save(small_model(rows=8, outputs=4), folder / "small.onnx")
    compile_partition(folder / "small.onnx", folder / "small.rai")
    return Program(
        name="small",
        family="none",
        format=FLEXMLRT_RAI,
        folder=folder,
        inputs=inputs,
        outputs=outputs,
        weights={},
        uniform_frames=True,
        device="simulator",
        artifact=folder / "small.rai",
    )


def resident_kib():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])
