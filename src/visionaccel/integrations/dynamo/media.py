"""Fetches the image of a request by Dynamo's own rules for URLs."""

from __future__ import annotations

import asyncio

from dynamo.common.http import AiohttpClient, HttpConnectionError, HttpStatusError, HttpTimeoutError
from dynamo.common.http.media_reference import max_media_bytes
from dynamo.common.http.url_validator import UrlValidationPolicy, validate_url
from dynamo.common.multimodal.media_source import decode_data_uri

from visionaccel.errors import InputError

_SECONDS = 30.0
"""For a whole download, as in Dynamo's own loader of images, unless Dynamo is configured otherwise."""


def fetch(source: str | bytes) -> bytes:
    """Return the content of an image file: what is behind an `https:` or `data:` URL, or the bytes that were given.

    Nothing else is fetched: no file of this machine, and `http:` URLs and private addresses only if Dynamo's
    `DYN_MM_ALLOW_INTERNAL` allows them. Redirections are checked as well, and so are the addresses that are connected
    to. Each call has a client and an event loop for itself, because it runs on a thread without one.

    Raises:
        InputError: If the URL is not allowed or malformed, or cannot be fetched.
        HttpConfigurationError: If there is a proxy, and Dynamo is not configured to trust it.
    """
    if isinstance(source, bytes):
        return source
    try:
        return asyncio.run(_fetched(source, UrlValidationPolicy.from_env()))
    except (ValueError, HttpConnectionError, HttpStatusError, HttpTimeoutError) as error:
        raise InputError(f"the image cannot be fetched: {error}", hint="Pass an https: or data: URL.") from error


async def _fetched(url: str, policy: UrlValidationPolicy) -> bytes:
    await validate_url(url, policy)
    content: bytes
    if url[:5].lower() == "data:":
        content = decode_data_uri(url, max_media_bytes())
    else:
        client = AiohttpClient()
        try:
            content = await client.fetch_bytes(url, _SECONDS, policy=policy, max_bytes=max_media_bytes())
        finally:
            await client.close()
    return content
