"""What tests of training share: tiny models of many families, data, recipes, whole runs, and groups of processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raymem.recipe.load import parse_recipe
from raymem.recipe.schema import Recipe
from raymem.storage.storage import Storage
from raymem.training.data.batches import Batch
from raymem.training.data.shards import Prepared, prepare
from raymem.training.dist_env import Layout
from raymem.training.loop import Outcome, run
from raymem.training.reporter import LocalReporter, Row
from tests.helpers import families
from tests.helpers.families import VOCABULARY

FAMILIES: dict[str, dict[str, Any]] = {
    name: families.options_of(name)
    for name in ("llama", "llama_tied", "qwen3", "gemma3_text", "gpt_neox", "gpt2", "opt", "phi3", "qwen3_moe")
}
"""A handful of tests.helpers.families, with which whole runs are tried."""


def save_model(directory: Path, family: str = "llama", *, max_shard_size: str = "5GB", **changes: Any) -> Path:
    """A model directory with random weights and a tokenizer, as ``save_pretrained`` writes it."""
    families.save(directory, family, max_shard_size=max_shard_size, **changes)
    save_tokenizer(directory)
    return directory


def let_anyone_in(directory: Path) -> None:
    """Open the way to a folder of pytest's for other users; pytest makes each of its folders 0700, however deep."""
    for folder in (directory, *directory.parents):
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(0o755)


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of the words ``w0`` .. in the vocabulary of the models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "<pad>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>").save_pretrained(directory)


def write_examples(path: Path, count: int, seed: int) -> None:
    """Texts of 4 to 40 words in which a word says a good deal about the next."""
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        at, words = draw.randrange(100), []
        for _ in range(draw.randint(4, 40)):
            at = (3 * at + draw.randrange(3)) % 100
            words.append(f"w{at}")
        texts.append(" ".join(words))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts laid over each other; a later value wins, and another ``kind`` drops the options of the former."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            below = result.get(key)
            both = isinstance(below, dict) and isinstance(value, dict)
            if both and value.get("kind", below.get("kind")) == below.get("kind"):
                value = merged(below, value)
            result[key] = value
    return result


PLAIN: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "set by the test"},
    "data": {"train": "train.jsonl", "sequence_length": 32},
    "adapter": {"kind": "lora", "rank": 4, "alpha": 8.0},
    "optimizer": {"lr": 1e-2},
    "train": {"steps": 4, "global_batch": 4, "micro_batch": 2},
    "scaling": {"num_workers": 0},
    "storage": {"path": "/nowhere"},
    "tracking": "none",
}


def make_recipe(*fragments: dict[str, Any], model: Path | str = "tiny-model") -> Recipe:
    """The plain recipe with fragments laid over it."""
    return parse_recipe(merged(PLAIN, {"model": {"name": str(model)}}, *fragments))


def run_fragment(examples: Path, storage: Path, *, evaluated: bool = False) -> dict[str, Any]:
    """The part of a recipe that says where data and results lie."""
    data = {"train": str(examples / "train.jsonl"), "eval": str(examples / "eval.jsonl") if evaluated else None}
    return {"data": data, "storage": {"path": str(storage)}}


def prepare_split(recipe: Recipe, split: Any) -> Prepared:
    cache = Path(recipe.data.train[0].path).parent / "cache"
    return prepare(recipe.data, split, recipe.model.tokenizer or recipe.model.name or "", cache)


def run_storage(recipe: Recipe) -> Storage:
    """Storage of the run's directory, which exists afterwards."""
    storage = Storage.open(recipe.storage.path).child(recipe.name)
    Path(storage.root).mkdir(parents=True, exist_ok=True)
    return storage


class Stopped(Exception):
    """Stands for whatever ends a process between two checkpoints."""


def train(recipe: Recipe, layout: Layout | None = None, *, stop_after: int = 0) -> tuple[Outcome | None, list[Row]]:
    """Run a recipe in this process (one of several, if there is a process group).

    Args:
        stop_after: end abruptly once the row of this step was reported, before its checkpoint.

    Returns:
        The outcome, None of a stopped run, and every row that was reported.
    """
    rows: list[Row] = []

    def stop(new: Sequence[Row]) -> None:
        if new[-1]["step"] == stop_after:
            raise Stopped

    train_data = prepare_split(recipe, "train")
    eval_data = prepare_split(recipe, "eval") if recipe.data.eval else None
    layout, reporter = layout or Layout.current(recipe), LocalReporter(rows.extend, stop)
    try:
        return run(recipe, layout, run_storage(recipe), train_data, eval_data, reporter), rows
    except Stopped:
        return None, rows


