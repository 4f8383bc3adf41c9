"""vLLM with its vision encoder behind the C++ bridge, on the simulator of an NPU, which crashes and hangs on demand."""

import base64
import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from openai import InternalServerError, OpenAI

from digits_vlm.samples import held_out_images
from forked import WORKER_IN_ENGINE, servers
from visionaccel.core.grid import Grid
from visionaccel.encoder import open_tower
from visionaccel_bench.server import serve
from visionaccel_flexmlrt.simulator import compile_partition
from visionaccel_flexmlrt.vitisai import ImportRequest, import_vitisai
from visionaccel_flexmlrt.vitisai.writing import write_vitisai_folder

IMAGES = held_out_images(300)
DEADLINE = 6
FAULTS = {
    "throw": "DRM_IOCTL_AMDXDNA_EXEC_CMD failed",
    "nan": "NaN or infinity",
    "zeros": "returned zeros",
    "unwritten": "unwritten",
    "abort": "SIGABRT",
    "segv": "SIGSEGV",
    "hang": f"within {DEADLINE} s",
}


def grid(sample):
    """The grid of an image at its own size: the processor rounds sides to multiples of 28 pixels."""
    return round(sample.image.height / 28) * 2, round(sample.image.width / 28) * 2


GRIDS = [size for size, _ in Counter(grid(sample) for sample in IMAGES).most_common(4)]
ON_DEVICE = [number for number, sample in enumerate(IMAGES) if grid(sample) in GRIDS]


@pytest.fixture(scope="module")
def bundle(digits, tmp_path_factory):
    """Artifacts of the most frequent grids, in both layouts, as AMD's compiler would leave them, imported."""
    folder, tower = tmp_path_factory.mktemp("compiled"), open_tower(digits)
    requests = []
    for number, (h, w) in enumerate(GRIDS):
        compiled = folder / f"{h}x{w}"
        write_vitisai_folder(
            tower,
            compiled,
            Grid(1, h, w),
            layout=("rai", "directory")[number % 2],
            compile=partial(compile_partition, precision="float32"),
        )
        # So small grids may have their windows in one and the same order, which then does not tell them apart.
        requests.append(ImportRequest(compiled, grid=Grid(1, h, w), precision="float32"))
    return import_vitisai(tower, requests, folder / "bundle").bundle.folder


def settings(bundle, **more):
    named = {"BACKEND": "flexmlrt", "DEVICE": "simulator", "BUNDLE": str(bundle), **more}
    return {f"VISIONACCEL_{name}": value for name, value in named.items()}


def test_token_ids_are_stock_s_through_bridge_and_simulator(ask, stock, bundle):
    answers = ask(settings(bundle, FIT="none", FALLBACK="torch_ref"), "read")
    assert answers["status"] == 0, answers["log"][-4000:]
    assert answers["read"] == stock["read"]
    assert len(ON_DEVICE) >= 80
    fallbacks = answers["log"].count("using fallback")
    assert fallbacks == len(IMAGES) - len(ON_DEVICE), "every image of these grids was encoded on the simulator"
    assert "backend 'flexmlrt', device simulator (simulated), float32 arithmetic" in answers["log"]


@pytest.fixture(scope="module")
def server(digits, bundle, tmp_path_factory):
    """A server on the simulator without a fallback, and the file that switches faults."""
    script = tmp_path_factory.mktemp("script") / "script"
    script.write_text("print vendor")
    environment = (
        settings(bundle, DEADLINE=str(DEADLINE)) | {"FLEXMLRT_SIMULATOR_SCRIPT": str(script)} | WORKER_IN_ENGINE
    )
    arguments = ("--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "16", "--dtype", "float32")
    with servers(), serve(digits, environment, arguments) as running:
        yield running, script


@pytest.fixture(scope="module")
def tokenizer(digits):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(digits)


def read(server, number):
    png = io.BytesIO()
    IMAGES[number].image.save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Read the digits."}]
    with OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=8
        )
    return answer.choices[0].message.content


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_device_ends_its_request_and_the_engine_goes_on(server, stock, tokenizer, fault):
    running, script = server
    number, another = ON_DEVICE[2 * list(FAULTS).index(fault) :][:2]  # fresh ones, which no cache holds
    script.write_text(f"forward {fault}")
    with pytest.raises(InternalServerError, match="image 1 of the prompt could not be encoded"):
        read(running, number)
    assert running.healthy()
    assert FAULTS[fault] in running.log.read_text()
    script.write_text("")
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(partial(read, running), (number, another)))
    expected = tokenizer.batch_decode([stock["read"][n] for n in (number, another)], skip_special_tokens=True)
    assert answers == expected


def test_what_the_vendor_s_library_prints_is_in_the_log_under_the_device_s_name(server):
    running, _ = server
    log = running.log.read_text()
    assert "vendor on stdout" in log
    assert "vendor on stderr" in log
