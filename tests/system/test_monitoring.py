"""Every query of the dashboard and of the alerts finds data on the real server; a real Prometheus answers them."""

from __future__ import annotations

import json
import math
import queue
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import yaml
from tritonclient.utils import InferenceServerException
from tuwen_client import Client, InvalidInput

from tests.monitoring import (
    ALERTS,
    MONITORING,
    Sample,
    Selector,
    alert_rules,
    all_queries,
    dashboard_queries,
    parse_metrics,
    selectors,
)
from tuwen.data.pairs import PairSet
from tuwen.serving.ports import free_ports
from tuwen.serving.server import EmbeddedServer

pytestmark = pytest.mark.triton
PROMETHEUS = shutil.which("prometheus")
FLOOD = 800  # far more at once than the queues of both steps hold, 128 each
TOLD_AFTER_S = 1.3  # models tell their counters once a second
# Longer than two scrapes of a second; Grafana's own $__rate_interval is at least four scrapes.
RATE_INTERVAL = "8s"


def some_load(client: Client, pairs: PairSet) -> None:
    client.embed_text([record.text for record in pairs.texts[:100]])
    client.embed_images([pairs.image_bytes(image_id) for image_id in pairs.image_ids[:40]])
    with pytest.raises(InvalidInput):
        client.embed_text([""])
    with pytest.raises(InvalidInput):
        client.embed_images([b"no picture"])


def read_page(url: str) -> list[Sample]:
    with urllib.request.urlopen(url) as answer:
        return parse_metrics(answer.read().decode())


def count(server: EmbeddedServer, metric: str, model: str) -> float:
    wanted = Selector(metric, (("model", "=", model),))
    return sum(sample.value for sample in read_page(server.endpoints.metrics) if wanted.matches(sample))


def needed_selectors() -> set[Selector]:
    found = {selector for query in all_queries() for selector in selectors(query)}
    return {selector for selector in found if selector.metric != "up"}  # Prometheus makes that one itself


def test_every_selector_finds_a_sample(sample_server: EmbeddedServer, client: Client, sample_pairs: PairSet) -> None:
    some_load(client, sample_pairs)
    samples = read_page(sample_server.endpoints.metrics)
    assert len(needed_selectors()) > 20
    missing = [str(selector) for selector in needed_selectors() if not any(map(selector.matches, samples))]
    assert not missing


@pytest.mark.parametrize("side", ["text", "image"])
def test_a_refused_item_counts_twice_for_the_ensemble_and_as_a_success_for_its_step(
    side: str, sample_server: EmbeddedServer, client: Client, sample_pairs: PairSet
) -> None:
    """What the halves in our queries rest on."""
    some_load(client, sample_pairs)
    step = "tokenize_text" if side == "text" else "preprocess_image_64"
    counted = [
        ("nv_inference_request_failure", f"tiny_rn_{side}"),
        ("nv_inference_request_success", step),
        ("nv_inference_request_success", f"tiny_rn_{side}_tower"),
    ]
    before = [count(sample_server, *one) for one in counted]
    for _ in range(3):
        with pytest.raises(InvalidInput):
            client.embed_text([""]) if side == "text" else client.embed_images([b"no picture"])
    after = [count(sample_server, *one) for one in counted]
    assert [new - old for new, old in zip(after, before, strict=True)] == [6, 3, 0]


IMAGE_STEPS = ("preprocess_image_64", "tiny_rn_image_tower")


def read_counts(server: EmbeddedServer, metric: str, models: tuple[str, ...]) -> dict[str, float]:
    return {model: count(server, metric, model) for model in models}


