"""Every overlay and component of ``k8s/``: valid, and safe by what it says."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import raymem
from raymem.k8s.checks import MAX_NAME
from raymem.k8s.overlays import OVERLAYS as RENDERED
from tests.helpers.manifests import (
    K8S,
    OVERLAYS,
    ROOT,
    Document,
    build,
    cluster_specs,
    containers,
    job_specs,
    needs_kubectl,
    of_kind,
    pod_templates,
    quantity,
    validate,
)

pytestmark = needs_kubectl

FROM_THE_USER = {"raymem-credentials", "raymem-mlflow-database"}
"""Secrets that docs/kubernetes.md tells people to make."""


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[Document]:
    return build(K8S / "overlays" / request.param)


@pytest.fixture
def variant(tmp_path: Path) -> Any:
    """Build an overlay with components added, as a person would write it."""

    def make(name: str, *components: str) -> list[Document]:
        shutil.copytree(K8S, tmp_path / "k8s", dirs_exist_ok=True)
        file = tmp_path / "k8s" / "overlays" / name / "kustomization.yaml"
        raw = yaml.safe_load(file.read_text())
        raw.setdefault("components", []).extend(f"../../components/{c}" for c in components)
        file.write_text(yaml.safe_dump(raw))
        return build(file.parent)

    return make


def test_every_overlay_can_be_rendered() -> None:
    assert set(RENDERED) == set(OVERLAYS)
    used = {c.name for c in (K8S / "components").iterdir()}
    text = "".join(p.read_text() for p in K8S.rglob("kustomization.yaml")) + (ROOT / "docs/kubernetes.md").read_text()
    assert {c for c in used if f"components/{c}" not in text and f"../{c}" not in text} == set()


def test_schemas(overlay: list[Document]) -> None:
    for document in overlay:
        validate(document)


def test_the_schemas_refuse_a_typo() -> None:
    documents = build(K8S / "overlays" / "cpu-demo")
    (job,) = of_kind(documents, "RayJob")
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["envFrm"] = []
    with pytest.raises(AssertionError, match="envFrm"):
        validate(job)
    (policy, *_) = of_kind(documents, "NetworkPolicy")
    policy["spec"]["podSelektor"] = {}
    with pytest.raises(AssertionError, match="podSelektor"):
        validate(policy)


def command_line(job: Document) -> tuple[str, Path, dict[str, Any]]:
    """The command of an entrypoint, its recipe, and what the command's own parser makes of the rest."""
    import typer

    from raymem.cli.main import app

    python, dash_m, package, *words = shlex.split(job["entrypoint"])
    assert (python, dash_m, package) == ("python", "-m", "raymem")
    found: Any = typer.main.get_command(app)
    command: list[str] = []
    while hasattr(found, "commands"):
        command.append(words.pop(0))
        found = found.commands[command[-1]]
    parsed = found.make_context(" ".join(command), words).params
    return " ".join(command), parsed["recipe"], parsed


def test_entrypoints_are_commands_with_files_of_the_image(overlay: list[Document]) -> None:
    from raymem.cluster.jobs.entrypoint import COMMANDS

    for where, job in job_specs(overlay):
        command, recipe, options = command_line(job)
        assert command in COMMANDS, where
        assert (ROOT / recipe).is_file(), where
        # A fixed name: the next attempt of the RayJob finds the checkpoints of the last one.
        assert [o for o in options["set_"] if o.startswith("name=")] or options["name"], where


