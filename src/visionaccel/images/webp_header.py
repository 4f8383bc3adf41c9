"""The size that a WebP file states: Pillow tells it only after the decoder has set up its frames for it."""

from __future__ import annotations

__all__ = ["WEBP_HEADER", "webp_size"]

WEBP_HEADER = 30
"""Bytes that hold the size, whichever kind of file it is."""


def webp_size(start: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the first bytes of a file; zeros if it is no WebP.

    The layouts are those of https://developers.google.com/speed/webp/docs/riff_container: `VP8X` holds the size of the
    canvas, less 1, in 24 bits each, `VP8L` in 14 bits each, and `VP8 ` the size itself in 14 bits each.

    Args:
        start: The first `WEBP_HEADER` bytes.
    """
    if len(start) < WEBP_HEADER or start[:4] != b"RIFF" or start[8:12] != b"WEBP":
        return 0, 0
    match start[12:16]:
        case b"VP8X":
            return int.from_bytes(start[24:27], "little") + 1, int.from_bytes(start[27:30], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(start[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            return int.from_bytes(start[26:28], "little") & 0x3FFF, int.from_bytes(start[28:30], "little") & 0x3FFF
    return 0, 0