def increase(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {key: value - before[key] for key, value in after.items()}


def test_what_is_refused_for_want_of_room_is_counted_exactly(
    sample_server: EmbeddedServer, sample_pairs: PairSet
) -> None:
    def read() -> tuple[dict[str, float], ...]:
        time.sleep(TOLD_AFTER_S)
        return (
            read_counts(sample_server, "tuwen_queue_full_total", IMAGE_STEPS),
            read_counts(sample_server, "tuwen_batch_items_total", IMAGE_STEPS),
            read_counts(sample_server, "nv_inference_request_success", IMAGE_STEPS),
            read_counts(sample_server, "nv_inference_request_failure", ("tiny_rn_image", *IMAGE_STEPS)),
        )

    picture = np.frombuffer(sample_pairs.image_bytes(sample_pairs.image_ids[0]), np.uint8)[None]
    before, outcomes = read(), queue.SimpleQueue[str]()
    with triton.InferenceServerClient(sample_server.endpoints.grpc) as raw:
        image = triton.InferInput("image", list(picture.shape), "UINT8").set_data_from_numpy(picture)
        for _ in range(FLOOD):
            raw.async_infer(
                "tiny_rn_image", [image], lambda result, error: outcomes.put(error.message() if error else "ok")
            )
        answers = Counter(outcomes.get(timeout=60) for _ in range(FLOOD))
    num_refused = sum(number for answer, number in answers.items() if "Exceeds maximum queue size" in answer)
    assert num_refused > 0
    assert num_refused + answers["ok"] == FLOOD
    full, items, handed_over, failed = map(increase, before, read())
    assert sum(full.values()) == num_refused
    assert failed == {"tiny_rn_image": 2 * num_refused, **dict.fromkeys(IMAGE_STEPS, 0)}
    assert items["tiny_rn_image_tower"] == answers["ok"]
    tower = "tiny_rn_image_tower"
    assert handed_over[tower] == items[tower] + full[tower]
    assert handed_over["preprocess_image_64"] == FLOOD


def test_what_waits_too_long_is_counted_as_expired(sample_server: EmbeddedServer) -> None:
    counters = ("tuwen_queue_expired_total", "tuwen_queue_full_total", "tuwen_batch_items_total")
    time.sleep(TOLD_AFTER_S)
    before = {name: count(sample_server, name, "tiny_rn_text_tower") for name in counters}
    with triton.InferenceServerClient(sample_server.endpoints.grpc) as raw:
        for number in range(5):  # each another text, which no cache can answer
            data = np.array([[f"等不了的第{number}句".encode()]], np.object_)
            text = triton.InferInput("text", [1, 1], "BYTES").set_data_from_numpy(data)
            with pytest.raises(InferenceServerException, match="Request timeout expired"):
                raw.infer("tiny_rn_text", [text], timeout=1)  # microsecond
    time.sleep(TOLD_AFTER_S)
    after = {name: count(sample_server, name, "tiny_rn_text_tower") for name in counters}
    assert [after[name] - before[name] for name in counters] == [5, 0, 0]


class Prometheus:
    """A running one that scrapes the given page every second."""

    def __init__(self, folder: Path, target: str) -> None:
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        shutil.copy(ALERTS, folder)
        self.url = f"http://127.0.0.1:{free_ports(1)[0]}"
        arguments = [
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'db'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]
        with open(folder / "log", "wb") as log:
            self.process = subprocess.Popen([str(PROMETHEUS), *arguments], stdout=log, stderr=log)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[float]:
        """The values now."""
        found = self.get(f"query?{urllib.parse.urlencode({'query': expression})}")["result"]
        return [float(series["value"][1]) for series in found]


@pytest.fixture
def prometheus(tmp_path: Path, sample_server: EmbeddedServer) -> Iterator[Prometheus]:
    if PROMETHEUS is None:
        pytest.skip("Prometheus is not installed: apt-get install prometheus")
    one = Prometheus(tmp_path, sample_server.endpoints.metrics.removeprefix("http://").removesuffix("/metrics"))
    try:
        yield one
    finally:
        one.process.terminate()
        one.process.wait(10)


def await_scrapes(prometheus: Prometheus, least: int) -> bool:
    try:
        return sum(prometheus.query('count_over_time(up{job="tuwen"}[1m])')) >= least
    except OSError:  # it is still starting
        return False


def test_prometheus_answers_every_query(prometheus: Prometheus, client: Client, sample_pairs: PairSet) -> None:
    deadline = time.monotonic() + 60
    while not await_scrapes(prometheus, least=6):
        assert time.monotonic() < deadline, "Prometheus does not scrape"
        some_load(client, sample_pairs)
    for title, queries in dashboard_queries("tiny_rn_text|tiny_rn_image", RATE_INTERVAL).items():
        for query in queries:
            values = prometheus.query(query)
            assert values, (title, query)
            assert all(map(math.isfinite, values)), (title, query, values)
    for selector in needed_selectors():
        assert prometheus.query(str(selector)), selector
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(alert_rules())
    assert {rule["health"] for rule in rules} == {"ok"}
    panels = dashboard_queries(interval=RATE_INTERVAL)
    for title in ("Time in queue", "Mean batch size", "Computation", "Hand-over"):
        assert len(prometheus.query(panels[title][0])) == 3, title  # both towers and preprocess_image_64
        # Pictures have kept two of them busy; the texts came out of the cache.
        assert len(prometheus.query(f"({panels[title][0]}) > 0")) >= 2, title
    (hit_ratio,) = prometheus.query(panels["Hit ratio"][0])
    assert 0 < hit_ratio <= 1
