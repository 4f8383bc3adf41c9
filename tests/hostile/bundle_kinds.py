"""Hostile bundles and checkpoints: manifests, configurations, headers of weights, models that state other weights."""

import copy
import hashlib
import json
from contextlib import suppress
from pathlib import Path

from hypothesis import strategies as st

from hostile.kinds import PIPE, Files, Kind
from hostile.seeds import BUNDLE, CHECKPOINT
from mutations import damage, damaged, mutations, sealed
from visionaccel.bundle import GOLDEN_FILE, MANIFEST, open_bundle, processor_digest, read_golden
from visionaccel.checkpoint import Checkpoint, weights_digest
from visionaccel.core.program import AnyGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import VisionAccelError
from visionaccel.families import tower_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_bundle(folder: Path) -> None:
    """Open it, and read all that is read before a backend is asked."""
    bundle = open_bundle(folder)
    programs = bundle.programs({"onnx", "checkpoint", *(entry.format for entry in bundle.manifest.programs)})
    for program in programs:
        with suppress(VisionAccelError):
            bundle.tower.host(program)
        with suppress(VisionAccelError):
            _ = program.model and program.model()


def read_golden_images(folder: Path) -> None:
    """Open the bundle, and read its golden images."""
    read_golden(open_bundle(folder))


def read_checkpoint(folder: Path) -> None:
    """Everything that is read of a checkpoint before its weights are used, and their digest."""
    tower = open_tower(folder)
    processor_digest(folder)
    tower.signature(AnyGrid(), None)
    weights_digest(tower.weights)


def read_weights(folder: Path) -> None:
    """The header, the tower over it, and the weights."""
    checkpoint = Checkpoint(folder)
    assert all(tensor.offset > 0 and min(tensor.shape, default=0) >= 0 for tensor in checkpoint.tensors.values())
    weights_digest(tower_of(checkpoint).weights)


def _texts(document: st.SearchStrategy[object]) -> st.SearchStrategy[bytes]:
    return document.map(lambda changed: json.dumps(changed).encode())


def _spoilt(data: bytes, most: int | None = None) -> st.SearchStrategy[bytes]:
    def spoil(changes: list[tuple[object, ...]]) -> bytes:
        changed = data
        for how in changes:
            changed = damaged(changed, *how)
        return changed

    return st.lists(damage((most or len(data)) - 1), min_size=1, max_size=2).map(spoil)


def _manifests(folder: Path) -> st.SearchStrategy[Files]:
    data = (folder / MANIFEST).read_bytes()
    stated = json.loads(data)
    changed = mutations(stated)
    return st.one_of(_texts(changed.map(sealed)), _texts(changed), _spoilt(data)).map(lambda text: {MANIFEST: text})


def _crafted_json(name: str) -> list[Files]:
    """Texts that no parser should be given for long: deep, large, repeated, without an end."""
    texts: list[bytes | None] = [
        b"[" * 10**6, b'{"a":' * 10**6, b"9" * 10**6,
        b"[" + b"[]," * 2_700_000 + b"[]]", b"[" + b"{}," * 2_700_000 + b"{}]",
        b'"' + b"\\u0000" * 10**6 + b'"', b'{"a": 1e999999999}', b"\xff\xfe" + b"{}", b"", b"null", PIPE, None,
        b"{" + b",".join(b'"%d": 0' % number for number in range(600_000)) + b"}", b" " * (17 * 2**20) + b"{}",
    ]  # fmt: skip
    return [{name: text} for text in texts]


def _stated_files(folder: Path) -> st.SearchStrategy[Files]:
    """Damaged files that the manifest states as they are: a digest is no sign of sense."""
    stated = json.loads((folder / MANIFEST).read_text())
    every = [*stated["files"], *(file for program in stated["programs"] for file in program["files"])]
    contents = {file["path"]: (folder / file["path"]).read_bytes() for file in every}
    header = 8 + int.from_bytes(contents[WEIGHTS][:8], "little")

    def state(name: str, changed: bytes) -> Files:
        return {name: changed, MANIFEST: json.dumps(sealed(_stating(stated, name, changed))).encode()}

    def one(name: str) -> st.SearchStrategy[Files]:
        content = contents[name]
        return _spoilt(content, header if name == WEIGHTS else None).map(lambda changed: state(name, changed))

    return st.sampled_from(sorted(contents)).flatmap(one)


