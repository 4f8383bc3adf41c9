"""Asks tiny pooling models about images, videos and text: `python ask_pooling.py FOLDER ANSWERS [NAME ...]`.

The folder has a checkpoint of `pooling_models` under each name. One engine after another answers, in float32.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm import LLM

from ask_families import LONGEST, TOKENS, ask_each, engine, picture, prompts
from message_parts import picture as part
from pooling_models import POOLING, Pooling

QUESTION = "Read the digits."


def numbers(output: Any) -> list[Any] | str:
    """The numbers of a request, or its error."""
    error = getattr(output, "error", None)
    try:
        return output.outputs.data.tolist() if error is None else str(error.message)
    except Exception as raised:
        return str(raised)


def results(llm: LLM, pooling: Pooling) -> list[list[Any] | str]:
    """The results of the prompts that a generating model is asked, in one batch, and of some of them again."""
    task = "classify" if pooling.task == "score" else pooling.task
    requests = prompts(pooling.model)
    outputs = [llm.encode(batch, pooling_task=task, use_tqdm=False) for batch in (requests, requests[4:9])]
    return [numbers(output) for batch in outputs for output in batch]


def scores(llm: LLM, pooling: Pooling) -> list[float]:
    """The scores of pictures and of a text, for a text and for another picture."""
    side = 2 * pooling.model.patch
    pictures = [{"content": [part(SimpleNamespace(image=picture(*TOKENS[n], side, n)))]} for n in (0, 5, 10)]
    pairs = [(QUESTION, pictures[0]), (QUESTION, pictures[1]), (pictures[2], pictures[1]), (pictures[1], "Digits")]
    return [output.outputs.score for pair in pairs for output in llm.score(*pair, use_tqdm=False)]


def asked(checkpoint: Path, name: str) -> list[Any]:
    """What one engine makes of the prompts, and then its scores."""
    pooling = POOLING[name]
    steps = {} if pooling.chunked else {"max_num_batched_tokens": LONGEST}
    with engine(checkpoint, pooling.model, runner="pooling", **steps, **pooling.engine) as llm:
        return [*results(llm, pooling), *(scores(llm, pooling) if pooling.scores else [])]


if __name__ == "__main__":
    ask_each(asked, POOLING)
