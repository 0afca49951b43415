"""Two ranks that share a model evaluate and generate as one process does, and hold no more of it than they need."""

from __future__ import annotations

import json
import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymem.errors import ModelError
from raymem.memory.meter import PeakMeter, resident_tensors, storage_bytes
from raymem.methods.plain.losses import FullLoss, FullLossKind
from raymem.recipe.schema import Recipe
from raymem.runs.evaluate import evaluate_recipe, evaluation_task
from raymem.runs.inference.generate import generation_task
from raymem.runs.inference.sharing import Sizes
from raymem.runs.results import EvaluationResult
from raymem.storage.checksums import CHECKSUMS
from raymem.training.artifacts.generate import continued
from raymem.training.artifacts.load import bare_model, load_artifact
from raymem.training.data.packed.shared import localise, to_dict
from raymem.training.dist_env import DistEnv
from raymem.training.evaluate import evaluate, evaluation_rows
from raymem.training.loss import prepare
from raymem.training.reporter import LocalReporter
from tests.helpers.peft_adapters import save_peft
from tests.helpers.support import (
    in_processes,
    make_recipe,
    prepare_split,
    run_fragment,
    save_model,
    train,
    write_examples,
)

pytestmark = pytest.mark.numerics

NO_PACKING = {"data": {"packing": "none"}}
ROWS = 9
"""Evaluation rows: with micro-batches of 2 on two ranks the last one has a single row for both."""
DEEP: dict[str, Any] = {"num_hidden_layers": 12, "hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
"""Sizes of a model of which an unit is a small part."""
MORAM: dict[str, Any] = {"adapter": {"kind": "moram", "rank": 4, "density": 0.2, "criterion": "magnitude"}}
PROMPT = {"prompt": "w1 w2 w3", "max_new_tokens": 4, "seed": 3, "raw": True, "system": None}
TEMPERATURES = (0.0, 1.0)
SHARED = ("base", "moram", "dora")
"""The artefacts that ranks can share."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("group")


@pytest.fixture(scope="module")
def base(place: Path) -> Path:
    write_examples(place / "train.jsonl", 12, seed=0)
    write_examples(place / "eval.jsonl", ROWS, seed=1)
    return save_model(place / "base")


@pytest.fixture(scope="module")
def artifacts(place: Path, base: Path) -> dict[str, str]:
    """Name -> an artefact that belongs to the base."""
    from peft import LoraConfig, TrainableTokensConfig

    outcome, _ = train(make_recipe(run_fragment(place, place), MORAM, {"train": {"steps": 2}}, model=base))
    assert outcome is not None
    dora = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"])
    return {
        "base": str(base),
        "moram": outcome.artifact,
        "dora": str(save_peft(place / "dora", base, dora)),
        "tokens": str(save_peft(place / "tokens", base, TrainableTokensConfig(token_indices=[1, 5]))),
    }


def recipe_of(place: Path, base: Path) -> Recipe:
    return make_recipe(run_fragment(place, place, evaluated=True), NO_PACKING, model=base)


def evaluate_and_generate(configs: list[dict[str, Any]], deep: dict[str, Any], other_base: str) -> dict[str, Any]:
    """What this rank makes of each evaluation and each prompt; of an artefact that is refused, the error."""
    dist_env = DistEnv.of(Recipe.model_validate(configs[0]["recipe"]).scaling)
    found: dict[str, Any] = {}
    for config in configs:
        name = config["name"]
        try:
            found[name] = evaluation_task(config, dist_env, LocalReporter().progress)
            for temperature in TEMPERATURES:
                prompt = {**PROMPT, "location": config["location"], "temperature": temperature}
                found[f"{name} {temperature}"] = generation_task(prompt, dist_env, LocalReporter().progress)
        except ModelError as error:
            found[name] = str(error)
    with pytest.raises(ModelError) as refused:
        load_artifact(other_base, dist_env=dist_env)
    found["other base"] = str(refused.value)
    found["peaks"] = peaks_of(deep, dist_env)
    found["of other ranks"] = rounded_otherwise(configs[0]["location"], dist_env)
    return found


def peaks_of(config: dict[str, Any], dist_env: DistEnv) -> dict[str, int]:
    """This rank's share of a model, and the bytes that torch held at most while it was evaluated and generated with."""
    recipe = Recipe.model_validate(config["recipe"])
    rows = evaluation_rows(localise(config["data"], recipe.storage.open()))
    peaks = {}
    for name in ("evaluating", "generating"):
        model, tokenizer = load_artifact(config["location"], dist_env=dist_env)
        prepare(model, FullLossKind(), FullLoss())
        peaks["share"] = storage_bytes(model.parameters())
        with PeakMeter(dist_env.device, partial(resident_tensors, model)) as meter:
            if name == "evaluating":
                evaluate(model, rows, dist_env, micro_batch=1, mixed=False)
            else:
                continued(model, tokenizer, [1, 2, 3], [], max_new_tokens=2)
        assert meter.peak is not None
        peaks[name] = meter.peak.allocated_bytes
    return peaks


def negate(logits: torch.Tensor) -> None:
    logits.neg_()


def rounded_otherwise(location: str, dist_env: DistEnv) -> list[int]:
    """Generate on ranks of which all but the first find other logits, as other hardware might."""
    model, tokenizer = load_artifact(location, dist_env=dist_env)
    if dist_env.rank:
        model.register_forward_hook(lambda module, args, output: negate(output.logits))
    return continued(model, tokenizer, [1, 2, 3], [], max_new_tokens=4)


@pytest.fixture(scope="module")
def found(place: Path, base: Path, artifacts: dict[str, str]) -> dict[str, list[Any]]:
    """Name of a work -> what each of the two ranks made of it."""
    recipe = recipe_of(place, base)
    raw = recipe.to_dict()
    raw["scaling"] = {**raw["scaling"], "num_workers": 2, "strategy": "fsdp2"}
    data = to_dict(prepare_split(recipe, "eval"))
    configs = [
        {"name": name, "recipe": raw, "data": data, "predictions": 1, "location": location,
         "artifact": "base" if name == "base" else location}
        for name, location in artifacts.items()
    ]  # fmt: skip
    many = str(save_model(place / "deep", **DEEP))
    deep = {"recipe": {**raw, "model": {**raw["model"], "name": many}}, "location": many}
    other = on_another_base(place, base, artifacts)
    ranks = in_processes(
        evaluate_and_generate, 2, place / "meet", configs, {**configs[0], **deep, "predictions": 0}, other
    )
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def on_another_base(place: Path, base: Path, artifacts: dict[str, str]) -> str:
    """The MoRAM adapter beside a base of which one number is another."""
    changed, adapter = place / "changed", place / "moram on another base"
    shutil.copytree(base, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][-1, -1] += 1
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    shutil.copytree(artifacts["moram"], adapter)
    (adapter / CHECKSUMS).unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(changed)}))
    return str(adapter)


