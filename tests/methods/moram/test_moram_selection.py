"""Selection against gradients that autograd holds all at once, its errors, and its footprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.errors import AdapterError
from raymem.methods.moram import check_base, select_indices
from raymem.methods.moram.indices import top_columns
from raymem.methods.moram.layer import layers
from tests.helpers.moram_cases import randomised, small_gpt2, small_llama, token_batches, trainable, with_moram
from tests.helpers.support import in_processes


def held_gradients(model: Any, batches: list[Any], *, absolute: bool = False) -> dict[str, torch.Tensor]:
    """Weight name -> |sum of gradients|, or the sum of |gradient|, of a bare model, all in memory."""
    found: dict[str, torch.Tensor] = {}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                gradient = parameter.grad.abs() if absolute else parameter.grad
                found[name] = found.get(name, 0) + gradient
    return {name: value.abs() for name, value in found.items()}


def expected_indices(model: Any, batches: list[Any], k: int, **options: Any) -> dict[str, torch.Tensor]:
    """For every adapted layer, from :func:`held_gradients`."""
    scores = held_gradients(model, batches, **options)
    return {f"base_model.model.{name.removesuffix('.weight')}": top_columns(s, k) for name, s in scores.items()}


@pytest.mark.parametrize("criterion", ["gradient", "absolute_gradient"])
@pytest.mark.parametrize("group_bytes", [None, 1, 1 << 30])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_the_choice_from_all_gradients_at_once(criterion: Any, group_bytes: int, checkpointing: bool) -> None:
    batches = token_batches(3)
    model = with_moram(small_llama(), k=5)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    found = select_indices(model, batches, criterion=criterion, group_bytes=group_bytes)
    expected = expected_indices(small_llama(), batches, 5, absolute=criterion == "absolute_gradient")
    assert len(found) == 14
    for name, index in found.items():
        assert torch.equal(index, expected[name]), name
        assert torch.equal(model.get_submodule(name).moram_index["default"], index)


def test_conv1d_is_selected_by_output_neuron() -> None:
    batches = token_batches(2)
    found = select_indices(with_moram(small_gpt2(), k=5, target_modules=["c_attn", "c_proj"]), batches)
    scores = held_gradients(small_gpt2(), batches)
    for name, index in found.items():
        score_IO = scores[f"{name.removeprefix('base_model.model.')}.weight"]
        assert torch.equal(index, top_columns(score_IO.mT.contiguous(), 5))


def test_reentrant_checkpointing_selects_the_same() -> None:
    batches = token_batches(2)
    model = with_moram(small_llama(), k=5)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    expected = expected_indices(small_llama(), batches, 5)
    for name, index in select_indices(model, batches).items():
        assert torch.equal(index, expected[name]), name


def test_leaves_no_trace() -> None:
    model = with_moram(small_llama()).eval()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    stream = torch.get_rng_state()
    select_indices(model, token_batches(2))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), stream)
    assert not model.training
    assert all(layer.tap is None for _, layer in layers(model))


def test_dropout_is_the_same_in_every_group() -> None:
    model = with_moram(small_llama(attention_dropout=0.5), k=5).train()
    batches = token_batches(2)
    in_one = select_indices(model, batches, group_bytes=1 << 30)
    in_many = select_indices(model, batches, group_bytes=1)
    assert all(torch.equal(in_one[name], in_many[name]) for name in in_one)


def test_a_later_selection_looks_at_the_trained_model() -> None:
    model, batches = with_moram(small_llama(), k=5), token_batches(2)
    first = {name: index.clone() for name, index in select_indices(model, batches).items()}
    randomised(model)
    merged = small_llama()
    state = {name: layer.get_delta_weight("default") for name, layer in layers(model)}
    with torch.no_grad():
        for name, delta in state.items():
            merged.get_submodule(name.removeprefix("base_model.model.")).weight += delta
    expected = expected_indices(merged, batches, 5)
    again = select_indices(model, batches)
    same = sum(int((again[name] == expected[name]).sum()) for name in again)
    assert same / sum(index.numel() for index in again.values()) > 0.99  # rounding may swap near ties
    assert any(not torch.equal(again[name], first[name]) for name in again)


def test_by_magnitude_and_at_random() -> None:
    model = with_moram(small_llama(), k=5)
    for name, index in select_indices(model, criterion="magnitude").items():
        assert torch.equal(index, top_columns(model.get_submodule(name).weight.detach().abs(), 5))
    drawn = {name: index.clone() for name, index in select_indices(model, criterion="random").items()}
    again = select_indices(with_moram(small_llama(), k=5), criterion="random")
    other = select_indices(with_moram(small_llama(), k=5), criterion="random", seed=1)
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert not any(torch.equal(drawn[name], other[name]) for name in drawn)
    assert not torch.equal(drawn["base_model.model.model.layers.0.self_attn.q_proj"],
                           drawn["base_model.model.model.layers.1.self_attn.q_proj"])  # fmt: skip


def test_a_loss_function_replaces_the_models_own() -> None:
    inputs = [{"input_ids": batch["input_ids"]} for batch in token_batches(2)]
    model = with_moram(small_llama(), k=5)
    found = select_indices(model, inputs, loss=lambda m, batch: m(**batch).logits.square().mean())
    assert len(found) == 14


def break_logits(model: Any, value: float) -> None:
    """A weight that makes every gradient NaN, or stops it."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(value)


