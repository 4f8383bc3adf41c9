"""Bad backends: the project that `visionaccel init backend` writes, with one fault planted in each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from visionaccel.bundle import ProgramRequest, export_bundle
from visionaccel.core.grid import Grid
from visionaccel.core.program import FixedGrid
from visionaccel.encoder import open_tower
from visionaccel_testing.conformance.declaration import Source
from visionaccel_testing.templates import write_backend_project

__all__ = ["FIXED", "GOOD", "PLANTED", "Planted", "fixed_shapes", "install"]

GOOD = "kit_good"
FIXED = (Grid(1, 8, 12), Grid(1, 20, 16))

_HEAD = """
import os, pathlib, threading, time
import numpy as np
Session, Backend = {stem}Session, {stem}Backend
_init, _run = Session.__init__, Session.run

def on_output(change):
    def run(self, inputs):
        found = dict(_run(self, inputs))
        found["embeddings"] = change(self, inputs, found["embeddings"])
        return found
    Session.run = run

def on_graph(change):
    def init(self, program):
        import dataclasses, onnx
        model = onnx.load_model_from_string(program.model())
        change(model.graph)
        _init(self, dataclasses.replace(program, model=model.SerializeToString))
    Session.__init__ = init

def replaced(old, new, **attributes):
    def change(graph):
        from onnx import helper
        for node in graph.node:
            if node.op_type == old:
                node.op_type = new
                del node.attribute[:]
                node.attribute.extend(helper.make_attribute(*pair) for pair in attributes.items())
    on_graph(change)
