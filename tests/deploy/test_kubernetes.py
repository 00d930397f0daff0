"""deploy/kubernetes without a cluster: Kubernetes' own schemas, what refers to what, and the adapter's queries."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from tuwen.cli import app

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
OVERLAYS = ("cpu", "gpu")
GPU_TYPES = sorted(path.parent.name for path in KUBERNETES.glob("gpu-types/*/kustomization.yaml"))
# The oldest that the clouds still run when this was written, and the newest the validator knows.
VERSIONS = ("1.31", kubernetes_validate.latest_version())
KUBECTL, PROMTOOL = shutil.which("kubectl"), shutil.which("promtool")
needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl, which has kustomize in it, is not installed")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed: apt-get install prometheus")
_KUSTOMIZE_KINDS = ("Kustomization", "Component")

Resource = dict[str, Any]


def documents(text: str) -> list[Resource]:
    return [document for document in yaml.safe_load_all(text) if document]


def render(folder: Path) -> list[Resource]:
    assert KUBECTL is not None
    run = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    return documents(run.stdout)


def written_resources() -> Iterator[tuple[str, Resource]]:
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        for document in documents(path.read_text(encoding="utf-8")):
            if "kind" in document and document["kind"] not in _KUSTOMIZE_KINDS:
                yield f"{path.relative_to(KUBERNETES)}: {document['kind']}", document


def only(resources: list[Resource], kind: str, name: str | None = None) -> Resource:
    (found,) = [one for one in resources if one["kind"] == kind and name in (None, one["metadata"]["name"])]
    return found


def pod_specs(resources: list[Resource]) -> list[Resource]:
    return [one["spec"]["template"]["spec"] for one in resources if one["kind"] in ("Deployment", "Job")]


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[Resource]:
    if KUBECTL is None:
        pytest.skip("kubectl, which has kustomize in it, is not installed")
    return render(KUBERNETES / "overlays" / request.param)


WRITTEN = dict(written_resources())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", WRITTEN)
def test_every_written_resource_keeps_to_the_schema(name: str, version: str) -> None:
    kubernetes_validate.validate(WRITTEN[name], version, strict=True)


def test_the_schema_would_notice_a_wrong_word() -> None:
    resource = dict(WRITTEN["base/disruption-budget.yaml: PodDisruptionBudget"])
    resource["spec"] = {**resource["spec"], "maxUnavailible": 1}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(resource, VERSIONS[0], strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_rendered_resource_keeps_to_the_schema(overlay: list[Resource], version: str) -> None:
    assert len(overlay) >= 9
    for resource in overlay:
        kubernetes_validate.validate(resource, version, strict=True)
        assert resource["kind"] == "Namespace" or resource["metadata"]["namespace"] == "tuwen"


def test_selectors_find_the_pods(overlay: list[Resource]) -> None:
    pod_labels = only(overlay, "Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = [only(overlay, "Deployment")["spec"]["selector"]["matchLabels"]]
    selectors += [one["spec"]["selector"] for one in overlay if one["kind"] == "Service"]
    selectors.append(only(overlay, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"])
    selectors.append(only(overlay, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"])
    assert len(selectors) == 5
    for selector in selectors:
        assert selector.items() <= pod_labels.items()


def test_ports_volumes_and_claims_that_are_named_exist(overlay: list[Resource]) -> None:
    container = only(overlay, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"] for port in container["ports"]}
    named = {port["targetPort"] for one in overlay if one["kind"] == "Service" for port in one["spec"]["ports"]}
    rules = only(overlay, "NetworkPolicy")["spec"]["ingress"]
    named |= {port["port"] for rule in rules for port in rule["ports"]}
    named |= {container[f"{probe}Probe"]["httpGet"]["port"] for probe in ("startup", "readiness", "liveness")}
    assert named == ports
    claims = {one["metadata"]["name"] for one in overlay if one["kind"] == "PersistentVolumeClaim"}
    for pod in pod_specs(overlay):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for each in (*pod.get("initContainers", ()), *pod["containers"]):
            assert {mount["name"] for mount in each["volumeMounts"]} <= set(volumes)
        used = (volume.get("persistentVolumeClaim") for volume in volumes.values())
        assert {claim["claimName"] for claim in used if claim} <= claims


def test_nothing_runs_as_root_or_writes_where_it_should_not(overlay: list[Resource]) -> None:
    for pod in pod_specs(overlay):
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
    triton = only(overlay, "Deployment")["spec"]["template"]["spec"]
    assert {mount["name"]: mount for mount in triton["containers"][0]["volumeMounts"]}["model-repository"]["readOnly"]


def test_the_autoscaler_asks_for_what_the_adapter_gives(overlay: list[Resource]) -> None:
    asked = {metric["pods"]["metric"]["name"] for metric in only(overlay, "HorizontalPodAutoscaler")["spec"]["metrics"]}
    assert asked == {rule["name"]["as"] for rule in adapter_rules()}


@needs_kubectl
def test_triton_goes_only_where_a_plan_is_made() -> None:
    resources = render(KUBERNETES / "overlays" / "gpu")
    affinity = only(resources, "Deployment")["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    jobs = [one for one in resources if one["kind"] == "Job"]
    products = [job["spec"]["template"]["spec"]["nodeSelector"]["nvidia.com/gpu.product"] for job in jobs]
    assert term["matchExpressions"][0]["values"] == products
    for pod in pod_specs(resources):
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert pod["tolerations"]


@needs_kubectl
@pytest.mark.parametrize("gpu_type", [each for each in GPU_TYPES if each != "plan-job"])
def test_every_gpu_type_has_a_job_of_its_own(gpu_type: str) -> None:
    (job,) = render(KUBERNETES / "gpu-types" / gpu_type)
    kubernetes_validate.validate(job, VERSIONS[-1], strict=True)
    assert job["metadata"]["name"] == f"build-plan-{gpu_type}"


@needs_kubectl
@pytest.mark.parametrize("name", OVERLAYS)
def test_object_storage_joins_either_overlay(name: str, tmp_path: Path) -> None:
    copied = shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    path = copied / "overlays" / name / "kustomization.yaml"
    path.write_text(path.read_text(encoding="utf-8") + "components: [../../components/object-storage]\n", "utf-8")
    resources = render(path.parent)
    for resource in resources:
        kubernetes_validate.validate(resource, VERSIONS[-1], strict=True)
    pod = only(resources, "Deployment")["spec"]["template"]["spec"]
    assert not any("persistentVolumeClaim" in volume for volume in pod["volumes"])
    (fetch,) = pod["initContainers"]
    upload = only(resources, "Job", "upload-repository")["spec"]["template"]["spec"]["containers"][0]
    config = only(resources, "ConfigMap")
    for container in (fetch, upload):
        assert {"configMapRef": {"name": config["metadata"]["name"]}} in container["envFrom"]
        assert "$(REPOSITORY)" in container["args"]
    assert "REPOSITORY" in config["data"]


def test_the_builders_commands_are_commands(overlay: list[Resource], tmp_path: Path) -> None:
    """Run for real, up to what is not there yet: exit code 1 and a sentence, where wrong usage is 2."""
    commands = [pod["containers"][0]["args"] for pod in pod_specs(overlay)]
    assert len(commands) == 2
    for program, *arguments in commands:
        assert program == "tuwen"
        mounted = [each.replace("/models", str(tmp_path)).replace("/checkpoint", "no-such-one") for each in arguments]
        result = CliRunner().invoke(app, mounted)
        assert result.exit_code == 1, result.output
        missing = "no-such-one" if arguments[0] == "build" else "no model in this repository"
        assert missing in f"{result.output}{result.exception}"


def adapter_rules() -> list[dict[str, Any]]:
    values = yaml.safe_load((KUBERNETES / "prometheus-adapter-values.yaml").read_text(encoding="utf-8"))
    return values["rules"]["custom"]


@needs_promtool
def test_the_adapters_queries_give_microseconds_per_request(tmp_path: Path) -> None:
    """Two towers of a pod: 30 requests/s that wait 2 ms each, 10 that wait 10 ms; 5 pictures/s that wait 40 ms."""
    pod = 'namespace="tuwen",pod="triton-1"'
    series = {
        f'nv_inference_queue_duration_us{{{pod},model="m_text_tower"}}': 30 * 2_000,
        f'nv_inference_request_success{{{pod},model="m_text_tower"}}': 30,
        f'nv_inference_queue_duration_us{{{pod},model="m_image_tower"}}': 10 * 10_000,
        f'nv_inference_request_success{{{pod},model="m_image_tower"}}': 10,
        f'nv_inference_queue_duration_us{{{pod},model="m_text"}}': 7_000_000,
        f'tuwen_queue_duration_us_total{{{pod},model="preprocess_image_224"}}': 5 * 40_000,
        f'tuwen_batch_items_total{{{pod},model="preprocess_image_224"}}': 5,
    }
    expected = {"tuwen_tower_queue_us": (30 * 2_000 + 10 * 10_000) / 40, "tuwen_picture_queue_us": 40_000}
    (tmp_path / "rules.yml").write_text("groups: []\n", encoding="utf-8")
    test = {
        "interval": "10s",
        "input_series": [{"series": name, "values": f"0+{10 * rate}x60"} for name, rate in series.items()],
        "promql_expr_test": [
            {
                "expr": rule["metricsQuery"]
                .replace("<<.GroupBy>>", "pod")
                .replace("<<.LabelMatchers>>", 'namespace="tuwen",pod=~"triton-1|triton-2"'),
                "eval_time": "8m",
                "exp_samples": [{"labels": '{pod="triton-1"}', "value": expected[rule["name"]["as"]]}],
            }
            for rule in adapter_rules()
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": [test]}), encoding="utf-8")
    assert PROMTOOL is not None
    run = subprocess.run(
        [PROMTOOL, "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 0, run.stdout + run.stderr
