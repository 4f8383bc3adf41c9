"""AMD's Vitis AI execution provider: its options, programs that it compiled, and the proof that it took the work."""

import json
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, parser
from typer.testing import CliRunner

from bundle_tools import GRID, forge
from bundles import document, entry, reseal, write_bundle
from towers import random_patches, reference
from visionaccel import open_encoder
from visionaccel.backends import Rejected
from visionaccel.bundle import open_bundle
from visionaccel.cli.app import app
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.program import EP_CONTEXT, ONNX, Program
from visionaccel.errors import (
    ArtifactError,
    BackendUnavailableError,
    BundleError,
    ConfigurationError,
    DeviceError,
)
from visionaccel_onnxrt import OnnxRuntimeBackend
from visionaccel_onnxrt.backend import OnnxRuntimeOptions
from visionaccel_onnxrt.ep_context import offload_of_context, verified_context
from visionaccel_onnxrt.offload import RECORD_ASSIGNMENT, Offload, assigned, require_offload
from visionaccel_onnxrt.vitisai import SUMMARIES, compiler_options, pass_summaries

VITISAI, CPU, AZURE = (f"{name}ExecutionProvider" for name in ("VitisAI", "CPU", "Azure"))
NEVER_TAKES = pytest.mark.skipif(AZURE not in onnxruntime.get_available_providers(), reason=f"no {AZURE} here")
"""Azure's provider stands for any that is active and runs nothing: no model of ours is for it."""

MODEL = """<ir_version: 8, opset_import: ["": 17]> g (float[2, 4] x) => (float[2, 4] out) {
    w = Constant<value = float[4, 4] {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}>()
    p = MatMul(x, w) s = Softmax(p) out = Add(s, x)
}"""


def model_bytes(text=MODEL):
    return parser.parse_model(text).SerializeToString()


def program_of(model=None, **settings):
    return Program(
        **{
            "name": "10x18",
            "family": "none",
            "format": ONNX,
            "folder": Path(),
            "inputs": (TensorSpec("x", "float32", (2, 4)),),
            "outputs": (TensorSpec("out", "float32", (2, 4)),),
            "weights": {},
            "uniform_frames": True,
            "model": (lambda: model_bytes()) if model is None else (lambda: model),
            "digest": "sha256:1",
            **settings,
        }
    )


def session_of(*providers, record="1"):
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry(RECORD_ASSIGNMENT, record)
    return onnxruntime.InferenceSession(model_bytes(), settings, providers=list(providers))


# What ONNX Runtime says of a session


def test_the_assignment_counts_what_the_provider_took():
    offload = assigned(session_of(CPU), CPU)
    assert (offload.device_nodes, offload.cpu_nodes, offload.cpu_share) == (3, 0, 0)


@NEVER_TAKES
def test_the_assignment_sees_that_an_active_provider_took_nothing():
    session = session_of(AZURE)
    assert session.get_providers()[0] == AZURE
    offload = assigned(session, AZURE)
    assert (offload.device_nodes, offload.cpu_nodes, offload.cpu_share) == (0, 3, 1)


def test_a_runtime_that_does_not_record_leaves_it_unknown():
    assert assigned(session_of(CPU, record="0"), CPU) is None
    assert assigned(object(), CPU) is None


# What the backend makes of it


@NEVER_TAKES
def test_an_active_provider_that_runs_nothing_is_refused():
    with pytest.raises(DeviceError, match=f"{AZURE} is active but leaves .* 0 of 3 nodes") as refusal:
        OnnxRuntimeBackend().open(program_of(), None, OnnxRuntimeOptions(provider=AZURE))
    assert "allow_cpu=true" in refusal.value.hint


@NEVER_TAKES
def test_with_allow_cpu_it_runs_and_says_where(caplog):
    options = OnnxRuntimeOptions(provider=AZURE, allow_cpu=True)
    with caplog.at_level(logging.INFO, logger="visionaccel_onnxrt"):
        session = OnnxRuntimeBackend().open(program_of(), None, options)
    assert (session.capabilities.device, session.capabilities.precision) == ("cpu", "float32")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "0 of 3 nodes on the device" in caplog.text
    x = np.ones((2, 4), np.float32)
    plain = OnnxRuntimeBackend().open(program_of(), "cpu", OnnxRuntimeOptions())
    np.testing.assert_array_equal(session.run({"x": x})["out"], plain.run({"x": x})["out"])


