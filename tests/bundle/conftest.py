"""Bundles of the tiny checkpoint, shared by the tests of this folder."""

import shutil
from pathlib import Path

import pytest

from bundle_tools import DYNAMIC, FIXED, LARGEST
from visionaccel.bundle import ProgramRequest, export_bundle
from visionaccel.encoder import open_tower


@pytest.fixture(scope="module", autouse=True)
def memory(tmp_path_factory):
    """Where digests are remembered by these tests, and no others."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("memory")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def requests_of_all(tiny):
    """A program of each coverage."""
    return [FIXED, ProgramRequest(open_tower(tiny).bucket(LARGEST)), DYNAMIC]


@pytest.fixture(scope="module")
def contained(tiny, requests_of_all, tmp_path_factory):
    """A bundle with its weights and a program of each coverage. Not to be changed."""
    folder = tmp_path_factory.mktemp("contained") / "bundle"
    return export_bundle(open_tower(tiny), folder, requests_of_all, self_contained=True).folder


@pytest.fixture(scope="module")
def referring(tiny, requests_of_all, tmp_path_factory):
    """A bundle of the same programs whose weights stay in the checkpoint. Not to be changed."""
    return export_bundle(open_tower(tiny), tmp_path_factory.mktemp("referring") / "bundle", requests_of_all).folder


@pytest.fixture
def bundle(contained, tmp_path):
    """A bundle with its weights, to be changed."""
    return Path(shutil.copytree(contained, tmp_path / "bundle"))
