"""``raymem k8s render``: what it fills in, and what it refuses."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymem.errors import ClusterError, RecipeError
from raymem.k8s.checks import CRON_SUFFIX, MAX_NAME
from raymem.k8s.kustomize import to_yaml
from raymem.k8s.overlays import GPU_PRODUCTS, OVERLAYS
from raymem.k8s.render import MARGIN, RUNTIME_BYTES, memory_request_bytes, render
from raymem.memory.devices import GPUS
from raymem.planner import plan_recipe
from raymem.recipe.load import load_recipe
from tests.helpers.manifests import (
    ROOT,
    cluster_specs,
    documents,
    job_specs,
    needs_kubectl,
    of_kind,
    quantity,
    validate,
)

RECIPE: dict[str, Any] = {
    "model": {"name": "some/model"},
    "data": {"train": "some/data"},
    "train": {"steps": 2},
    "storage": {"path": "/shared/runs"},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write(tmp_path / "my_Run.v1.yaml")


def write(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump({**RECIPE, **sections}))
    return path


def made(recipe: Path, **arguments: Any) -> Any:
    """Render with a figure, for which no model is needed."""
    return render(recipe, **{"overlay": "gpu", "worker_memory": "10Gi", **arguments})


# ---- what is filled in


RUNS = {"loram": "loram run", "sweep": "sweep", "scheduled-evaluation": "evaluate"}
"""Overlay -> the command that it runs, where that is not train."""


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay(recipe: Path, overlay: str) -> None:
    shape = OVERLAYS[overlay]
    workers = "2-8" if shape.elastic else "4"
    image, name = "reg.io:5000/me/raymem:1.2", "my-run-v1" if shape.job else "raymem-interactive"
    rendered = made(recipe, overlay=overlay, workers=workers, image=image, gpu="L4" if shape.gpu is not False else None)
    found = documents(rendered.manifests)
    for document in found:
        validate(document)
    ray_objects = [d for d in found if d["kind"].startswith("Ray")]
    assert [(d["kind"], d["metadata"]["name"]) for d in ray_objects] == [(shape.kind, name)]
    assert (rendered.kind, rendered.name) == (shape.kind, name)
    assert "registry.example.com" not in yaml.safe_dump(found)

    ((_, cluster),) = cluster_specs(found)
    head, (group,) = cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["image"] == image
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert quantity(container["resources"]["requests"]["memory"]) == memory_request_bytes(10 << 30) == 15 << 30
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (overlay != "cpu-demo")
    if overlay != "cpu-demo":
        assert group["template"]["spec"]["nodeSelector"]["nvidia.com/gpu.product"] == GPU_PRODUCTS["L4"]
    assert (group["minReplicas"], group["maxReplicas"]) == ((2, 8) if shape.elastic else (4, 4))
    advertised = group["rayStartParams"].get("resources")
    assert (advertised is not None) == (overlay == "sweep")
    if advertised is not None:
        mib = GPUS["L4"].capacity_bytes >> 20
        assert json.loads(json.loads(advertised)) == {"gpu_memory_mib": mib}, "one shell takes the outer quotes"
    if shape.job is None:
        assert not [c for c in of_kind(found, "ConfigMap") if c["metadata"]["name"].endswith("-recipe")]
        return

    ((_, job),) = job_specs(found)
    assert job["entrypoint"] == f"python -m raymem {RUNS.get(overlay, 'train')} /etc/raymem/recipe.yaml"
    labelled = [ray_objects[0], head, group["template"], job["submitterPodTemplate"]]
    assert {document["metadata"]["labels"]["raymem.io/run"] for document in labelled} == {"my-run-v1"}
    (settings,) = [c for c in of_kind(found, "ConfigMap") if c["metadata"]["name"] == "my-run-v1-recipe"]
    assert {"name": "recipe", "configMap": {"name": "my-run-v1-recipe"}} in head["spec"]["volumes"]
    mounts = head["spec"]["containers"][0]["volumeMounts"]
    assert {"name": "recipe", "mountPath": "/etc/raymem", "readOnly": True} in mounts
    inside = recipe.parent / "inside.yaml"
    inside.write_text(settings["data"]["recipe.yaml"])
    loaded = load_recipe(inside)
    assert loaded.name == "my_Run.v1"  # the run keeps its name, and so its checkpoints
    own = 1 if overlay == "sweep" else 4
    assert loaded.scaling.num_workers == ((2, 8) if shape.elastic else own)
    assert loaded.scaling.use_gpu == (overlay != "cpu-demo")
    assert loaded.scaling.resources_per_worker is not None
    assert loaded.scaling.resources_per_worker["CPU"] <= float(container["resources"]["limits"]["cpu"])


@needs_kubectl
def test_a_cluster_that_stays_grows_from_none_and_a_nightly_job_may_have_gpus(recipe: Path) -> None:
    ((_, cluster),) = cluster_specs(documents(made(recipe, overlay="interactive", workers="6").manifests))
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 6)
    assert "nvidia.com/gpu" not in group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert made(recipe, overlay="interactive", name="team").name == "team"
    on_a_bucket = {"overlay": "scheduled-evaluation", "overrides": ["storage.path=s3://bucket/runs"], "gpu": "T4"}
    found = documents(made(recipe, **on_a_bucket).manifests)
    for document in found:
        validate(document)
    assert "raymem-shared" not in yaml.safe_dump(found)
    ((_, cluster),) = cluster_specs(found)
    assert cluster["workerGroupSpecs"][0]["template"]["spec"]["nodeSelector"]["nvidia.com/gpu.product"] == "Tesla-T4"


@needs_kubectl
@pytest.mark.parametrize("overlay", ["gpu-spot-elastic", "interactive"])
def test_a_namespace_and_a_storage_class_of_ones_own(recipe: Path, overlay: str) -> None:
    found = documents(made(recipe, overlay=overlay, namespace="team-a", storage_class="nfs.csi").manifests)
    for document in found:
        validate(document)
    (namespace,) = of_kind(found, "Namespace")
    assert namespace["metadata"]["name"] == "team-a"
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {d["metadata"].get("namespace") for d in found if d is not namespace} == {"team-a"}
    classes = {
        claim["metadata"]["name"]: claim["spec"].get("storageClassName")
        for claim in of_kind(found, "PersistentVolumeClaim")
    }
    assert classes == {"raymem-shared": "nfs.csi", "raymem-mlflow": None}
    assert "raymem.svc" not in yaml.safe_dump(found), (
        "the tracking server is reached by a name with the namespace in it"
    )


@needs_kubectl
def test_the_recipe_can_be_read_in_the_manifests(recipe: Path) -> None:
    for only_job in (False, True):
        text = made(recipe, only_job=only_job).manifests
        assert "\n  recipe.yaml: |\n    name: my_Run.v1\n" in text
        assert text.endswith("\n") and not text.endswith("\n\n")
    prompt = "two lines\nand: 'a quote', \\t and ümlauts\n\n"
    assert yaml.safe_load(to_yaml({"a": prompt, "b": "x" * 500})) == {"a": prompt, "b": "x" * 500}


@needs_kubectl
def test_gpu_kind_and_options(recipe: Path) -> None:
    options = {"command": "loram run", "arguments": ["--with-lora"]}
    (job, *others) = documents(
        made(recipe, gpu="L4", name="other", only_job=True, cpus=7, workers="1", **options).manifests
    )[::-1]
    assert [d["metadata"]["name"] for d in others] == ["other-recipe"]
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["template"]["spec"]["nodeSelector"] == {"nvidia.com/gpu.product": GPU_PRODUCTS["L4"]}
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] == "7"
    assert job["spec"]["entrypoint"] == "python -m raymem loram run /etc/raymem/recipe.yaml --with-lora"


@needs_kubectl
def test_what_a_base_and_a_command_make_of_the_job(tmp_path: Path) -> None:
    """LoRAM's recipes run all of its stages; trials of a sweep share the workers, each with the recipe's own number."""

    def job_and_recipe(path: Path, **arguments: Any) -> tuple[Any, Any]:
        found = documents(made(path, only_job=True, **arguments).manifests)
        ((job,), (config,)) = of_kind(found, "RayJob"), of_kind(found, "ConfigMap")
        return job["spec"], yaml.safe_load(config["data"]["recipe.yaml"])

    pruned = write(tmp_path / "small.yaml", base={"kind": "loram", "ratio": 0.5})
    job, inside = job_and_recipe(pruned, workers="2")
    assert job["entrypoint"] == "python -m raymem loram run /etc/raymem/recipe.yaml"
    assert inside["scaling"]["num_workers"] == 2
    plain = write(tmp_path / "plain.yaml", scaling={"num_workers": 1})
    job, inside = job_and_recipe(plain, workers="3", command="sweep", arguments=["--space", "joint"])
    assert job["entrypoint"] == "python -m raymem sweep /etc/raymem/recipe.yaml --space joint"
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], inside["scaling"]["num_workers"]) == (3, 1)


@needs_kubectl
def test_runs_on_an_object_store_have_no_shared_volume(tmp_path: Path) -> None:
    found = documents(made(write(tmp_path / "a.yaml", storage={"path": "s3://bucket/runs"})).manifests)
    for document in found:
        validate(document)
    assert "raymem-shared" not in yaml.safe_dump(found)
    ((_, cluster),) = cluster_specs(found)
    volumes = {v["name"] for v in cluster["headGroupSpec"]["template"]["spec"]["volumes"]}
    assert volumes == {"shm", "tmp", "home", "recipe"}


@needs_kubectl
@pytest.mark.usefixtures("planned_here")
def test_the_memory_request_is_the_figure_with_its_margin() -> None:
    overrides = ["storage.path=/shared/runs", "scaling.num_workers=2"]
    path = ROOT / "jobs" / "recipes" / "demo.yaml"
    done = render(path, overlay="cpu-demo", overrides=overrides)
    assert done.figure_bytes == plan_recipe(load_recipe(path, overrides)).capacity_bytes
    assert done.request_bytes >= done.figure_bytes * MARGIN + RUNTIME_BYTES
    assert done.request_bytes - (done.figure_bytes * MARGIN + RUNTIME_BYTES) < 1 << 30
    ((_, cluster),) = cluster_specs(documents(done.manifests))
    (container,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert quantity(container["resources"]["requests"]["memory"]) == done.request_bytes


@pytest.mark.usefixtures("planned_here")
def test_a_model_that_is_not_here_needs_a_figure(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", model={"name": "/shared/models/big"})
    with pytest.raises(
        ClusterError, match=r"cannot be planned here .*big does not exist.*--model-config, or say.*--worker-memory"
    ):
        render(path, overlay="gpu")


@needs_kubectl
@pytest.mark.usefixtures("planned_here")
def test_the_config_of_a_model_that_cannot_be_downloaded_is_enough(tmp_path: Path, llama: Path) -> None:
    path = write(tmp_path / "a.yaml", model={"name": "some/model", "revision": "main"})
    for given in (llama / "config.json", llama):
        figure = render(path, overlay="cpu-demo", model_config=given).figure_bytes
        here = load_recipe(write(tmp_path / "b.yaml", model={"name": str(llama)}))
        assert figure == plan_recipe(here).capacity_bytes
    with pytest.raises(ClusterError, match=r"--model-config .*none: No such file or directory; give the config.json"):
        render(path, overlay="gpu", model_config=tmp_path / "none")


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"overlay": "gppu"}, r"--overlay gppu: is not one of cpu-demo, gpu, .*, scheduled-evaluation; choose"),
        ({"command": "loram runn"}, r"--command loram runn: no command .*; did you mean 'loram run'\?"),
        ({"arguments": ["--fresh"]}, r"--fresh: each attempt of a RayJob would start over, .*; give the run another"),
        ({"gpu": "B300"}, r"--gpu B300: is not in the table \(T4, .*short: A100, H100"),
        ({"overlay": "cpu-demo", "gpu": "H100"}, r"--gpu H100: overlay cpu-demo has no GPUs; leave it out"),
        ({"workers": "0"}, r"--workers 0: write a number from 1, or min-max"),
        ({"workers": "8-2"}, r"--workers 8-2: write a number"),
        ({"workers": "2-8"}, r"--workers 2-8: overlay gpu has a fixed number of workers.*gpu-spot-elastic"),
        ({"name": "x" * (MAX_NAME + 1)}, rf"--name x+ has 48 characters, KubeRay allows {MAX_NAME}; give another"),
        ({"name": "Upper"}, r"--name Upper is not a name for Kubernetes .*give another one with --name"),
        ({"name": "1st"}, r"--name 1st is not a name for Kubernetes"),
        (
            {"overlay": "scheduled-evaluation", "name": "x" * 37},
            rf"37 characters, KubeRay allows {MAX_NAME - CRON_SUFFIX}",
        ),
        (
            {"overlay": "interactive", "command": "train"},
            r"--command train: overlay interactive is a cluster that stays",
        ),
        ({"namespace": "Team"}, r"--namespace Team: is not a name for a namespace"),
        ({"namespace": "n" * 64}, r"--namespace n+: is not a name"),
        ({"storage_class": "a b"}, r"--storage-class a b: is not a name for a storage class; `kubectl get"),
        (
            {"storage_class": "nfs", "overrides": ["storage.path=s3://b/runs"]},
            r"--storage-class nfs: storage\.path is s3://b/runs, so that there is no shared volume; leave it out",
        ),
        ({"image": "raymem"}, r"--image raymem: needs a tag that stays"),
        ({"image": "host:5000/raymem"}, r"--image host:5000/raymem: needs a tag"),
        ({"image": "raymem:latest"}, r"--image raymem:latest: needs a tag that stays \(not latest\)"),
        ({"worker_memory": "much"}, r"--worker-memory much: is no amount of memory; write for example 64Gi"),
        ({"worker_memory": "90Gi"}, r"--gpu: a worker needs 90\.0 GiB and a H100-80GB has 79\.1 GiB; lower train"),
        ({"worker_memory": "20Gi", "gpu": "T4"}, r"a T4 has 14\.6 GiB"),
        ({"node_memory": "14Gi"}, r"--node-memory: a worker needs 15\.0 GiB and a node has 14\.0 GiB; lower"),
        (
            {"overlay": "cpu-demo", "cpus": 1, "overrides": ["scaling.resources_per_worker={CPU: 2}"]},
            r"--cpus 1: scaling\.resources_per_worker gives each worker 2 CPU; raise one",
        ),
    ],
)
def test_bad_options(recipe: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ClusterError, match=words):
        made(recipe, **arguments)


def test_names_of_recipes(tmp_path: Path) -> None:
    for name, words in [
        ("r" * 48, rf"name: r+ gives the RayJob name r+, which has 48 characters, KubeRay allows {MAX_NAME}"),
        ("7b-run", r"name: 7b-run gives the RayJob name 7b-run, which is not a name"),
    ]:
        with pytest.raises(ClusterError, match=words):
            made(write(tmp_path / "a.yaml", name=name))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"storage": {"path": "raymem-runs"}},
            r"storage\.path: .*/raymem-runs is a directory of one machine, and the run",
        ),
        ({"storage": {"path": "/sharedruns"}}, r"storage\.path: /sharedruns is a directory of one machine"),
        ({"data": {"train": ["/shared/a.jsonl", "b.jsonl"]}}, r"data\.train\[1\]\.path: .*/b\.jsonl is a path of this"),
        ({"data": {"train": "x/y", "eval": "e.csv"}}, r"data\.eval\[0\]\.path: .*e\.csv is a path of this machine"),
        ({"model": {"name": "/models/llama"}}, r"model\.name: /models/llama is a path of this machine, which the Pods"),
        ({"adapter": {"init_from": "old/adapter"}}, r"adapter\.init_from: .*/old/adapter is a path of this machine"),
        (
            {"model": {"name": "demo"}, "storage": {"path": "s3://b/runs"}},
            r"model: demo is built in the storage path and needs a directory, not s3://b/runs; set",
        ),
    ],
)
def test_what_the_pods_would_not_see(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ClusterError, match=words):
        made(write(tmp_path / "a.yaml", **sections))


def test_invalid_recipe(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.stepps"):
        made(recipe, overrides=["train.stepps=3"])


def test_no_kubectl(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match=r"neither kubectl nor kustomize is on the PATH.*; install kubectl"):
        made(recipe)


@needs_kubectl
def test_command_line(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from raymem.cli.main import run_app

    assert run_app("k8s", "render", recipe, "--worker-memory", "10Gi", "--workers", "3", "-s", "seed=5") == 0
    shown = capsys.readouterr()
    assert len(documents(shown.out)) == 16
    assert re.search(r"RayJob my-run-v1: .* 10\.00 GiB.* 15\.00 GiB", " ".join(shown.err.split()))
    render = ("k8s", "render", recipe, "--worker-memory", "10Gi", "--only-job")
    assert run_app(*render, "--", "--force", "-s", "seed=5") == 0
    (job,) = of_kind(documents(capsys.readouterr().out), "RayJob")
    assert job["spec"]["entrypoint"] == "python -m raymem train /etc/raymem/recipe.yaml --force"
    assert run_app(*render, "--", "--forse") == 2
    assert "No such option: --forse" in capsys.readouterr().err
    (recipe.parent / "mine.yaml").write_text("adapter.rank: {type: choice, choices: [2, 4]}\n")
    mine = recipe.parent / "mine.yaml"
    mine_here = os.path.relpath(mine)
    assert run_app(*render, "--command", "sweep", "--", "--budget", "1GiB", "--space", mine_here) == 1
    assert f"--space {mine_here}: is a file of this machine, which the" in " ".join(capsys.readouterr().err.split())
    assert run_app(*render, "--command", "sweep", "--", "--budget", "1GiB", "--space", "join") == 1
    assert "did you mean 'joint'" in capsys.readouterr().err
    assert run_app("k8s", "render", recipe, "--overlay", "none") == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: --overlay none: is not one of")