def test_no_session_moves_to_the_cpu_when_its_provider_fails():
    # ONNX Runtime would make a session anew on the CPU, in the middle of a run, and only print that it did.
    session = OnnxRuntimeBackend().open(program_of(), "cpu", OnnxRuntimeOptions())
    assert not session._session._enable_fallback


@pytest.mark.skipif(VITISAI in onnxruntime.get_available_providers(), reason="AMD's build has it")
def test_a_runtime_without_the_provider_is_refused():
    verdict = OnnxRuntimeBackend().probe(program_of(), "npu")
    assert isinstance(verdict, Rejected)
    assert f"has no {VITISAI}" in verdict.reason
    assert "Ryzen AI" in verdict.hint
    with pytest.raises(ConfigurationError, match=f"no execution provider '{VITISAI}'"):
        OnnxRuntimeBackend().open(program_of(), "npu", OnnxRuntimeOptions(provider=VITISAI))


def test_tensors_go_by_the_names_that_the_artifact_has_for_them():
    stored = {"x": "pixels:0", "out": "rows:0"}
    model = onnx.load_from_string(model_bytes())
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = [stored.get(value, value) for value in values]
    for value in (*model.graph.input, *model.graph.output):
        value.name = stored[value.name]
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    ours, plain = (
        OnnxRuntimeBackend().open(program, "cpu", OnnxRuntimeOptions()).run({"x": x})
        for program in (program_of(model.SerializeToString(), stored_names=stored), program_of())
    )
    assert list(ours) == ["out"]
    np.testing.assert_array_equal(ours["out"], plain["out"])


# When an offload is good enough


def require(*found, allow_cpu=False, must_know=True):
    return require_offload(found, VITISAI, allow_cpu=allow_cpu, must_know=must_know, unknown="nobody says")


def test_the_worst_account_counts():
    good, bad = Offload(100, 0, 0.0, "one"), Offload(90, 10, 0.05, "another")
    assert require(good, None, bad) == bad


@pytest.mark.parametrize(
    "offload", [Offload(0, 3, 1.0, "it"), Offload(90, 10, 0.5, "it"), Offload(0, 0, 0.0, "it")], ids=str
)
def test_too_little_is_refused_unless_the_cpu_is_allowed(offload):
    with pytest.raises(DeviceError, match="leaves too much of the program to the CPU"):
        require(Offload(100, 0, 0.0, "a liar"), offload)
    assert require(offload, allow_cpu=True) == offload


def test_what_nobody_says_is_refused_where_it_must_be_known(caplog):
    with pytest.raises(DeviceError, match=r"nothing proves that .*: nobody says") as refusal:
        require(None)
    assert "allow_cpu=true" in refusal.value.hint
    assert require(None, allow_cpu=True) is require(None, must_know=False) is None
    assert "may run on the CPU" in caplog.text


# What AMD's compiler says

FINAL = """--------- Final Summary of VAIML Pass ----------
OS: Linux X64
Model: /models/tower.onnx
Device: stx
Model data type: float32
Device data type: bfloat16
Number of operators in the model: 1182
GOPs of the model: 84.2197
Number of operators supported by VAIML: 1181 (99.915%)
GOPs supported by VAIML: 84.215 (99.994%)
Number of operators offloaded by VAIML: 600 (50.761%)
GOPs offloaded by VAIML: 42.110 (50.000%)
Number of subgraphs below 20% GOPs threshold (fall back to CPU): 1
"""
PRELIMINARY = """Model data type: float32
Number of operators in the model: 12
GOPs of the model: 1.5
Number of operators supported by VAIML: 0(0.000%)
GOPs supported by VAIML: 0.000 (0.000%)
"""


@pytest.mark.parametrize(
    ("text", "expected", "precision"),
    [
        (FINAL, (600, 582, 0.5), "bfloat16"),
        (PRELIMINARY, (0, 12, 1.0), None),
        (FINAL.replace("1182", "1,182").replace("\n", "\r\n"), (600, 582, 0.5), "bfloat16"),
        ("\n".join(f"   {line.upper()}" for line in FINAL.splitlines()), (600, 582, 0.5), "BFLOAT16"),
        (FINAL.replace("GOPs", "Cycles"), (600, 582, 582 / 1182), "bfloat16"),
    ],
    ids=["final", "preliminary", "separators", "upper case", "no operations"],
)
@pytest.mark.parametrize("name", SUMMARIES)
def test_a_pass_summary_is_read(text, expected, precision, name, tmp_path):
    folder = tmp_path / "key"
    folder.mkdir()
    (folder / name).write_bytes(text.encode())
    (summary,) = pass_summaries({"cache_dir": str(tmp_path), "cache_key": "key"})
    offload = summary.offload
    assert (offload.device_nodes, offload.cpu_nodes, offload.cpu_share) == pytest.approx(expected)
    assert summary.precision == precision


