"""NVIDIA Dynamo's own worker, as far as it concerns a custom encoder. Importing this module imports Dynamo.

Its distributions are unpacked next to the environment and not installed, because pytest and vLLM would load their
plug-ins: so their folder is only a place of modules while they are imported.
"""

import asyncio
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

from transformers import AutoConfig

UNPACKED = Path(sys.prefix) / "dynamo"

sys.path.append(str(UNPACKED))
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dynamo.runtime import logging

        logging.configure_dynamo_logging = lambda *_: None  # it would replace the handlers of pytest and vLLM
        from dynamo.vllm.args import parse_args
        from dynamo.vllm.handlers import DecodeWorkerHandler
        from dynamo.vllm.multimodal_utils.custom_encoder import create_custom_encoder_adapter
finally:
    sys.path.remove(str(UNPACKED))

__all__ = ["Worker", "create_custom_encoder_adapter", "parse_args", "resolved"]


def resolved(checkpoint):
    """What Dynamo asks of the model's configuration in vLLM."""
    config = AutoConfig.from_pretrained(checkpoint)
    return SimpleNamespace(hf_config=config, architectures=config.architectures, is_multimodal_model=True)


class Worker(DecodeWorkerHandler):
    """Dynamo's handler of requests with a custom encoder, and without an engine."""

    def __init__(self, path, checkpoint):
        self.model_config = resolved(checkpoint)
        self._custom_encoder = self._custom_encoder_adapter = None
        options = SimpleNamespace(
            custom_encoder_class=path, model_source_path=str(checkpoint), engine_args=SimpleNamespace()
        )
        self._load_custom_encoder(options)

    @property
    def backend(self):
        """The object of our class."""
        return self._custom_encoder._backend

    def prompts(self, *requests):
        """Each request's prompt or error, where a request is the URLs of its images; all at the same time."""

        async def ask():
            asked = [self._prompt(urls, str(number)) for number, urls in enumerate(requests)]
            return await asyncio.gather(*asked, return_exceptions=True)

        return asyncio.run(ask())

    def _prompt(self, urls, name):
        media = {"image_url": [{"Url": url} for url in urls]}
        return self._assemble_custom_encoder_prompt({"token_ids": [1, 2, 3], "multi_modal_data": media}, name)

    def shutdown(self):
        """As at the end of the worker."""
        self._custom_encoder.shutdown()
