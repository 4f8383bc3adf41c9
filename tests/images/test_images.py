"""Image files: which are read, and what is refused before a pixel is decoded."""

import os
import struct
import zlib
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from hostile.bombs import bombs
from hostile.seeds import IMAGE_FORMATS, OTHER_FORMATS, image_bytes, picture
from visionaccel.errors import InputError
from visionaccel.images import FORMATS, MOST_FILE_BYTES, MOST_PIXELS, as_rgb, decode_image, load_image
from visionaccel.images.loading import WEBP_HEADER, webp_size


def written(folder, data):
    file = folder / "image"
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_every_wanted_format_is_read_in_rgb(tmp_path, kind):
    image = load_image(written(tmp_path, image_bytes(kind)))
    assert image.mode == "RGB"
    assert set(image.size) == {40, 24}
    assert set(FORMATS) == {each.upper() for each in IMAGE_FORMATS}


def test_the_content_of_a_file_is_decoded_like_the_file(tmp_path):
    content = image_bytes("png")
    assert np.array_equal(decode_image(content), load_image(written(tmp_path, content)))
    with pytest.raises(InputError, match="the file cannot be read as an image"):
        decode_image(content[:60])


def test_a_turned_photograph_is_shown_upright(tmp_path):
    assert load_image(written(tmp_path, image_bytes("jpeg"))).size == (24, 40)


def test_of_several_frames_the_first_is_read(tmp_path):
    file = tmp_path / "image"
    picture().save(file, "tiff", save_all=True, append_images=[Image.new("RGB", (3, 3))])
    assert np.array_equal(load_image(file), picture())


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_other_formats_are_refused_by_name(tmp_path, kind):
    with pytest.raises(InputError, match="supported formats: BMP, GIF, JPEG, PNG, TIFF, WEBP"):
        load_image(written(tmp_path, image_bytes(kind)))


def png(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize("size", [(8193, 8192), (10_000, 10_000), (13_377, 13_377)])
def test_a_size_over_the_limit_is_refused_with_the_limit(tmp_path, size):
    """From below to above the sizes at which Pillow itself warns."""
    file = written(tmp_path, png(*size))
    with pytest.raises(InputError, match=rf"{size[0]}x{size[1]} pixels.*{MOST_PIXELS}"):
        load_image(file)


def test_an_impossible_size_is_refused(tmp_path):
    with pytest.raises(InputError, match="pixels"):
        load_image(written(tmp_path, png(2**31 - 1, 2**31 - 1)))


def test_the_largest_image_is_read(tmp_path):
    file = tmp_path / "image"
    Image.new("1", (8192, 8192)).save(file, "png")
    assert load_image(file).size == (8192, 8192)


def test_a_file_of_too_many_bytes_is_refused_with_the_limit(tmp_path):
    file = written(tmp_path, image_bytes("png"))
    os.truncate(file, MOST_FILE_BYTES + 1)
    with pytest.raises(InputError, match=f"the limit is {MOST_FILE_BYTES}"):
        load_image(file)


def test_a_named_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "image")
    with pytest.raises(InputError, match="not a file"):
        load_image(tmp_path / "image")


@pytest.mark.parametrize(
    "settings", [{}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}], ids=["VP8", "VP8L", "VP8X"]
)
def test_the_size_of_a_webp_is_read_without_its_decoder(settings, tmp_path):
    file = tmp_path / "image"
    picture(301, 207).save(file, "webp", **settings)
    assert webp_size(file.read_bytes()[:WEBP_HEADER]) == (301, 207)
    assert webp_size(image_bytes("png")[:WEBP_HEADER]) == (0, 0)


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_what_pillow_makes_of_a_damaged_file_is_a_wrong_input(tmp_path, kind):
    """Pillow raises errors of zlib and struct, index errors and others, when it opens a file or when it decodes it."""
    whole = image_bytes(kind)
    for length in range(12, len(whole), max(1, len(whole) // 40)):
        data = whole[:length] + b"\xff" * 40
        with suppress(InputError):
            load_image(written(tmp_path, data))
        lazy = None
        with suppress(Exception):  # what cannot even be opened is not given to as_rgb
            lazy = Image.open(BytesIO(data), formats=FORMATS)
        if lazy is not None and lazy.width * lazy.height < 2**20:
            with suppress(InputError):
                as_rgb(lazy)


def test_bombs_take_no_memory(tmp_path):
    """All that state a huge size are refused; the count shows that there are such."""
    refused = 0
    for kind in IMAGE_FORMATS:
        for data in list(bombs(kind))[:3]:
            try:
                load_image(written(tmp_path, data))
            except InputError:
                refused += 1
    assert refused >= 3 * len(IMAGE_FORMATS) - 2
