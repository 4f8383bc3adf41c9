"""Parts of chat messages."""

import io
from base64 import b64encode
from typing import Any

__all__ = ["picture"]


def picture(sample: Any) -> dict[str, Any]:
    """An image as a part of a message."""
    png = io.BytesIO()
    sample.image.save(png, "PNG")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64encode(png.getvalue()).decode()}"}}
