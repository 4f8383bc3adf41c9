"""Hostile image files."""

from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path

from hypothesis import strategies as st
from PIL import Image

from hostile.bombs import bombs
from hostile.kinds import PIPE, Files, Kind
from hostile.seeds import IMAGE_FORMATS, IMAGES, OTHER_FORMATS, image_bytes
from mutations import damage, damaged
from visionaccel.errors import InputError
from visionaccel.images import FORMATS, MOST_PIXELS, as_rgb, load_image

FILE = "image"
_SMALL = 2**20


def read_image(folder: Path) -> None:
    """Read it as a file, and as an image of Pillow's whose pixels are not there yet."""
    path = folder / FILE
    refusal = None
    try:
        image = load_image(path)
        assert image.mode == "RGB"
        assert 0 < image.width * image.height <= MOST_PIXELS
    except InputError as error:
        refusal = error
    if path.is_fifo():
        raise refusal or AssertionError("a pipe was read")
    lazy = None
    with suppress(Exception):  # Pillow's own, of what cannot even be opened
        lazy = Image.open(BytesIO(path.read_bytes()), formats=FORMATS)
    assert lazy is not None or refusal is not None
    if lazy is not None and lazy.width * lazy.height <= _SMALL:
        assert as_rgb(lazy).mode == "RGB"
    if refusal is not None:
        raise refusal


def read_other(folder: Path) -> None:
    """A format that is not wanted is refused, however good the file is."""
    image = load_image(folder / FILE)
    raise AssertionError(f"a file of another format was read as {image.size}")


@cache
def _whole(kind: str) -> bytes:
    return image_bytes(kind)


def _spoilt(kind: str) -> st.SearchStrategy[Files]:
    whole = _whole(kind)
    ways = st.lists(damage(len(whole) - 1), min_size=1, max_size=3)

    def spoil(changes: list[tuple[object, ...]]) -> bytes:
        data = whole
        for how in changes:
            data = damaged(data, *how)
        return data

    head = damage(min(len(whole) - 1, 64)).map(lambda how: damaged(whole, *how))
    rest = st.binary(max_size=300).map(lambda data: whole[:12] + data)
    return st.one_of(ways.map(spoil), head, rest, st.binary(max_size=200)).map(lambda data: {FILE: data})


def _of_format(kind: str) -> Kind:
    return Kind(
        name=f"image: {kind}",
        base=IMAGES,
        crafted=lambda _: [{FILE: data} for data in bombs(kind)],
        inputs=lambda _: _spoilt(kind),
        read=read_image,
        share=550,
        whole={FILE: _whole(kind)},
    )


KINDS = (
    *(_of_format(kind) for kind in IMAGE_FORMATS),
    Kind(
        name="image: other formats",
        base=IMAGES,
        crafted=lambda _: [{FILE: PIPE}, {FILE: None}, *({FILE: _whole(kind)} for kind in OTHER_FORMATS)],
        inputs=lambda _: st.sampled_from(OTHER_FORMATS).flatmap(_spoilt).filter(_is_other),
        read=read_other,
        share=200,
    ),
)


def _is_other(files: Files) -> bool:
    starts = (b"BM", b"GIF8", b"\xff\xd8", b"\x89PNG", b"II", b"MM", b"RIFF")
    return not any((files[FILE] or b"").startswith(start) for start in starts)
