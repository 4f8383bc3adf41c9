"""The pipelined mode is tested on the vLLM that is there, whatever its number; the verdict is kept for that build."""

import dataclasses
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile

import pytest

from gated import wait_until
from visionaccel.core.grid import Grid
from visionaccel.core.program import FixedGrid
from visionaccel.errors import ConfigurationError
from visionaccel.integrations.vllm import activation, compat, encoder_source
from visionaccel.integrations.vllm.activation import choose_mode
from visionaccel.integrations.vllm.compat import architectures, contract, engine_config
from visionaccel.integrations.vllm.compat.contract import Feature
from visionaccel.integrations.vllm.encoder_source import Grids
from visionaccel.integrations.vllm.pipelined import self_test
from visionaccel.isolation import as_finding
from visionaccel.settings import load_settings

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own deprecations


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """A cache of the test's own, and a contract that is looked up again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("VISIONACCEL_BACKEND", "onnxrt")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.delenv("VISIONACCEL_MODE", raising=False)
    contract.missing.cache_clear()
    yield tmp_path
    contract.missing.cache_clear()


@pytest.fixture(scope="module")
def built(digits):
    from vllm.engine.arg_utils import EngineArgs

    architectures.register_models()
    return EngineArgs(model=str(digits), dtype="float32", max_model_len=160).create_engine_config()


@pytest.fixture
def config(built):
    """A real engine configuration that nothing of ours has changed."""
    built.ec_transfer_config = None
    built.scheduler_config.scheduler_cls = None
    return built


def runs_again(*_):
    raise AssertionError("the self-test runs again")


def test_a_release_that_was_never_tried_pipelines_once_its_self_test_has_passed(config, monkeypatch, own_folder):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    assert not compat.release().startswith(compat.TRIED_RELEASES)
    choice = choose_mode(config, load_settings())
    assert (choice.mode, choice.reason) == ("pipelined", "nothing prevents it")
    (kept,) = own_folder.glob("visionaccel/*.json")

    # The second start has the verdict; a damaged one is not believed.
    with monkeypatch.context() as patch:
        patch.setattr(self_test, "_run", runs_again)
        assert choose_mode(config, load_settings()).mode == "pipelined"
        patch.setattr(vllm, "__version__", "0.99.1")
        with pytest.raises(AssertionError, match="runs again"):
            choose_mode(config, load_settings())
    kept.write_text('{"problem": nul')
    monkeypatch.setattr(self_test, "_run", lambda kind: "it lost a request")
    assert "failed: it lost a request" in choose_mode(config, load_settings()).reason


BROKEN = {
    "loses a request": (
        """
        def schedule(self, *args, **kwargs):
            if len(self.requests) > 3:  # the last of the queue is never looked at again
                self.waiting.remove_requests([next(iter(self.requests.values()))])
            return schedule_of_vllm(self, *args, **kwargs)
        """,
        "does not end",
    ),
    "never asks the connector": (
        """
        def _try_schedule_encoder_inputs(self, *args, **kwargs):
            connector, self.ec_connector = self.ec_connector, None
            try:
                return try_of_vllm(self, *args, **kwargs)
            finally:
                self.ec_connector = connector
        """,
        "were encoded in the step",
    ),
    "gives other arguments": (
        """
        def _update_request_with_output(self, *args, **kwargs):
            self.ec_connector.update_state_after_alloc("request")
            return update_of_vllm(self, *args, **kwargs)
        """,
        "TypeError",
    ),
}
"""Changes to vLLM's scheduler, as a release might make them, and what the self-test says of each."""