@pytest.mark.parametrize("text", ["", "Number of operators in the model: 12", "100% on AIE", "\0\xff", "{}"])
def test_a_summary_without_the_counts_says_nothing(text, tmp_path):
    (tmp_path / SUMMARIES[0]).write_bytes(text.encode("latin-1"))
    assert list(pass_summaries({"cache_dir": str(tmp_path), "cache_key": ""})) == []


def test_no_summary_is_no_summary(tmp_path):
    assert list(pass_summaries({"cache_dir": str(tmp_path), "cache_key": "other"})) == []
    assert list(pass_summaries({})) == []


# The provider's options


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "vitisai_config.json"
    path.write_text("{}")
    return path


def options_of(program=None, given=None, folder=None, runtime="1.23"):
    return compiler_options(program or program_of(), given or {}, folder, runtime)


def test_the_cache_is_on_disk_in_the_users_folder(monkeypatch, tmp_path, config):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = options_of(program_of(companions={"vitisai_config": config}))
    assert options["cache_dir"] == str(tmp_path / "visionaccel" / "vitisai")
    assert Path(options["cache_dir"]).is_dir()
    assert options["config_file"] == str(config)
    assert options["enable_cache_file_io_in_mem"] == "0"
    assert set(options["cache_key"]) <= set("0123456789abcdef")


def test_whatever_changes_the_compiled_program_changes_its_key(tmp_path, config):
    def key(**changes):
        return options_of(**{"folder": tmp_path, **changes})["cache_key"]

    configured = program_of(companions={"vitisai_config": config})
    keys = [
        key(),
        key(runtime="1.24"),
        key(program=program_of(digest="sha256:2")),
        key(program=program_of(name="other")),
        key(given={"target": "X1"}),
        key(program=configured),
    ]
    config.write_text('{"passes": []}')
    keys.append(key(program=configured))
    assert len(set(keys)) == len(keys)
    assert key() == key(given={"encryption_key": "0" * 64}) == key(given={"cache_dir": str(tmp_path / "other")})


def test_what_the_user_sets_comes_first(tmp_path, config):
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    given = {"config_file": str(mine), "cache_key": "mine", "enable_cache_file_io_in_mem": "1", "target": "VAIML"}
    program = program_of(companions={"vitisai_config": config}, digest=None)
    assert options_of(program, given, tmp_path) == {**given, "cache_dir": str(tmp_path)}


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="no digest"):
        options_of(program_of(digest=None), folder=tmp_path)
    with pytest.raises(ConfigurationError, match=r"gone\.json does not exist"):
        options_of(given={"config_file": str(tmp_path / "gone.json")}, folder=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be used for compiled programs"):
        options_of(folder=tmp_path / "file" / "folder")


def test_a_compiled_program_gets_no_cache(tmp_path, config):
    program = program_of(format=EP_CONTEXT, companions={"vitisai_config": config})
    assert options_of(program, folder=tmp_path) == {"config_file": str(config)}
    with pytest.raises(ConfigurationError, match="accepts no provider option cache_key"):
        options_of(program, {"cache_key": "mine"})


# Programs that a provider compiled


def context_model(refers_to="10x18.onnx_VITISAI.bin", **attributes):
    """What a provider writes: a node in the place of what it compiled, and one that it left to the CPU."""
    given = {"source": VITISAI, "embed_mode": 0, "main_context": 1, "ep_cache_context": refers_to, **attributes}
    given = {name: value for name, value in given.items() if value is not None}
    nodes = [
        helper.make_node("EPContext", ["x"], ["taken"], domain="com.microsoft", **given),
        helper.make_node("Cast", ["taken"], ["out"], to=TensorProto.FLOAT),
    ]
    x, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("x", "out"))
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [out]), opset_imports=domains, ir_version=8)


