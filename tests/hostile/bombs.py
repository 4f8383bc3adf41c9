"""Image files made by hand that are small and state, or hold, very much."""

import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

from PIL import Image

from hostile.seeds import image_bytes, picture

HUGE = ((65535, 65535), (16383, 16383), (8193, 8192), (2**31 - 1, 1), (1, 2**31 - 1), (0, 0), (2**31 - 1, 2**31 - 1))
"""Sizes in pixels that headers are made to state."""

FRAMES = 400


def bombs(kind: str) -> Iterator[bytes]:
    """Files of one format."""
    whole = image_bytes(kind)
    for width, height in HUGE:
        yield _stating(kind, whole, width, height)
    yield from (_many_frames(kind), _inflating(kind), b"", whole[:1], whole + bytes(2**20))
    if kind == "png":
        yield from _png_texts(whole)
    if kind == "jpeg":
        yield from _jpeg_markers(whole)
    if kind == "tiff":
        yield from _tiff_loops(whole)


def _stating(kind: str, whole: bytes, width: int, height: int) -> bytes:
    """The file, with another size in its header."""
    data = bytearray(whole)
    match kind:
        case "png":
            header = struct.pack(">II", width, height) + whole[24:29]
            data[16:33] = header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
        case "gif":
            size = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
            data[6:10] = size
            place = whole.index(b",\0\0\0\0") + 5
            data[place : place + 4] = size
        case "bmp":
            data[18:26] = struct.pack("<II", width, height)
        case "jpeg":
            place = next(whole.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in whole) + 5
            data[place : place + 4] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
        case "webp":
            chunk = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0"
            canvas = (max(width - 1, 0) & 0xFFFFFF).to_bytes(3, "little")
            canvas += (max(height - 1, 0) & 0xFFFFFF).to_bytes(3, "little")
            data[12:] = chunk + canvas + whole[12:]
            data[4:8] = struct.pack("<I", len(data) - 8)
        case "tiff":
            for tag, value in ((256, width), (257, height)):
                place = _tiff_entry(whole, tag)
                data[place + 2 : place + 12] = struct.pack("<HII", 4, 1, value & 0xFFFFFFFF)
    return bytes(data)


def _tiff_entry(whole: bytes, tag: int) -> int:
    """Where a tag's entry begins in the first directory."""
    (start,) = struct.unpack_from("<I", whole, 4)
    (count,) = struct.unpack_from("<H", whole, start)
    return next(
        place
        for place in range(start + 2, start + 2 + 12 * count, 12)
        if struct.unpack_from("<H", whole, place) == (tag,)
    )


def _many_frames(kind: str) -> bytes:
    """Of a format that has frames, a file of many; of another, a plain one."""
    if kind in ("bmp", "jpeg"):
        return image_bytes(kind)
    buffer = BytesIO()
    frames = [picture(9, 9).rotate(number) for number in range(FRAMES)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _inflating(kind: str) -> bytes:
    """As large as may be, of one colour: it is decoded whole."""
    buffer = BytesIO()
    settings = {"tiff": {"compression": "tiff_lzw"}, "webp": {"lossless": True, "method": 0}}.get(kind, {})
    side = 1024 if kind == "bmp" else 8192
    Image.new("L" if kind != "webp" else "RGB", (side, side)).save(buffer, kind, **settings)
    return buffer.getvalue()


def _png_texts(whole: bytes) -> Iterator[bytes]:
    """Compressed texts and profiles that inflate to 64 MiB each."""
    packed = zlib.compress(bytes(2**26), 9)
    for name, content in (
        (b"zTXt", b"k\0\0" + packed), (b"iTXt", b"k\0\1\0\0\0" + packed), (b"iCCP", b"k\0\0" + packed),
    ):  # fmt: skip
        chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        yield whole[:33] + chunk * 8 + whole[33:]
        yield whole[:33] + struct.pack(">I", 2**31 - 1) + name + content + whole[33:]


def _jpeg_markers(whole: bytes) -> Iterator[bytes]:
    """Tables and profiles over and over, and scans that never end."""
    comment = b"\xff\xfe" + struct.pack(">H", 65535) + bytes(65533)
    yield whole[:2] + comment * 64 + whole[2:]
    profile = b"\xff\xe2" + struct.pack(">H", 2 + 14 + 60000) + b"ICC_PROFILE\0\1\xff" + bytes(60000)
    yield whole[:2] + profile * 64 + whole[2:]
    scan = whole.index(b"\xff\xda")
    yield whole[:scan] + whole[scan:-2] * 64
    buffer = BytesIO()
    Image.new("RGB", (2000, 2000)).save(buffer, "jpeg", progressive=True)
    progressive = buffer.getvalue()
    scan = progressive.rindex(b"\xff\xda")
    yield progressive[:scan] + progressive[scan:-2] * 40 + b"\xff\xd9"


def _tiff_loops(whole: bytes) -> Iterator[bytes]:
    """A directory that is its own successor, one with a value of 4 GiB, and one far away."""
    (start,) = struct.unpack_from("<I", whole, 4)
    (count,) = struct.unpack_from("<H", whole, start)
    following = start + 2 + 12 * count
    yield whole[:following] + struct.pack("<I", start) + whole[following + 4 :]
    for tag in (258, 273, 279):
        place = _tiff_entry(whole, tag)
        yield whole[: place + 4] + struct.pack("<I", 2**32 - 1) + whole[place + 8 :]
    yield whole[:4] + struct.pack("<I", 2**32 - 1) + whole[8:]
    tiles = [(322, 4, 1, 2**31), (323, 4, 1, 2**31)]
    yield whole[:start] + struct.pack("<H", len(tiles)) + b"".join(struct.pack("<HHII", *t) for t in tiles) + bytes(64)