def _stating(stated: dict[str, object], name: str, data: bytes) -> dict[str, object]:
    forged = copy.deepcopy(stated)
    for file in (*forged["files"], *(file for program in forged["programs"] for file in program["files"])):
        if file["path"] == name:
            file |= {"bytes": len(data), "sha256": "sha256:" + hashlib.sha256(data).hexdigest()}
    if name == "config.json":
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            forged["vision_config"] = json.loads(data)["vision_config"]
    return forged


def resealed(data: bytes) -> bytes:
    """A manifest with the right seal; what is no document stays as it is."""
    try:
        return json.dumps(sealed(json.loads(data))).encode()
    except (ValueError, RecursionError):
        return data


def _headed(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def _headers(file: Path) -> st.SearchStrategy[bytes]:
    """A file of weights with another header."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    changed = mutations(header).map(lambda changed: _headed(changed, body))
    return st.one_of(changed, _spoilt(data, 8 + length))


def _golden_images(folder: Path) -> st.SearchStrategy[Files]:
    """A file of golden images with another header, or another list of what they are; the manifest states it."""
    stated = json.loads((folder / MANIFEST).read_text())
    data = (folder / GOLDEN_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entries = json.loads(header["__metadata__"]["golden"])

    def listing(changed: object) -> bytes:
        return _headed({**header, "__metadata__": {"golden": json.dumps(changed)}}, data[8 + length :])

    every = st.one_of(mutations(entries).map(listing), _headers(folder / GOLDEN_FILE))
    return every.map(
        lambda changed: {
            GOLDEN_FILE: changed, MANIFEST: json.dumps(sealed(_stating(stated, GOLDEN_FILE, changed))).encode(),
        }
    )  # fmt: skip


def _weights(folder: Path) -> st.SearchStrategy[Files]:
    return _headers(folder / WEIGHTS).map(lambda data: {WEIGHTS: data})


def crafted_headers(folder: Path) -> list[Files]:
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = next(iter(header.keys() - {"__metadata__"}))

    def with_entry(**changes: object) -> bytes:
        return _headed({**header, name: {**header[name], **changes}}, body)

    texts = [files[WEIGHTS] for files in _crafted_json(WEIGHTS)]
    return [
        *({WEIGHTS: text if text in (None, PIPE) else _headed(text, body)} for text in texts),
        *({WEIGHTS: stated.to_bytes(8, "little") + data[8:]} for stated in (0, 1, 2**24, 2**31, 2**62, 2**64 - 1)),
        {WEIGHTS: with_entry(shape=[-2, -header[name]["shape"][0] // 2, *header[name]["shape"][1:]])},
        {WEIGHTS: with_entry(shape=[2**62] * 300_000)},
        {WEIGHTS: with_entry(shape=[10**4000] * 3000)},
        {WEIGHTS: with_entry(shape=[1.5], data_offsets=["0", "6"])},
        {WEIGHTS: with_entry(data_offsets=[0, 2**70])},
        {WEIGHTS: with_entry(dtype="F4", shape=[3])},
        {WEIGHTS: _headed({**header, "x" * 10**6: header[name]}, body)},
        {WEIGHTS: None, INDEX: json.dumps({"weight_map": {name: "../" + WEIGHTS}}).encode()},
        {WEIGHTS: None, INDEX: json.dumps({"weight_map": {name: "config.json"}}).encode()},
    ]


def _descriptions(folder: Path) -> st.SearchStrategy[Files]:
    def one(name: str) -> st.SearchStrategy[Files]:
        data = (folder / name).read_bytes()
        return st.one_of(_texts(mutations(json.loads(data))), _spoilt(data)).map(lambda text: {name: text})

    return st.sampled_from(["config.json", "preprocessor_config.json"]).flatmap(one)


KINDS = (
    Kind("bundle: manifest", BUNDLE, lambda _: _crafted_json(MANIFEST), _manifests, read_bundle, 1500),
    Kind("bundle: stated files", BUNDLE, lambda _: [], _stated_files, read_bundle, 600),
    Kind("safetensors header", CHECKPOINT, crafted_headers, _weights, read_weights, 1300),
    Kind("golden images", BUNDLE, lambda _: [], _golden_images, read_golden_images, 400),
    Kind(
        "checkpoint: JSON",
        CHECKPOINT,
        lambda _: [*_crafted_json("config.json"), *_crafted_json("preprocessor_config.json")],
        _descriptions,
        read_checkpoint,
        600,
    ),
)
