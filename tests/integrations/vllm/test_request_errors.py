"""How a request that failed in the scheduler ends for its client, through vLLM's own output processor."""

import asyncio
import functools
import inspect
import warnings
from types import SimpleNamespace

import pytest

from visionaccel.errors import ConfigurationError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM and what it imports use deprecated parts of torch
    from visionaccel.integrations.vllm import activation
    from visionaccel.integrations.vllm.compat import contract, scheduling, serving
    from visionaccel.integrations.vllm.compat.contract import Feature

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own deprecations

REASON = "image 1 of the prompt could not be encoded: the device is gone."


@pytest.fixture(autouse=True)
def explained(monkeypatch):
    """vLLM's output processor as activation changes it, for one test."""
    from vllm.v1.engine.output_processor import RequestState

    for name in ("_new_completion_output", "make_request_output"):
        monkeypatch.setattr(RequestState, name, inspect.unwrap(getattr(RequestState, name)))
    serving.explain_errors()
    serving.explain_pooling_errors()


def failed_request(pooling):
    """What the scheduler knows of a request that it has just ended."""
    from vllm.v1.engine import FinishReason

    return SimpleNamespace(
        request_id="request-1",
        pooling_params=object() if pooling else None,
        client_index=0,
        trace_headers=None,
        take_events=lambda: None,
        get_finished_reason=lambda: FinishReason.ERROR,
    )


def processed(*, pooling, queue):
    """Send the outputs of a failed request to vLLM's output processor, as the engine and the API server do."""
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    outputs = {}
    scheduling.append_errors(outputs, [(failed_request(pooling), REASON)])
    arrived = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(outputs[0]))
    processor = OutputProcessor(None, log_stats=False)
    kind = RequestOutputKind.FINAL_ONLY
    request = EngineCoreRequest(
        request_id="request-1",
        prompt_token_ids=[1, 2],
        mm_features=None,
        sampling_params=None if pooling else SamplingParams(detokenize=False, output_kind=kind),
        pooling_params=PoolingParams(task="embed", output_kind=kind) if pooling else None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id="request",
    )
    collector = RequestOutputCollector(kind, "request-1") if queue else None
    processor.add_request(request, prompt=None, queue=collector)
    found = processor.process_outputs(arrived.outputs)
    assert not processor.has_unfinished_requests()
    if collector is None:
        (output,) = found.request_outputs
        return output
    return asyncio.run(collector.get())


def message_for_client(call):
    """The message of the error that a client would get, from the exception or as the pooling endpoints find it."""
    from vllm.entrypoints.generate.base.serving import GenerationError

    try:
        output = call()
        error = getattr(output, "error", None)
        if error is not None:
            return error.message
        _ = output.outputs.data
    except GenerationError as raised:
        return str(raised)
    return None


@pytest.mark.parametrize("queue", [True, False], ids=["server", "offline"])
def test_a_failed_pooling_request_ends_with_its_reason(queue):
    assert message_for_client(lambda: processed(pooling=True, queue=queue)) == REASON


def test_a_failed_pooling_result_of_a_release_without_errors_cannot_be_read_as_numbers():
    from vllm.entrypoints.generate.base.serving import GenerationError
    from vllm.outputs import EmbeddingOutput

    failed = serving._FailedPooling(REASON)
    with pytest.raises(GenerationError, match="the device is gone"):
        EmbeddingOutput.from_base(failed)
    assert REASON in repr(failed)


def test_a_failed_completion_of_the_offline_engine_has_its_reason_as_stop_reason():
    (completion,) = processed(pooling=False, queue=False).outputs
    assert completion.finish_reason == "error"
    assert completion.stop_reason == REASON


def test_a_failed_completion_of_a_server_brings_its_reason():
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing, GenerationError

    def served():
        (completion,) = processed(pooling=False, queue=True).outputs
        GenerateBaseServing._raise_if_error(object(), completion.finish_reason, "request-1")

    with pytest.raises(GenerationError, match="the device is gone"):
        served()


@pytest.mark.parametrize("pooling", [True, False], ids=["pooling", "completion"])
def test_a_failed_request_ends_with_its_reason_where_another_plug_in_wrapped_the_method_first(monkeypatch, pooling):
    from vllm.v1.engine.output_processor import RequestState

    name = "make_request_output" if pooling else "_new_completion_output"
    stock = inspect.unwrap(getattr(RequestState, name))

    @functools.wraps(stock)
    def traced(*args, **kwargs):
        return stock(*args, **kwargs)

    monkeypatch.setattr(RequestState, name, traced)
    serving.explain_pooling_errors()
    serving.explain_errors()
    wrapped = getattr(RequestState, name)
    assert wrapped is not traced or (not pooling and serving.takes_request_errors())
    serving.explain_pooling_errors()
    serving.explain_errors()
    assert getattr(RequestState, name) is wrapped, "wrapped once"
    if pooling:
        assert message_for_client(lambda: processed(pooling=True, queue=True)) == REASON


def test_failed_pooling_requests_are_noticed_where_reasons_are_off(digits, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.output_processor import RequestState

    monkeypatch.setattr(RequestState, "make_request_output", inspect.unwrap(RequestState.make_request_output))
    monkeypatch.setattr(activation, "missing", lambda feature: ("a name",) if feature is Feature.REASONS else ())
    monkeypatch.setattr(activation, "_check", lambda *_: None)
    monkeypatch.setenv("VISIONACCEL_MODE", "inline")
    config = EngineArgs(model=str(digits), max_model_len=160, runner="pooling").create_engine_config()
    activation._prepare(config, client_embeds=False)
    assert RequestState.make_request_output is not inspect.unwrap(RequestState.make_request_output)


def test_where_pooling_requests_cannot_end_alone_pooling_models_are_refused(digits, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.output_processor import RequestState

    config = EngineArgs(model=str(digits), max_model_len=160, runner="pooling").create_engine_config()
    monkeypatch.delattr(RequestState, "make_request_output")
    contract.missing.cache_clear()
    with pytest.raises(ConfigurationError, match=r"pooling models cannot be served on vLLM .*make_request_output"):
        activation._prepare(config, client_embeds=False)
    monkeypatch.undo()
    contract.missing.cache_clear()
