"""What `visionaccel doctor` finds on machines that are as they should be, and on those that are not."""

import json

import pytest
from typer.testing import CliRunner

from visionaccel.cli.app import app
from visionaccel_flexmlrt.checks import check_machine
from visionaccel_flexmlrt.runtime import AmdEnvironment

STRIX = ("0x1022", "0x17f0", "0x10")


@pytest.fixture
def machine(tmp_path):
    """The folders of a good machine and its environment."""
    device = tmp_path / "sys/bus/pci/devices/0000:c5:00.1"
    device.mkdir(parents=True)
    identify(device, *STRIX)
    parameters = tmp_path / "sys/module/amdxdna/parameters"
    parameters.mkdir(parents=True)
    (parameters / "timeout_in_sec").write_text("120\n")
    for file in ("dev/accel/accel0", "opt/xilinx/xrt/bin/xrt-smi"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    ini = tmp_path / "xrt.ini"
    ini.write_text("[Debug]\nnum_heap_pages=8\n")
    return tmp_path, {"XRT_INI_PATH": str(ini)}


def identify(device, vendor, kind, revision):
    for name, value in (("vendor", vendor), ("device", kind), ("revision", revision)):
        (device / name).write_text(value + "\n")


def found(machine, kernel="6.11.0-19-generic"):
    root, environment = machine
    return {finding.name: finding for finding in check_machine(AmdEnvironment.read(environment), root, kernel)}


def test_a_good_machine_passes_but_for_the_library_that_is_not_here(machine):
    failures = [finding.name for finding in found(machine).values() if finding.status != "pass"]
    assert failures == ["FlexMLRT library"]


def test_every_failure_says_what_to_do(tmp_path):
    nothing = check_machine(AmdEnvironment(), tmp_path, "5.15.0")
    assert {finding.status for finding in nothing} >= {"failure", "warning"}
    assert all(finding.fix for finding in nothing if finding.status != "pass")


@pytest.mark.parametrize(
    ("ids", "status", "text"),
    [
        (STRIX, "pass", "Strix"),
        (("0x1022", "0x17f0", "0x20"), "pass", "Krackan"),
        (("0x1022", "0x1502", "0x00"), "failure", "no bfloat16"),
        (("0x8086", "0x7d1d", "0x04"), "failure", "none was found"),
    ],
)
def test_the_npu_is_known_by_its_ids(machine, ids, status, text):
    identify(machine[0] / "sys/bus/pci/devices/0000:c5:00.1", *ids)
    finding = found(machine)["NPU on the PCI bus"]
    assert finding.status == status
    assert text in finding.detail


@pytest.mark.parametrize(
    ("release", "status"), [("6.10.0", "pass"), ("7.0-rc1", "pass"), ("6.8.0-45-generic", "failure")]
)
def test_the_kernel_must_be_new_enough(machine, release, status):
    assert found(machine, release)["kernel"].status == status


@pytest.mark.parametrize(("seconds", "status"), [("0", "pass"), ("2", "warning"), ("x", "warning")])
def test_a_short_timeout_is_warned_of(machine, seconds, status):
    (machine[0] / "sys/module/amdxdna/parameters/timeout_in_sec").write_text(seconds)
    assert found(machine)["amdxdna timeout"].status == status


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("[Debug]\nnum_heap_pages=1\n", "num_heap_pages is 1"),
        ("[Debug]\n", "num_heap_pages is not set"),
        ("num_heap_pages=8\n", "cannot be understood"),
        ("[Debug]\nnum_heap_pages=many\n", "cannot be understood"),
    ],
)
def test_a_heap_that_is_too_small_is_a_failure(machine, text, detail):
    (machine[0] / "xrt.ini").write_text(text)
    finding = found(machine)["XRT heap"]
    assert finding.status == "failure"
    assert detail in finding.detail
    assert "num_heap_pages=8" in finding.fix


def test_an_unset_or_missing_xrt_ini_is_a_failure(machine):
    root, _ = machine
    assert "not set" in found((root, {}))["XRT heap"].detail
    assert "cannot be read" in found((root, {"XRT_INI_PATH": str(root / "absent.ini")}))["XRT heap"].detail


def doctor(*arguments, status=0):
    """What `visionaccel doctor` finds."""
    run = CliRunner().invoke(app, ["doctor", "--no-vllm", "--json", *map(str, arguments)])
    assert run.exit_code == status, run.output
    return json.loads(run.stdout)["findings"]


def test_doctor_lists_every_backend_and_never_fails_by_itself(monkeypatch):
    monkeypatch.setenv("XRT_INI_PATH", "/dev/null/absent")
    rows = doctor()
    backends = {"flexmlrt", "onnxrt", "openvino", "simulated", "torch_ref"}
    assert {row["about"] for row in rows} == {"environment", "versions", "settings", *backends}
    assert all(row["fix"] for row in rows if row["status"] == "failure")


def test_doctor_of_a_backend_that_cannot_run_exits_with_1():
    doctor("--backend", "flexmlrt", status=1)
    doctor("--backend", "onnxrt")


def test_doctor_reports_a_broken_source_and_goes_on(tmp_path):
    rows = doctor(tmp_path, "--backend", "onnxrt", status=1)
    assert {row["status"] for row in rows if row["about"] == "source"} == {"failure"}
    assert "onnxrt" in {row["about"] for row in rows}