@pytest.mark.parametrize(
    ("batches", "spoil", "options", "message"),
    [
        ([], None, {}, "batches: there are none"),
        ([{"input_ids": torch.zeros(1, 4, dtype=torch.long)}], None, {}, "returned no loss for a batch with input_ids"),
        (token_batches(1), float("nan"), {}, r"layers\.1\.mlp\.down_proj: its gradient .* is not finite"),
        (token_batches(1), 0.0, {}, r"layers\.1\.mlp\.down_proj: its gradient .* is zero"),
        (token_batches(1), None, {"adapter_name": "other"}, "no MoRAM adapter 'other'"),
        (token_batches(1), None, {"criterion": "best"}, "criterion: 'best' is not one of gradient"),
    ],
    ids=["no batches", "no labels", "nan", "zero", "no adapter", "criterion"],
)
def test_what_cannot_rank_is_refused_and_changes_nothing(batches: Any, spoil: Any, options: Any, message: str) -> None:
    model = with_moram(small_llama())
    if spoil is not None:
        break_logits(model, spoil)
    with pytest.raises(AdapterError, match=message):
        select_indices(model, batches, **options)
    assert all((layer.moram_index["default"] == -1).all() for _, layer in layers(model))
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if ".moram_A." in name)


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(AdapterError, match="attach one first"):
        select_indices(small_llama(), token_batches(1))


def test_a_base_that_changed_since_is_noticed() -> None:
    model = with_moram(small_llama())
    select_indices(model, token_batches(1))
    check_base(model)
    with torch.no_grad():
        weight = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").weight
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj: the base weight is not the one"):
        check_base(model)
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(-9.0))
    check_base(model)
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]  # the same bits in other places
    with pytest.raises(AdapterError, match="the base weight is not the one"):
        check_base(model)


def select_on_a_rank(batches: list[Any], wrap: bool) -> dict[str, torch.Tensor]:
    import torch.distributed as dist

    torch.manual_seed(dist.get_rank())
    model = with_moram(small_llama(), k=5)
    if wrap:
        model = torch.nn.parallel.DistributedDataParallel(model)
    mine = batches[dist.get_rank() :: dist.get_world_size()]
    return {name: index.clone() for name, index in select_indices(model, mine).items()}


@pytest.mark.parametrize("wrap", [False, True], ids=["bare", "ddp"])
def test_ranks_agree_with_each_other_and_with_one_process(tmp_path: Path, wrap: bool) -> None:
    batches = token_batches(4)
    first, second = in_processes(select_on_a_rank, 2, tmp_path, batches, wrap)
    alone = select_indices(with_moram(small_llama(), k=5), batches)
    same = sum(int((first[name] == alone[name]).sum()) for name in alone)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert same / sum(index.numel() for index in alone.values()) > 0.99  # another order of summation


def test_more_batches_come_closer_to_the_choice_of_all() -> None:
    """On random tokens every batch is noise; the share of the 8-batch choice that N batches find grows with N."""
    batches = token_batches(8)
    model = with_moram(small_llama(), k=5)

    def chosen(count: int) -> torch.Tensor:
        found = select_indices(model, batches[:count])
        return torch.cat([torch.zeros(len(i), 64).scatter_(1, i.long(), 1.0) for i in found.values()])

    everything = chosen(8)
    recall = [float((chosen(count) * everything).sum() / everything.sum()) for count in (1, 4, 8)]
    assert recall[0] < recall[1] < recall[2] == 1.0


def test_gradients_concentrate_where_selection_looks() -> None:
    """The selected connections hold several times their share of the gradient's energy."""
    batches = token_batches(2)
    model = with_moram(small_llama(), k=4)
    chosen = select_indices(model, batches)
    scores = held_gradients(small_llama(), batches)
    kept = whole = 0.0
    for name, index in chosen.items():
        energy = scores[f"{name.removeprefix('base_model.model.')}.weight"].square()
        kept, whole = kept + float(energy.gather(1, index.long()).sum()), whole + float(energy.sum())
    density = sum(i.numel() for i in chosen.values()) / sum(
        layer.out_features * layer.in_features for _, layer in layers(model)
    )
    assert kept / whole > 2 * density
    assert len(trainable(model)) == 28
