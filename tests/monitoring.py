"""The queries of monitoring/, and what a page of metrics has for them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MONITORING = Path(__file__).parents[1] / "monitoring"
ALERTS, ALERT_TESTS = MONITORING / "alerts.yml", MONITORING / "alerts_test.yml"
DASHBOARD = MONITORING / "grafana" / "dashboards" / "tuwen.json"
_SELECTOR = re.compile(r"\b((?:nv_|tuwen_|up\b)\w*)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def dashboard_queries(models: str = ".+", interval: str = "1m") -> dict[str, list[str]]:
    """Title of a panel -> its queries, with Grafana's variables filled in."""
    return {
        panel["title"]: [
            target["expr"].replace("$model", models).replace("$__rate_interval", interval)
            for target in panel["targets"]
        ]
        for panel in dashboard()["panels"]
        if panel["type"] != "row"
    }


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def all_queries() -> list[str]:
    return [query for queries in dashboard_queries().values() for query in queries] + [
        rule["expr"] for rule in alert_rules()
    ]


@dataclass(frozen=True)
class Selector:
    """`metric{label="value", ...}` of a query."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        return self.metric + "{" + ", ".join(f'{label}{how}"{value}"' for label, how, value in self.matchers) + "}"

    def matches(self, sample: Sample) -> bool:
        return sample.metric == self.metric and all(
            _holds(how, value, sample.labels.get(label, "")) for label, how, value in self.matchers
        )


@dataclass(frozen=True)
class Sample:
    """One line of /metrics."""

    metric: str
    labels: dict[str, str]
    value: float


def _holds(how: str, wanted: str, value: str) -> bool:
    is_equal = re.fullmatch(wanted, value) is not None if "~" in how else wanted == value
    return is_equal != how.startswith("!")


def selectors(query: str) -> set[Selector]:
    return {Selector(metric, tuple(_MATCHER.findall(inner))) for metric, inner in _SELECTOR.findall(query)}


def parse_metrics(page: str) -> list[Sample]:
    found = (_SAMPLE.fullmatch(line) for line in page.splitlines() if not line.startswith("#"))
    return [
        Sample(match[1], dict(re.findall(r'(\w+)="([^"]*)"', match[2] or "")), float(match[3]))
        for match in found
        if match
    ]
