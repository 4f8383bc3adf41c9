"""Computes with an installed visionaccel-flexmlrt: a product with ones on FlexMLRT's simulator, through the bridge.

Run by `make dist` on the built wheel, and by cibuildwheel on each of its wheels. Needs the extra `simulator`.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx

from visionaccel_flexmlrt import runtime
from visionaccel_flexmlrt.simulator import compile_partition


def main() -> None:
    """Compile a product, run it in the simulator and compare the result."""
    lacking = runtime.missing(runtime.SIMULATOR, runtime.AmdEnvironment())
    if lacking is not None:
        raise SystemExit(f"{lacking.reason} {lacking.hint}")
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [onnx.helper.make_tensor_value_info("x", float32, (1, 16))],
        [onnx.helper.make_tensor_value_info("y", float32, (1, 2))],
        [onnx.numpy_helper.from_array(np.ones((16, 2), np.float32), "w")],
    )
    with tempfile.TemporaryDirectory() as folder:
        partition, artifact = Path(folder, "product.onnx"), Path(folder, "product.rai")
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), partition)
        compile_partition(partition, artifact)
        model = runtime.load(runtime.SIMULATOR, runtime.AmdEnvironment()).Model(
            path=str(artifact),
            single_file=True,
            inputs=[("x", "float32", [1, 16])],
            outputs=[("y", "float32", [1, 2])],
            device_name="",
            subgraph="",
            cache_dir=folder,
            execute_mode=2,
            preemption=True,
        )
        (found,) = model.run([np.arange(16, dtype=np.float32)[None]])
    if found.tolist() != [[120.0, 120.0]]:
        raise SystemExit(f"the simulator computes {found.tolist()} and not [[120.0, 120.0]]")
    print("the simulator computes")


if __name__ == "__main__":
    main()
