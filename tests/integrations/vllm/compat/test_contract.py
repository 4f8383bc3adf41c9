"""What is relied on in vLLM stands in one table, and each row of it can be found missing."""

import ast
import dataclasses
import importlib
import inspect

import pytest

from doc_pages import ROOT
from docsite.tables import ENTRIES, contract_table
from syntax import at_run_time
from visionaccel.integrations.vllm.compat import architectures, contract
from visionaccel.integrations.vllm.compat.contract import (
    Feature,
    Need,
    entries_of,
    missing_names,
    missing_of,
    way_of,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own deprecations

ALL = [
    (feature, entry)
    for feature in Feature
    for architecture in (None, *architectures.ARCHITECTURES)
    for entry in entries_of(feature, architecture)
]
NEEDS = list(dict.fromkeys(need for _, entry in ALL for need in entry.needs))
INTEGRATION = ROOT / "src" / "visionaccel" / "integrations" / "vllm"


def lacks(feature):
    """What a feature misses now; looked up each time."""
    return tuple(dict.fromkeys(text for each, entry in ALL if each is feature for text in missing_of(entry)))


@pytest.mark.parametrize("feature", Feature)
def test_the_contract_holds_on_this_vllm(feature):
    assert lacks(feature) == ()


def test_a_row_says_only_what_is_checked():
    assert {need.use for need in NEEDS} == {"call", "read", "subclass", "override", "patch"}
    with pytest.raises(TypeError, match="parametres"):
        contract._need({"call": "module:name", "parametres": "one"}, {})
    with pytest.raises(KeyError, match="tover"):
        contract._need({"patch": "module:{tover}"}, {"tower": "Tower"})


def homes_of(need):
    """What has a need's name: its module, or the classes that an instance would find it in; and its last part."""
    found = importlib.import_module(need.module)
    *path, last = need.name.split(".")
    for part in path:
        found = getattr(found, part)
    if inspect.ismodule(found):
        return [found], last
    kind = found if isinstance(found, type) else type(found)
    return [base for base in kind.__mro__[:-1] if last in vars(base)], last


@pytest.mark.parametrize(
    "need",
    [need for need in NEEDS if not need.name.endswith(".__init__")],  # which every class has
    ids=lambda need: f"{need.use} {need.target}",
)
def test_each_name_is_missed_when_it_is_gone(need, monkeypatch):
    homes, name = homes_of(need)
    for home in homes:
        monkeypatch.delattr(home, name)
    assert missing_names([dataclasses.replace(need, optional=False)]) == (
        f"{need.target.replace(':', '.')} does not exist",
    )


@pytest.mark.parametrize("need", [need for need in NEEDS if not need.optional], ids=lambda need: need.target)
def test_each_condition_of_a_name_can_fail(need):
    for field, text in (
        ("parameters", "takes no parameter never_heard_of"),
        ("attributes", "has no attribute never_heard_of"),
        ("mentions", "does not use never_heard_of"),
    ):
        if getattr(need, field):
            changed = dataclasses.replace(need, **{field: (*getattr(need, field), "never_heard_of")})
            if field == "parameters" and takes_keywords(need):
                assert need.target in TAKE_ANY_KEYWORD, "what takes any keyword cannot lack one"
                if need.use not in ("call", "override"):
                    continue
                changed = dataclasses.replace(need, parameters=("never_heard_of", *need.parameters[1:]))
                text = f"has a new parameter {need.parameters[0]}"
            assert any(text in found for found in missing_names([changed])), (need, field)
    if need.implements:
        changed = dataclasses.replace(need, implements=need.implements[1:])
        assert missing_names([changed]) == (
            f"{need.target.replace(':', '.')} has a new abstract method {need.implements[0]}",
        )


TAKE_ANY_KEYWORD = {
    f"vllm.distributed.ec_transfer.ec_connector.base:ECConnectorBase.{name}"
    for name in ("start_load_caches", "save_caches")
}
"""Methods with `**kwargs`: no parameter can be missed there. What they ask for beyond ours still can, and what another
release adds to this set is to be looked at."""


def takes_keywords(need):
    homes, name = homes_of(need)
    parameters = inspect.signature(getattr(homes[0], name)).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def test_a_new_parameter_without_a_default_breaks_what_is_called_or_overridden(monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    def finish_requests(self, request_ids, finished_status, why): ...

    finish_requests.__module__ = Scheduler.__module__
    monkeypatch.setattr(Scheduler, "finish_requests", finish_requests)
    assert lacks(Feature.CONTAINMENT) == (
        "vllm.v1.core.sched.scheduler.Scheduler.finish_requests has a new parameter why",
    )
    assert not any(lacks(feature) for feature in Feature if feature is not Feature.CONTAINMENT)


def test_the_first_way_that_holds_is_taken_and_one_is_enough(monkeypatch):
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase
    from vllm.v1.core.sched.scheduler import Scheduler

    (ending,) = (entry for entry in entries_of(Feature.PIPELINED) if entry.end)
    assert way_of(ending) == "the connector names it"
    monkeypatch.delattr(ECConnectorBase, "take_unavailable_requests")
    assert (way_of(ending), lacks(Feature.PIPELINED)) == ("the contained scheduler ends it", ())
    monkeypatch.delattr(Scheduler, "finish_requests")
    assert way_of(ending) is None
    (text,) = lacks(Feature.PIPELINED)
    assert text.startswith("how a request ends whose image failed: (the connector names it) ")
    assert text.endswith("vllm.v1.core.sched.scheduler.Scheduler.finish_requests is abstract")


def imported():
    """Modules and names of vLLM that the integration's sources import, but for what only types name."""
    for path in INTEGRATION.rglob("*.py"):
        for node in at_run_time(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                yield from ((path.name, node.module, alias.name) for alias in node.names)


PUBLIC = {("vllm", "ModelRegistry"), ("vllm.plugins", "load_general_plugins")}
"""What vLLM documents for plug-ins, and the contract's rows name by another path."""

OF_TRIALS = {"modelled_engine.py"}
"""Builds parts of vLLM to test them; nothing that is served depends on these names."""


def test_what_the_sources_import_of_vllm_is_in_the_contract():
    tabled = {(need.module, need.name.partition(".")[0]) for need in NEEDS}
    modules = {module for module, _ in tabled}
    found = {(file, module, name) for file, module, name in imported() if file not in OF_TRIALS}
    assert len(found) >= 8
    unknown = {
        (file, module, name)
        for file, module, name in found
        if (module, name) not in tabled | PUBLIC and f"{module}.{name}" not in modules
    }
    assert unknown == set()


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_what_every_image_request_passes_is_needed_by_the_in_line_mode(architecture):
    from visionaccel.integrations.vllm.processing import FittedInfo, FittedProcessor

    row = architectures.ARCHITECTURES[architecture]
    inline = {need.target for entry in entries_of(Feature.INLINE, architecture) for need in entry.needs}
    overridden = set()
    info, processor, _ = architectures.processing_of(architectures.stock_class(architecture))
    for part, ours, stock in (("info", FittedInfo, info), ("processor", FittedProcessor, processor)):
        for kind in ours.__mro__[:-1]:
            methods = [name for name, value in vars(kind).items() if inspect.isfunction(value) and hasattr(stock, name)]
            overridden |= {f"{row.model}._processor_factory.{part}.{name}" for name in methods}
    assert len(overridden) >= 7
    assert overridden - inline == set()


def test_every_row_is_in_one_of_the_two_tables():
    tables = contract_table(changing=True) + contract_table(changing=False)
    for need in (need for _, entry in ENTRIES for need in entry.needs):
        assert f"| `{need.module}` | `{need.name}` | {need.use} |" in tables
    assert not any(f" {use} |" in contract_table(changing=False) for use in ("patch", "subclass", "override"))
    assert isinstance(NEEDS[0], Need)
