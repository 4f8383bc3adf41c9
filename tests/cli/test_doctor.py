"""`visionaccel doctor`: whatever is broken is a finding with a fix, and nothing that is broken ends the command."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bundle_tools import CERTIFICATE, forge
from bundles import document, write_bundle
from command_line import run_command
from fake_plugins import ECHO, install
from gated import wait_until
from visionaccel.bundle import GOLDEN_FILE, MANIFEST, Golden, open_bundle, write_golden
from visionaccel.cli.diagnosis.checks import of_environment
from visionaccel.core.grid import Grid
from visionaccel.core.safe_text import one_line
from visionaccel.isolation import as_finding

PLUGIN = """
import os, signal, sys, time
from visionaccel.backends import Finding, VisionBackend, hookimpl

class Broken(VisionBackend):
    name = "broken"
    formats = frozenset({{"onnx"}})
    def probe(self, program, device): ...
    def open(self, program, device, options): ...
    def devices(self):
        return {devices}
    def checks(self, programs):
        {checks}

@hookimpl
def visionaccel_backends():
    return [Broken]
"""


def doctor(*arguments, site=None, status=0, **environment):
    """The command in a process of its own; its findings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VISIONACCEL_")}
    path = {} if site is None else {"PYTHONPATH": str(site)}
    done = run_command(
        "doctor", "--no-vllm", "--json", *arguments, environment={**inherited, **path, **environment}, folder=site
    )
    assert done.returncode == status, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) == {"version", "created", "findings"}
    assert all(set(row) == {"about", "what", "status", "found", "fix"} for row in answer["findings"])
    return answer["findings"]


def broken(tmp_path, checks="return ()", devices='("cpu",)'):
    """A site with a plug-in that is broken in some way."""
    return install(tmp_path / "site", "broken-plugin", "broken", PLUGIN.format(checks=checks, devices=devices))


def of(findings, about, what=None):
    return [row for row in findings if row["about"] == about and what in (None, row["what"])]


def the(findings, about, what):
    (row,) = of(findings, about, what)
    return row


# Plug-ins


@pytest.mark.parametrize(
    ("checks", "expected"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV (a segmentation fault)"),
        ("import ctypes; ctypes.string_at(0)", "died of SIGSEGV (a segmentation fault)"),
        ("os.abort()", "died of SIGABRT (an abort)"),
        ("os._exit(0)", "ended with status 0 before it answered"),
        ("sys.exit(3)", "SystemExit: 3"),
        ("raise OSError('libnpu.so.1: cannot open')", "OSError: libnpu.so.1: cannot open"),
        ("return [{'status': 'excellent'}]", "is not a finding"),
    ],
)
def test_a_backend_that_breaks_in_its_checks_is_a_failure(tmp_path, checks, expected):
    findings = doctor("--backend", "broken", site=broken(tmp_path, checks), status=1)
    failures = [row for row in of(findings, "broken") if row["status"] == "failure"]
    assert [expected in row["found"] for row in failures] == [True], failures
    assert all(row["fix"] for row in failures)


