from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raymem.recipe.data import DataSection
from raymem.training.data.batches import Batch, eval_batches, global_targets, rank_batches
from raymem.training.data.encode import Encoder
from raymem.training.data.formats import PromptCompletion
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.shards import prepare
from tests.helpers.talks import encoded

S = 80


@pytest.fixture
def examples(texts: Callable[..., list[str]]) -> list[PromptCompletion]:
    return [PromptCompletion(text, " " + text[::-1][:12]) for text in texts(24, 5)]


@pytest.fixture
def rows(write_jsonl: Any, examples: Any, tokenizer_dir: Path, tmp_path: Path) -> Callable[[str], PackedRows]:
    path = write_jsonl("x.jsonl", [{"prompt": e.prompt, "completion": e.completion} for e in examples])
    source = {"path": str(path), "template": "none"}

    def make(packing: Any) -> PackedRows:
        section = DataSection.model_validate({"train": source, "sequence_length": S, "packing": packing})
        return PackedRows(prepare(section, "train", str(tokenizer_dir), tmp_path).directories)

    return make


@pytest.fixture(scope="module")
def llama(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def loss_sum(model: Any, batch: Batch) -> float:
    """Summed loss as transformers computes it (its own shift)."""
    with torch.no_grad():
        return float(model(**batch.model_inputs(), labels=batch.labels, num_items_in_batch=1).loss)


def losses_one_by_one(model: Any, tokenizer: Any, examples: list[PromptCompletion]) -> tuple[float, int]:
    """The same, independently: every example alone in its own forward pass."""
    encoder = Encoder(tokenizer, "tiny")
    total, targets = 0.0, 0
    for example in examples:
        made = encoded(encoder, example)
        ids, mask = torch.from_numpy(made.input_ids[:S]).long(), torch.from_numpy(made.targets[:S])
        if not mask[1:].any():
            continue
        with torch.no_grad():
            log_probabilities = model(ids[None]).logits[0].log_softmax(-1)
        total -= float(log_probabilities[:-1].gather(1, ids[1:, None])[:, 0][mask[1:]].sum())
        targets += int(mask[1:].sum())
    return total, targets


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_packed_examples_do_not_see_each_other(
    rows: Any, llama: Any, tokenizer: Any, examples: list[PromptCompletion], packing: str
) -> None:
    packed = rows(packing)
    want, num_targets = losses_one_by_one(llama, tokenizer, examples)
    ids = np.arange(len(packed))
    assert global_targets(packed, ids) == num_targets
    assert packing == "none" or len(packed) < len(examples) * 0.7  # several per row, or nothing is shown
    for micro_batch in (1, 4):
        batches = rank_batches(packed, ids, 0, 1, micro_batch)
        assert sum(loss_sum(llama, batch) for batch in batches) == pytest.approx(want, rel=1e-5)


def test_without_position_ids_they_would(rows: Any, llama: Any, tokenizer: Any, examples: Any) -> None:
    """The test above can fail."""
    want, _ = losses_one_by_one(llama, tokenizer, examples)
    batches = rank_batches(rows("bfd"), np.arange(len(rows("bfd"))), 0, 1, 4)
    mixed = sum(loss_sum(llama, replace(batch, position_ids=None)) for batch in batches)
    assert abs(mixed - want) > 1e-3 * want
    inputs = batches[-1].model_inputs() | {"use_cache": True}
    with torch.no_grad():
        cached = float(llama(**inputs, labels=batches[-1].labels, num_items_in_batch=1).loss)
    alone = loss_sum(llama, batches[-1])
    assert abs(cached - alone) > 1e-3 * alone  # why model_inputs turns the cache off


def test_a_flattened_batch_has_the_same_loss(rows: Any, llama: Any) -> None:
    for batch in rank_batches(rows("bfd"), np.arange(len(rows("bfd"))), 0, 1, 4):
        flat = batch.flattened()
        assert flat.input_ids.shape == (1, batch.input_ids.numel())
        assert loss_sum(llama, flat) == pytest.approx(loss_sum(llama, batch), rel=1e-5)


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
def test_fields_and_labels(rows: Any, packing: str) -> None:
    packed = rows(packing)
    ids = np.array([1, 0, 1])
    (batch,) = rank_batches(packed, ids, 0, 1, 4)
    for index, row_id in enumerate(ids):
        row = packed.row(int(row_id))
        assert batch.input_ids[index].tolist() == row.input_ids.tolist()
        want = [token if target else -100 for token, target in zip(row.input_ids, row.targets, strict=True)]
        assert batch.labels[index].tolist() == want
        if batch.position_ids is not None:
            restarts = np.flatnonzero(row.starts).tolist()
            want = [t - max(start for start in restarts if start <= t) for t in range(S)]
            assert batch.position_ids[index].tolist() == want
        if batch.attention_mask is not None:
            assert batch.attention_mask[index].tolist() == [1] * row.length + [0] * (S - row.length)
    assert (batch.position_ids is not None) == (packing == "bfd")
    assert (batch.attention_mask is not None) == (packing == "none")
    assert (batch.input_ids.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert int((batch.labels[:, 1:] != -100).sum()) == global_targets(packed, ids)
    assert int((batch.labels[:, 0] != -100).sum()) == 0


def test_model_inputs_and_device(rows: Any) -> None:
    for packing, extra in (("bfd", {"position_ids"}), ("wrapped", set()), ("none", {"attention_mask"})):
        (batch,) = rank_batches(rows(packing), np.arange(1), 0, 1, 1)
        assert set(batch.model_inputs()) == {"input_ids", "use_cache"} | extra
        assert batch.model_inputs()["use_cache"] is False
        moved = batch.to("meta")
        tensors = [moved.labels, *(v for v in moved.model_inputs().values() if isinstance(v, torch.Tensor))]
        assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
@pytest.mark.parametrize(("world", "micro_batch"), [(1, 4), (2, 2), (3, 2), (4, 16), (13, 1)])
def test_all_ranks_get_equal_shapes_and_together_all_rows(
    rows: Any, packing: str, world: int, micro_batch: int
) -> None:
    packed = rows(packing)
    ids = np.arange(11) % len(packed)
    ranks = [rank_batches(packed, ids, rank, world, micro_batch) for rank in range(world)]
    assert len({tuple(batch.input_ids.shape for batch in batches) for batches in ranks}) == 1
    assert ranks[0][0].input_ids.shape[0] <= micro_batch
    found = [
        tuple(labels.tolist()) for batches in ranks for b in batches for labels in b.labels if (labels != -100).any()
    ]
    want = [tuple(np.where((row := packed.row(int(i))).targets, row.input_ids, -100).tolist()) for i in ids]
    assert sorted(found) == sorted(want)


def test_a_rank_takes_every_world_th_row(rows: Any) -> None:
    packed = rows("none")
    ids = np.array([3, 1, 4, 0, 5])
    (batch,) = rank_batches(packed, ids, 1, 2, 4)
    assert batch.input_ids[:2].tolist() == [packed.row(1).input_ids.tolist(), packed.row(0).input_ids.tolist()]
    assert not (batch.labels[2] != -100).any()


def test_ragged_tails_are_spread_before_rows_are_filled_up(rows: Any) -> None:
    batches = rank_batches(rows("bfd"), np.arange(6) % 3, 0, 1, 4)
    assert [batch.input_ids.shape[0] for batch in batches] == [3, 3]


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_a_rank_without_rows_gets_a_batch_without_loss(rows: Any, llama: Any, packing: str) -> None:
    (batch,) = rank_batches(rows(packing), np.arange(2), 2, 3, 1)
    assert not (batch.labels != -100).any()
    assert batch.attention_mask is None or batch.attention_mask.all()  # nothing to attend to would be undefined
    with torch.no_grad():
        assert torch.isfinite(llama(**batch.model_inputs()).logits).all()


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 4), (2, 3), (5, 1)])
def test_evaluation_sees_every_row_once(rows: Any, world: int, micro_batch: int) -> None:
    packed = rows("none")
    ranks = [list(eval_batches(packed, rank, world, micro_batch)) for rank in range(world)]
    assert len({tuple(batch.input_ids.shape for batch in batches) for batches in ranks}) == 1
    found = sum(int((batch.labels != -100).sum()) for batches in ranks for batch in batches)
    assert found == packed.num_targets.sum()
    seen = [
        tuple(ids.tolist())
        for batches in ranks
        for batch in batches
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True)
        if (labels != -100).any()
    ]
    assert sorted(seen) == sorted(tuple(packed.row(i).input_ids.tolist()) for i in range(len(packed)))