@pytest.mark.parametrize("change", BROKEN)
def test_a_scheduler_that_works_otherwise_fails(change, monkeypatch):
    """In this process, as the child would play it."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from visionaccel.integrations.vllm.pipelined.modelled_run import run_modelled

    source, message = BROKEN[change]
    space = {
        "schedule_of_vllm": Scheduler.schedule,
        "try_of_vllm": Scheduler._try_schedule_encoder_inputs,
        "update_of_vllm": Scheduler._update_request_with_output,
    }
    exec("class Changed:\n" + source, space)
    (name,) = (name for name in vars(space["Changed"]) if not name.startswith("__"))
    monkeypatch.setattr(Scheduler, name, vars(space["Changed"])[name])
    found = run_modelled(contained=True, asynchronous=False)
    assert message in found.detail
    if change == "gives other arguments":  # what is raised is no verdict
        with pytest.raises(self_test._NoVerdictError, match=message):
            self_test._verdict([found])
    else:
        assert message in self_test._verdict([found])


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_vllms_own_schedulers_pass_with_and_without_containment(asynchronous):
    from visionaccel.integrations.vllm.pipelined.modelled_run import run_modelled

    for contained in (True, False):
        assert run_modelled(contained=contained, asynchronous=asynchronous).status == "pass"


def test_a_failed_self_test_means_in_line_and_refuses_what_names_the_pipelined_mode(config, monkeypatch):
    monkeypatch.setattr(self_test, "_run", lambda kind: "request3 does not end")
    choice = choose_mode(config, load_settings())
    assert choice.mode == "inline"
    assert choice.reason == f"its self-test on vLLM {compat.release()} failed: request3 does not end"
    monkeypatch.setattr(self_test, "_run", runs_again)
    monkeypatch.setenv("VISIONACCEL_MODE", "pipelined")
    with pytest.raises(ConfigurationError, match=r"VISIONACCEL_MODE=pipelined.*self-test.*request3 does not end"):
        choose_mode(config, load_settings())
    monkeypatch.delenv("VISIONACCEL_MODE")
    engine_config.use_connector(config, client_embeds=False)
    with pytest.raises(ConfigurationError, match=r"--ec-transfer-config.*self-test.*request3 does not end"):
        choose_mode(config, load_settings())


def test_a_self_test_that_could_not_be_run_is_not_kept(config, monkeypatch, own_folder):
    monkeypatch.setattr(self_test, "_MODULE", "visionaccel.no_such_module")
    choice = choose_mode(config, load_settings())
    assert choice.mode == "inline"
    assert "the self-test could not be run: its process ended with status 1" in choice.reason
    assert not list(own_folder.rglob("*.json"))


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_temporary_folder_of_the_child_is_no_verdict(config, monkeypatch, own_folder, tmp_path):
    """In this process, as the child would meet it."""
    from visionaccel.integrations.vllm.pipelined import modelled_run

    answer = tmp_path / "answer.json"

    def run(kind):
        with monkeypatch.context() as patch:
            patch.setattr(modelled_run, "give_up_after", lambda _: None)
            patch.setattr(tempfile, "mkdtemp", no_space)
            modelled_run.main(str(answer), "60", *kind)
        return self_test._verdict([as_finding(row) for row in json.loads(answer.read_bytes())])

    monkeypatch.setattr(self_test, "_run", run)
    choice = choose_mode(config, load_settings())
    assert choice.mode == "inline"
    assert "the self-test could not be run: OSError: [Errno 28] No space left on device" in choice.reason
    assert not list(own_folder.glob("visionaccel/**/*.json"))


def test_a_full_temporary_folder_at_the_start_is_told_and_means_in_line(config, monkeypatch, own_folder):
    monkeypatch.setattr(tempfile, "mkdtemp", no_space)
    choice = choose_mode(config, load_settings())
    assert choice.mode == "inline"
    assert "the self-test could not be run" in choice.reason
    assert "No space left on device" in choice.reason
    assert not list(own_folder.rglob("*.json"))


def test_the_folder_of_a_self_test_that_is_killed_is_removed(tmp_path):
    """Where the configuration is made, a second process of the play's is killed, as when its time is over."""
    code = (
        "import os, signal\n"
        "from visionaccel.integrations.vllm.compat import modelled_engine\n"
        "from visionaccel.integrations.vllm.pipelined import modelled_run\n"
        "modelled_engine.small_config = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "modelled_run.run_modelled(contained=False, asynchronous=False)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert ended.returncode == -signal.SIGKILL
    wait_until(lambda: not [path for path in tmp_path.iterdir() if (path / "config.json").exists()])


def test_the_verdict_is_of_the_files_that_it_stands_on(monkeypatch, tmp_path, own_folder):
    files = list(self_test._files())
    names = {path.name for path in files}
    assert {"scheduler.py", "encoder_cache_manager.py", "base.py", "request.py", "connector.py"} <= names
    module = tmp_path / "scheduler.py"
    module.write_text("def schedule(): ...")
    monkeypatch.setattr(self_test, "_files", lambda: [module])
    runs = []
    monkeypatch.setattr(self_test, "_run", lambda kind: runs.append(kind) or "")
    for _ in range(2):
        assert self_test.problem(contained=True, asynchronous=False) is None
    assert len(runs) == 1
    module.write_text("def schedule(): return 1")
    assert self_test.problem(contained=True, asynchronous=False) is None
    assert len(runs) == 2


def test_where_no_verdict_can_be_kept_the_self_test_runs_each_time(monkeypatch, tmp_path):
    file = tmp_path / "no-folder"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    runs = []
    monkeypatch.setattr(self_test, "_run", lambda kind: runs.append(kind) or "it lost a request")
    for _ in range(2):
        assert self_test.problem(contained=True, asynchronous=False) == "it lost a request"
    assert len(runs) == 2


def test_the_verdict_is_of_the_scheduler_that_will_run(config, monkeypatch):
    asked = []
    monkeypatch.setattr(self_test, "_run", lambda kind: asked.append(kind) or "")
    for asynchronous in (False, True):
        monkeypatch.setattr(config.scheduler_config, "async_scheduling", asynchronous)
        choose_mode(config, load_settings())
    monkeypatch.setattr(config.scheduler_config, "scheduler_cls", "their.own")
    choose_mode(config, load_settings())
    assert asked == [("own", "sync"), ("own", "async"), ("stock", "async")]


def gone(monkeypatch, target):
    """Take a name away from vLLM."""
    module, _, name = target.partition(":")
    owner = __import__(module, fromlist=["*"])
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    monkeypatch.delattr(owner, last)


@pytest.fixture
def log():
    """What is logged below vLLM's logger, which hands nothing up."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("vllm.visionaccel")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


CONNECTOR = "vllm.distributed.ec_transfer.ec_connector.base:ECConnectorBase"
MODELS = "vllm.model_executor.models.qwen2_5_vl"


@pytest.mark.parametrize(
    ("target", "off", "pipelined", "contained"),
    [
        ("vllm.v1.core.encoder_cache_manager:EncoderCacheManager.free_encoder_input", Feature.CONTAINMENT, True, False),
        (f"{CONNECTOR}.ensure_cache_available", Feature.PIPELINED, False, True),
        ("vllm.v1.engine.output_processor:RequestState._new_completion_output", Feature.REASONS, True, True),
        ("vllm.multimodal.parse:MultiModalDataParser._parse_image_data", Feature.FITTING, True, True),
    ],
)
def test_a_feature_that_misses_a_name_is_off_alone_and_the_log_names_it(
    config, monkeypatch, log, target, off, pipelined, contained
):
    gone(monkeypatch, target)
    monkeypatch.setattr(self_test, "_run", lambda kind: "")
    activation._prepare(config, False)
    (warning,) = (line for line in log if "Without it, " in line)
    assert f"lacks what the {off} feature needs:" in warning
    assert f"{target.replace(':', '.')} does not exist" in warning
    assert (engine_config.is_pipelined(config), config.scheduler_config.scheduler_cls is not None) == (
        pipelined,
        contained,
    )


def test_without_the_contract_of_the_in_line_mode_vllm_does_not_start(config, monkeypatch):
    gone(monkeypatch, f"{MODELS}:Qwen2_5_VisionTransformer")
    with pytest.raises(ConfigurationError, match=r"cannot be replaced: .*Qwen2_5_VisionTransformer does not"):
        activation._prepare(config, False)


def test_what_every_image_request_passes_must_be_there_at_the_start(config, monkeypatch):
    renamed = dataclasses.make_dataclass("ProcessorInputs", ["prompt", "mm_data_items", "mm_processor_options"])
    monkeypatch.setattr("vllm.multimodal.processing.ProcessorInputs", renamed)
    with pytest.raises(ConfigurationError, match=r"ProcessorInputs has no attribute hf_processor_mm_kwargs"):
        activation._prepare(config, False)


@pytest.mark.parametrize("rust", [True, False])
def test_what_does_not_apply_with_the_rust_front_end_is_logged_once(config, monkeypatch, log, rust):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", str(int(rust)))
    monkeypatch.setattr(self_test, "_run", lambda kind: "")
    activation._prepare(config, False)
    warnings = [line for line in log if "VLLM_USE_RUST_FRONTEND" in line]
    assert len(warnings) == rust
    for what in ("mm_processor_kwargs", "NaN", "timed", "/metrics"):
        assert all(what in line for line in warnings)


def test_images_that_must_be_fitted_and_cannot_be_are_no_start(config, monkeypatch):
    gone(monkeypatch, "vllm.multimodal.parse:MultiModalDataParser._parse_image_data")
    grids = Grids(None, (FixedGrid(Grid(1, 8, 8)),), rest=True)
    monkeypatch.setattr(encoder_source, "grids_of", lambda *_: grids)
    with pytest.raises(ConfigurationError, match=r"images cannot be fitted to them: .*_parse_image_data does not"):
        activation._prepare(config, False)


def test_images_that_need_no_fitting_as_a_fallback_takes_them_are_no_obstacle(config, monkeypatch):
    gone(monkeypatch, "vllm.multimodal.parse:MultiModalDataParser._parse_image_data")
    monkeypatch.setenv("VISIONACCEL_FIT", "none")
    grids = Grids(None, (FixedGrid(Grid(1, 8, 8)),), rest=True)
    monkeypatch.setattr(encoder_source, "grids_of", lambda *_: grids)
    monkeypatch.setattr(self_test, "_run", lambda kind: "")
    activation._prepare(config, False)


def test_pipelined_by_name_is_refused_where_its_contract_does_not_hold(config, monkeypatch):
    gone(monkeypatch, f"{CONNECTOR}.ensure_cache_available")
    monkeypatch.setattr(self_test, "_run", runs_again)
    monkeypatch.setenv("VISIONACCEL_MODE", "pipelined")
    with pytest.raises(ConfigurationError, match="ensure_cache_available does not exist"):
        choose_mode(config, load_settings())


def test_doctor_names_what_is_missing(monkeypatch):
    from visionaccel.cli.diagnosis.children import _contract

    assert [(each.name, each.status) for each in _contract(architectures.ARCHITECTURES)] == [("contract", "pass")]
    contract.missing.cache_clear()
    gone(monkeypatch, f"{CONNECTOR}.ensure_cache_available")
    (found,) = _contract(architectures.ARCHITECTURES)
    assert (found.name, found.status) == ("contract: pipelined", "warning")
    assert "ensure_cache_available does not exist" in found.detail
    assert "Without it, images are encoded in the engine's step" in found.detail
