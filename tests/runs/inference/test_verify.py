"""LoRAM's verification on ranks that share the models: the difference and the refusals of one process."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from raymem.errors import RecoveryMismatch
from raymem.methods.loram.verify import require_same_logits
from raymem.runs.loram import verify
from raymem.runs.loram.pipeline import Pipeline
from raymem.runs.resolved import ResolvedRun
from raymem.storage.checksums import CHECKSUMS
from raymem.training.dist_env import DistEnv
from raymem.training.reporter import LocalReporter
from tests.helpers.loram_runs import loram_recipe, run_stages
from tests.helpers.support import in_processes, save_model

pytestmark = [pytest.mark.slow, pytest.mark.numerics]

MORAM: dict[str, Any] = {"kind": "moram", "rank": 4, "density": 0.2, "criterion": "magnitude"}


def differences(configs: list[dict[str, Any]]) -> list[float]:
    import torch.distributed as dist

    dist_env = DistEnv(rank=dist.get_rank(), world_size=dist.get_world_size(), strategy="fsdp2")
    return [verify.logits_task(config, dist_env, LocalReporter().progress) for config in configs]


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize("adapter", ["lora", "moram"])
def test_ranks_that_share_the_models_find_what_one_process_finds(
    family: str, adapter: str, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"adapter": MORAM} if adapter == "moram" else {}
    model = save_model(tmp_path / "model", family)
    pipeline = Pipeline(loram_recipe(model, examples, tmp_path, align=False, **sections))
    run_stages(pipeline, ("prune", "train", "recover"))
    alone = pipeline.verify()
    assert alone.logit_difference is not None and alone.logit_difference < 1e-5
    place = tmp_path / "small"
    pruned = pipeline.ready().directory
    config = {"adapter": place / "adapter", "pruned": pruned, "recovered": place / "recovered"}
    broken = tmp_path / "broken"
    shutil.copytree(place / "recovered", broken)
    (broken / CHECKSUMS).unlink()
    tensors = load_file(broken / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor + 0.1
    save_file(tensors, broken / "adapter_model.safetensors", {"format": "pt"})
    configs = [{part: str(path) for part, path in one.items()} for one in (config, {**config, "recovered": broken})]
    first, second = in_processes(differences, 2, tmp_path / "meet", configs)
    assert first == second, "bit for bit"
    right, wrong = first
    assert require_same_logits(place / "recovered", right) < 1e-5
    with pytest.raises(RecoveryMismatch, match="differ by"):
        require_same_logits(broken, wrong)
    check_the_pipeline_asks_a_group(pipeline, config, alone.num_factors, monkeypatch)


def check_the_pipeline_asks_a_group(
    pipeline: Pipeline, config: dict[str, Path], num_factors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where workers share the model the two models run on them; the rest of the verification stays."""
    asked: list[dict[str, Path]] = []

    def shared_difference(run: ResolvedRun, pruned: str, adapter: str, recovered: str, status: Any) -> float:
        asked.append({"adapter": Path(adapter), "pruned": Path(pruned), "recovered": Path(recovered)})
        return 0.25e-5

    ready = pipeline.ready()
    scaling = ready.run.recipe.scaling.model_copy(update={"num_workers": 3, "strategy": "fsdp2"})
    run = replace(ready.run, recipe=ready.run.recipe.model_copy(update={"scaling": scaling}))
    pipeline._ready = replace(ready, run=run)
    monkeypatch.setattr(verify, "shared_difference", shared_difference)
    Path(pipeline.run_storage.join("loram/verify.json")).unlink()
    found = pipeline.verify()
    assert (found.logit_difference, found.num_factors) == (0.25e-5, num_factors)
    assert asked == [config]
