"""The encoder in NVIDIA Dynamo: its own worker loads it, drives it and makes the prompts for vLLM."""

import base64
import http.server
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from doc_pages import blocks, commands
from gated import gated
from towers import reference
from visionaccel.bundle import ProgramRequest, export_bundle
from visionaccel.core.grid import Grid
from visionaccel.core.program import FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError, DeviceError, InputError, ServiceClosedError, UnfitGridError
from visionaccel.families import supported_architectures
from visionaccel.images import image_processor
from visionaccel.service import EncodeService
from visionaccel_testing.checkpoints import TINY_TOWERS, random_checkpoint

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "dynamo.md"
UNPACKED = Path(sys.prefix) / "dynamo" / "unpacked"
CELL = 8  # pixels of a token's side

pytestmark = [
    pytest.mark.skipif(not UNPACKED.exists(), reason="needs Dynamo's distributions, which `make unit-others` unpacks"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def path():
    """The class, as the page has it on the command line."""
    (found,) = set(re.findall(r"--custom-encoder-class (\S+) --", PAGE.read_text()))
    return found


def written(folder, family, **options):
    """A checkpoint of a tiny tower with the model's image processor."""
    from transformers import Qwen2VLImageProcessor

    random_checkpoint(folder, TINY_TOWERS[family], family=family, **options)
    size = {"shortest_edge": 4 * CELL**2, "longest_edge": 100 * CELL**2}
    Qwen2VLImageProcessor(patch_size=4, temporal_patch_size=2, merge_size=2, size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamo")
    return {family: written(folder / family, family) for family in ("qwen3_vl", "qwen3_5", "qwen2_5_vl")}


@pytest.fixture
def checkpoint(checkpoints):
    return checkpoints["qwen3_vl"]


@pytest.fixture
def started(path, monkeypatch):
    """Starts a worker on a checkpoint, with settings."""
    from dynamo_worker import Worker

    workers = []

    def start(checkpoint, **settings):
        for name, value in {"backend": "torch_ref", **settings}.items():
            monkeypatch.setenv(f"VISIONACCEL_{name.upper()}", str(value))
        workers.append(Worker(path, checkpoint))
        return workers[-1]

    yield start
    for worker in workers:
        worker.shutdown()


@pytest.fixture
def gates(started, checkpoint, monkeypatch):
    """Starts a worker whose devices wait for the test; returns it and their gates."""
    from visionaccel.integrations.dynamo import encoder

    def start(devices=1, **options):
        opened = [gated(checkpoint) for _ in range(devices)]
        for _, gate in opened:
            gate.shut()
        service = EncodeService([each for each, _ in opened], **options)
        monkeypatch.setattr(encoder, "open_wanted_service", lambda source, settings: service)
        return started(checkpoint), *(gate for _, gate in opened)

    return start


def png(columns, rows, seed=0):
    """An image file of random pixels, as many tokens wide and high."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows * CELL, columns * CELL, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def data_url(content):
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def given(prompt):
    """Embeddings and grids in a prompt for vLLM."""
    image = prompt["multi_modal_data"]["image"]
    return image["image_embeds"].numpy(), [tuple(grid) for grid in image["image_grid_thw"].tolist()]


@pytest.mark.parametrize(
    ("backend", "family"), [("onnxrt", "qwen3_vl"), ("torch_ref", "qwen3_vl"), ("onnxrt", "qwen3_5")]
)
def test_vllm_is_given_the_towers_embeddings(backend, family, checkpoints, started):
    files = png(5, 3), png(4, 6, seed=1)
    process = image_processor(checkpoints[family], "torchvision")
    patches, grids = zip(*(process(Image.open(BytesIO(file))) for file in files), strict=True)
    (prompt,) = started(checkpoints[family], backend=backend).prompts([data_url(file) for file in files])
    rows, found = given(prompt)
    assert found == [grid.thw for grid in grids] == [(1, 6, 10), (1, 12, 8)]
    tower = TINY_TOWERS[family]
    assert rows.shape == (15 + 24, tower["out_hidden_size"] * (1 + len(tower.get("deepstack_visual_indexes", ()))))
    exact = reference(checkpoints[family], np.concatenate(patches), found)
    assert np.abs(rows - exact).max() < 1e-5 * np.abs(exact).max()


def test_an_image_may_be_the_content_of_a_file(checkpoint, started):
    backend = started(checkpoint).backend
    first, second = (backend.preprocess(raw).item for raw in (png(2, 2), data_url(png(2, 2))))
    one, other = backend.forward_batch([first, second])
    assert one.embeddings.equal(other.embeddings)
    assert one.grid_thw == other.grid_thw == (1, 4, 4)


def test_the_failure_of_an_image_is_that_of_its_request_alone(gates):
    worker, gate = gates()
    gate.fail = lambda patches: DeviceError("the device has no memory for it.") if len(patches) == 36 else None
    gate.let_in()
    good, bad = data_url(png(2, 2)), data_url(png(3, 3))
    fine, failed, also_fine = worker.prompts([good], [good, bad], [data_url(png(2, 2, seed=1))])
    assert type(failed) is DeviceError
    assert not isinstance(failed, ValueError), "the client is not at fault"
    assert given(fine)[1] == given(also_fine)[1] == [(1, 4, 4)]


NOT_ALLOWED = {
    "file:///etc/hostname": "'file' not allowed",
    "/etc/hostname": "'' not allowed",
    "ftp://example.com/image.png": "'ftp' not allowed",
    "http://example.com/image.png": "http:// URLs are not allowed",
    "https://127.0.0.1/image.png": "blocked range",
    "https://[::1]/image.png": "blocked range",
    "https://[::1/image.png": "Invalid IPv6 URL",
    "https://localhost/image.png": "is blocked",
    "https://169.254.169.254/latest/meta-data": "blocked range",
    "data:image/png,plain": "expected base64",
    "data:image/png;base64,!": "base64",
    "data:image/png;base64,": "the file cannot be read as an image",
    data_url(png(4, 4)[:90]): "the file cannot be read as an image",
    data_url(b"<svg/>"): "supported formats: BMP",
}


def test_what_is_not_an_allowed_image_is_the_clients_error(checkpoint, started):
    """A ValueError, whose message Dynamo sends to the client."""
    worker = started(checkpoint)
    answers = worker.prompts(*([url] for url in NOT_ALLOWED), [data_url(png(2, 2))])
    for (url, reason), answer in zip(NOT_ALLOWED.items(), answers, strict=False):
        assert isinstance(answer, InputError), url
        assert isinstance(answer, ValueError)
        assert reason in str(answer), url
        assert str(answer) == answer.message, "the hint is for the operator"
    assert given(answers[-1])[1] == [(1, 4, 4)]


@pytest.fixture
def server():
    """A server of one image, its address, and the paths that were asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response({"/missing": 404, "/moved": 302}.get(self.path, 200))
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
            self.wfile.write(png(2, 2) if self.path == "/image" else b"?")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever).start()
        yield f"http://127.0.0.1:{served.server_port}", asked
        served.shutdown()


def test_urls_are_fetched_by_dynamos_rules(checkpoint, started, server, monkeypatch):
    (address, asked), worker = server, started(checkpoint)
    (refused,) = worker.prompts([f"{address}/image"])
    assert isinstance(refused, InputError)
    assert asked == []
    monkeypatch.setenv("DYN_MM_ALLOW_INTERNAL", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fetched, expected, missing, moved = worker.prompts(
        [f"{address}/image"], [data_url(png(2, 2))], [f"{address}/missing"], [f"{address}/moved"]
    )
    assert np.array_equal(given(fetched)[0], given(expected)[0])
    assert isinstance(missing, InputError)
    assert "404" in str(missing)
    assert isinstance(moved, InputError)
    assert "'file' not allowed" in str(moved)


def test_a_download_over_dynamos_limit_is_refused(checkpoint, started, monkeypatch):
    monkeypatch.setenv("DYN_MM_MAX_FILE_SIZE_MB", "1")
    (answer,) = started(checkpoint).prompts([data_url(bytes(2**20 + 3))])
    assert isinstance(answer, InputError)
    assert "maximum allowed size" in str(answer)


def test_images_are_encoded_on_several_devices_at_the_same_time(gates):
    """Although Dynamo waits for one image at a time."""
    worker, *devices = gates(devices=2)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(worker.prompts, [data_url(png(2, 2))], [data_url(png(2, 2, seed=1))])
        for gate in devices:
            gate.wait_for_calls(1)
        for gate in devices:
            gate.let_in()
        assert [given(prompt)[1] for prompt in asked.result()] == [[(1, 4, 4)]] * 2


def test_closing_fails_the_images_in_the_queue(gates):
    worker, gate = gates()
    queued = [worker.backend.preprocess(png(2, 2, seed)).item for seed in range(2)]
    gate.wait_for_calls(1)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(worker.backend.close)
        with pytest.raises(ServiceClosedError):
            worker.backend.forward_batch(queued[1:])
        gate.let_in()
        closing.result()
    assert len(worker.backend.forward_batch(queued[:1])) == 1
    assert gate.closed
    with pytest.raises(ServiceClosedError):
        worker.backend.preprocess(png(2, 2))


def test_an_image_that_dynamo_drops_leaves_the_queue(gates):
    worker, gate = gates()
    kept, dropped = (worker.backend.preprocess(png(2, 2, seed)).item for seed in range(2))
    gate.wait_for_calls(1)
    service = worker.backend._opened.service
    assert service.counters.waiting == 1
    del dropped
    assert (service.counters.waiting, service.counters.cancelled) == (0, 1)
    gate.let_in()
    assert len(worker.backend.forward_batch([kept])) == 1


@pytest.fixture
def bundle(checkpoint, tmp_path):
    folder = tmp_path / "bundle"
    export_bundle(open_tower(checkpoint), folder, [ProgramRequest(FixedGrid(Grid(1, 8, 12)))])
    return folder


def test_images_are_fitted_to_the_grids_of_a_bundle(checkpoint, bundle, started):
    (prompt,) = started(checkpoint, backend="onnxrt", bundle=bundle).prompts([data_url(png(3, 3)), data_url(png(9, 2))])
    rows, grids = given(prompt)
    assert grids == [(1, 8, 12)] * 2
    assert len(rows) == 2 * 24


def test_without_fitting_an_image_of_another_grid_fails_alone(checkpoint, bundle, started):
    worker = started(checkpoint, backend="onnxrt", bundle=bundle, fit="none")
    unfit, fine = worker.prompts([data_url(png(3, 3))], [data_url(png(6, 4))])
    assert type(unfit) is UnfitGridError
    assert str(unfit).endswith("accepted grids: 8x12 (height x width in patches).")
    assert given(fine)[1] == [(1, 8, 12)]


def test_the_checks_of_a_bundle_are_those_of_vllm(bundle, checkpoint, tmp_path, started):
    other = written(tmp_path / "other", "qwen3_vl", seed=1)
    with pytest.raises(ConfigurationError, match="made from different vision weights"):
        started(other, backend="onnxrt", bundle=bundle)
    with pytest.raises(ConfigurationError, match=r"the bundle .* is not a folder"):
        started(checkpoint, bundle=tmp_path / "missing")


def test_dynamo_takes_the_command_line_of_the_page(path, checkpoint):
    from dynamo_worker import parse_args

    (command,) = (each for block in blocks(PAGE) if block.language == "console" for each in commands(block))
    assert command.words[:3] == ("python", "-m", "dynamo.vllm")
    made = parse_args([{"Qwen/Qwen3-VL-8B-Instruct": str(checkpoint)}.get(word, word) for word in command.words[3:]])
    assert made.custom_encoder_class == path
    assert made.model_source_path == str(checkpoint)
    assert made.engine_args.enable_mm_embeds
    assert "visionaccel" not in command.environment["VLLM_PLUGINS"]


@pytest.mark.parametrize(("plugins", "warned"), [(None, True), ("a,visionaccel", True), ("a", False)])
def test_a_plug_in_of_vllm_that_encodes_as_well_is_logged(plugins, warned, checkpoint, started, monkeypatch, caplog):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    started(checkpoint)
    assert ("second encoder in the engine" in caplog.text) == warned


def test_models_that_dynamo_cannot_serve_are_refused(checkpoints, path, started):
    from visionaccel.integrations.dynamo import VisionAccelEncoder

    with pytest.raises(ValueError, match="does not support this multimodal decoder"):
        started(checkpoints["qwen2_5_vl"])
    with pytest.raises(ConfigurationError, match="Qwen2_5_VLForConditionalGeneration: it can for Qwen3VLFor"):
        VisionAccelEncoder().build(str(checkpoints["qwen2_5_vl"]))


def test_the_models_are_those_for_which_dynamo_has_an_adapter(checkpoint, path):
    from dynamo_worker import create_custom_encoder_adapter, resolved
    from visionaccel.integrations.dynamo.encoder import ARCHITECTURES, VisionAccelEncoder

    def accepted(architecture):
        config.architectures = [architecture]
        try:
            return create_custom_encoder_adapter(VisionAccelEncoder(), config, None)
        except ValueError:
            return None

    config = resolved(checkpoint)
    assert set(filter(accepted, supported_architectures())) == set(ARCHITECTURES)


def test_without_dynamo_the_error_says_what_to_install():
    code = "import visionaccel.integrations.dynamo"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ConfigurationError" in done.stderr
    assert "pip install 'ai-dynamo[vllm]'" in done.stderr
