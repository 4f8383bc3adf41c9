"""ONNX Runtime's CPU provider computes bfloat16 programs as hardware does: float32 inside, rounded by each operator."""

import json
from math import erf

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, parser
from safetensors.torch import save_file
from torch.nn.functional import linear

from visionaccel.backends import Accepted
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.program import ONNX, Program
from visionaccel.errors import ArtifactError
from visionaccel_onnxrt import OnnxRuntimeBackend
from visionaccel_onnxrt.backend import OnnxRuntimeOptions
from visionaccel_onnxrt.bfloat16 import emulate_bfloat16

BFLOAT16 = ml_dtypes.bfloat16
every_level = pytest.mark.parametrize("level", ["none", "basic", "extended", "all"])

CONSTANTS = {"two": 2.0, "half": 0.5, "one": 1.0, "root2": 2**0.5, "epsilon": 1e-6, "scale": 0.125}


def model_of(body, element="bfloat16", **shapes):
    """A serialized model: `body` over `bx`, `by`, ..., which are float32 inputs of these shapes cast; it makes `r`."""
    inputs = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    to = TensorProto.DataType.Value({"float32": "FLOAT"}.get(element, element.upper()))
    casts = "".join(f"b{name} = Cast<to = {to}>({name})\n" for name in shapes)
    for name, value in CONSTANTS.items():
        if f", {name})" in body:
            casts += f"{name}32 = Constant<value_float = {value}>()\n{name} = Cast<to = {to}>({name}32)\n"
    header = '<ir_version: 8, opset_import: ["": 17, "acme": 1]> g'
    text = f"{header} ({inputs}) => (float[] out) {{{casts}{body}\nout = Cast<to = 1>(r)}}"
    return parser.parse_model(text).SerializeToString()


def program_of(model, folder, precision="bfloat16"):
    return Program(
        name="test",
        family="none",
        format=ONNX,
        folder=folder,
        inputs=tuple(TensorSpec(value.name, "float32", (1,)) for value in onnx.load_from_string(model).graph.input),
        outputs=(TensorSpec("out", "float32", (1,)),),
        weights={},
        uniform_frames=True,
        precision=precision,
        model=lambda: model,
    )


def run(model, folder, level, inputs):
    """The output of a bfloat16 program in the real backend."""
    options = OnnxRuntimeOptions(optimization=level, threads=1)
    return OnnxRuntimeBackend().open(program_of(model, folder), "cpu", options).run(inputs)["out"]


def softmax(x, axis=-1):
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


ARITHMETIC = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Neg": np.negative,
    "Pow": np.power,
    "Sqrt": np.sqrt,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Tanh": np.tanh,
    "Erf": lambda x: np.vectorize(erf)(x).astype(np.float32),
    "MatMul": np.matmul,
    "Gemm": lambda a, b, c, **_: a @ b.T + c,
    "ReduceMean": lambda x, axes, keepdims: x.mean(tuple(axes), keepdims=bool(keepdims)),
    "Softmax": softmax,
}


def op_by_op(model, inputs, *, dtype=BFLOAT16):
    """The model in numpy, one operator after another: float32 inside, rounded to `dtype` by each."""
    values = dict(inputs)
    with np.errstate(all="ignore"):
        for node in onnx.load_from_string(model).graph.node:
            taken = [values[name] for name in node.input]
            settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            match node.op_type:
                case "Cast":
                    result = taken[0].astype(BFLOAT16 if settings["to"] == TensorProto.BFLOAT16 else np.float32)
                case "Constant":
                    result = np.float32(settings["value_float"])
                case "Transpose":
                    result = taken[0].transpose(settings["perm"])
                case operator:
                    wide = ARITHMETIC[operator](*(value.astype(np.float32) for value in taken), **settings)
                    assert wide.dtype == np.float32
                    result = wide.astype(dtype)
            values[node.output[0]] = result
    return values["out"].astype(np.float32)