def column(rows: Sequence[Row], name: str = "loss") -> list[float]:
    """One metric of every step, in the order of steps; of a step that was reported twice the later row counts."""
    by_step = {row["step"]: row[name] for row in rows if name in row}
    return [by_step[step] for step in sorted(by_step)]


def random_batch(rows: int, length: int, seed: int = 0, *, packed: bool = True) -> Batch:
    """Random tokens; packed ones are two segments per row, the first token of each without a loss."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, length), generator=source)
    positions = torch.arange(length).expand(rows, -1).clone()
    if packed:
        positions[:, length // 2 :] -= length // 2
    labels = ids.masked_fill(positions == 0, -100)
    return Batch(ids, labels, positions if packed else None, None)


def num_targets(*batches: Batch) -> int:
    return sum(int((batch.labels != -100).sum()) for batch in batches)


def snapshot(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal names and bitwise equal values; NaNs equal themselves."""
    assert set(found) == set(expected)
    different = [name for name in found if not torch.equal(_bits(found[name]), _bits(expected[name]))]
    assert not different, f"{len(different)} of {len(found)} tensors differ: {different[:3]}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def realigned(model: Any) -> Any:
    """The model, its weights moved to memory that torch allocates, so that equal ones compute equal bits.

    One read from a file lies where the file has it, and kernels may round by how memory is aligned.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter that is not trained, and every buffer."""
    parameters = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return {**parameters, **dict(model.named_buffers())}


def start_server() -> Any:
    """Let the server of :func:`in_processes` begin its imports; they go on in the background."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preloaded"])
    with pytest.MonkeyPatch.context() as patch:  # the server is not told sys.path and skips what it cannot find
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def in_processes(work: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> list[Any]:
    """Call ``work(*arguments)`` on every rank of a fresh gloo group; returns what each rank returned.

    Processes are forked from a server that has imported torch and transformers once, so a group costs about a second.
    ``work`` lives at the top of a module. With ``world_size`` 0 there is one process and no group.
    """
    context = start_server()
    folder.mkdir(parents=True, exist_ok=True)
    pipes = [context.Pipe(duplex=False) for _ in range(max(1, world_size))]
    started = [
        context.Process(target=_work, args=(sender, work, rank, world_size, str(folder / "meet"), arguments))
        for rank, (_, sender) in enumerate(pipes)
    ]
    try:
        for process in started:
            process.start()
        for _, sender in pipes:
            sender.close()
        outcomes = [pickle.loads(receiver.recv_bytes()) for receiver, _ in pipes]
    except EOFError:
        raise AssertionError(f"a process died: exit codes {[process.exitcode for process in started]}") from None
    finally:
        for process in started:
            process.join(timeout=10)
            process.kill()
        (folder / "meet").unlink(missing_ok=True)
    failures = [f"rank {rank}:\n{trace}" for rank, (_, trace) in enumerate(outcomes) if trace]
    assert not failures, "\n".join(failures)
    return [result for result, _ in outcomes]


def _work(
    sender: Any, work: Callable[..., Any], rank: int, world_size: int, meet: str, arguments: Sequence[Any]
) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if world_size:
            dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world_size)
        # Plain pickle copies tensors; the pickler of multiprocessing would share memory with a process that ends.
        sender.send_bytes(pickle.dumps((work(*arguments), None)))
    except BaseException:
        sender.send_bytes(pickle.dumps((None, traceback.format_exc())))
    finally:
        sender.close()
        os._exit(0)  # what is left of a failed group would wait for its peers


class PlansHere:
    """Stands for the planner's process, which takes longer to start than a tiny plan; it has a test of its own."""

    def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        from raymem.planner.subprocess_main import answer

        with warnings.catch_warnings(action="ignore"):
            return answer(job)

    def close(self) -> int:
        return 0