def test_recipes_of_the_entrypoints_are_valid(overlay: list[Document]) -> None:
    from raymem.recipe.load import load_recipe

    for where, job in job_specs(overlay):
        command, recipe, options = command_line(job)
        loaded = load_recipe(ROOT / recipe, options["set_"])
        assert loaded.storage.path == "/shared/runs"
        (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
        if command not in ("evaluate", "sweep"):  # one task; trials of one worker each
            number = loaded.scaling.num_workers
            least, most = number if isinstance(number, tuple) else (number, number)
            assert (group["minReplicas"], group["maxReplicas"]) == (least, most), where
            asked = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert loaded.scaling.use_gpu == ("nvidia.com/gpu" in asked), where


def test_versions(overlay: list[Document]) -> None:
    (pinned,) = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert [where for where, cluster in cluster_specs(overlay) if cluster["rayVersion"] != pinned] == []
    for where, image in [(where, c["image"]) for where, c in containers(overlay) if "image" in c]:
        name, _, tag = image.rpartition(":")
        assert name == "registry.example.com/raymem", where
        assert tag in (f"{raymem.__version__}-cpu", f"{raymem.__version__}-cuda"), where


def test_jobs_end_and_go_on(overlay: list[Document]) -> None:
    for where, job in job_specs(overlay):
        assert job["shutdownAfterJobFinishes"] is True, where
        assert job["ttlSecondsAfterFinished"] > 0, where
        assert job["backoffLimit"] >= 1, where
        assert 0 < job["preRunningDeadlineSeconds"] < job["activeDeadlineSeconds"], where


def test_clusters(overlay: list[Document]) -> None:
    for where, cluster in cluster_specs(overlay):
        assert cluster["authOptions"] == {"mode": "token"}, where
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", where
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP", where
        grows = cluster.get("enableInTreeAutoscaling", False)
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], where
            assert grows or group["minReplicas"] == group["maxReplicas"], where
        head = cluster["headGroupSpec"]["template"]["spec"]
        assert head["automountServiceAccountToken"] is grows, where
        if grows:
            assert cluster["autoscalerOptions"]["version"] == "v2", where
            assert head["serviceAccountName"] == "raymem-autoscaler"
            assert "restartPolicy" not in head


def test_pods_are_confined(overlay: list[Document]) -> None:
    for where, template in pod_templates(overlay):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["runAsUser"] >= 1000, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), where
        assert not [v for v in spec["volumes"] if "hostPath" in v], where
        if " head" not in where:
            assert spec["automountServiceAccountToken"] is False, where
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "raymem", where
    for where, container in containers(overlay):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, where
        assert context["readOnlyRootFilesystem"] is True, where
        assert context["capabilities"] == {"drop": ["ALL"]}, where
        # What is written then goes to volumes.
        assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]], where


def test_requests_and_limits(overlay: list[Document]) -> None:
    for where, container in containers(overlay):
        asked, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(asked), where
        assert {"cpu", "memory"} <= set(limits), where
        for kind, amount in asked.items():
            assert quantity(amount) <= quantity(limits[kind]), (where, kind)
        assert quantity(asked["memory"]) == quantity(limits["memory"]), where  # memory cannot be taken back
    for where, template in pod_templates(overlay):
        shm = [v["emptyDir"] for v in template["spec"]["volumes"] if v["name"] == "shm"]
        if "submitter" in where or "Deployment" in where:
            continue
        (shared_memory,) = shm
        assert shared_memory["medium"] == "Memory", where
        limit = template["spec"]["containers"][0]["resources"]["limits"]["memory"]
        assert quantity(shared_memory["sizeLimit"]) < quantity(limit), where


def test_no_secret_values(overlay: list[Document]) -> None:
    assert of_kind(overlay, "Secret") == []
    for where, container in containers(overlay):
        for variable in container.get("env", []):
            assert not re.search("TOKEN|SECRET|PASSWORD|KEY|CREDENTIAL", variable["name"]), where
            assert "valueFrom" not in variable, where  # secrets come by envFrom only
    for settings in of_kind(overlay, "ConfigMap"):
        assert not [name for name in settings["data"] if re.search("TOKEN|SECRET|PASSWORD|KEY", name)]
    assert [where for where, job in job_specs(overlay) if "runtimeEnvYAML" in job] == []
    assert not re.search(r"://[^/@\s]+:[^/@\s]+@", yaml.safe_dump_all(overlay))


def test_references(overlay: list[Document]) -> None:
    check_references(overlay)


def check_references(found: list[Document]) -> None:
    def names(kind: str) -> set[str]:
        return {document["metadata"]["name"] for document in of_kind(found, kind)}

    documented = (ROOT / "docs" / "kubernetes.md").read_text()
    for where, template in pod_templates(found):
        spec = template["spec"]
        assert spec["serviceAccountName"] in names("ServiceAccount"), where
        volumes = {volume["name"] for volume in spec["volumes"]}
        for volume in spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in names("PersistentVolumeClaim"), where
            if "configMap" in volume:
                assert volume["configMap"]["name"] in names("ConfigMap"), where
        mounted = {m["name"] for container in spec["containers"] for m in container["volumeMounts"]}
        assert mounted <= volumes, where
        assert volumes <= mounted, where
    for where, container in containers(found):
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                assert source["configMapRef"]["name"] in names("ConfigMap"), where
            else:
                assert source["secretRef"]["name"] in FROM_THE_USER, where
                assert source["secretRef"]["name"] in documented, where
    for document in found:
        if document["kind"] != "Namespace":
            assert document["metadata"]["namespace"] == "raymem"
    (tracking,) = [c["data"]["MLFLOW_TRACKING_URI"] for c in of_kind(found, "ConfigMap") if "HF_HOME" in c["data"]]
    assert tracking.removeprefix("http://").split(":")[0] in names("Service")


