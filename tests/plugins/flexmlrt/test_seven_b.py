"""The published geometry: the 7B tower's blocks compiled for 58x74, imported, and run on the simulator."""

from functools import partial

from simulated import simulated_precision
from towers import lowest_cosine
from visionaccel import open_encoder
from visionaccel.core.grid import Grid
from visionaccel.encoder import open_tower
from visionaccel_flexmlrt.simulator import compile_partition
from visionaccel_flexmlrt.vitisai import ImportRequest, import_vitisai
from visionaccel_flexmlrt.vitisai.writing import write_vitisai_folder

GRID = Grid(1, 58, 74)


def test_the_imported_artifact_of_the_7b_towers_blocks_is_right(seven, seven_answer, tmp_path):
    tower, precision = open_tower(seven), simulated_precision()
    write_vitisai_folder(
        tower, tmp_path / "compiled", GRID, layout="rai", compile=partial(compile_partition, precision=precision)
    )
    bundle = import_vitisai(
        tower, [ImportRequest(tmp_path / "compiled", precision=precision)], tmp_path / "bundle"
    ).bundle
    assert bundle.grids == (GRID,)
    patches, exact = seven_answer
    with open_encoder(bundle, backend="flexmlrt", device="simulator") as encoder:
        assert encoder.capabilities.simulated
        assert encoder.capabilities.precision == precision
        lowest = lowest_cosine(encoder.encode(patches, [GRID]), exact)
    if precision == "bfloat16":
        assert 0.999 < lowest < 0.999999, "right, and not in float32, which comes closer"
    else:
        assert lowest > 0.999999
