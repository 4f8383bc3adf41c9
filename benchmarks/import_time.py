"""What `import visionaccel` adds to an interpreter's start."""

import statistics
import subprocess
import sys

RUNS = 15
CODE = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def measure() -> dict[str, float]:
    def seconds(statement: str) -> float:
        command = [sys.executable, "-c", CODE.format(statement)]
        runs = [float(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(RUNS)]
        return statistics.median(runs)

    return {
        "import visionaccel, ms": 1e3 * seconds("import visionaccel"),
        "import numpy, ms (for scale)": 1e3 * seconds("import numpy"),
        "vLLM entry point with no backend named, ms": 1e3
        * seconds("from visionaccel.integrations.vllm import register; register()"),
    }
