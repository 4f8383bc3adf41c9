"""Bundles whose programs do not take every grid: vLLM's images are made to fit them, exactly, or refused alone."""

import base64
import io

import numpy as np
import pytest
from openai import BadRequestError, OpenAI
from PIL import Image

from digits_vlm.samples import held_out_images
from forked import WORKER_IN_ENGINE, servers
from visionaccel.bundle import ProgramRequest, export_bundle
from visionaccel.core.grid import Grid
from visionaccel.core.program import FixedGrid
from visionaccel.encoder import open_tower
from visionaccel_bench.server import serve

GRIDS = ("8x16", "16x8", "12x22", "22x12", "12x12")
LARGEST = Grid(1, 22, 22)
"""The largest grid of the accuracy images."""


@pytest.fixture(scope="module")
def bundles(digits, tmp_path_factory):
    """Bundles of the digits tower: fixed grids whose host part is split off, and one bucket."""
    folder, tower = tmp_path_factory.mktemp("bundles"), open_tower(digits)
    fixed = [ProgramRequest(FixedGrid(Grid.parse(text)), split_host=True) for text in GRIDS]
    export_bundle(tower, folder / "fixed", fixed, self_contained=True)
    export_bundle(tower, folder / "bucket", [ProgramRequest(tower.bucket(LARGEST))])
    return folder


def read(ask, bundle, fit="letterbox"):
    answers = ask({"VISIONACCEL_BACKEND": "onnxrt", "VISIONACCEL_BUNDLE": str(bundle), "VISIONACCEL_FIT": fit}, "read")
    assert answers["status"] == 0, answers["log"][-4000:]
    return answers


def test_letterboxed_images_are_read_within_one_point_of_their_own_grids(ask, stock, bundles):
    answers = read(ask, bundles / "fixed")
    assert set(answers["image_tokens"]) == {Grid.parse(text).tokens(2) for text in GRIDS}
    assert answers["accuracy"] >= stock["accuracy"] - 0.01
    assert "and takes 8x16, 16x8, 12x22, 22x12, 12x12;" in answers["log"]


def test_stretched_images_lose_no_more_than_is_documented(ask, stock, bundles):
    answers = read(ask, bundles / "fixed", "stretch")
    assert answers["accuracy"] >= stock["accuracy"] - 0.02


def test_images_within_a_bucket_are_read_as_stock_vllm_reads_them(ask, stock, bundles):
    answers = read(ask, bundles / "bucket")
    assert answers["read"] == stock["read"]


def test_what_fits_no_program_goes_to_the_fallback(ask, stock, bundles):
    settings = {
        "VISIONACCEL_BACKEND": "onnxrt",
        "VISIONACCEL_BUNDLE": str(bundles / "fixed"),
        "VISIONACCEL_FIT": "none",
        "VISIONACCEL_FALLBACK": "torch_ref",
    }
    answers = ask(settings, "few")
    assert answers["status"] == 0, answers["log"][-4000:]
    for part in ("first", "video"):
        theirs, ours = stock["parts"][part], answers["parts"][part]
        assert [answer["tokens"] for answer in ours] == [answer["tokens"] for answer in theirs]
    assert "using fallback" in answers["log"]


def pictures():
    """Images that break careless code, as files: the bytes, and whether the digits on them must be read."""
    digit = held_out_images(1)[0].image
    grey = digit.convert("L")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees to the right
    sixteen = Image.fromarray(np.asarray(grey, dtype=np.uint16) * 257)
    return {
        "one pixel": (encoded(Image.new("RGB", (1, 1), "white")), False),
        "1:200": (encoded(Image.new("RGB", (400, 2), "white")), False),
        "200:1": (encoded(Image.new("RGB", (2, 400), "white")), False),
        "huge": (encoded(Image.new("RGB", (5000, 4000), "grey")), False),
        "16 bit": (encoded(sixteen), False),
        "alpha": (encoded(digit.convert("RGBA")), True),
        "palette": (encoded(digit.convert("P")), True),
        "grey": (encoded(grey), True),
        "bilevel": (encoded(grey.point(lambda level: 255 * (level > 100)).convert("1")), True),
        "turned by EXIF": (encoded(digit.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=turned, quality=95), True),
        "animated": (encoded(digit, "GIF", save_all=True, append_images=[digit]), True),
        "large": (encoded(digit.resize((digit.width * 8, digit.height * 8))), True),
    }


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_no_image_crashes_a_server_and_what_it_refuses_it_refuses_alone(digits, bundles):
    settings = {"VISIONACCEL_BACKEND": "onnxrt", "VISIONACCEL_BUNDLE": str(bundles / "fixed")} | WORKER_IN_ENGINE
    arguments = (
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "16",
        "--trust-request-mm-kwargs",
    )  # fmt: skip
    with (
        servers(),
        serve(digits, settings, arguments) as server,
        OpenAI(base_url=server.url, api_key="none", max_retries=0) as client,
    ):

        def ask(data, kind="image", **extra):
            url = f"data:{kind}/any;base64," + base64.b64encode(data).decode()
            media = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
            content = [media, {"type": "text", "text": "Read the digits."}]
            messages = [{"role": "user", "content": content}]
            reply = client.chat.completions.create(
                model="visionaccel", messages=messages, temperature=0, max_tokens=8, **extra
            )
            return reply.choices[0].message.content

        truth = held_out_images(1)[0].truth
        answers = {name: ask(data) for name, (data, _) in pictures().items()}
        must = {name: truth for name, (_, readable) in pictures().items() if readable}
        assert {name: answers[name] for name in must} == must

        whole = encoded(held_out_images(1)[0].image)
        refused = {
            "truncated": (whole[: len(whole) // 2], "image"),
            "text": (b"no image at all", "image"),
            "empty": (b"", "image"),
            "1:201": (encoded(Image.new("RGB", (402, 2))), "image"),
            "video": (b"no video either", "video"),
        }
        messages = {}
        for name, (data, kind) in refused.items():
            try:
                messages[name] = f"answered: {ask(data, kind)}"
            except BadRequestError as error:
                messages[name] = str(error)
        assert not any(message.startswith("answered") for message in messages.values()), messages
        assert "aspect ratio over 200" in messages["1:201"]
        assert "does not accept videos: its vision encoder's programs accept 8x16; 16x8" in messages["video"]
        with pytest.raises(BadRequestError, match=r"this image has grid 1x.*, but the encoder's programs accept 8x16"):
            ask(whole, extra_body={"mm_processor_kwargs": {"min_pixels": 300000}})
        assert server.healthy()
        assert ask(whole) == truth