def alone(place: Path, base: Path, artifact: str) -> EvaluationResult:
    return evaluate_recipe(recipe_of(place, base), artifact, predictions=1)


@pytest.mark.parametrize("name", SHARED)
def test_two_ranks_evaluate_as_one_process_does(
    found: dict[str, list[Any]], place: Path, base: Path, artifacts: dict[str, str], name: str
) -> None:
    (first, predictions), second = found[name]
    assert (first, predictions) == second, "bit for bit"
    expected = alone(place, base, "base" if name == "base" else artifacts[name])
    assert first.loss == pytest.approx(expected.loss, rel=1e-5)
    assert first.num_targets == expected.num_targets
    assert predictions == list(expected.predictions)


def test_what_is_evaluated_are_different_models(found: dict[str, list[Any]]) -> None:
    losses = sorted(found[name][0][0].loss for name in SHARED)
    assert min(b - a for a, b in pairwise(losses)) > 1e-4


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_two_ranks_generate_what_one_process_does(
    found: dict[str, list[Any]], artifacts: dict[str, str], name: str, temperature: float
) -> None:
    first, second = found[f"{name} {temperature}"]
    assert first == second
    prompt = {**PROMPT, "location": artifacts[name], "temperature": temperature}
    assert first == generation_task(prompt, DistEnv(), LocalReporter().progress)


def test_an_adapter_that_needs_the_whole_base_is_refused_with_a_cure(found: dict[str, list[Any]]) -> None:
    for told in found["tokens"]:
        assert "embed_tokens.trainable_tokens_original.default" in told and "is not in its file but made when" in told
        assert "use one worker, or merge it into its base (raymem merge" in told


def test_an_adapter_of_another_base_is_refused(found: dict[str, list[Any]]) -> None:
    for told in found["other base"]:
        assert (
            "layers.1.self_attn.q_proj: the base weight is not the one that the connections were selected for" in told
        )


def test_ranks_that_round_otherwise_write_the_same(found: dict[str, list[Any]]) -> None:
    first, second = found["of other ranks"]
    assert first == second and len(first) == 4


def test_a_rank_holds_its_share_and_a_unit(found: dict[str, list[Any]], place: Path) -> None:
    sizes = Sizes.of(bare_model(place / "deep"))
    activations = 250_000
    assert sizes.weights > sizes.weights / 2 + sizes.gathered + 2 * activations, (
        "otherwise the bound would prove nothing"
    )
    for peaks in found["peaks"]:
        assert peaks["share"] == pytest.approx(sizes.weights / 2, rel=0.01)
        for work in ("evaluating", "generating"):
            assert sizes.gathered <= peaks[work] - peaks["share"] <= sizes.gathered + activations
