"""The pipelined mode where it is hard: small steps and caches, two workers, and pixels that pass the scheduler by."""

import pytest

from visionaccel.observe import timed_encodes

BACKEND = {"VISIONACCEL_BACKEND": "onnxrt", "VISIONACCEL_TIMING": "1"}
CONNECTOR = {
    "ec_connector": "VisionAccelConnector",
    "ec_role": "ec_consumer",
    "ec_connector_module_path": "visionaccel.integrations.vllm.connector",
}
DIFFERENT_IMAGES = 20


def tokens(answers):
    return [answer["tokens"] for answer in answers]


def encodes(log):
    """Items that were encoded, from the log of times."""
    return sum(len(encode["grids"]) for encode in timed_encodes(log))


@pytest.mark.parametrize(
    ("part", "size", "threads", "cores"),
    [
        ("pressed", "32KiB", "0", "VLLM_CPU_OMP_THREADS_BIND=0 binds the language model to 0"),
        ("pressed-tp2", "512MiB", "0|1", "VLLM_CPU_OMP_THREADS_BIND=0|1 binds the language model to 0-1"),
    ],
    ids=["evicting", "tp2"],
)
def test_chunks_shared_prefixes_evictions_and_two_workers_change_no_token(
    ask_processes, stock, part, size, threads, cores
):
    answers = ask_processes(BACKEND | {"VISIONACCEL_CACHE_SIZE": size, "VLLM_CPU_OMP_THREADS_BIND": threads}, part)
    assert answers["status"] == 0, answers["log"][-4000:]
    crowd, again = answers["parts"]["crowd"], answers["parts"]["again"]
    assert tokens(crowd) == tokens(stock["parts"]["crowd"])
    assert tokens(again) == tokens(stock["parts"]["crowd"])
    assert max(answer["prompt_tokens"] for answer in crowd) > 136, "computed in chunks"
    assert sum(answer["cached_tokens"] for answer in again) > 0, "prefixes were shared"
    if part == "pressed":
        assert encodes(answers["log"]) > DIFFERENT_IMAGES, "what was evicted was encoded again"
    else:
        assert encodes(answers["log"]) == DIFFERENT_IMAGES, "each image was encoded once, for both workers"
        assert answers["log"].count("Creating connector with name: VisionAccelConnector") == 3
    assert f"of the CPU: {cores}" in answers["log"]
    assert "in-line, for images that the EC connector lacks" not in answers["log"]
    assert not answers["client_embeds"], "clients may not send embeddings"


def test_pixels_that_pass_the_scheduler_by_are_encoded_in_the_step(ask_processes, stock):
    answers = ask_processes(BACKEND, "blind", connector=CONNECTOR)
    assert answers["status"] == 0, answers["log"][-4000:]
    assert "--ec-transfer-config names VisionAccelConnector" in answers["log"]
    assert "is encoded in the engine's step, because its pixels do not pass the scheduler" in answers["log"]
    assert "float32 arithmetic, in-line, for images that the EC connector lacks" in answers["log"]
    for part in ("first", "video"):
        assert tokens(answers["parts"][part]) == tokens(stock["parts"][part])
    assert not answers["client_embeds"]
