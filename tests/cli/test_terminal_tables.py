"""Tables of the commands in a terminal of 80 columns."""

import re
from functools import cache

import pytest
from typer.testing import CliRunner

from bundles import write_bundle
from visionaccel.cli.app import app
from visionaccel.cli.diagnosis import diagnose
from visionaccel.cli.output import print_table
from visionaccel_bench.blocks import Table, print_blocks
from visionaccel_bench.faultsuite.cells import FaultRow, every_cell, fault_table

LONGEST_WORD = 24
"""Longer ones, such as digests and paths, break where the line ends."""


@pytest.fixture(scope="module")
def bundle(tiny, tmp_path_factory):
    return write_bundle(tiny, tmp_path_factory.mktemp("tables") / "bundle", "10x18", self_contained=True)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    from digits_vlm.samples import held_out_images

    path = tmp_path_factory.mktemp("tables") / "picture.png"
    held_out_images(1)[0].image.save(path)
    return path


def words(text):
    """The words of an output, with each number as 0: times and sizes differ from one run to the next."""
    return {re.sub(r"\d+", "0", word) for word in text.split()}


COMMANDS = {
    "backends": "backends",
    "explain": "explain {tiny}",
    "inspect": "inspect {bundle}",
    "validate": "validate {bundle} --reference {tiny} --no-write --backend onnxrt",
    "encode": "encode {picture} --checkpoint {digits} --backend onnxrt",
    "export": "export {tiny} {tmp_path}/{columns} --grid 10x18 --bucket 12x20 --dynamic",
    "doctor": "doctor {bundle} --no-vllm",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_words_are_whole_and_nothing_is_left_out_in_80_columns(
    command, monkeypatch, tiny, digits, bundle, picture, tmp_path
):
    shown = {}
    monkeypatch.setitem(diagnose.__globals__, "diagnose", cache(diagnose))  # it takes long, and depends on no width
    for columns in (80, 400):
        monkeypatch.setenv("COLUMNS", str(columns))
        line = COMMANDS[command].format_map(locals())
        done = CliRunner().invoke(app, line.split())
        assert done.exit_code == 0, done.output
        shown[columns] = done.stdout
    missing = {word for word in words(shown[400]) - words(shown[80]) if len(word) <= LONGEST_WORD}
    assert not missing
    assert "\u2026" not in shown[80]


def test_words_of_a_measurement_are_whole_in_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    columns = ("", "median, s", "least to most, s", "patches/s", "% of peak", "times vLLM bf16", "times transformers")
    row = ("torch_ref dtype=bfloat16", "0.002", "0.002 to 0.008", "85820", "13", "-", "1.26")
    print_blocks([Table(columns, (row,), layout="numbers")])
    shown = capsys.readouterr().out
    assert set(" ".join((*columns, *row)).split()) <= set(shown.split())
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("passed", [True, False])
def test_words_of_the_fault_suite_are_whole_in_80_columns(monkeypatch, capsys, passed):
    monkeypatch.setenv("COLUMNS", "80")
    said = {"expected": "answer", "answered": "right answer", "lost": 0, "recovery_seconds": 8.68, "passed": passed}
    cells = every_cell()
    rows = [
        FaultRow(
            fault=cell.fault,
            moment=cell.moment,
            mode=cell.serving.mode,
            isolation=cell.serving.isolation,
            fallback=cell.serving.fallback,
            **said,
        )
        for cell in cells
    ]
    table = fault_table(rows, without=("expected", "wrong", "detail"))
    print_blocks([table])
    shown = capsys.readouterr().out
    assert {word for cells in (table.columns, *table.rows) for cell in cells for word in cell.split()} <= set(
        shown.split()
    )
    assert max(map(len, shown.splitlines())) <= 80


def test_a_word_that_no_column_has_room_for_is_shown_whole_in_parts(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    print_table("", ("name", "digest"), [("weights", "0123456789" * 12)])
    assert "0123456789" * 12 in "".join(capsys.readouterr().out.split())


def test_the_table_of_doctor_has_every_finding_and_their_number(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(app, ["doctor", "--no-vllm", "--backend", "onnxrt"])
    assert done.exit_code == 0
    assert "visionaccel-onnxrt 0.1.0 loads" in done.stdout
    assert " failed, " in done.stdout