def context_program(folder, model=None, *, listed=("10x18.onnx_VITISAI.bin",), **settings):
    """A compiled program in a folder, with the files beside it that are said to be verified."""
    data = (model or context_model()).SerializeToString() if not isinstance(model, bytes) else model
    (folder / "10x18.onnx").write_bytes(data)
    for name in listed:
        (folder / name).write_bytes(b"compiled")
    companions = {f"part{number}": folder / name for number, name in enumerate(listed)}
    return program_of(
        data, format=EP_CONTEXT, artifact=folder / "10x18.onnx", device="npu", companions=companions, **settings
    )


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"embed_mode": 1, "refers_to": "../bytes of the compiled program/\0"},
        {"embed_mode": None, "refers_to": "bytes"},
        {"main_context": 0, "refers_to": None},
    ],
    ids=["beside", "embedded", "embedded by default", "shares another's"],
)
def test_a_compiled_program_is_opened_by_its_path(attributes, tmp_path):
    program = context_program(tmp_path, context_model(**attributes))
    assert verified_context(program, VITISAI) == tmp_path / "10x18.onnx"


@pytest.mark.parametrize(
    "name", ["../outside.bin", "/etc/passwd", "folder/part.bin", "", ".", "..", "C:part.bin", "folder\\part.bin"]
)
def test_a_compiled_program_that_leads_elsewhere_is_refused(name, tmp_path):
    with pytest.raises(ArtifactError, match="is not a plain file name"):
        verified_context(context_program(tmp_path, context_model(name)), VITISAI)


def test_a_file_that_was_not_verified_is_not_followed(tmp_path):
    (tmp_path / "stranger.bin").write_bytes(b"compiled by a stranger")
    with pytest.raises(ArtifactError, match=r"needs stranger\.bin .* not among the program's verified files"):
        verified_context(context_program(tmp_path, context_model("stranger.bin")), VITISAI)
    program = context_program(tmp_path)
    (tmp_path / "10x18.onnx_VITISAI.bin").unlink()
    with pytest.raises(ArtifactError, match=r"needs 10x18\.onnx_VITISAI\.bin"):
        verified_context(program, VITISAI)


def hide(model):
    """Put the nodes of a model into a branch of another."""
    inner = helper.make_graph(model.graph.node, "inner", [], model.graph.output)
    condition = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("", TensorProto.BOOL, [], [True]))
    branch = helper.make_node("If", ["yes"], ["out"], then_branch=inner, else_branch=inner)
    del model.graph.node[:]
    model.graph.node.extend([condition, branch])
    return model


def test_branches_are_looked_into(tmp_path):
    assert verified_context(context_program(tmp_path, hide(context_model())), VITISAI)
    with pytest.raises(ArtifactError, match="is not a plain file name"):
        verified_context(context_program(tmp_path, hide(context_model("../outside.bin"))), VITISAI)


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"source": "QNNExecutionProvider"}, "compiled by 'QNNExecutionProvider'"),
        ({"source": None}, "an unnamed execution provider"),
        ({"source": 3}, "source of an EPContext has the wrong type"),
        ({"embed_mode": "1"}, "embed_mode of an EPContext has the wrong type"),
        ({"embed_mode": 2, "refers_to": "../outside.bin"}, "is not a plain file name"),
    ],
)
def test_nodes_of_another_kind_are_refused(attributes, says, tmp_path):
    with pytest.raises(ArtifactError, match=says):
        verified_context(context_program(tmp_path, context_model(**attributes)), VITISAI)


def test_what_is_no_compiled_program_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="has no EPContext"):
        verified_context(context_program(tmp_path, model_bytes()), VITISAI)
    with pytest.raises(ArtifactError, match="is not an ONNX model"):
        verified_context(context_program(tmp_path, b"\xff\xff\xff"), VITISAI)


def test_weights_of_a_compiled_program_lie_beside_it(tmp_path):
    model = context_model()
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../model.safetensors")
    model.graph.initializer.append(weight)
    with pytest.raises(ArtifactError, match=r"refers to its weights .* not a plain file name"):
        verified_context(context_program(tmp_path, model), VITISAI)


def test_what_was_left_outside_of_a_compiled_program_is_counted(tmp_path):
    model = context_model()
    context_program(tmp_path, model)
    offload = offload_of_context(tmp_path / "10x18.onnx")
    assert (offload.device_nodes, offload.cpu_nodes, offload.cpu_share) == (1, 1, 0)
    model.graph.node.append(helper.make_node("MatMul", ["x", "x"], ["y"]))
    context_program(tmp_path, model)
    assert offload_of_context(tmp_path / "10x18.onnx").cpu_share == 0.5
    assert offload_of_context(tmp_path / "gone.onnx") is None


