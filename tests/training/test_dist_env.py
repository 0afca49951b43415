from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.errors import DataError, RecipeError
from raymem.training.dist_env import DistEnv
from tests.helpers.support import in_processes, make_recipe


def test_a_gpu_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(RecipeError, match=r"scaling\.use_gpu: true, but PyTorch sees no CUDA device"):
        DistEnv.current(make_recipe({"scaling": {"use_gpu": True}}))


def test_a_single_process_needs_no_group() -> None:
    dist_env = DistEnv.current(make_recipe())
    assert (dist_env.rank, dist_env.world_size, dist_env.is_main, dist_env.sharded) == (0, 1, True, False)
    dist_env.barrier()
    assert dist_env.max_over_ranks(3) == 3
    assert dist_env.on_main(lambda: "done") == "done"


def group_work() -> list[Any]:
    dist_env = DistEnv.current(make_recipe({"scaling": {"num_workers": 2}}))
    calls: list[int] = []

    def count() -> str:
        calls.append(dist_env.rank)
        return "from main"

    def fail() -> None:
        raise DataError("row 3 is empty")

    found: list[Any] = [dist_env.rank, dist_env.max_over_ranks(10 + dist_env.rank), dist_env.on_main(count), calls]
    try:
        dist_env.on_main(fail)
    except DataError as error:
        found.append(str(error))
    return found


def test_main_works_once_and_all_learn_what_came_of_it(tmp_path: Path) -> None:
    assert in_processes(group_work, 2, tmp_path) == [
        [0, 11, "from main", [0], "row 3 is empty"],
        [1, 11, "from main", [], "row 3 is empty"],
    ]