def test_after_a_crash_the_others_are_still_looked_at_and_the_status_is_0(tmp_path):
    findings = doctor(site=broken(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)"))
    assert "SIGSEGV" in the(findings, "broken", "plug-in")["found"]
    assert the(findings, "onnxrt", "devices")["found"] == "cpu"
    assert the(findings, "torch_ref", "plug-in")["status"] == "pass"


@pytest.mark.parametrize("ends", ["sys.exit(0)", "raise KeyboardInterrupt"])
def test_a_plug_in_that_prints_and_ends_on_import_is_a_finding(tmp_path, ends):
    site = install(tmp_path / "site", "broken-plugin", "broken", f"import sys\nprint('[]')\n{ends}")
    found = the(doctor("--backend", "broken", site=site, status=1), "broken", "plug-in")
    assert found["status"] == "failure"
    assert "backend 'broken' of broken-plugin 1.0 cannot be loaded" in found["found"]


def test_a_backend_that_hangs_is_ended_in_time(tmp_path):
    # It has to be ended by force: SIGTERM does nothing to it.
    checks = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    findings = doctor("--backend", "broken", "--limit", "4", site=broken(tmp_path, checks), status=1)
    assert "did not end within 4 s" in the(findings, "broken", "plug-in")["found"]


def test_a_backend_that_crashes_when_its_process_ends_has_answered(tmp_path):
    site = broken(tmp_path, "import atexit; atexit.register(os.abort); return ()")
    findings = doctor("--backend", "broken", site=site)
    assert the(findings, "broken", "devices")["status"] == "pass"
    end = the(findings, "broken", "end of plug-in")
    assert end["status"] == "warning"
    assert "SIGABRT" in end["found"]


def test_what_a_backend_prints_does_not_reach_the_answer(tmp_path):
    noise = "print('[]{garbage' * 9999, flush=True); os.write(1, b'\\xff\\x00' * 99999); os.write(2, b'noise\\n')"
    findings = doctor("--backend", "broken", site=broken(tmp_path, f"{noise}; return [Finding('noise', 'pass', 'ok')]"))
    assert the(findings, "broken", "noise") == {
        "about": "broken", "what": "noise", "status": "pass", "found": "ok", "fix": "",
    }  # fmt: skip


def test_the_last_words_of_a_crash_are_told(tmp_path):
    checks = "os.write(2, b'undefined symbol: npu_open\\x1b[31m\\n'); os.abort()"
    found = the(doctor("--backend", "broken", site=broken(tmp_path, checks), status=1), "broken", "plug-in")["found"]
    assert found.endswith("it last printed: undefined symbol: npu_open?[31m")


def test_a_plug_in_that_cannot_be_imported_is_a_failure_that_names_it(tmp_path):
    site = install(tmp_path / "site", "broken-plugin", "broken", "raise RuntimeError('no driver')")
    found = the(doctor("--backend", "broken", site=site, status=1), "broken", "plug-in")
    assert found["status"] == "failure"
    assert "broken-plugin 1.0 cannot be loaded: RuntimeError: no driver" in found["found"]
    assert "Reinstall broken-plugin" in found["fix"]


def test_a_backend_without_devices_fails(tmp_path):
    findings = doctor("--backend", "broken", site=broken(tmp_path, devices="()"), status=1)
    assert the(findings, "broken", "devices")["status"] == "failure"


def test_two_distributions_of_one_backend_are_a_failure_of_their_own(tmp_path):
    site = install(tmp_path / "site", "other-onnxrt", "onnxrt", ECHO.format(name="onnxrt", score=1))
    found = the(doctor(site=site), "backends", "backends")
    assert "provided by both" in found["found"]
    assert found["fix"] == "Uninstall one of them."


def test_options_that_the_backend_does_not_take_are_a_failure():
    settings = {"VISIONACCEL_BACKEND": "onnxrt", "VISIONACCEL_OPTIONS": "thread=2"}
    found = the(doctor("--backend", "onnxrt", status=1, **settings), "onnxrt", "VISIONACCEL_OPTIONS")
    assert "thread" in found["found"]
    assert "threads" in found["fix"]


# Versions


def test_a_requirement_that_is_not_met_is_a_failure_with_the_command_that_mends_it(tmp_path):
    site = broken(tmp_path)
    (metadata,) = site.glob("*.dist-info/METADATA")
    needs = (
        "numpy<1,>=0.9",
        "pydantic>=2",
        "absent-library>=1",
        "six<0.1; python_version < '3'",
        "rich<1; extra == 'x'",
    )
    lines = "".join(f"Requires-Dist: {one}\n" for one in needs)
    metadata.write_text(f"{metadata.read_text()}Provides-Extra: x\n{lines}")
    rows = {row["found"]: row for row in of(doctor("--backend", "broken", site=site, status=1), "versions")}
    (numpy,) = (row for found, row in rows.items() if "needs numpy<1,>=0.9, but " in found)
    assert numpy["status"] == "failure"
    assert numpy["fix"] == "pip install 'numpy<1,>=0.9'"
    absent = rows["broken-plugin 1.0 needs absent-library>=1, but it is not installed"]
    assert absent["fix"] == "pip install 'absent-library>=1'"
    (extra,) = (row for found, row in rows.items() if "needs rich<1" in found)
    assert extra["status"] == "warning"
    assert not any("pydantic" in found or "six" in found for found in rows)


def test_versions_of_what_answers_depend_on_are_told():
    findings = doctor("--backend", "onnxrt")
    assert {"visionaccel", "visionaccel-onnxrt", "numpy", "onnxruntime", "vllm"} <= {
        row["what"] for row in of(findings, "versions")
    }
    assert the(findings, "versions", "visionaccel")["status"] == "pass"


# Settings


def test_a_mistyped_setting_is_a_warning_with_the_right_name():
    found = the(doctor("--backend", "onnxrt", VISIONACCEL_BACKNED="onnxrt"), "settings", "VISIONACCEL_BACKNED")
    assert found["status"] == "warning"
    assert found["fix"] == "Did you mean VISIONACCEL_BACKEND?"


def test_a_wrong_value_is_a_failure_and_does_not_hide_a_mistyped_name():
    settings = {"VISIONACCEL_DEADLINE": "soon", "VISIONACCEL_BACKNED": "onnxrt"}
    rows = of(doctor("--backend", "onnxrt", status=1, **settings), "settings")
    assert [row["status"] for row in rows] == ["warning", "failure"]
    assert "VISIONACCEL_DEADLINE='soon'" in rows[1]["found"]


def test_settings_that_name_what_is_not_there_are_failures():
    settings = {"VISIONACCEL_BACKEND": "onnxtr", "VISIONACCEL_BUNDLE": "/nowhere", "VISIONACCEL_FALLBACK": "auto"}
    rows = {
        row["what"]: row
        for row in of(doctor("--backend", "onnxrt", status=1, **settings), "settings")
        if row["status"] == "failure"
    }
    assert set(rows) == set(settings)
    assert rows["VISIONACCEL_BACKEND"]["fix"] == "Did you mean 'onnxrt'?"


# Bundles


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    return write_bundle(tiny, tmp_path_factory.mktemp("doctor") / "bundle", "10x18", self_contained=True)


@pytest.fixture
def bundle(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "bundle")


def certify(bundle, **changes):
    def change(stated):
        stated["certificate"] = {**CERTIFICATE, **changes}
        stated["certificate"]["programs"][0] |= {"failure": None}

    forge(bundle, change)


def test_a_bundle_without_certificate_and_golden_images_is_told_to_be_validated(bundle):
    findings = doctor(str(bundle), "--backend", "onnxrt")
    assert the(findings, "source", "digests")["status"] == "pass"
    assert the(findings, "source", "model")["status"] == "pass"
    for name in ("certificate", "golden images"):
        found = the(findings, "source", name)
        assert (found["status"], found["fix"]) == ("warning", "Run `visionaccel validate`.")


def test_golden_images_are_counted_and_broken_ones_are_a_failure(bundle):
    opened = open_bundle(bundle)
    tower, program = opened.tower, opened.manifest.programs[0].name
    patches, embeddings = np.zeros((180, tower.patch_width), np.float32), np.ones((45, tower.out_width), np.float32)
    write_golden(opened, [Golden("zeros", program, (Grid(1, 10, 18),), patches, embeddings, 0.99)], {})
    found = the(doctor(str(bundle), "--backend", "onnxrt"), "source", "golden images")
    assert (found["status"], found["found"][:2]) == ("pass", "1,")
    (bundle / GOLDEN_FILE).write_bytes(b"golden")
    forge(bundle)
    broken = the(doctor(str(bundle), "--backend", "onnxrt", status=1), "source", str(bundle))
    assert "contains no valid golden images" in broken["found"]


def test_an_edited_file_is_a_failure(bundle):
    model = bundle / document(bundle)["programs"][0]["model"]
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    found = the(doctor(str(bundle), "--backend", "onnxrt", status=1), "source", str(bundle))
    assert "is damaged" in found["found"]
    assert found["fix"]


def test_an_edited_manifest_is_a_failure(bundle):
    manifest = bundle / MANIFEST
    manifest.write_text(manifest.read_text().replace('"family"', '"Family"'))
    assert the(doctor(str(bundle), "--backend", "onnxrt", status=1), "source", str(bundle))["status"] == "failure"


def test_a_certificate_says_where_it_was_made(bundle):
    certify(bundle)
    here = doctor(str(bundle), "--backend", "onnxrt")
    assert the(here, "source", "certificate")["status"] == "pass"
    assert the(here, "source", "certificate's device")["found"] == "made on onnxrt, cpu"
    other = the(doctor(str(bundle), "--backend", "openvino"), "source", "certificate's device")
    assert (other["status"], other["found"]) == ("warning", "made on onnxrt, cpu; openvino will run it")
    npu = doctor(str(bundle), "--backend", "onnxrt", VISIONACCEL_DEVICE="npu")
    assert "npu will run it" in the(npu, "source", "certificate's device")["found"]


def test_a_certificate_that_was_not_passed_is_a_failure(bundle):
    certify(bundle, passed=False)
    found = the(doctor(str(bundle), "--backend", "onnxrt", status=1), "source", "certificate")
    assert found["status"] == "failure"
    assert "Do not serve it" in found["fix"]


def test_a_certificate_whose_reference_was_our_own_tower_is_a_warning(bundle):
    certify(bundle, independent=False)
    found = the(doctor(str(bundle), "--backend", "onnxrt"), "source", "certificate's reference")
    assert found["status"] == "warning"


def test_the_bundle_of_the_settings_is_looked_at(bundle):
    findings = doctor("--backend", "onnxrt", VISIONACCEL_BUNDLE=str(bundle))
    assert str(bundle) in the(findings, "source", "manifest")["found"]


# The machine, and the command


def test_the_machine_is_described():
    rows = {row["what"]: row for row in of(doctor("--backend", "onnxrt"), "environment")}
    assert set(rows) == {"Python", "system", "kernel", "processor", "memory", "disk", "cores"}
    assert sys.executable in rows["Python"]["found"]


def test_what_cannot_be_read_of_the_machine_is_a_finding_and_the_rest_is_found(tmp_path):
    rows = {finding.name: finding for finding in of_environment(tmp_path)}
    assert rows["memory"].status == rows["processor"].status == "failure"
    assert rows["Python"].status == "pass"


def test_little_memory_and_an_old_processor_are_warnings(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\nflags : fpu sse4_2 f16c\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 67108864 kB\nMemAvailable: 67000000 kB\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{2**30}\n")
    rows = {finding.name: finding for finding in of_environment(tmp_path)}
    assert rows["processor"].status == "warning"
    assert rows["processor"].detail.endswith("; f16c")
    assert rows["memory"].status == "warning"
    assert "may use 1.0 GiB" in rows["memory"].detail


def test_strict_makes_any_failure_the_status(tmp_path):
    doctor("--strict", site=broken(tmp_path, "raise OSError"), status=1)


def test_findings_are_bounded_and_printable():
    row = as_finding({"name": "a\x1b]0;b\n", "status": "pass", "detail": "x" * 99_999})
    assert row.name == "a?]0;b"
    assert len(row.detail) == 2000
    assert one_line("\u202ereversed") == "?reversed"
    with pytest.raises(ValueError, match="is not a finding"):
        as_finding({"name": "no status"})


def test_no_child_or_folder_is_left_behind(tmp_path):
    # The child's own child, which holds its pipe, goes with it.
    note = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    checks = f"import subprocess; subprocess.Popen(['sleep', '987']); {note}; time.sleep(60)"
    doctor("--backend", "broken", "--limit", "4", site=broken(tmp_path, checks), status=1, TMPDIR=str(tmp_path))
    assert not list(Path(tmp_path).glob("visionaccel-doctor-*"))
    assert not group_of(int((tmp_path / "pid").read_text()))


def test_an_interrupted_command_ends_its_children(tmp_path):
    checks = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    # Whatever started the tests may have them ignore the signal.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = f"{heard}; from visionaccel.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", command, "doctor", "--no-vllm", "--backend", "broken"],
        env={**os.environ, "PYTHONPATH": str(broken(tmp_path, checks)), "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 60)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) != 0
        finally:
            process.kill()
    assert not group_of(int((tmp_path / "pid").read_text()))
    assert not list(Path(tmp_path).glob("visionaccel-doctor-*"))


def group_of(leader):
    """Processes of a process group that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = status.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(group) == leader and state != "Z":
            found.append(status)
    return found
