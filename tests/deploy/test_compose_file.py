"""docker-compose.yml, .env, the Dockerfiles and what they mount, without an engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from tests.deploy.compose_file import COMPOSE, ROOT, interpolate, mounts, read_env, services
from tests.deploy.images import Image, read_dockerfile, read_stages, requirement_lines
from tests.monitoring import MONITORING
from tuwen.cli import app
from tuwen.serving.server import EXIT_TIMEOUT_S, STOP_TIMEOUT_S

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
SERVICES = services()
BUILT = {name: service for name, service in SERVICES.items() if "build" in service}


def image_of(service: dict[str, Any]) -> Image:
    build = service["build"]
    return read_dockerfile(ROOT / build["dockerfile"], build.get("target"), build.get("args"))


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def check(*command: str | Path, environment: dict[str, str] | None = None) -> None:
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_file_follows_the_compose_specification() -> None:
    check(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_the_file_follows_it_once_it_is_filled_in(tmp_path: Path) -> None:
    filled = tmp_path / "docker-compose.yml"
    filled.write_text(interpolate(COMPOSE.read_text(encoding="utf-8"), read_env()), encoding="utf-8")
    check(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", filled)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_linter_has_nothing_to_say(path: Path) -> None:
    check(tool("hadolint"), path)


def test_every_variable_is_defined_and_used() -> None:
    text = COMPOSE.read_text(encoding="utf-8")
    services(read_env())  # a KeyError names one that is not defined
    unused = {name for name in read_env() if f"${{{name}}}" not in text}
    assert unused == {"COMPOSE_PROJECT_NAME"}  # Compose's own


def test_the_release_is_said_once() -> None:
    release = read_env()["TRITON_RELEASE"]
    year, month = map(int, release.split("."))
    assert (year, month) >= (25, 4)  # before, a cancelled request may crash it
    pattern = rf"(tritonserver|tensorrt):?[^ ]*\b{re.escape(release)}|RELEASE=\"?{re.escape(release)}"
    named = subprocess.run(
        ["git", "grep", "-nIE", pattern],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.splitlines()  # fmt: skip
    assert [line.partition(":")[0] for line in named] == [".env"], named


@pytest.mark.parametrize("name", ["builder-gpu", "triton-cpu", "triton-gpu"])
def test_the_builder_of_plans_is_the_server_s_own_image(name: str) -> None:
    assert image_of(SERVICES[name]).base == f"nvcr.io/nvidia/tritonserver:{read_env()['TRITON_RELEASE']}-py3"


@pytest.mark.parametrize("name", BUILT)
def test_every_stage_of_a_dockerfile_begins_with_an_image_s_name(name: str) -> None:
    """An engine reads all of them with the arguments of the one that it builds, and refuses a name such as `a:-py3`."""
    build = BUILT[name]["build"]
    for stage in read_stages(ROOT / build["dockerfile"], build.get("args")).values():
        assert re.fullmatch(r"[a-z0-9][a-z0-9./_-]*:[A-Za-z0-9_][\w.-]*", stage.base), stage.base


def test_every_image_has_a_version() -> None:
    bases = [image_of(service).base for service in BUILT.values()]
    for image in bases + [service["image"] for name, service in SERVICES.items() if name not in BUILT]:
        assert re.search(r":v?\d+\.\d+[\w.-]*$", image), image


@pytest.mark.parametrize("path", sorted(DOCKER.glob("requirements/*.txt")), ids=lambda path: path.name)
def test_every_package_has_a_version(path: Path) -> None:
    for line in requirement_lines(path):
        assert re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.+]+( ; platform_machine == '\w+')?", line), line


def test_images_of_one_package_have_one_version_of_it() -> None:
    versions: dict[str, set[str]] = {}
    for path in DOCKER.glob("requirements/*.txt"):
        for line in requirement_lines(path):
            name, _, version = line.partition("==")
            versions.setdefault(re.sub(r"\[.*", "", name).lower(), set()).add(version)
    assert {name for name, found in versions.items() if len(found) > 1} == set()


def test_a_copied_path_is_there_and_travels_to_the_engine() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for service in BUILT.values():
        for sources, _ in image_of(service).copies:
            for source in sources:
                assert (ROOT / source).exists(), source
                assert not any(source.startswith(line.strip("/")) for line in ignored if line and line[0] not in "#!*")


@pytest.mark.parametrize("name", SERVICES)
def test_mounts_and_profiles(name: str) -> None:
    service = SERVICES[name]
    declared = yaml.safe_load(interpolate(COMPOSE.read_text(encoding="utf-8"), read_env()))["volumes"]
    assert service["profiles"]  # nothing starts unless asked for
    for mount in mounts(service):
        if mount.is_volume:
            assert mount.source in declared
        else:
            assert (ROOT / mount.source).exists(), mount
            assert mount.read_only, mount


@pytest.mark.parametrize("name", SERVICES)
def test_nobody_is_root_or_has_a_capability(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert service["mem_limit"]
    if name in BUILT:
        assert image_of(service).user == "1000:1000"


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_loopback(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))
    assert "network_mode" not in SERVICES[name]


@pytest.mark.parametrize("name", SERVICES)
def test_whoever_is_waited_for_can_be_met(name: str) -> None:
    """A service waits for others of its profiles only; health is asked of those that have a check."""
    service = SERVICES[name]
    awaited = service.get("depends_on", {})
    for other, how in (awaited if isinstance(awaited, dict) else {key: {} for key in awaited}).items():
        if how.get("required", True):
            assert set(service["profiles"]) <= set(SERVICES[other]["profiles"])
        if how.get("condition") == "service_healthy":
            assert "healthcheck" in SERVICES[other]
        if how.get("condition") == "service_completed_successfully":
            assert SERVICES[other]["restart"] == "no"


@pytest.mark.parametrize("name", BUILT)
def test_a_command_parses(name: str) -> None:
    """Command and option names exist; the values are read too."""
    for words in (BUILT[name]["command"], image_of(BUILT[name]).command):
        parse(words)


def parse(words: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    assert words[0] == "tuwen"
    context, words = group.context_class(group), words[1:]
    while hasattr(group, "get_command"):
        group, words = group.get_command(context, words[0]), words[1:]
        context = group.context_class(group, parent=context)
    if words != ["--help"]:
        group.make_context("tuwen", [*words])


def test_an_option_that_is_not_there_is_noticed() -> None:
    with pytest.raises(Exception, match="--no-such"):
        parse(["tuwen", "serve", "--no-such=1"])


def test_the_server_has_time_to_drain() -> None:
    for name in ("triton-cpu", "triton-gpu"):
        seconds = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
        assert seconds > STOP_TIMEOUT_S + EXIT_TIMEOUT_S
        assert SERVICES[name]["restart"] == "unless-stopped"


def test_models_are_written_by_the_builder_alone() -> None:
    writers = {
        name
        for name, service in SERVICES.items()
        for mount in mounts(service)
        if mount.source == "models" and not mount.read_only
    }
    assert writers == {"builder-cpu", "builder-gpu"}


def test_both_profiles_differ_in_what_they_must_alone() -> None:
    cpu, gpu = SERVICES["triton-cpu"], SERVICES["triton-gpu"]
    assert set(gpu["command"]) - set(cpu["command"]) == {"--config-name=gpu"}
    assert not set(cpu["command"]) - set(gpu["command"])
    differing = {key for key in cpu.keys() | gpu.keys() if cpu.get(key) != gpu.get(key)}
    assert differing == {"profiles", "depends_on", "deploy", "command"}


def test_the_gateway_knows_what_its_service_sets() -> None:
    gateway = SERVICES["gateway"]
    [config] = mounts(gateway)
    assert (config.source, config.target) == ("./deploy/gateway/haproxy.cfg", "/usr/local/etc/haproxy/haproxy.cfg")
    text = (ROOT / config.source).read_text(encoding="utf-8")
    assert set(gateway["environment"]) <= set(re.findall(r"TUWEN_[A-Z_]+", re.sub(r"(?m)^ *#.*$", "", text)))
    listening = {gateway["environment"][f"TUWEN_GATEWAY_{kind}"] for kind in ("HTTP", "GRPC")}
    assert listening == {f"0.0.0.0:{port.rpartition(':')[2]}" for port in gateway["ports"]}
    behind = [gateway["environment"][f"TUWEN_TRITON_{kind}"] for kind in ("HTTP", "GRPC")]
    assert behind == [f"triton:{port.rpartition(':')[2]}" for port in SERVICES["triton-cpu"]["ports"][:2]]


def test_haproxy_has_nothing_against_it() -> None:
    environment = {name: str(value or "secret") for name, value in SERVICES["gateway"]["environment"].items()}
    check(tool("haproxy"), "-c", "-f", ROOT / "deploy" / "gateway" / "haproxy.cfg", environment=environment)


def test_prometheus_scrapes_the_server_with_the_committed_rules() -> None:
    there = {mount.target: ROOT / mount.source for mount in mounts(SERVICES["prometheus"]) if not mount.is_volume}
    config = yaml.safe_load(there["/etc/prometheus/prometheus.yml"].read_text(encoding="utf-8"))
    committed = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
    assert config["scrape_configs"][0]["static_configs"] == [{"targets": ["triton:8002"]}]
    assert "triton" in SERVICES["triton-cpu"]["networks"]["default"]["aliases"]
    config["scrape_configs"] = committed["scrape_configs"]
    assert config == committed
    assert set(config["rule_files"]) == {Path(target).name for target in there} - {"prometheus.yml"}
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]


def test_promtool_takes_the_configuration(tmp_path: Path) -> None:
    for path in (DOCKER / "prometheus.yml", MONITORING / "alerts.yml"):
        shutil.copy(path, tmp_path)
    check(tool("promtool"), "check", "config", tmp_path / "prometheus.yml")


def test_grafana_finds_what_it_is_provisioned_with() -> None:
    service = SERVICES["grafana"]
    there = {mount.target: ROOT / mount.source for mount in mounts(service) if not mount.is_volume}
    environment = service["environment"]
    provisioning = there[environment["GF_PATHS_PROVISIONING"]]
    assert [*there[environment["TUWEN_DASHBOARDS"]].glob("*.json")]
    asked = {
        name for path in provisioning.rglob("*.yml") for name in re.findall(r"\$\{(\w+)\}", path.read_text("utf-8"))
    }
    assert asked == {"TUWEN_DASHBOARDS", "PROMETHEUS_URL"} <= set(environment)
    host = environment["PROMETHEUS_URL"].removeprefix("http://").partition(":")[0]
    assert host in SERVICES
