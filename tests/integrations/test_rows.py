"""Looking ahead in a trainer's batches: the ones of each step, the largest one, and nothing is disturbed."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset

from raymem.integrations.rows import Upcoming

Batch = dict[str, torch.Tensor]
CPU = torch.device("cpu")
ROWS: list[dict[str, Any]] = [{"input_ids": list(range(3, 4 + index % 7)), "index": index} for index in range(13)]


def collate(rows: list[Any]) -> Batch:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = [list(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {"input_ids": torch.tensor(ids), "index": torch.tensor([row["index"] for row in rows])}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(ROWS)


def loader(kind: str) -> Any:
    if kind == "stream":
        return DataLoader(Stream(), batch_size=2, collate_fn=collate)
    data: Any = datasets.Dataset.from_list(ROWS) if kind == "arrow" else ROWS
    made: Any = DataLoader(data, batch_size=2, shuffle=kind != "ordered", collate_fn=collate)
    return made if kind == "ordered" else prepare_data_loader(made, use_seedable_sampler=True)


@pytest.mark.parametrize("kind", ["ordered", "accelerate", "arrow", "stream"])
def test_the_batches_of_a_step_are_those_that_come(kind: str) -> None:
    data = loader(kind)
    upcoming = Upcoming(data, 2, CPU)
    before = torch.random.get_rng_state()
    looked = [upcoming.of_step(step) for step in range(4 if kind == "stream" else 8)]
    assert torch.equal(torch.random.get_rng_state(), before)
    came: list[Batch] = []
    for epoch in range(1 if kind == "stream" else 2):
        if hasattr(data, "set_epoch"):
            data.set_epoch(epoch)
        came += list(data)
    seen = [batch["index"].tolist() for step in looked for batch in step]
    assert seen == [batch["index"].tolist() for batch in came]
    assert [len(step) for step in looked][:4] == [2, 2, 2, 1], "the last step of an epoch has what is left"


@pytest.mark.parametrize("kind", ["ordered", "accelerate", "arrow", "stream"])
def test_the_largest_batch_is_of_the_longest_rows(kind: str) -> None:
    largest = Upcoming(loader(kind), 2, CPU).largest()
    assert list(largest["input_ids"].shape) == [2, 7]
    if kind != "stream":
        assert sorted(len(ROWS[index]["input_ids"]) for index in largest["index"].tolist()) == [6, 7]