def matches(selector: Document, labels: dict[str, str]) -> bool:
    plain = all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())
    return plain and all(
        labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", []) if e["operator"] == "In"
    )


PART = {"app.kubernetes.io/part-of": "raymem"}
HEAD = {**PART, "ray.io/node-type": "head"}  # the operator adds the second label
WORKER = {**PART, "ray.io/node-type": "worker"}
SUBMITTER = {**PART, "app.kubernetes.io/component": "submitter"}
MLFLOW = {**PART, "app.kubernetes.io/name": "raymem-mlflow"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
STRANGER = {"app": "something-else"}


def open_ports(found: list[Document], source: dict[str, str], target: dict[str, str]) -> set[tuple[int, int]]:
    """Port ranges on which the policies let ``source`` in at ``target``."""
    allowed = set()
    for policy in of_kind(found, "NetworkPolicy"):
        if not matches(policy["spec"]["podSelector"], target) or "Ingress" not in policy["spec"]["policyTypes"]:
            continue
        for rule in policy["spec"].get("ingress", []):
            if any(matches(peer.get("podSelector", {}), source) for peer in rule["from"]):
                allowed |= {(port["port"], port.get("endPort", port["port"])) for port in rule["ports"]}
    return allowed


def may_send(found: list[Document], source: dict[str, str], target: dict[str, str] | None) -> set[tuple[int, int]]:
    """Port ranges on which ``source`` may connect to ``target``, or to the world outside."""
    allowed = set()
    for policy in of_kind(found, "NetworkPolicy"):
        if not matches(policy["spec"]["podSelector"], source) or "Egress" not in policy["spec"]["policyTypes"]:
            continue
        for rule in policy["spec"].get("egress", []):
            for peer in rule["to"]:
                outside = "ipBlock" in peer
                inside = not outside and target is not None and "namespaceSelector" not in peer
                if (outside and target is None) or (inside and matches(peer["podSelector"], target or {})):
                    allowed |= {(port["port"], port.get("endPort", port["port"])) for port in rule["ports"]}
    return allowed


def test_network_policies_open_the_ports_in_use_and_no_other(overlay: list[Document]) -> None:
    everything = {document["metadata"]["name"]: document["spec"] for document in of_kind(overlay, "NetworkPolicy")}
    assert everything["raymem-default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ray, dashboard, tracking = {(1024, 65535)}, {(8265, 8265)}, {(5000, 5000)}
    for source, target, ports in [
        (HEAD, WORKER, ray),
        (WORKER, HEAD, ray | set()),
        (WORKER, WORKER, ray),
        (SUBMITTER, HEAD, dashboard),
        (HEAD, MLFLOW, tracking),
        (WORKER, MLFLOW, tracking),
    ]:
        assert open_ports(overlay, source, target) == ports, (source, target)
        assert may_send(overlay, source, target) == ports, (source, target)
    assert open_ports(overlay, OPERATOR, HEAD) == dashboard
    for source, target in [
        *((STRANGER, target) for target in (HEAD, WORKER, SUBMITTER, MLFLOW)),
        *((source, WORKER) for source in (OPERATOR, SUBMITTER, MLFLOW)),
        (SUBMITTER, MLFLOW),
        (MLFLOW, HEAD),
        (HEAD, SUBMITTER),
    ]:
        assert open_ports(overlay, source, target) == set(), (source, target)
    grows = any(cluster.get("enableInTreeAutoscaling") for _, cluster in cluster_specs(overlay))
    assert may_send(overlay, WORKER, None) == {(443, 443)}
    assert may_send(overlay, HEAD, None) == {(443, 443), *({(6443, 6443)} if grows else ())}
    assert may_send(overlay, SUBMITTER, None) == may_send(overlay, MLFLOW, None) == set()
    # The labels that were assumed, and the ports, are those of the manifests.
    (service,) = of_kind(overlay, "Service")
    assert [port["port"] for port in service["spec"]["ports"]] == [5000]
    (server,) = of_kind(overlay, "Deployment")
    (container,) = server["spec"]["template"]["spec"]["containers"]
    assert [port["containerPort"] for port in container["ports"]] == [5000]
    assert "--port=5000" in container["args"]
    assert server["spec"]["template"]["metadata"]["labels"] == MLFLOW
    for where, template in pod_templates(overlay):
        if "submitter" in where:
            assert template["metadata"]["labels"] == SUBMITTER
    for where, cluster in cluster_specs(overlay):
        (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        assert {port["containerPort"] for port in head["ports"]} == {6379, 8265}, where
    blocks = [p["ipBlock"] for s in everything.values() for r in s.get("egress", []) for p in r["to"] if "ipBlock" in p]
    assert all("169.254.0.0/16" in block["except"] for block in blocks)


def test_names_fit(overlay: list[Document]) -> None:
    limits = {"RayJob": MAX_NAME, "RayCluster": 53, "RayCronJob": 36}
    for document in overlay:
        assert len(document["metadata"]["name"]) <= limits.get(document["kind"], 63)


def test_heads_are_not_evicted() -> None:
    (budget,) = of_kind(build(K8S / "overlays" / "gpu"), "PodDisruptionBudget")
    assert matches(budget["spec"]["selector"], HEAD)
    assert not matches(budget["spec"]["selector"], WORKER)


def test_spot_workers_are_elastic_and_have_time_to_say_goodbye() -> None:
    found = build(K8S / "overlays" / "gpu-spot-elastic")
    ((_, cluster),) = cluster_specs(found)
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] < group["maxReplicas"]
    (settings,) = of_kind(found, "ConfigMap")
    drain = float(settings["data"]["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert 0 < drain < min(30, group["template"]["spec"]["terminationGracePeriodSeconds"])


def test_kueue() -> None:
    (job,) = of_kind(build(K8S / "overlays" / "kueue"), "RayJob")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "raymem"
    assert job["spec"]["suspend"] is True
    assert "enableInTreeAutoscaling" not in job["spec"]["rayClusterSpec"]


def test_kueue_follows_an_autoscaler() -> None:
    found = build(K8S / "overlays" / "kueue-elastic")
    (job,) = of_kind(found, "RayJob")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "raymem"
    assert job["metadata"]["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}
    assert job["spec"]["suspend"] is True
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"] is True and group["minReplicas"] < group["maxReplicas"]
    assert "gke-spot" not in str(found), "on any nodes"


def test_object_store(variant: Any) -> None:
    found = variant("gpu", "object-store")
    for document in found:
        validate(document)
    check_references(found)
    assert [d["metadata"]["name"] for d in of_kind(found, "PersistentVolumeClaim")] == ["raymem-mlflow"]


def test_mlflow_on_postgresql(variant: Any) -> None:
    found = variant("gpu", "mlflow-postgres")
    for document in found:
        validate(document)
    check_references(found)
    assert [d["metadata"]["name"] for d in of_kind(found, "PersistentVolumeClaim")] == ["raymem-shared"]
    (server,) = of_kind(found, "Deployment")
    assert "--backend-store-uri" not in " ".join(server["spec"]["template"]["spec"]["containers"][0]["args"])
    assert may_send(found, MLFLOW, None) == {(443, 443), (5432, 5432)}


def test_dockerfile() -> None:
    text = (K8S / "Dockerfile").read_text()
    (base,) = re.findall(r"^ARG BASE=(.*)$", text, re.MULTILINE)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", base)
    assert "latest" not in text
    assert text.index("USER 1000:1000") > text.index("pip install")
    assert all("--no-cache-dir -c constraints.txt" in line for line in re.findall(r"pip install.*", text))
    assert text.count("rm -rf /var/lib/apt/lists/*") == text.count("apt-get update")
    copied = [source for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for source in line.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in (ROOT / ".dockerignore").read_text().splitlines()
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert {source.split("/")[0] for source in included} <= set(copied), "the package cannot be built from these"
    extras = pyproject["project"]["optional-dependencies"]
    assert set(re.findall(r"\[([a-z,]+)\]", text)) <= {"quant", "server", "quant,server"}
    assert {"quant", "server"} <= set(extras)
