"""What is exported computes what the checkpoint computes, and says what it is."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings

from bundle_tools import DYNAMIC, FIXED, GRID, LARGEST, TRIPLE, assert_close, cosines, encode
from strategies import grids
from towers import random_patches, reference
from visionaccel import open_encoder
from visionaccel.bundle import (
    MANIFEST,
    MOST_PATCHES,
    ProgramRequest,
    export_bundle,
    open_bundle,
    processor_digest,
    program_name,
    tower_digest,
)
from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid, Bucket, FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError, UnfitGridError
from visionaccel_testing.checkpoints import random_checkpoint


def test_a_bundle_states_what_it_holds(tiny, contained):
    opened = open_bundle(contained)
    assert opened.family == "qwen2_5_vl"
    assert opened.grids == (GRID,)
    assert opened.manifest.weights_digest == tower_digest(open_tower(tiny))
    assert opened.manifest.spec == open_tower(tiny).spec.document()
    assert opened.manifest.checkpoint is None
    listed = {file.path for file in opened.manifest.every_file()}
    assert listed | {MANIFEST} == {file.name for file in contained.iterdir()}
    programs = {program.name: program for program in opened.programs(["onnx", "checkpoint"])}
    assert list(programs) == ["10x18", "bucket-440x9", "dynamic", "checkpoint"]
    assert programs["10x18"].coverage == FixedGrid(GRID)
    assert programs["bucket-440x9"].coverage == Bucket({"patches": 440, "windows": 9})
    assert programs["dynamic"].coverage == AnyGrid()
    assert str(programs["10x18"].inputs[0]) == "pixel_values: float32[180, 96]"
    assert str(programs["10x18"].outputs[0]) == "embeddings: float32[45, 24]"


def test_a_referring_bundle_holds_no_weights_and_names_the_checkpoint(tiny, referring):
    opened = open_bundle(referring)
    assert opened.manifest.checkpoint.source == str(tiny)
    assert opened.tower.checkpoint.folder == tiny
    assert sum(file.stat().st_size for file in referring.iterdir()) < (tiny / "model.safetensors").stat().st_size / 2
    assert {file.suffix for file in referring.iterdir()} == {".onnx", ".json"}


@pytest.mark.parametrize("self_contained", [False, True], ids=["referring", "contained"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_every_program_computes_what_the_checkpoint_computes(tmp_path, stored, precision, self_contained):
    checkpoint = random_checkpoint(tmp_path / "checkpoint", dtype=stored)
    tower, patches = open_tower(checkpoint), random_patches(TRIPLE)
    exact = reference(checkpoint, patches, TRIPLE)
    for request in (FIXED, ProgramRequest(tower.bucket(LARGEST)), DYNAMIC):
        folder = tmp_path / program_name(request.coverage)
        opened = export_bundle(tower, folder, [request], self_contained=self_contained, precision=precision)
        ours = encode(opened, patches=patches)
        if precision == "float32":
            assert_close(ours, exact)
        else:
            assert cosines(ours, exact).min() > {"bfloat16": 0.999, "float16": 0.9999}[precision]


def test_the_packed_weights_are_those_of_the_checkpoint(tiny, contained):
    assert_close(encode(contained, backend="torch_ref"), reference(tiny, random_patches(TRIPLE), TRIPLE))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("self_contained", [False, True], ids=["referring", "contained"])
def test_what_the_host_does_of_a_split_program_changes_nothing(tiny, tmp_path, precision, self_contained):
    tower, triples = open_tower(tiny), [(2, 10, 18)]
    for coverage in (FIXED.coverage, tower.bucket(LARGEST)):
        whole, split = (
            export_bundle(
                tower,
                tmp_path / f"{program_name(coverage)}-{split_host}",
                [ProgramRequest(coverage, split_host)],
                self_contained=self_contained,
                precision=precision,
            )
            for split_host in (False, True)
        )
        (program,) = split.programs(["onnx"])
        assert split.manifest.programs[0].host.tensors == ("patch_embed.proj.weight",)
        assert program.inputs[0].name == "patch_embeddings"
        assert "patch_embed" not in str(onnx.load_model_from_string(program.model()).graph.initializer)
        # bfloat16 products differ in the order of their sums, by what is rounded away.
        assert_close(encode(split, triples), encode(whole, triples), 2e-5 if precision == "float32" else 2e-2)


@pytest.fixture(scope="module")
def bucket_encoder(tiny, tmp_path_factory):
    tower = open_tower(tiny)
    request = ProgramRequest(tower.bucket(LARGEST))
    folder = tmp_path_factory.mktemp("bucket") / "bundle"
    with open_encoder(export_bundle(tower, folder, [request], self_contained=True), backend="onnxrt") as encoder:
        yield encoder


@given(triple=grids(most_side=10))
@example(triple=(1, 20, 22))
@example(triple=(1, 2, 2))
@example(triple=(3, 20, 2))
@hypothesis_settings(max_examples=25)
def test_a_bucket_computes_a_smaller_grid_as_its_own_program_does(tiny, bucket_encoder, tmp_path_factory, triple):
    tower, (frames, height, width) = open_tower(tiny), triple
    for h, w in {(height, width), (width, height)}:
        if not tower.fits(bucket_encoder.programs[0].program.coverage, Grid(1, h, w)):
            continue
        patches = random_patches([(frames, h, w)])
        folder = tmp_path_factory.mktemp("exact") / "bundle"
        exact = export_bundle(tower, folder, [ProgramRequest(FixedGrid(Grid(1, h, w)))])
        ours = bucket_encoder.encode(patches, [(frames, h, w)])
        assert_close(ours, encode(exact, [(frames, h, w)], patches), 1e-5)
        by_frame = [bucket_encoder.encode(frame, [(1, h, w)]) for frame in np.split(patches, frames)]
        np.testing.assert_array_equal(ours, np.concatenate(by_frame))


def test_a_bucket_is_for_the_grid_turned_on_its_side_too(tiny, bucket_encoder):
    for triples in ([(1, 22, 20)], [(2, 18, 10)]):
        patches = random_patches(triples)
        assert_close(bucket_encoder.encode(patches, triples), reference(tiny, patches, triples))


def test_what_no_program_of_a_bundle_takes_is_refused(bucket_encoder):
    with pytest.raises(UnfitGridError, match="440 patches in 9 windows"):
        bucket_encoder.encode(random_patches([(1, 22, 22)]), [(1, 22, 22)])


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "split"])
def static_models(request, tiny, tmp_path_factory):
    """Self-contained programs of fixed shapes by path."""
    tower, folder = open_tower(tiny), tmp_path_factory.mktemp("static") / "bundle"
    coverages = (FIXED.coverage, FixedGrid(Grid(1, 58, 74)), tower.bucket(LARGEST))
    requests = [ProgramRequest(coverage, request.param) for coverage in coverages]
    export_bundle(tower, folder, requests, self_contained=True)
    return sorted(folder.glob("*.onnx"))


def test_fixed_programs_are_valid_onnx_with_standard_operators_of_opset_17(static_models):
    for path in static_models:
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions


def test_fixed_programs_have_no_dynamic_dimension_anywhere(static_models):
    for path in static_models:
        model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True)
        shapes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*model.graph.input, *model.graph.output, *model.graph.value_info)
        }
        assert all(size > 0 for shape in shapes.values() for size in shape)
        assert {name for node in model.graph.node for name in node.output} <= shapes.keys()


def test_fixed_programs_hold_no_mask_over_all_pairs_of_patches(static_models):
    for path in static_models:
        graph = onnx.load(path, load_external_data=False).graph
        patches = {"10x18": 180, "58x74": 58 * 74, "bucket-440x9": 440}[path.stem]
        constants = [list(tensor.dims) for tensor in graph.initializer]
        constants += [list(a.t.dims) for node in graph.node for a in node.attribute if a.HasField("t")]
        assert not [shape for shape in constants if shape.count(patches) > 1]
        assert not [value for value in graph.input if str(value).count(f"dim_value: {patches}\n") > 1]


def test_a_program_opens_by_its_path_in_plain_onnx_runtime(tiny, contained):
    patches = random_patches(TRIPLE)
    session = onnxruntime.InferenceSession(contained / "10x18.onnx")
    (embeddings,) = session.run(None, {"pixel_values": patches})
    assert_close(embeddings, reference(tiny, patches, TRIPLE))


def test_the_image_processor_comes_along(digits, tmp_path):
    folder = export_bundle(open_tower(digits), tmp_path / "bundle", [DYNAMIC], self_contained=True).folder
    assert open_bundle(folder).manifest.processor_digest == processor_digest(digits) == processor_digest(folder)
    assert processor_digest(digits) is not None


def test_the_processors_digest_is_of_what_makes_patches(tmp_path):
    settings = {"patch_size": 14, "image_mean": [0.5, 0.5, 0.5]}

    def digest(name, config):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / name).write_text(json.dumps(config))
        return processor_digest(folder)

    old = digest("preprocessor_config.json", {**settings, "image_processor_type": "Qwen2VLImageProcessor"})
    new = {"image_processor": {**settings, "image_processor_type": "Fast"}, "processor_class": "Qwen"}
    assert old == digest("processor_config.json", new)
    assert old != digest("preprocessor_config.json", {**settings, "patch_size": 16})
    assert processor_digest(tmp_path) is None

    both = tmp_path / "both"
    both.mkdir()
    (both / "preprocessor_config.json").write_text(json.dumps({**settings, "patch_size": 16}))
    (both / "processor_config.json").write_text(json.dumps(new))
    assert processor_digest(both) == old, "what transformers reads where there are both"
    (both / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen"}))
    assert processor_digest(both) != old


@pytest.mark.parametrize(
    ("coverages", "complaint"),
    [
        ([], "no program was requested"),
        ([FixedGrid(GRID), FixedGrid(GRID)], "twice"),
        ([AnyGrid(), AnyGrid(5)], "twice"),
        ([FixedGrid(Grid(2, 10, 18))], "one frame"),
        ([FixedGrid(Grid(1, 999_998, 999_998))], f"at most {MOST_PATCHES} patches"),
        ([Bucket({"patches": 2 * MOST_PATCHES, "windows": 9})], f"at most {MOST_PATCHES} patches"),
    ],
)
def test_programs_that_cannot_be_are_refused_before_anything_is_written(tiny, tmp_path, coverages, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        export_bundle(open_tower(tiny), tmp_path / "bundle", [ProgramRequest(coverage) for coverage in coverages])
    assert not list(tmp_path.iterdir())
