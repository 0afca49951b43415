"""The loss axis in training: chunked equals full for every family, head and layout, and what cannot be is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from raymem.errors import RecipeError
from raymem.methods.chunked_loss import choice
from raymem.methods.chunked_loss.probing import Verdict
from raymem.methods.plain.losses import FullLoss, FullLossKind
from raymem.recipe.schema import Recipe
from raymem.training.data.batches import Batch
from raymem.training.dist_env import DistEnv, replicate
from raymem.training.loss import forward_loss_sum, loss_of, prepare
from raymem.training.model.build import build_model
from tests.helpers import families
from tests.helpers.support import FAMILIES, VOCABULARY, in_processes, make_recipe, random_batch, save_model

LOSS_FAMILIES = (*FAMILIES, "qwen2", "gemma2", "cohere", "granite", "mixtral", "gpt_oss")
LEAKING = ("opt", "gpt_oss")
"""Those that do not keep packed examples apart."""
FULL_TRAINING: dict[str, Any] = {"adapter": "none"}
LORA_ON_HEAD: dict[str, Any] = {"adapter": {"kind": "lora", "targets": ["q_proj", "lm_head"]}}
TOLERANCE = {"fp32": (1e-6, 1e-5), "bf16": (1e-3, 1e-2)}
"""precision -> relative difference of the loss, and of the gradients in norm."""


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    packing = {"packing": "none" if family in LEAKING else "bfd"}
    return {
        "model": {"name": None, "config": families.options_of(family, **changes), "tokenizer": "demo"},
        "data": packing,
    }


def batch_of(*, packed: bool) -> Batch:
    """Four rows in which the first half of each, a prompt, is no target."""
    drawn = random_batch(4, 24, packed=packed)
    labels = drawn.labels.clone()
    labels[:, :11] = -100
    return Batch(drawn.input_ids, labels, drawn.position_ids, None)


def loss_and_gradients(recipe: Recipe, model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)  # OPT and GPT-2 have dropout in their configs
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)  # at zero, A would have no gradient
    torch.manual_seed(0)
    loss = forward_loss_sum(model, batch, mixed=recipe.train.precision == "bf16_mixed")
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def compare(recipe: Recipe, batch: Batch, dist_env: DistEnv | None = None) -> None:
    """Loss and every gradient of ``chunked`` against ``full``."""
    results = []
    for kind in ("full", "chunked"):
        one = Recipe.model_validate({**recipe.to_dict(), "loss": kind})
        model = build_model(one, dist_env)
        assert loss_of(model).chunked == (kind == "chunked")
        results.append(loss_and_gradients(one, model, batch))
    assert_alike(results[0], results[1], recipe.train.precision)


def assert_alike(expected: Any, found: Any, precision: str) -> None:
    for_loss, for_gradients = TOLERANCE["fp32" if precision == "fp32" else "bf16"]
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=for_loss)
    assert found[1].keys() == expected[1].keys()
    theirs = torch.cat([gradient.flatten().double() for gradient in expected[1].values()])
    ours = torch.cat([found[1][name].flatten().double() for name in expected[1]])
    assert float((ours - theirs).norm()) <= for_gradients * float(theirs.norm())
    assert float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)) >= 0.9999


@pytest.mark.parametrize("training", ["lora", "none"])
@pytest.mark.parametrize("family", LOSS_FAMILIES)
def test_every_family_has_the_same_loss_and_gradients(family: str, training: str) -> None:
    compare(make_recipe(config_of(family), {"adapter": training}), batch_of(packed=family not in LEAKING))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "cohere"])
def test_tied_or_not_in_bf16(family: str, tied: bool) -> None:
    config = config_of(family, tie_word_embeddings=tied)
    compare(make_recipe(config, FULL_TRAINING, {"train": {"precision": "bf16"}}), batch_of(packed=True))


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_mixed"])
def test_lora_on_the_head(family: str, precision: str) -> None:
    compare(make_recipe(config_of(family), LORA_ON_HEAD, {"train": {"precision": precision}}), batch_of(packed=True))


@pytest.mark.parametrize("activations", ["checkpoint", "loract"])
def test_beside_the_activations_axis(activations: str) -> None:
    """Neither recomputes nor compresses what the loss keeps."""
    options = {"kind": "loract", "rank": 32} if activations == "loract" else activations  # of full rank: exact
    compare(make_recipe(config_of("llama"), FULL_TRAINING, {"activations": options}), batch_of(packed=True))


def test_over_a_base_in_4_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = save_model(tmp_path / "model", hidden_size=64, head_dim=16)
    nf4 = {"base": {"quantize": "nf4"}, "train": {"precision": "bf16"}}
    compare(make_recipe(nf4, model=model), batch_of(packed=True))


def test_rows_without_a_target_cost_no_logits() -> None:
    batch = batch_of(packed=True)
    nothing = Batch(batch.input_ids, torch.full_like(batch.labels, -100), batch.position_ids, None)
    for fragment in (FULL_TRAINING, LORA_ON_HEAD):
        model = build_model(make_recipe(config_of("llama"), fragment, {"loss": "chunked"}))
        loss, gradients = loss_and_gradients(make_recipe(config_of("llama"), fragment), model, nothing)
        assert float(loss) == 0
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert gradients.keys() == trained, "other workers wait for each of them"
        assert not any(gradient.any() for gradient in gradients.values())


def by_layout(raw: dict[str, Any]) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    recipe = Recipe.model_validate(raw)
    dist_env = DistEnv.current(recipe)
    found = {}
    for kind in ("full", "chunked"):
        one = Recipe.model_validate({**raw, "loss": kind})
        model = build_model(one, dist_env)
        batch = batch_of(packed=True)
        # The second rank has a row without loss, as ranks have that fill up a batch.
        labels = batch.labels if dist_env.rank == 0 else torch.full_like(batch.labels, -100)
        mine = Batch(batch.input_ids, labels, batch.position_ids, None)
        found[kind] = loss_and_gradients(one, model if dist_env.sharded else replicate(model, dist_env), mine)
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("fragment", [FULL_TRAINING, LORA_ON_HEAD])
@pytest.mark.parametrize("family", ["llama_tied", "gemma2"])
def test_on_two_workers(family: str, fragment: dict[str, Any], strategy: str, tmp_path: Path) -> None:
    recipe = make_recipe(config_of(family), fragment, {"scaling": {"num_workers": 2, "strategy": strategy}})
    ranks = in_processes(by_layout, 2, tmp_path, recipe.to_dict())
    for rank in ranks:
        assert_alike(rank["full"], rank["chunked"], "fp32")
    for name, gradient in ranks[0]["chunked"][1].items():
        assert torch.equal(gradient, ranks[1]["chunked"][1][name])


@pytest.fixture
def _nothing_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "verdict_of", lambda model: Verdict(False, False, "its logits look ahead"))


@pytest.mark.usefixtures("_nothing_is_right")
def test_where_it_is_not_right_auto_says_so_and_chunked_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = build_model(make_recipe(config_of("llama")))
    assert not loss_of(model).chunked
    (line,) = [r.getMessage() for r in caplog.records if "loss:" in r.getMessage()]
    assert "LlamaForCausalLM" in line and "its logits look ahead" in line
    assert line == loss_of(model).note
    with pytest.raises(RecipeError, match=r"loss: chunked is not right for LlamaForCausalLM: .*; use loss: full"):
        build_model(make_recipe(config_of("llama"), {"loss": "chunked"}))
    assert not loss_of(build_model(make_recipe(config_of("llama"), {"loss": "full"}))).chunked


def test_a_prepared_model_is_a_model_as_before() -> None:
    """Calls without targets give logits; a copy computes with its own weights."""
    import copy
    import inspect

    model: Any = build_model(make_recipe(config_of("llama"), FULL_TRAINING))
    batch = batch_of(packed=True)
    logits = model(**batch.model_inputs()).logits
    assert logits.shape == (4, 24, VOCABULARY)
    assert "logits_to_keep" in inspect.signature(model.forward).parameters
    copied = copy.deepcopy(model)
    before = forward_loss_sum(model, batch, mixed=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(forward_loss_sum(copied, batch, mixed=False), before)
    assert not torch.equal(forward_loss_sum(model, batch, mixed=False), before)


def test_the_full_loss_predicts_each_token_from_the_one_before() -> None:
    class Fixed(nn.Module):
        """Answers with given logits."""

        config = None

        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__()
            self.logits = logits

        def get_output_embeddings(self) -> None:
            return None

        def forward(self, **inputs: Any) -> Any:
            return self

    labels = torch.tensor([[-100, 2, 3, -100]])
    batch = Batch(labels, labels, None, None)

    def loss(logits: torch.Tensor) -> float:
        model = Fixed(logits)
        prepare(model, FullLossKind(), FullLoss())
        return float(forward_loss_sum(model, batch, mixed=False))

    logits = torch.zeros(1, 4, 5)
    logits[0, 0, 2] = logits[0, 1, 3] = 100.0
    assert loss(logits) == pytest.approx(0, abs=1e-6)
    logits[0, 2:] = torch.randn(2, 5)  # positions whose successor is no target do not count
    assert loss(logits) == pytest.approx(0, abs=1e-6)
    assert loss(torch.zeros(1, 4, 5)) == pytest.approx(2 * float(torch.log(torch.tensor(5.0))))
