"""What an encoder instance's EC connector may publish."""

import pytest
import torch

from visionaccel.integrations.vllm.inline.visual import guard_saving


class Connector:
    """Publishes as vLLM's connectors do: what a step encoded, and what earlier steps left in the cache."""

    def __init__(self):
        self.saved, self.seen = [], []

    def save_caches(self, encoder_cache, mm_hash, **kwargs):
        self.saved.append((mm_hash, encoder_cache[mm_hash], kwargs))

    def start_save_caches(self, **kwargs):
        self.seen.append(sorted(kwargs.get("encoder_cache") or ()))


@pytest.fixture
def connector():
    connector = Connector()
    guard_saving(connector, 8)
    return connector


def save(connector, cache, name, **kwargs):
    connector.save_caches(encoder_cache=cache, mm_hash=name, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sound_embeddings_are_saved_unchanged(connector, dtype):
    cache = {"a": torch.tensor([[0.0, -1.0]], dtype=dtype), "b": torch.ones(2, 3, dtype=dtype)}
    save(connector, cache, "a", extra=1)
    connector.save_caches(cache, "b")
    assert [(name, kwargs) for name, _, kwargs in connector.saved] == [("a", {"extra": 1}), ("b", {})]
    assert all(embedding is cache[name] for name, embedding, _ in connector.saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fault", [0.0, float("nan"), float("inf"), float("-inf")])
def test_faulty_embeddings_are_not_saved(connector, dtype, fault):
    embedding = torch.zeros(4, 8, dtype=dtype)
    embedding[2, 3] = fault
    embedding[1, 1] = 0.0 if fault == 0.0 else 1.0
    save(connector, {"a": embedding}, "a")
    assert connector.saved == []


@pytest.mark.parametrize("fault", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_an_embedding_with_a_faulty_deepstack_level_is_not_saved(connector, block, fault):
    embedding = torch.arange(1.0, 97).reshape(4, 24)
    save(connector, {"a": embedding}, "a")
    embedding[:, 8 * block : 8 * block + 8] = 0
    embedding[1, 8 * block + 3] = fault
    save(connector, {"b": embedding}, "b")
    assert [name for name, *_ in connector.saved] == ["a"]


def test_what_another_tower_of_the_model_encoded_is_judged_as_a_whole(connector):
    audio = torch.zeros(2, 12)
    audio[:, 0] = 1
    save(connector, {"a": audio}, "a")
    assert len(connector.saved) == 1


def test_a_refused_embedding_is_not_published_from_the_cache_either(connector):
    cache = {"good": torch.ones(1, 2), "faulty": torch.zeros(1, 2)}
    save(connector, cache, "good")
    save(connector, cache, "faulty")
    connector.start_save_caches(encoder_cache=cache)
    assert connector.seen == [["good"]]
    assert sorted(cache) == ["faulty", "good"]


def test_an_image_that_was_encoded_anew_is_published(connector):
    cache = {"a": torch.zeros(1, 2)}
    save(connector, cache, "a")
    cache["a"] = torch.ones(1, 2)
    save(connector, cache, "a")
    connector.start_save_caches(encoder_cache=cache)
    assert [name for name, *_ in connector.saved] == ["a"]
    assert connector.seen == [["a"]]


def test_what_was_freed_and_encoded_again_under_the_same_name_is_published(connector):
    cache = {"a": torch.zeros(1, 2)}
    save(connector, cache, "a")
    del cache["a"]
    connector.start_save_caches(encoder_cache=cache)
    cache["a"] = torch.zeros(1, 2)  # not passed to `save_caches`, so nothing is known of it
    connector.start_save_caches(encoder_cache=cache)
    assert connector.seen == [[], ["a"]]


def test_a_cache_need_not_be_given(connector):
    save(connector, {"a": torch.zeros(1, 2)}, "a")
    connector.start_save_caches()
    assert connector.seen == [[]]


def test_guarding_twice_is_guarding_once(connector):
    guarded = connector.save_caches
    guard_saving(connector, 8)
    assert connector.save_caches is guarded


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # vLLM's and torch's own
def test_the_guard_fits_vllms_connector(tmp_path):
    from vllm.distributed.ec_transfer.ec_connector.example_connector import ECExampleConnector

    connector = ECExampleConnector.__new__(ECExampleConnector)
    connector._is_producer, connector._storage_path = True, str(tmp_path)
    guard_saving(connector, 8)
    cache = {"good": torch.ones(2, 3), "faulty": torch.zeros(2, 3)}
    for name in cache:
        save(connector, cache, name)
    connector.start_save_caches(encoder_cache=cache)
    assert [file.parent.name for file in tmp_path.rglob("*.safetensors")] == ["good"]