def test_a_compiled_program_runs_nowhere_else(tmp_path):
    program = context_program(tmp_path)
    verdict = OnnxRuntimeBackend().probe(program, "cpu")
    assert isinstance(verdict, Rejected)
    assert "compiled for an npu" in verdict.reason
    with pytest.raises(ConfigurationError, match=f"compiled for {VITISAI}; {CPU} cannot run it"):
        OnnxRuntimeBackend().open(program, "cpu", OnnxRuntimeOptions())


def test_a_bundle_of_compiled_programs_is_refused_with_a_reason(tiny, tmp_path):
    folder = write_bundle(tiny, tmp_path / "bundle", f"{GRID.h}x{GRID.w}", self_contained=True)
    (folder / "10x18.onnx").write_bytes(context_model().SerializeToString())
    (folder / "10x18.onnx_VITISAI.bin").write_bytes(b"compiled")

    def compiled(manifest):
        program = entry(manifest, "10x18")
        program["format"] = EP_CONTEXT
        program["files"].append({"path": "10x18.onnx_VITISAI.bin"})
        program["companions"] = {"ep_context": "10x18.onnx_VITISAI.bin"}

    forge(folder, compiled)
    (program,) = open_bundle(folder).programs([EP_CONTEXT])
    assert verified_context(program, VITISAI) == folder / "10x18.onnx"
    with pytest.raises(BackendUnavailableError, match="program '10x18' was compiled for an npu"):
        open_encoder(folder, backend="onnxrt", device="cpu")


def test_nothing_is_written_where_nothing_is_compiled(tmp_path):
    with pytest.raises(ConfigurationError, match="compiles no programs that could be kept in context_dir"):
        OnnxRuntimeBackend().open(program_of(), "cpu", OnnxRuntimeOptions(context_dir=tmp_path))


class Compiling:
    """Stands for a session of AMD's build, which writes what it compiled when it is made."""

    written = context_model()

    def __init__(self, model, settings, **_):
        path = Path(settings.get_session_config_entry("ep.context_file_path"))
        path.write_bytes(self.written.SerializeToString())
        path.with_name(f"{path.name}_VITISAI.bin").write_bytes(b"compiled")

    def get_providers(self):
        return [VITISAI]


def open_compiling(monkeypatch, folder, **options):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [VITISAI, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Compiling)
    chosen = OnnxRuntimeOptions(context_dir=folder / "kept", cache_dir=folder / "cache", **options)
    return OnnxRuntimeBackend().open(program_of(), "npu", chosen)


def test_a_session_that_starts_again_replaces_what_it_kept(monkeypatch, tmp_path):
    for _ in range(2):
        assert open_compiling(monkeypatch, tmp_path).capabilities.device == "npu"
        names = sorted(path.name for path in (tmp_path / "kept").iterdir())
        assert names == ["10x18.onnx", "10x18.onnx_VITISAI.bin"]
        assert (tmp_path / "kept" / "10x18.onnx").read_bytes() == Compiling.written.SerializeToString()
        (tmp_path / "kept" / "10x18.onnx_VITISAI.bin").write_bytes(b"old")


def test_what_is_no_compiled_program_is_not_replaced(monkeypatch, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "10x18.onnx").write_bytes(model_bytes())
    with pytest.raises(ConfigurationError, match=r"10x18\.onnx exists and is not a compiled program"):
        open_compiling(monkeypatch, tmp_path)
    assert (tmp_path / "kept" / "10x18.onnx").read_bytes() == model_bytes()


def test_a_session_that_is_refused_keeps_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(Compiling, "written", parser.parse_model(MODEL))
    with pytest.raises(DeviceError, match="leaves too much of the program to the CPU"):
        open_compiling(monkeypatch, tmp_path)
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize("device", [None, "cpu", "cuda:0"])
def test_amds_provider_is_to_be_had_on_its_own_device_only(device):
    # By the device it is decided that the session gets a process of its own.
    with pytest.raises(ConfigurationError, match=f"{VITISAI} does not run on device") as refusal:
        OnnxRuntimeBackend().open(program_of(), device, OnnxRuntimeOptions(provider=VITISAI))
    assert "device npu" in refusal.value.hint


# Bundles for the compiler


