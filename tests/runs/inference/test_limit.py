"""A model that one process may not hold is evaluated, and generates, on two workers of Ray that share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymem.cluster.backend import RayBackend
from raymem.errors import ClusterError, DataError, OutOfMemory
from raymem.recipe.schema import ScalingSection
from raymem.runs.evaluate import evaluation_task
from raymem.runs.inference.generate import generation_task
from raymem.runs.inference.sharing import Sizes
from raymem.training.artifacts.load import bare_model
from raymem.training.data.packed.shared import to_dict
from raymem.training.dist_env import DistEnv
from raymem.training.reporter import LocalReporter
from tests.helpers.limited import (
    die_on_rank_1,
    limited_evaluation,
    limited_generation,
    ranks,
    refuse_on_rank_1,
)
from tests.helpers.ray_processes import RayHead
from tests.helpers.support import make_recipe, prepare_split, run_fragment, save_model, train, write_examples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MIB = 1 << 20
LARGE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 32,
    "head_dim": 64,
    "num_attention_heads": 8,
}
"""Sizes of a model of 490 MB in fp32, in files of 34 MB: torch maps a file whole, and so that it counts."""
SHARED = ScalingSection(num_workers=2, strategy="fsdp2", resources_per_worker={"CPU": 1.0}, max_failures=0)
ALONE = ScalingSection(num_workers=1, resources_per_worker={"CPU": 1.0}, max_failures=0)
LIMIT_BYTES = 400 * MIB
"""Above what a process has once it has done the same with a tiny model."""
PROMPT = {"prompt": "w1 w2 w3", "max_new_tokens": 3, "temperature": 0.0, "seed": 0, "raw": True, "system": None}


@pytest.fixture(scope="module")
def configs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """Work -> ``tiny`` and ``large`` -> its plain data, with a LoRA adapter of the model."""
    place = tmp_path_factory.mktemp("large")
    write_examples(place / "train.jsonl", 4, seed=0)
    write_examples(place / "eval.jsonl", 5, seed=1)
    found: dict[str, dict[str, Any]] = {"evaluating": {}, "generating": {}}
    for name, model in (("tiny", llama), ("large", save_model(place / "model", max_shard_size="34MB", **LARGE))):
        where = run_fragment(place, place, evaluated=True)
        recipe = make_recipe(where, {"name": name, "train": {"steps": 1, "global_batch": 1}}, model=model)
        outcome, _ = train(recipe)
        assert outcome is not None
        found["evaluating"][name] = {
            "recipe": recipe.to_dict(), "artifact": outcome.artifact, "data": to_dict(prepare_split(recipe, "eval")),
            "predictions": 0,
        }  # fmt: skip
        found["generating"][name] = {**PROMPT, "location": outcome.artifact}
    return found


TASKS: dict[str, tuple[Any, Any, str]] = {
    "evaluating": (limited_evaluation, evaluation_task, r"set scaling\.strategy: fsdp2 and scaling\.num_workers: 2"),
    "generating": (limited_generation, generation_task, r"give --workers 2"),
}


@pytest.mark.parametrize("work", TASKS)
def test_two_workers_do_what_one_has_no_memory_for(
    work: str, configs: dict[str, dict[str, Any]], cluster: RayHead
) -> None:
    limited, unlimited, cure = TASKS[work]
    config = {**configs[work], "limit_bytes": LIMIT_BYTES}
    large = configs[work]["large"]
    sizes = Sizes.of(bare_model(configs["evaluating"]["large"]["artifact"]))
    assert sizes.weights / 2 + sizes.gathered + 90 * MIB < LIMIT_BYTES < sizes.weights - 60 * MIB
    refused = rf"^out of memory on rank 0 of 1, which holds the whole model: {cure}, so that more"
    with pytest.raises(OutOfMemory, match=refused):
        RayBackend(ALONE).group(limited, config)
    told: list[str] = []
    found = RayBackend(SHARED).group(limited, config, told.append)
    expected = unlimited(large, DistEnv(), LocalReporter().progress)
    assert any("loading the weights" in text for text in told)
    if work == "evaluating":
        assert found[0].loss == pytest.approx(expected[0].loss, rel=1e-5)
        assert found[0].num_targets == expected[0].num_targets
    else:
        assert found == expected and found.text


def test_every_rank_takes_part_and_rank_0_answers(cluster: RayHead) -> None:
    told: list[str] = []
    found = RayBackend(SHARED).group(ranks, {"given": 7}, told.append)
    assert (found["rank"], found["strategy"], found["given"]) == (0, "fsdp2", 7)
    assert [rank for rank, _ in found["everyone"]] == [0, 1]
    assert len({pid for _, pid in found["everyone"]}) == 2
    assert told[-1] == "looking"


def test_an_error_of_one_rank_is_the_users_own_and_a_death_is_one_sentence(cluster: RayHead) -> None:
    with pytest.raises(DataError, match=r"^mine: 1 is wrong; take 2$"):
        RayBackend(SHARED).group(refuse_on_rank_1, {})
    with pytest.raises(ClusterError) as error:
        RayBackend(SHARED).group(die_on_rank_1, {})
    said = str(error.value)
    assert said.startswith("scaling: the workers failed 1 time, one more than scaling.max_failures=0 allows, at last ")
    assert said.endswith("; run the same command again, with --verbose for the workers' output")
    assert "checkpoint" not in said and "\n" not in said
