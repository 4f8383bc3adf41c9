"""The board on which a worker tells the scheduler of items it could not encode."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from visionaccel.grid import Grid
from visionaccel.integrations.vllm.board import _FOLDER as BOARD
from visionaccel.integrations.vllm.faults import Fault, FaultReader, report_fault
from visionaccel.runtime.keys import item_key


@pytest.fixture
def board(monkeypatch, tmp_path):
    monkeypatch.setenv(BOARD, f"{os.getpid()}:{tmp_path}")
    return tmp_path


def test_nobody_listens_before_a_reader_is_made(board):
    assert not report_fault(Fault("k", "m"))
    FaultReader()
    assert report_fault(Fault("k", "m"))


def test_nobody_listens_without_a_board(monkeypatch):
    monkeypatch.delenv(BOARD, raising=False)
    assert FaultReader().new() == []
    assert not report_fault(Fault("k", "m"))


def test_each_fault_is_read_once(board):
    reader = FaultReader()
    assert reader.new() == []
    report_fault(Fault("a", "first\nline"))
    report_fault(Fault("b", "naïve"))
    assert reader.new() == [Fault("a", "first\nline"), Fault("b", "naïve")]
    assert reader.new() == []
    report_fault(Fault("c", "third"))
    assert reader.new() == [Fault("c", "third")]


def test_a_line_still_being_written_waits(board):
    reader = FaultReader()
    report_fault(Fault("a", "whole"))
    file = board / str(os.getpid())
    with file.open("ab") as partial:
        partial.write(b'{"key": "b", ')
    assert reader.new() == [Fault("a", "whole")]
    assert reader.new() == []
    with file.open("ab") as partial:
        partial.write(b'"message": "late"}\n')
    assert reader.new() == [Fault("b", "late")]


def test_a_child_process_reaches_its_parents_reader(board):
    reader = FaultReader()
    code = (
        "from visionaccel.integrations.vllm.faults import *; assert report_fault(Fault('k', 'from a worker')), 'deaf'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert reader.new() == [Fault("k", "from a worker")]


def test_what_an_earlier_engine_left_is_not_read(board):
    FaultReader()
    report_fault(Fault("old", "of an engine that is gone"))
    reader = FaultReader()
    assert reader.new() == []
    reader.close()
    assert not report_fault(Fault("k", "nobody listens any more"))


def test_a_cleaner_of_temporary_files_costs_no_fault(board):
    reader = FaultReader()
    shutil.rmtree(board)
    reader.listen()
    assert report_fault(Fault("k", "after the cleaning"))
    assert reader.new() == [Fault("k", "after the cleaning")]
    shutil.rmtree(board)
    (lost,) = reader.new()
    assert "went away" in lost.message


def test_the_board_is_private_is_not_adopted_by_another_launcher_and_is_removed_at_exit():
    code = """
import os, stat, subprocess, sys
from visionaccel.integrations.vllm import board, faults
board.make_board()
named = os.environ[board._FOLDER]
board.make_board()
assert os.environ[board._FOLDER] == named
folder = named.partition(":")[2]
assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
faults.FaultReader()
assert stat.S_IMODE(os.stat(os.path.join(folder, str(os.getpid()))).st_mode) == 0o600
child = "import os; from visionaccel.integrations.vllm import board as f; f.make_board(); print(os.environ[f._FOLDER])"
other = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout.strip()
assert other and other != named
assert os.path.isdir(folder) and not os.path.exists(other.partition(":")[2])
print(folder)
"""
    environment = {name: value for name, value in os.environ.items() if name != BOARD}
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert not Path(run.stdout.strip()).exists()


def test_keys_depend_on_pixels_and_grid_and_on_nothing_else():
    pixels = np.arange(32, dtype=np.float32).reshape(8, 4)
    key = item_key(pixels, Grid(1, 2, 4))
    assert key == item_key(torch.from_numpy(pixels.copy()), Grid(1, 2, 4))
    assert key == item_key(np.asfortranarray(pixels), Grid(1, 2, 4))
    assert key != item_key(pixels, Grid(1, 4, 2))
    assert key != item_key(pixels + 1, Grid(1, 2, 4))
    bfloat = torch.from_numpy(pixels.copy()).bfloat16()
    assert item_key(bfloat, Grid(1, 2, 4)) == item_key(bfloat.clone(), Grid(1, 2, 4))