def ulps(a, b):
    """How many bfloat16 numbers lie between two arrays of such numbers."""

    def rank(x):
        bits = x.astype(BFLOAT16).view(np.int16).astype(np.int32)
        return np.where(bits < 0, -0x8000 - bits, bits)

    return np.abs(rank(a) - rank(b))


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@every_level
@pytest.mark.parametrize(
    "body",
    [
        "r = Add(bx, by)",
        "r = Mul(bx, by)",
        "r = Div(bx, by)",
        "r = Sqrt(bx)",
        "s = Add(bx, by) p = Mul(s, bx) d = Sub(p, by) n = Neg(d) q = Div(n, s) r = Add(q, by)",
        "p = Pow(bx, two) s = Add(p, epsilon) q = Sqrt(s) d = Div(by, q) r = Mul(d, half)",
        "a = Mul(bx, one) b = Mul(a, one) c = Add(b, epsilon) d = Sub(c, epsilon) r = Mul(d, two)",
    ],
)
def test_elementwise_operators_give_every_bit(body, level, tmp_path):
    every_number = np.arange(2**16, dtype=np.uint16).view(BFLOAT16).astype(np.float32)
    model = model_of(body, x=[2**16], y=[2**16])
    inputs = {"x": every_number, "y": np.random.default_rng(0).permutation(every_number)}
    ours, expected = run(model, tmp_path, level, inputs), op_by_op(model, inputs)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(ours), ~number)
    np.testing.assert_array_equal(ours[number].view(np.int32), expected[number].view(np.int32))


@every_level
def test_inputs_are_rounded_to_nearest_even(level, tmp_path):
    edges = np.arange(2**16, dtype=np.uint32)[:, None] << 16 | np.uint32([0x7FFF, 0x8000, 0x8001])
    inputs = {"x": edges.view(np.float32)}
    model = model_of("r = Neg(bx)", x=edges.shape)
    np.testing.assert_array_equal(run(model, tmp_path, level, inputs), op_by_op(model, inputs))


