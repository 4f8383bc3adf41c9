"""The Grafana dashboard against a real Prometheus that scrapes real encodes: every query has an answer."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, start_http_server

from gated import gated
from towers import random_patches
from visionaccel import open_encoder
from visionaccel.backends import default_registry
from visionaccel.observe import SERIES, EncoderMetrics, MetricsCollector
from visionaccel.service import EncodeService
from visionaccel.trust import ChainLink, GuardedEncoder, Shadow

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "docs/dashboards/visionaccel.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
FETCHED = ROOT / ".venv/debian/usr/bin/prometheus"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_panels_lie_beside_each_other_and_show_every_metric():
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    shown = {name for query in QUERIES for name in re.findall(r"visionaccel_\w+", query)}
    names = {re.sub(r"_(bucket|total)$", "", name) for name in shown}
    assert names == {series.name for series in SERIES}


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory, tiny):
    """The address of a Prometheus that scrapes this process while images are encoded."""
    binary = shutil.which("prometheus") or (str(FETCHED) if FETCHED.exists() else None)
    if binary is None:
        if os.environ.get("TESTS_PROMETHEUS") == "1":
            pytest.fail("there is no Prometheus.")
        pytest.skip("there is no Prometheus; `make unit` fetches one")
    folder = tmp_path_factory.mktemp("prometheus")
    metrics, registry = EncoderMetrics(), CollectorRegistry()
    registry.register(MetricsCollector(metrics))
    server, thread = start_http_server(0, "127.0.0.1", registry)
    port = free_port()
    target = f"127.0.0.1:{server.server_port}"
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 500ms, scrape_timeout: 400ms}\n"
        f"scrape_configs: [{{job_name: vllm, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    command = [binary, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        command.append(f"--web.listen-address=127.0.0.1:{port}")
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    plugins = default_registry().plugins
    plugins.register(metrics)
    try:
        _encode_a_while(tiny, metrics, f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        plugins.unregister(metrics)
        process.terminate()
        process.wait(20)
        server.shutdown()
        server.server_close()
        thread.join(20)


def _encode_a_while(tiny, metrics, url):
    """Encodes, failures and comparisons, until Prometheus has seen some of them come."""
    first, gate = gated(tiny)
    second = ChainLink("onnxrt", open_encoder(tiny, backend="onnxrt"))
    gate.fail = lambda patches: OSError("gone") if len(patches) == 32 else None
    shadow = Shadow(1.0, 0.999, ChainLink("exact", open_encoder(tiny, backend="onnxrt")))
    metrics.processed(0.01)
    link = ChainLink("gated", first.primary, cool_down=60.0)
    with EncodeService([GuardedEncoder(link, [second], shadow)]) as service:
        metrics.watch_service(service)
        limit, seed = time.monotonic() + 60, 0
        while time.monotonic() < limit:
            for grid in ((1, 4, 4), (1, 4, 8), (1, 4, 6)):
                seed += 1
                service.encode(random_patches([grid], seed=seed), [grid])
            metrics.processed(0.01)
            time.sleep(0.05)
            try:
                if len(query(url, "rate(visionaccel_failures_total[3s]) > 0")) and seed > 30:
                    link.breaker.trip("for the alert")
                    time.sleep(1.5)
                    return
            except OSError:
                continue  # not up yet
    raise AssertionError("Prometheus saw nothing")


def query(url, expression):
    """What an instant query answers: labels and value of each series."""
    address = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(address, timeout=10) as reply:
        answer = json.loads(reply.read())
    assert answer["status"] == "success"
    return [(series["metric"], float(series["value"][1])) for series in answer["data"]["result"]]


def filled(expression):
    """A panel's query as Grafana sends it."""
    return expression.replace("$__rate_interval", "5s").replace("$instance", ".*")


ALERTS = [
    line.split("`")[1]
    for line in (ROOT / "docs/observe.md").read_text().partition("| alert | expression |")[2].splitlines()
    if "visionaccel_" in line and line.startswith("|")
]


@pytest.mark.parametrize("expression", ALERTS)
def test_every_alert_of_the_documentation_fires_where_it_should(prometheus, expression):
    """Here a device is disabled and the fallback does the work; nothing is lost, and no answer is wrong."""
    series = query(prometheus, expression.replace("[10m]", "[20s]"))
    quiet = "failed_items" in expression or "comparisons" in expression
    assert bool(series) != quiet


@pytest.mark.parametrize("expression", QUERIES)
def test_every_query_has_an_answer(prometheus, expression):
    series = query(prometheus, filled(expression))
    assert series
    assert all(np.isfinite(value) or "quantile" in expression for _, value in series)


def test_the_answers_are_those_of_the_encodes(prometheus):
    by_kind = {labels["kind"]: value for labels, value in query(prometheus, "visionaccel_failures_total")}
    assert by_kind["DeviceError"] > 0
    (cosine, *_) = [value for _, value in query(prometheus, filled("min(visionaccel_lowest_cosine)"))]
    assert cosine > 0.999
    (fallback,) = [value for _, value in query(prometheus, "visionaccel_fallback_items_total")]
    assert fallback > 0


def test_the_variable_finds_servers(prometheus):
    (variable,) = [each for each in DASHBOARD["templating"]["list"] if each["name"] == "instance"]
    name = re.fullmatch(r"label_values\((\w+), instance\)", variable["query"]["query"])[1]
    assert {labels["instance"] for labels, _ in query(prometheus, name)}