def export(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_an_export_for_vitis_ai_brings_the_compilers_configuration(tiny, tmp_path):
    done = export(tiny, tmp_path / "bundle", "--target", "vitisai", "--grid", "10x18", "--bucket", "20x22")
    assert done.exit_code == 0, done.output
    for program in document(tmp_path / "bundle")["programs"]:
        assert (program["device"], program["precision"]) == ("npu", "float32")
        assert program["companions"] == {"vitisai_config": "vitisai_config.json"}
        assert [file["path"] for file in program["files"]] == [program["model"], "vitisai_config.json"]
    programs = open_bundle(tmp_path / "bundle").programs([ONNX])
    assert len({program.digest for program in programs}) == 2
    config = json.loads(programs[0].companions["vitisai_config"].read_text())
    assert [(each["name"], each["plugin"]) for each in config["passes"]] == [
        ("init", "vaip-pass_init"),
        ("vaiml_partition", "vaip-pass_vaiml_partition"),
    ]
    assert config["passes"][1]["vaiml_config"]["preferred_data_storage"] == "unvectorized"
    assert config["targets"][0]["pass"] == ["init", "vaiml_partition"]
    model = onnx.load_from_string(programs[0].model())
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "only programs of fixed shapes"),
        (["--grid", "10x18", "--dynamic"], "only programs of fixed shapes"),
        (["--grid", "10x18", "--device", "cuda"], "is for device npu, not cuda"),
    ],
)
def test_an_export_that_the_compiler_cannot_take_is_refused(arguments, says, tiny, tmp_path):
    done = export(tiny, tmp_path / "bundle", "--target", "vitisai", *arguments)
    assert done.exit_code != 0
    assert says in f"{done.exception}"
    assert not (tmp_path / "bundle").exists()


def test_a_configuration_that_was_changed_is_refused(tiny, tmp_path):
    folder = tmp_path / "bundle"
    assert export(tiny, folder, "--target", "vitisai", "--grid", "10x18").exit_code == 0
    before = open_bundle(folder).programs([ONNX])[0].digest
    (folder / "vitisai_config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"vitisai_config\.json"):
        open_bundle(folder)
    reseal(folder)
    assert open_bundle(folder).programs([ONNX])[0].digest != before


# On a machine with AMD's build


@pytest.fixture(scope="module")
def compiled(tiny, tmp_path_factory):
    """A bundle for the compiler, and the options that keep what is compiled with it."""
    folder = tmp_path_factory.mktemp("npu")
    write = export(tiny, folder / "bundle", "--target", "vitisai", "--grid", "10x18", "--self-contained")
    assert write.exit_code == 0, write.output
    return folder / "bundle", {"cache_dir": str(folder / "cache")}


def encode_on_npu(folder, options, tiny):
    patches = random_patches([(1, 10, 18)])
    with open_encoder(folder, backend="onnxrt", device="npu", options=options) as encoder:
        assert (encoder.capabilities.device, encoder.capabilities.precision) == ("npu", "bfloat16")
        ours = encoder.encode(patches, [(1, 10, 18)])
    exact = reference(tiny, patches, [(1, 10, 18)])
    cosines = (ours * exact).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosines.min() > 0.99


@pytest.mark.ryzen_ai
def test_the_npu_computes_what_the_reference_does(compiled, tiny, caplog):
    folder, options = compiled
    with caplog.at_level(logging.INFO, logger="visionaccel_onnxrt"):
        encode_on_npu(folder, options, tiny)
    assert "nodes on the device" in caplog.text


@pytest.mark.ryzen_ai
def test_the_second_start_finds_the_compiled_program(compiled, tiny):
    folder, options = compiled
    encode_on_npu(folder, options, tiny)
    before = {path: path.stat().st_mtime_ns for path in Path(options["cache_dir"]).glob("*/vaiml_par_*/**/*")}
    encode_on_npu(folder, options, tiny)
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.ryzen_ai
def test_a_compiled_program_that_was_kept_runs(compiled, tiny, tmp_path):
    folder, options = compiled
    encode_on_npu(folder, {**options, "context_dir": str(tmp_path)}, tiny)
    (program,) = open_bundle(folder).programs([ONNX])
    kept = program_of(
        (tmp_path / "10x18.onnx").read_bytes(),
        format=EP_CONTEXT,
        artifact=tmp_path / "10x18.onnx",
        companions={path.name: path for path in tmp_path.iterdir()},
        inputs=program.inputs,
        outputs=program.outputs,
        device="npu",
    )
    session = OnnxRuntimeBackend().open(kept, "npu", OnnxRuntimeOptions())
    shape = program.inputs[0].shape
    assert np.isfinite(session.run({program.inputs[0].name: np.ones(shape, np.float32)})[program.outputs[0].name]).all()
