"""A pytest plug-in that runs transformers' tests of a model with an encoder in the place of its vision tower.

The tests make, copy, save and load their models themselves. So a model gets its encoder when it first encodes an image
or a video: `get_image_features` and `get_video_features` of the family's classes call `accelerate` before that. The
encoder is closed after the test.

For each test, the plug-in writes a row to a JSON file: the outcome, and how often these methods, our encoder and
transformers' towers were called.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from outcomes import Row, left_out_rules, reason_to_leave_out

_METHODS = ("get_image_features", "get_video_features")

# The tests' own configuration has the activation of its language model, which no released tower has.
_VISION_CONFIGURATIONS = {"qwen3_vl": {"hidden_act": "gelu_pytorch_tanh"}}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the plug-in's options."""
    group = parser.getgroup("tower")
    group.addoption("--tower-family", required=True, help="folder of the model in transformers, such as qwen2_vl")
    group.addoption("--tower-backend", help="backend of the encoder; without it, the models keep their towers")
    group.addoption("--tower-results", required=True, type=Path, help="file for the rows")
    group.addoption("--tower-left-out", type=Path, help="file of tests that are not run, with reasons")


def pytest_configure(config: pytest.Config) -> None:
    """Register the hooks that need the options."""
    config.pluginmanager.register(_Recorder(config), "tower-recorder")


@dataclass
class _Calls:
    """The counts of a test; see `Row`."""

    requests: int = 0
    ours: int = 0
    theirs: int = 0


@dataclass
class _Replacement:
    """Gives each model an encoder when it first encodes.

    Attributes:
        backend: The encoder's backend; None to leave the models as they are.
        calls: The counts of the current test.
        handles: The handles of the current test's models.
    """

    backend: str | None
    calls: _Calls = field(default_factory=_Calls)
    handles: list[Any] = field(default_factory=list)

    def install(self, modelling: ModuleType) -> None:
        """Wrap the methods of a family's model classes that return features."""
        for _, kind in inspect.getmembers(modelling, inspect.isclass):
            for name in _METHODS:
                if kind.__module__ == modelling.__name__ and name in vars(kind):
                    setattr(kind, name, self._replacing(vars(kind)[name]))

    def _replacing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)  # transformers reads the signature
        def features(model: Any, *arguments: Any, **named: Any) -> Any:
            self.calls.requests += 1
            self._replace(model)
            return method(model, *arguments, **named)

        return features

    def _replace(self, model: Any) -> None:
        from visionaccel.integrations.transformers import accelerate
        from visionaccel.integrations.transformers.tower import EncoderTower

        tower = model.get_encoder(modality="image")
        if isinstance(tower, EncoderTower):
            return
        if not getattr(tower, "counted", False):
            tower.counted = True
            tower.register_forward_pre_hook(self._counting("theirs"))
        if self.backend is not None:
            self.handles.append(accelerate(model, backend=self.backend))
            model.get_encoder(modality="image").register_forward_pre_hook(self._counting("ours"))

    def _counting(self, name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:  # a function, because a copy of a model has copies of the objects in its hooks
            setattr(self.calls, name, getattr(self.calls, name) + 1)

        return count

    def close(self) -> None:
        """Close the encoders of a test, and start to count again."""
        while self.handles:
            self.handles.pop().restore()
        self.calls = _Calls()


class _Recorder:
    """Leaves tests out, and records a row for each test of a family."""

    def __init__(self, config: pytest.Config) -> None:
        self._family, self._target = config.getoption("--tower-family"), config.getoption("--tower-results")
        left_out = config.getoption("--tower-left-out")
        self._rules = left_out_rules(left_out.read_text()) if left_out else []
        self._replacement = _Replacement(config.getoption("--tower-backend"))
        self._rows: dict[str, Row] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Function]) -> None:
        """Wrap the methods of the model's classes, and take the tests that are left out off the list."""
        name = f"transformers.models.{self._family}.modeling_{self._family}"
        self._replacement.install(sys.modules[name])
        if self._family in _VISION_CONFIGURATIONS:
            for tester in {item.cls.model_tester_class for item in items if hasattr(item.cls, "model_tester_class")}:
                _configure(tester, _VISION_CONFIGURATIONS[self._family])
        kept, left_out = [], []
        for item in items:
            row = Row(self._family, f"{item.cls.__name__}::{item.name}", _group(item))
            row.replaced = self._replacement.backend is not None
            self._rows[item.nodeid] = row
            row.detail = reason_to_leave_out(self._rules, row) or ""
            row.outcome = "left out" if row.detail else ""
            (left_out if row.detail else kept).append(item)
        items[:] = kept
        if left_out:
            config.hook.pytest_deselected(items=left_out)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Iterator[None]:
        """Count during a test."""
        torch.manual_seed(0)
        try:
            return (yield)
        finally:
            row = self._rows[item.nodeid]
            for name, count in asdict(self._replacement.calls).items():
                setattr(row, name, count)
            self._replacement.close()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record how a test ended. A test of which a part fails has failed; reports of other parts are ignored."""
        row = self._rows[report.nodeid]
        if report.failed:
            row.outcome = "failed"
            crash = getattr(report.longrepr, "reprcrash", None)
            row.detail = row.detail or str(crash.message if crash else report.longrepr)
        elif type(report) is pytest.TestReport and not row.outcome and (report.skipped or report.when == "call"):
            row.outcome = report.outcome

    def pytest_sessionfinish(self) -> None:
        """Write the rows."""
        self._target.write_text(json.dumps([asdict(row) for row in self._rows.values()], indent=1))


def _configure(tester: Any, values: Mapping[str, Any]) -> None:
    """Change values of the tower in the configurations that a tester class of transformers makes."""
    make = tester.get_config

    def get_config(self: Any) -> Any:
        config = make(self)
        for name, value in values.items():
            setattr(config.vision_config, name, value)
        return config

    tester.get_config = get_config


def _group(item: pytest.Function) -> str:
    """Return the class that a test comes from: the mix-in, if the model's own class overrides its test."""
    name = getattr(item, "originalname", item.name)
    return next(kind.__name__ for kind in reversed(item.cls.__mro__) if name in vars(kind))
