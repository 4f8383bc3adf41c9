"""Draws the pictures of the pages as SVG; the windows come from the tables that the encoder itself makes.

Run it with visionaccel installed: `python docs/pictures/draw.py` writes the files next to it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from visionaccel.core.grid import Grid
from visionaccel.families.qwen2_5_vl import FAMILY
from visionaccel.towers import TowerSpec, window_order

GRID = Grid(1, 20, 28)
"""The picture's grid: 10x14 tokens, with partial windows at both edges."""

INK, FAINT, HOST, DEVICE = "#24292f", "#6e7781", "#fff1cc", "#cfe6ff"
SHADES = ("#cfe6ff", "#d9f2d9", "#ffe3c2", "#f6d6e8")
HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    'font-family="sans-serif" font-size="13" role="img">\n<title>{title}</title>\n'
    '<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>\n'
)


def spec() -> TowerSpec:
    """The 7B tower."""
    return FAMILY.described({"vision_config": {"hidden_size": 1280}}, "7B")


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 13, colour: str = INK) -> str:
    """A line of text."""
    escaped = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escaped}</text>\n'


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    """A box with a thin edge."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{FAINT}"/>\n'


def arrow(x: float, y: float, length: float) -> str:
    """An arrow to the right."""
    tip = x + length
    line = f'<path d="M{x:g} {y:g}H{tip - 5:g}" stroke="{INK}" fill="none"/>'
    return f'{line}<path d="M{tip:g} {y:g}l-7 -4v8z" fill="{INK}"/>\n'


def document(title: str, width: int, height: int, body: str) -> str:
    """A whole file."""
    return HEAD.format(title=title, width=width, height=height) + body + "</svg>\n"


def windows() -> str:
    """Where each token of a grid stands in window order, and the windows in both orders."""
    sizes = spec()
    index, lengths = window_order(sizes, [GRID])
    height, width = GRID.h // sizes.merge, GRID.w // sizes.merge
    place = np.argsort(index)  # place[token] is where the token stands
    tokens = (lengths // sizes.merged).tolist()
    window_of_place = np.repeat(np.arange(len(tokens)), tokens).tolist()
    cell, left, top = 34, 24, 54
    body = text(left, 30, f"Grid {GRID} in patches is {height}x{width} tokens, in windows of up to 4x4.", size=15)
    for token, at in enumerate(place.tolist()):
        x, y = left + token % width * cell, top + token // width * cell
        body += box(x, y, cell, cell, shade(window_of_place[at]))
        body += text(x + cell / 2, y + cell / 2 + 5, str(at), anchor="middle")
    side = (sizes.window or 0) * cell
    for down in range(0, height * cell, side):
        for across in range(0, width * cell, side):
            right, bottom = min(across + side, width * cell), min(down + side, height * cell)
            corners = f"M{left + across} {top + down}H{left + right}V{top + bottom}H{left + across}Z"
            body += f'<path d="{corners}" fill="none" stroke="{INK}" stroke-width="2"/>\n'
    y = top + height * cell + 34
    body += text(left, y - 8, "A token's number is its place in raster order. The windows, one after the other:")
    body += strip(left, y + 14, "raster", range(len(tokens)), tokens)
    _, grouped = window_order(sizes, [GRID], grouped=True)
    order = np.argsort(-lengths, kind="stable")
    assert grouped.tolist() == lengths[order].tolist()
    body += strip(left, y + 64, "grouped", order.tolist(), tokens)
    body += text(left, y + 130, "Numbers are windows; widths are their tokens: 16, 8 or 4.", colour=FAINT)
    return document("Window order of a grid of 20x28 patches", 680, y + 150, body)


def shade(window: int) -> str:
    """A colour that differs from the neighbours'."""
    return SHADES[window % 4 if window // 4 % 2 == 0 else 3 - window % 4]


def strip(left: float, y: float, name: str, order: Sequence[int], tokens: Sequence[int]) -> str:
    """Windows in an order, as wide as they have tokens."""
    body, x = text(left, y + 22, name), left + 66.0
    for window in order:
        width = tokens[window] * 3.6
        body += box(x, y, width, 32, shade(window)) + text(x + width / 2, y + 21, str(window), anchor="middle")
        x += width
    return body


STEPS = (
    ("checks",),
    ("tables",),
    ("patch", "embedding"),
    ("into window", "order"),
    ("blocks",),
    ("merger",),
    ("back to", "input order"),
    ("checks",),
)
SIDES: Mapping[str, str] = {
    "checkpoint (torch_ref)": "hhdddddh",
    "any grid (--dynamic)": "hhdddddh",
    "bucket": "hhdddddh",
    "bucket, --split-host": "hhhhddhh",
    "fixed grid": "h-dddddh",
    "fixed grid, --split-host": "h-hhddhh",
}
"""Who does each step for each kind of program: the host, the device, or neither at run time, since it is baked in."""


def split() -> str:
    """Who does what for each kind of program."""
    left, top, wide, high = 196, 96, 92, 36
    body = text(24, 32, "Who does each step of an encode", size=15)
    for column, lines in enumerate(STEPS):
        for number, line in enumerate(lines):
            body += text(left + column * wide + wide / 2, 66 + number * 16, line, anchor="middle", size=12)
    looks = {"h": (HOST, "host"), "d": (DEVICE, "device"), "-": ("#ffffff", "baked in")}
    for row, (kind, sides) in enumerate(SIDES.items()):
        y = top + row * high
        body += text(24, y + 22, kind)
        for column, (fill, word) in enumerate(looks[side] for side in sides):
            x = left + column * wide
            body += box(x, y, wide, high, fill)
            body += text(x + wide / 2, y + 23, word, anchor="middle", size=12, colour=FAINT)
    width, height = left + len(STEPS) * wide + 24, top + len(SIDES) * high + 24
    return document("Who does each step of an encode", width, height, body)


def flow() -> str:
    """A split program of one grid: shapes at each edge."""
    sizes = spec()
    patches, tokens = GRID.patches, GRID.tokens(sizes.merge)
    stages = (
        ("patches", f"[{patches}, {sizes.patch_width}]", "#ffffff"),
        ("patch embedding", "one product", HOST),
        ("gather", "window_index", HOST),
        ("program", "blocks, merger", DEVICE),
        ("gather", "reverse_index", HOST),
        ("embeddings", f"[{tokens}, {sizes.out_width}]", "#ffffff"),
    )
    edges = (
        "",
        f"[{patches}, {sizes.hidden}]",
        f"[{tokens}, {sizes.merged}, {sizes.hidden}]",
        f"[{tokens}, {sizes.out_width}]",
        "",
    )
    body = text(24, 30, f"A split program of grid {GRID}: what the host does around the device", size=15)
    x, y, wide, gap = 24, 66, 126, 92
    for number, (name, detail, fill) in enumerate(stages):
        body += box(x, y, wide, 56, fill)
        body += text(x + wide / 2, y + 24, name, anchor="middle")
        body += text(x + wide / 2, y + 43, detail, anchor="middle", size=11, colour=FAINT)
        if number < len(edges):
            body += arrow(x + wide, y + 28, gap)
            body += text(x + wide + gap / 2, y + 18, edges[number], anchor="middle", size=10, colour=FAINT)
        x += wide + gap
    legend = (
        "Yellow runs on the host, blue on the device. Sizes are the 7B tower's; everything at the edges is float32."
    )
    body += text(24, 152, legend, colour=FAINT)
    return document("A split program and the host's part around it", x - gap + 24, 170, body)


INLINE = (
    "In-line: an image is encoded inside the engine's step",
    ("client", "API server", "scheduler", "worker", "device"),
    (
        (0, 1, "request with an image"),
        (1, 1, "image processor"),
        (1, 2, "patches, grid, hash"),
        (2, 3, "step: encode this image"),
        (3, 3, "checks, tables"),
        (3, 4, "session.run"),
        (4, 3, "embeddings"),
        (3, 3, "guard, fallback"),
        (3, 3, "language model's step"),
        (3, 2, "tokens"),
        (2, 0, "answer"),
    ),
    {3: "Every request of the engine waits until the device has answered."},
)
PIPELINED = (
    "Pipelined: an image is encoded while the language model decodes for other requests",
    ("client", "API server", "scheduler", "connector", "encode service", "device", "worker"),
    (
        (0, 1, "request with an image"),
        (1, 1, "image processor"),
        (1, 2, "patches, grid, hash"),
        (2, 3, "is it ready?"),
        (3, 4, "submit"),
        (3, 2, "not yet"),
        (4, 5, "session.run"),
        (2, 6, "steps of other requests"),
        (5, 4, "embeddings"),
        (4, 4, "guard, fallback, cache"),
        (2, 3, "is it ready?"),
        (3, 2, "yes"),
        (2, 6, "step, with the embeddings in shared memory"),
        (6, 6, "language model"),
        (2, 0, "answer"),
    ),
    {5: "The request waits in vLLM's queue, without memory for keys and values."},
)
Message = tuple[int, int, str]


def sequence(title: str, parties: Sequence[str], messages: Sequence[Message], notes: Mapping[int, str]) -> str:
    """Who says what to whom, from top to bottom. A note stands below the message of its number."""
    wide, high, left, top = 136, 34, 84, 84
    body, y = text(16, 30, title, size=15), float(top)
    for sender, receiver, words in messages:
        number = round((y - top) / high)
        x, there = left + sender * wide, left + receiver * wide
        if sender == receiver:
            body += box(x - 62, y, 124, 24, HOST)
            body += text(x, y + 16, words, anchor="middle", size=10)
        else:
            way = 1 if there > x else -1
            body += f'<path d="M{x:g} {y + 18:g}H{there - way * 5:g}" stroke="{INK}" fill="none"/>'
            body += f'<path d="M{there:g} {y + 18:g}l{-way * 7:g} -4v8z" fill="{INK}"/>\n'
            body += text((x + there) / 2, y + 12, words, anchor="middle", size=10)
        y += high
        if number in notes:
            body += text(left, y + 12, notes[number], size=11, colour=FAINT)
            y += high
    columns = ""
    for number, party in enumerate(parties):
        x = left + number * wide
        columns += f'<path d="M{x:g} 70V{y:g}" stroke="{FAINT}" stroke-dasharray="3 3"/>\n'
        columns += box(x - 60, 46, 120, 26, DEVICE if party == "device" else "#f6f8fa")
        columns += text(x, 64, party, anchor="middle", size=12)
    return document(title, left + (len(parties) - 1) * wide + 84, round(y) + 16, columns + body)


def whole() -> str:
    """Everything on one picture: three axes, and what stands between them."""
    rows = (
        ("engines", ("vLLM, in-line", "vLLM, pipelined", "transformers", "Python")),
        ("core", ("queue and cache", "chain of fallbacks, canary, guard, shadow")),
        ("core", ("encoder: checks, host part, session, host part, checks",)),
        ("families", ("Qwen2.5-VL", "yours: one module")),
        ("backends", ("onnxrt", "openvino", "flexmlrt", "torch_ref", "yours: one class")),
        ("devices", ("CPU", "GPU", "NPU", "simulated")),
    )
    body, left, wide, high = text(16, 30, "Pixels in, embeddings out", size=15), 100, 620, 44
    for row, (name, cells) in enumerate(rows):
        y, width = 50 + row * (high + 10), wide / len(cells)
        body += text(16, y + 27, name, colour=FAINT)
        for column, cell in enumerate(cells):
            fill = HOST if name == "core" else DEVICE if name in ("backends", "devices") else "#d9f2d9"
            body += box(left + column * width, y, width - 6, high, fill)
            body += text(left + column * width + width / 2 - 3, y + 27, cell, anchor="middle", size=12)
    return document("visionaccel from engine to device", left + wide + 16, 50 + len(rows) * (high + 10) + 10, body)


PICTURES: Mapping[str, Callable[[], str]] = {
    "windows.svg": windows,
    "split.svg": split,
    "flow.svg": flow,
    "inline.svg": lambda: sequence(*INLINE),
    "pipelined.svg": lambda: sequence(*PIPELINED),
    "whole.svg": whole,
}

if __name__ == "__main__":
    for file, draw in PICTURES.items():
        Path(__file__).with_name(file).write_text(draw())