"""


def fixed_shapes(checkpoint: Path, folder: Path) -> Path:
    """A bundle of one grid and of a bucket, in standard operators."""
    tower = open_tower(checkpoint)
    requests = [ProgramRequest(FixedGrid(FIXED[0])), ProgramRequest(tower.bucket(Grid(1, 24, 24)))]
    export_bundle(tower, folder, requests)
    return folder


@dataclass(frozen=True)
class Planted:
    """A fault.

    Attributes:
        name: The backend's name.
        check: The check that must find it.
        says: What its failure must mention.
        source: Python that is put behind the good backend's.
        requires: The core as its metadata asks for it.
        opens: Makes what it opens of a checkpoint; None if that itself.
    """

    name: str
    check: str
    says: str
    source: str
    requires: str = "visionaccel>=0.1,<0.2"
    opens: Source | None = None


PLANTED = (
    Planted("heavy_import", "L0-light-import", "onnxruntime", "import onnxruntime"),
    Planted(
        "heavy_library", "L0-light-import", "libonnxruntime_providers_shared.so",
        """
        import ctypes, importlib.util, pathlib
        _place = pathlib.Path(importlib.util.find_spec("onnxruntime").origin).parent
        ctypes.CDLL(str(_place / "capi" / "libonnxruntime_providers_shared.so"))
        """,
    ),
    Planted("open_device", "L0-light-import", "/dev/zero", 'DEVICE = open("/dev/zero", "rb")'),
    Planted(
        "new_class_each_time", "L0-registration", "two classes",
        """
        @hookimpl
        def visionaccel_backends():
            return [type("Again", (Backend,), {})]
        """,
    ),
    Planted(
        "secret_options", "L0-options", "without a description",
        """
        from visionaccel.backends import Options
        class Secret(Options):
            threads: int = 1
        Backend.options = Secret
        """,
    ),
    Planted(
        "raising_probe", "L0-probe", "no driver",
        """
        def probe(self, program, device):
            raise RuntimeError("no driver")
        Backend.probe = probe
        """,
    ),
    Planted(
        "any_device", "L0-probe", "a device that does not exist",
        "Backend.probe = lambda self, program, device: Accepted(20)",
    ),
    Planted(
        "any_family", "L0-foreign-families", "an unknown family",
        """
        from visionaccel_torch_ref import TorchReferenceBackend
        class Anything(TorchReferenceBackend):
            name = Backend.name
            def probe(self, program, device):
                return Accepted(20)
        @hookimpl
        def visionaccel_backends():
            return [Anything]
        """,
    ),
    Planted("any_core", "L0-requirement", "upper bound", "", requires="visionaccel"),
    Planted("other_core", "L0-requirement", "is installed", "", requires="visionaccel>=7,<8"),
    Planted(
        "impossible_capabilities", "L0-capabilities", "max_in_flight",
        """
        def init(self, program):
            _init(self, program)
            self.capabilities = Capabilities(device="cpu", precision="float32", max_in_flight=4)
        Session.__init__ = init
        """,
    ),
    Planted("wrong_dtype", "L1-rows", "float64", "on_output(lambda self, inputs, rows: rows.astype(np.float64))"),
    Planted(
        "row_too_many", "L1-rows", "the program declares",
        "on_output(lambda self, inputs, rows: np.concatenate([rows, rows[-1:]]))",
    ),
    Planted(
        "shuffled_images", "L1-permutation", "another order",
        "on_output(lambda self, inputs, rows: np.roll(rows, len(rows) // 2, 0) if inputs['frames'][0] > 1 else rows)",
    ),
    Planted(
        "shared_attention", "L1-addition", "see each other",
        """
        def run(self, inputs):
            return _run(self, {**inputs, "frames": np.ones_like(inputs["frames"])})
        Session.run = run
        """,
    ),
    Planted(
        "unmasked_windows", "L1-partial-windows", "of partial windows",
        """
        def run(self, inputs):
            return _run(self, {**inputs, "window_mask": np.ones_like(inputs["window_mask"])})
        Session.run = run
        """,
    ),
    Planted(
        "unmasked_padding", "L1-padding", "in a bucket of",
        """
        def run(self, inputs):
            if "frame_bias" in inputs:
                inputs = {**inputs, "frame_bias": np.zeros_like(inputs["frame_bias"])}
            return _run(self, inputs)
        Session.run = run
        """,
        opens=fixed_shapes,
    ),
    Planted(
        "writable_only", "L1-memory-layout", "read-only",
        """
        def run(self, inputs):
            if not inputs["pixel_values"].flags.writeable:
                raise ValueError("the buffer is read-only")
            return _run(self, inputs)
        Session.run = run
        """,
    ),
    Planted(
        "scribbling", "L1-inputs-untouched", "wrote to its input",
        """
        import ctypes
        def run(self, inputs):
            found = _run(self, inputs)
            array = inputs["rotary_cos"]
            ctypes.memset(array.ctypes.data, 0, array.nbytes)
            return found
        Session.run = run
        """,
    ),
    Planted(
        "stale_buffer", "L1-outputs-owned", "its own buffer",
        """
        buffers = {}
        def reused(self, inputs, rows):
            buffer = buffers.setdefault(rows.shape, np.empty_like(rows))
            buffer[:] = rows
            return buffer
        on_output(reused)
        """,
    ),
    Planted(
        "few_wrong_rows", "L2-cosines", "lowest cosine",
        """
        def change(self, inputs, rows):
            rows = rows.copy()
            rows[-1] = rows[-1][::-1]
            return rows
        on_output(change)
        """,
    ),
    Planted("too_long", "L2-cosines", "too long or too short", "on_output(lambda self, inputs, rows: 1.01 * rows)"),
    Planted(
        "wrong_on_some_grids", "L2-generated-grids", "lowest cosine",
        "on_output(lambda self, inputs, rows: rows[::-1] if len(rows) % 5 == 2 else rows)",
    ),
    Planted("unread_images", "L2-digits", "the digits model reads", "on_output(lambda self, inputs, rows: rows[::-1])"),
    Planted(
        "unwritten_rows", "L2-silent-rows", "a single repeated number",
        """
        def change(self, inputs, rows):
            rows = rows.copy()
            rows[len(rows) - len(rows) // 8:] = 0
            return rows
        on_output(change)
        """,
    ),
    Planted(
        "repeated_rows", "L2-silent-rows", "make a count fit",
        """
        def change(self, inputs, rows):
            rows = rows.copy()
            rows[1::16] = rows[::16][:len(rows[1::16])]
            return rows
        on_output(change)
        """,
    ),
    Planted(
        "swapped_axes", "L2-axes", "height and width are swapped",
        """
        from visionaccel_torch_ref import TorchReferenceBackend
        class Swapped(TorchReferenceBackend):
            name = Backend.name
            def open(self, program, device, options):
                session = super().open(program, device, options)
                run = session.run
                session.run = lambda inputs: run({**inputs, "grid_thw": inputs["grid_thw"][:, [0, 2, 1]]})
                return session
        @hookimpl
        def visionaccel_backends():
            return [Swapped]
        """,
    ),
    Planted(
        "off_by_one_window", "L2-windows", "another row",
        "on_output(lambda self, inputs, rows: np.roll(rows, 16, axis=0))",
    ),
    Planted(
        "shifted_windows", "L2-windows", "wrong places",
        """
        def run(self, inputs):
            order = np.roll(inputs["window_index"], 2)
            return _run(self, {**inputs, "window_index": order, "reverse_index": np.argsort(order)})
        Session.run = run
        """,
    ),
    Planted(
        "noise", "L3-calls", "differ in some bits",
        """
        random = np.random.default_rng()
        on_output(lambda self, inputs, rows: rows + 1e-6 * random.standard_normal(rows.shape, np.float32))
        """,
    ),
    Planted(
        "process_noise", "L3-processes", "in another process",
        "on_output(lambda self, inputs, rows: rows * np.float32(1 + os.getpid() % 397 * 2.4e-7))",
    ),
    Planted(
        "batch_statistics", "L3-neighbours", "larger values",
        "on_output(lambda self, inputs, rows: rows + 0.3 * rows.mean(axis=0))",
    ),
    Planted(
        "bound_to_a_thread", "L3-threads", "did not open the session",
        """
        def init(self, program):
            _init(self, program)
            self.thread = threading.get_ident()
        def run(self, inputs):
            if threading.get_ident() != self.thread:
                raise RuntimeError("wrong thread")
            return _run(self, inputs)
        Session.__init__, Session.run = init, run
        """,
    ),
    Planted(
        "race", "L4-concurrent-calls", "hare memory",
        """
        scratch = {}
        def run(self, inputs):
            scratch.clear()
            scratch.update(inputs)
            time.sleep(0.002)
            return _run(self, dict(scratch))
        Session.run = run
        """,
    ),
    Planted(
        "one_for_all", "L4-two-sessions", "other weights",
        """
        opened = {}
        _open = Backend.open
        def open(self, program, device, options):
            return opened.setdefault(program.name, _open(self, program, device, options))
        Backend.open, Session.close = open, lambda self: None
        """,
    ),
    Planted(
        "gone_at_close", "L4-close-during-encode", "SIGKILL",
        """
        import signal
        def close(self):
            os.kill(os.getpid(), signal.SIGKILL)
        Session.close = close
        """,
    ),
    Planted(
        "closes_for_all", "L4-double-close", "closed",
        """
        closed = []
        _open = Backend.open
        def open(self, program, device, options):
            if closed:
                raise RuntimeError("the device was closed")
            return _open(self, program, device, options)
        Backend.open, Session.close = open, lambda self: closed.append(self)
        """,
    ),
    Planted(
        "crash_at_exit", "L4-left-open", "SIGABRT",
        """
        import atexit
        def init(self, program):
            _init(self, program)
            atexit.register(os.abort)
        Session.__init__ = init
        """,
    ),
    Planted(
        "one_process", "L4-fork", "forked",
        """
        probed = []
        _probe, _open = Backend.probe, Backend.open
        def probe(self, program, device):
            probed.append(os.getpid())
            return _probe(self, program, device)
        def open(self, program, device, options):
            if probed[0] != os.getpid():
                raise RuntimeError("the driver belongs to another process")
            return _open(self, program, device, options)
        Backend.probe, Backend.open = probe, open
        """,
    ),
    Planted(
        "memory_leak", "L4-memory-slope", "memory grows",
        """
        kept = []
        def change(self, inputs, rows):
            kept.append(np.ones(4096))
            return rows
        on_output(change)
        """,
    ),
    Planted(
        "descriptor_leak", "L4-descriptors", "file descriptors",
        """
        def init(self, program):
            _init(self, program)
            os.open("/dev/null", os.O_RDONLY)
        Session.__init__ = init
        """,
    ),
    Planted(
        "descriptor_each_call", "L4-descriptors", "encodes of one encoder left",
        """
        def run(self, inputs):
            os.open("/dev/null", os.O_RDONLY)
            return _run(self, inputs)
        Session.run = run
        """,
    ),
    Planted(
        "thread_leak", "L4-descriptors", "threads",
        """
        def init(self, program):
            _init(self, program)
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        Session.__init__ = init
        """,
    ),
    Planted(
        "reads_what_is_there", "L5-truncated", "is missing",
        """
        def init(self, program):
            self.width, self._session, self._weights = program.outputs[0].shape[1], None, None
            try:
                _init(self, program)
            except Exception:
                self.capabilities = Capabilities(device="cpu", precision="float32", thread_safe=True)
        def run(self, inputs):
            try:
                return _run(self, inputs)
            except Exception:
                return {"embeddings": np.ones((len(inputs["window_index"]), self.width), np.float32)}
        Session.__init__, Session.run = init, run
        """,
    ),
    Planted(
        "poisoned_by_a_failure", "L5-failed-call", "gets a wrong answer",
        """
        failed = []
        def run(self, inputs):
            try:
                found = dict(_run(self, inputs))
            except Exception:
                failed.append(1)
                raise
            if failed:
                found["embeddings"] = found["embeddings"] * np.float32(1.5)
            return found
        Session.run = run
        """,
    ),
    Planted(
        "fills_up", "L5-failed-call", "runs on inputs",
        """
        def run(self, inputs):
            given = inputs.get("pixel_values")
            if given is not None and given.shape[1] == 95:
                inputs = {**inputs, "pixel_values": np.pad(given, ((0, 0), (0, 1)))}
            return _run(self, inputs)
        Session.run = run
        """,
    ),
    Planted(
        "nan_to_number", "L5-nan-output", "something replaces NaN",
        "on_output(lambda self, inputs, rows: np.where(np.isnan(rows), np.float32(np.arange(rows.shape[1])), rows))",
    ),
    Planted(
        "numbers_without_memory", "L5-allocation", "MiB of memory left",
        """
        def run(self, inputs):
            try:
                np.empty(1 << 28)
                return _run(self, inputs)
            except MemoryError:
                rows = inputs["window_index"].shape[0]
                return {"embeddings": np.tile(np.arange(self.width, dtype=np.float32), (rows, 1))}
        def init(self, program):
            _init(self, program)
            self.width = program.outputs[0].shape[1]
        Session.__init__, Session.run = init, run
        """,
    ),
    Planted(
        "worse_when_reopened", "L5-device-lost", "first answer",
        """
        def init(self, program):
            _init(self, program)
            mark = pathlib.Path(__file__).with_name("opened")
            with mark.open("a") as file:
                file.write("x")
            self.worn = mark.stat().st_size > 2
        def worn(self, inputs, rows):
            return rows * np.float32(0.5) if self.worn else rows
        Session.__init__ = init
        on_output(worn)
        """,
    ),
    Planted("slow", "L6-floor", "times as fast", """
        def run(self, inputs):
            return [_run(self, inputs) for _ in range(25)][-1]
        Session.run = run
        """),
)  # fmt: skip


def install(site: Path, name: str, source: str = "", requires: str = "visionaccel>=0.1,<0.2") -> None:
    """Put the generated backend into a folder on the Python path, as pip would leave it.

    Args:
        site: The folder.
        name: The backend's name.
        source: Python that is put behind its own.
        requires: The core as its metadata asks for it.
    """
    project = site.parent / f"project-{name}"
    write_backend_project(name, project)
    module = f"visionaccel_{name}"
    good = (project / module / "__init__.py").read_text()
    stem = "".join(word.capitalize() for word in name.split("_"))
    head = _HEAD.format(stem=stem) if source else ""
    site.mkdir(exist_ok=True)
    (site / f"{module}.py").write_text(good + head + dedent(source))
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: visionaccel-{name.replace('_', '-')}\nVersion: 1.0\nRequires-Dist: {requires}\n"
    )
    (info / "entry_points.txt").write_text(f"[visionaccel.backends]\n{name} = {module}\n")