@every_level
@pytest.mark.parametrize(
    "body",
    [
        "r = MatMul(bx, by)",
        "r = Gemm<transB = 1>(bx, bw, bc)",
        "r = Softmax<axis = -1>(bx)",
        "r = ReduceMean<axes = [-1], keepdims = 1>(bx)",
        "r = Sigmoid(bx)",
        "r = Erf(bx)",
        "r = Tanh(bx)",
    ],
)
def test_other_operators_are_within_one_bfloat16_number(body, level, tmp_path):
    shapes = {"x": [48, 96], "y": [96, 40], "w": [40, 96], "c": [40]}
    inputs = {name: random(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    model = model_of(body, **shapes)
    assert ulps(run(model, tmp_path, level, inputs), op_by_op(model, inputs)).max() <= 1


FUSED = {
    "RMS normalisation": "s = Pow(bx, two) m = ReduceMean<axes = [-1], keepdims = 1>(s) e = Add(m, epsilon) "
    "q = Sqrt(e) d = Div(bx, q) r = Mul(d, bc)",
    "layer normalisation": "m = ReduceMean<axes = [-1], keepdims = 1>(bx) z = Sub(bx, m) s = Pow(z, two) "
    "v = ReduceMean<axes = [-1], keepdims = 1>(s) e = Add(v, epsilon) q = Sqrt(e) d = Div(z, q) p = Mul(d, bc) "
    "r = Add(p, bc)",
    "GELU": "d = Div(bx, root2) e = Erf(d) f = Add(e, one) g = Mul(bx, f) r = Mul(g, half)",
    "SiLU": "s = Sigmoid(bx) r = Mul(bx, s)",
    "linear": "p = MatMul(bx, bw) r = Add(p, bc)",
    "gated": "g = Gemm<transB = 1>(bx, bw, bc) s = Sigmoid(g) a = Mul(g, s) u = Gemm<transB = 1>(bx, by, bc) "
    "r = Mul(a, u)",
    "attention": "t = Transpose<perm = [1, 0]>(by) l = MatMul(bx, t) z = Mul(l, scale) p = Softmax<axis = -1>(z) "
    "r = MatMul(p, bw)",
}
"""What ONNX Runtime makes one operator of in float32, without the roundings inside."""


@every_level
@pytest.mark.parametrize("body", FUSED.values(), ids=FUSED)
def test_no_optimization_takes_the_rounding_away(body, level, tmp_path):
    shapes = {"x": [64, 64], "y": [64, 64], "w": [64, 64], "c": [64]}
    # Rows of length near 1 keep the sigmoid out of its tails, where ONNX Runtime's float32 is no better than 1e-7.
    inputs = {name: random(*shape, seed=seed) / 3 for seed, (name, shape) in enumerate(shapes.items())}
    model = model_of(body, **shapes)
    ours, rounded = run(model, tmp_path, level, inputs), op_by_op(model, inputs)
    unrounded = op_by_op(model, inputs, dtype=np.float32).astype(BFLOAT16).astype(np.float32)
    assert np.mean(ours == rounded) > 0.99
    assert np.mean(ours == unrounded) < 0.9


def mlp_over(file):
    """Two gated layers; every weight lies in the safetensors file, and one of them in float32."""
    size = int.from_bytes(file.read_bytes()[:8], "little")
    stored = json.loads(file.read_bytes()[8 : 8 + size])
    kinds = {"BF16": TensorProto.BFLOAT16, "F32": TensorProto.FLOAT}
    weights = []
    for name, entry in stored.items():
        weight = TensorProto(name=name, data_type=kinds[entry["dtype"]], data_location=TensorProto.EXTERNAL)
        weight.dims.extend(entry["shape"])
        begin, end = entry["data_offsets"]
        for key, value in (("location", file.name), ("offset", 8 + size + begin), ("length", end - begin)):
            weight.external_data.add(key=key, value=str(value))
        weights.append(weight)
    cast, node = TensorProto.BFLOAT16, helper.make_node
    nodes = [
        node("Cast", ["x"], ["bx"], to=cast),
        node("Cast", ["bias.0"], ["narrow bias"], to=cast),
        node("Gemm", ["bx", "weight.0", "narrow bias"], ["g0"], transB=1),
        node("Sigmoid", ["g0"], ["s0"]),
        node("Mul", ["g0", "s0"], ["a0"]),
        node("Gemm", ["a0", "weight.1", "bias.1"], ["g1"], transB=1),
        node("Add", ["g1", "bx"], ["sum"]),
        node("Cast", ["sum"], ["out"], to=TensorProto.FLOAT),
    ]
    x, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [24, 48]) for name in ("x", "out"))
    graph = helper.make_graph(nodes, "mlp", [x], [out], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


@pytest.fixture
def mlp(tmp_path):
    """An MLP's weights, and its model over the file that holds them."""
    torch.manual_seed(0)
    shapes = {"weight.0": (96, 48), "bias.0": (96,), "weight.1": (48, 96), "bias.1": (48,)}
    weights = {name: (torch.randn(shape) / 8).bfloat16() for name, shape in shapes.items()}
    weights["bias.0"] = torch.randn(96)
    save_file(weights, tmp_path / "model.safetensors")
    return weights, mlp_over(tmp_path / "model.safetensors")


@every_level
def test_an_mlp_over_a_safetensors_file_computes_as_torch_in_bfloat16(mlp, level, tmp_path):
    weights, model = mlp
    x = random(24, 48)
    narrow = torch.from_numpy(x).bfloat16()
    hidden = linear(narrow, weights["weight.0"], weights["bias.0"].bfloat16())
    hidden = linear(hidden * torch.sigmoid(hidden), weights["weight.1"], weights["bias.1"])
    expected = (hidden + narrow).float().numpy()
    ours = run(model, tmp_path, level, {"x": x})
    assert np.mean(ours == expected) > 0.99
    np.testing.assert_allclose(ours, expected, rtol=2**-7, atol=2**-7)


def test_external_data_is_referenced_and_never_read(mlp, tmp_path):
    _, model = mlp
    (tmp_path / "model.safetensors").unlink()
    before, after = (onnx.load_from_string(m).graph for m in (model, emulate_bfloat16(model)))
    assert before.initializer == after.initializer
    assert [value.name for value in before.output] == [value.name for value in after.output]


def test_only_arithmetic_is_cast_and_each_value_once():
    model = model_of("t = Transpose<perm = [1, 0]>(bx) a = Add(t, t) b = Mul(a, t) r = Mul(a, b)", x=[4, 4])
    operators = [node.op_type for node in onnx.load_from_string(emulate_bfloat16(model)).graph.node]
    assert operators == [
        *("Cast", "Transpose"),
        *("Cast", "Add", "Cast"),
        *("Cast", "Mul", "Cast"),
        *("Cast", "Mul", "Cast"),
        "Cast",
    ]


def test_a_mask_is_not_cast():
    model = model_of("m = Less(bx, by) n = Not(m) r = Where(n, bx, by)", x=[4], y=[4])
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(emulate_bfloat16(model)), strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    assert types["m"] == types["n"] == TensorProto.BOOL
    assert types["r"] == TensorProto.BFLOAT16


@pytest.mark.parametrize(
    "body",
    [
        "out = Mul(x, x)",
        "b = Cast<to = 16>(x) t = Transpose<perm = [1, 0]>(b) out = Cast<to = 1>(t)",
        "y = acme.Thing(x) out = Mul(y, x)",
    ],
)
def test_a_model_that_does_not_compute_in_bfloat16_is_returned_as_it_is(body):
    header = '<ir_version: 8, opset_import: ["": 17, "acme": 1]> g (float[4, 4] x) => (float[4, 4] out)'
    model = parser.parse_model(f"{header} {{{body}}}").SerializeToString()
    assert emulate_bfloat16(model) is model


def test_a_value_whose_type_cannot_be_told_is_named():
    with pytest.raises(ArtifactError, match=r"'puzzle' .* an output of Thing, is unknown"):
        emulate_bfloat16(model_of("puzzle = acme.Thing(bx) r = Mul(bx, puzzle)", x=[4]))


def test_subgraphs_are_refused():
    branches = ", ".join(
        f"{name}_branch = {name} () => (bfloat16[4] {name}) {{{name} = Neg(bx)}}" for name in ("then", "else")
    )
    body = f"s = Add(bx, bx) number = Constant<value_int = 1>() bool = Cast<to = 9>(number) r = If(bool)<{branches}>"
    with pytest.raises(ArtifactError, match="only in a flat graph"):
        emulate_bfloat16(model_of(body, x=[4]))


def test_bytes_that_are_no_model_are_refused():
    with pytest.raises(ArtifactError, match="cannot be read"):
        emulate_bfloat16(b"not a model")


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_the_backend_says_what_it_computes_in(precision, tmp_path):
    model = model_of("r = Mul(bx, bx)", x=[4], element=precision)
    program = program_of(model, tmp_path, precision)
    verdict = OnnxRuntimeBackend().probe(program, "cpu")
    assert isinstance(verdict, Accepted)
    emulated = "bfloat16 emulated: float32 arithmetic, rounded after each operator"
    assert (emulated in verdict.notes) == (precision == "bfloat16")
    session = OnnxRuntimeBackend().open(program, "cpu", OnnxRuntimeOptions())
    # ONNX Runtime's CPU provider computes float16 operators in float32, so nothing else is claimed of it.
    assert session.capabilities.precision == ("bfloat16" if precision == "bfloat16" else "float32")
    np.testing.assert_array_equal(session.run({"x": np.full(4, 3, np.float32)})["out"], np.full(4, 9))
