"""monitoring/ without a server: the dashboard's form, the alerts' own tests, and that both are documented."""

from __future__ import annotations

import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.monitoring import ALERT_TESTS, MONITORING, alert_rules, all_queries, dashboard, dashboard_queries, selectors

DOCUMENT = Path(__file__).parents[1] / "docs" / "monitoring.md"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed: apt-get install prometheus")
GRID_WIDTH = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def panels() -> list[dict[str, Any]]:
    return dashboard()["panels"]


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    grid = panel["gridPos"]
    return {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    for one, other in combinations(panels(), 2):
        assert not cells(one) & cells(other), (one["title"], other["title"])
    assert all(x < GRID_WIDTH for panel in panels() for x, _ in cells(panel))


def test_every_panel_asks_the_chosen_source_and_explains_itself() -> None:
    for panel in panels():
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == DATASOURCE
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF")[: len(panel["targets"])]
        assert all(target["datasource"] == DATASOURCE for target in panel["targets"])


def test_both_variables_are_defined_and_used() -> None:
    defined = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert set(defined) == {"datasource", "model"}
    assert defined["datasource"]["query"] == "prometheus"
    assert selectors(defined["model"]["query"]["query"])
    assert sum("$model" in target["expr"] for panel in panels() for target in panel.get("targets", [])) >= 3


def test_what_was_asked_for_is_on_the_dashboard() -> None:
    asked = {"Requests answered", "Latency", "Time in queue", "Mean batch size", "Hit ratio", "Failed requests"}
    assert asked | {"Refused by a queue", "Waiting requests", "Processor", "Memory"} <= set(dashboard_queries())


def test_every_alert_is_tested_documented_and_said_in_a_sentence() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    tests = yaml.safe_load(ALERT_TESTS.read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    is_silent = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    names = {rule["alert"] for rule in alert_rules()}
    assert names == fires == is_silent
    for rule in alert_rules():
        assert f"`{rule['alert']}`" in document
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_every_metric_is_documented() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    for metric in {selector.metric for query in all_queries() for selector in selectors(query)}:
        assert f"`{metric}`" in document, metric


@needs_promtool
@pytest.mark.parametrize(
    "arguments", [("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")], ids=["config", "rules"]
)
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    assert PROMTOOL is not None
    run = subprocess.run([PROMTOOL, *arguments], cwd=MONITORING, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@needs_promtool
def test_every_query_of_the_dashboard_parses(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    rules = [{"record": "query", "expr": query} for queries in dashboard_queries().values() for query in queries]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    run = subprocess.run([PROMTOOL, "check", "rules", "--lint=none", str(file)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_provisioning_points_where_the_readme_says() -> None:
    source = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text())
    provider = yaml.safe_load((MONITORING / "grafana/provisioning/dashboards/tuwen.yml").read_text())
    readme = (MONITORING / "README.md").read_text(encoding="utf-8")
    for variable in (source["datasources"][0]["url"], provider["providers"][0]["options"]["path"]):
        assert variable.strip("${}") + "=" in readme
