"""Two workers compute what one does, and either goes on from the other's checkpoint.

All runs happen in three launches of a process group, whose results the tests below look at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raymem.methods.plain.losses import FullLoss, FullLossKind
from raymem.planner.plan import make_plan
from raymem.planner.tracing.step_trace import trace_step
from raymem.planner.types import Target
from raymem.recipe.schema import Recipe
from raymem.storage.storage import Storage
from raymem.training.checkpoint import latest_manifest
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.dist_env import DistEnv
from raymem.training.evaluate import evaluate
from raymem.training.loop import METERED_STEPS
from raymem.training.loss import prepare as prepare_loss
from raymem.training.model.build import build_model
from tests.helpers.support import (
    column,
    in_processes,
    make_recipe,
    merged,
    prepare_split,
    run_fragment,
    run_storage,
    save_model,
    train,
)

pytestmark = pytest.mark.numerics

FULL = {"adapter": {"kind": "none"}}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": FULL,  # of a model whose head is tied to its embedding
    "mlorc": {**FULL, "optimizer": {"kind": "mlorc_adamw", "min_dim": 8, "lr": 1e-3}},
    "master": {"train": {"precision": "bf16", "master": "fp32"}},
    "rounding": {"train": {"precision": "bf16", "master": "stochastic_rounding"}},
}
EXACT = ("lora", "full", "mlorc")
RESHARDED = ("full", "rounding", "mlorc")
STOP = 3
"""Runs that are cut off here have the checkpoint of step 2."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def recipe_of(examples: Path, place: Path) -> Any:
    tied = save_model(place / "tied", "llama_tied")

    def make(run: str, kind: str, world: int, strategy: str) -> Recipe:
        scaling = {"scaling": {"num_workers": world, "strategy": strategy}, "name": f"{run}-{kind}"}
        where = run_fragment(examples, place, evaluated=True)
        steps = {"train": {"steps": 4, "save_every": 2, "eval_every": 4}}
        return make_recipe(where, steps, scaling, KINDS[kind], model=tied)

    return make


Job = tuple[str, dict[str, Any], int]


def train_all(jobs: list[Job]) -> dict[str, dict[str, Any]]:
    """Per job the outcome and the rows of this rank."""
    found = {}
    for key, raw, stop_after in jobs:
        metered = METERED_STEPS if key.endswith("lora") or key == "two-ddp-full" else ()
        recipe = Recipe.model_validate(raw)
        outcome, rows = train(recipe, stop_after=stop_after, metered_steps=metered)
        found[key] = {"outcome": outcome and outcome.to_dict(), "rows": rows}
    return found


@pytest.fixture(scope="module")
def runs(recipe_of: Any, place: Path) -> dict[str, list[dict[str, Any]]]:
    """Name of a run -> what each of its ranks found."""

    def job(key: str, run: str, kind: str, world: int, strategy: str, stop_after: int = 0) -> Job:
        return f"{key}-{kind}", recipe_of(run, kind, world, strategy).to_dict(), stop_after

    alone = [job("one", "one", kind, 1, "fsdp2") for kind in KINDS]
    alone += [job("one-stopped", "grown", kind, 1, "fsdp2", STOP) for kind in RESHARDED]
    together = [job("two-fsdp2", "two-fsdp2", kind, 2, "fsdp2") for kind in KINDS]
    together += [job("two-ddp", "two-ddp", kind, 2, "ddp") for kind in EXACT]
    together += [job("grown", "grown", kind, 2, "fsdp2") for kind in RESHARDED]
    together += [job("two-stopped", "shrunk", kind, 2, "fsdp2", STOP) for kind in RESHARDED]
    together += [job("to-plain", "to-plain", "lora", 2, "ddp", STOP)]
    last = [job("shrunk", "shrunk", kind, 1, "fsdp2") for kind in RESHARDED]
    found: dict[str, list[dict[str, Any]]] = {}
    for world, jobs in ((1, alone), (2, together), (1, last)):
        ranks = in_processes(train_all, world, place, jobs)
        found |= {key: [rank[key] for rank in ranks] for key, _, _ in jobs}
    return found


@pytest.fixture(scope="module")
def plain(recipe_of: Any) -> dict[str, list[dict[str, float]]]:
    """Rows of the runs without any process group."""
    return {kind: train(recipe_of("plain", kind, 0, "ddp"))[1] for kind in KINDS}


def tolerance(kind: str) -> float:
    return 1e-5 if kind in EXACT else 2e-2


@pytest.mark.parametrize(
    ("strategy", "kind"), [*(("ddp", kind) for kind in EXACT), *(("fsdp2", kind) for kind in KINDS)]
)
def test_two_ranks_agree_bit_for_bit(runs: Any, strategy: str, kind: str) -> None:
    first, second = runs[f"two-{strategy}-{kind}"]
    for name in ("loss", "grad_norm", "eval_loss", "peak_bytes"):
        assert column(first["rows"], name) == column(second["rows"], name)
    assert first["outcome"] == second["outcome"]


@pytest.mark.parametrize(
    ("key", "kind"),
    [*(("two-ddp", kind) for kind in EXACT), *((key, kind) for key in ("one", "two-fsdp2") for kind in KINDS)],
)
def test_any_number_of_workers_computes_the_same(runs: Any, plain: Any, key: str, kind: str) -> None:
    rows = runs[f"{key}-{kind}"][0]["rows"]
    for name in ("loss", "eval_loss"):
        assert column(rows, name) == pytest.approx(column(plain[kind], name), rel=tolerance(kind))
    assert column(rows, "lr") == column(plain[kind], "lr")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_measured_peak_is_the_predicted_one(runs: Any, recipe_of: Any, kind: str) -> None:
    """DDP's buckets count once, also in the second step, where it makes them anew."""
    measured = column(runs[f"two-ddp-{kind}"][0]["rows"], "peak_bytes")
    recipe = recipe_of("planned", kind, 2, "ddp")
    plan = make_plan(trace_step(recipe, Target.of(recipe)), Target.of(recipe), None)
    assert measured == pytest.approx([plan.step_peak_bytes] * 2, rel=0.01)


def test_one_worker_with_fsdp2_is_a_plain_run_bit_for_bit(runs: Any, plain: Any) -> None:
    for kind in EXACT:
        assert column(runs[f"one-{kind}"][0]["rows"]) == column(plain[kind])


def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    (path,) = Path(run_storage(recipe).root).glob("*/*model.safetensors")
    return load_file(path)


@pytest.mark.parametrize("kind", RESHARDED)
@pytest.mark.parametrize(("run", "straight"), [("grown", "two-fsdp2"), ("shrunk", "one")])
def test_a_checkpoint_goes_on_under_another_number_of_workers(
    runs: Any, recipe_of: Any, run: str, straight: str, kind: str
) -> None:
    (stopped, *_), (resumed, *_) = runs[f"{'one' if run == 'grown' else 'two'}-stopped-{kind}"], runs[f"{run}-{kind}"]
    assert stopped["outcome"] is None
    assert resumed["outcome"]["started_at"] == 2
    losses = column(stopped["rows"] + resumed["rows"])
    assert losses == pytest.approx(column(runs[f"{straight}-{kind}"][0]["rows"]), rel=tolerance(kind))
    if kind in EXACT:
        expected = weights(recipe_of(straight, kind, 1, "fsdp2"))
        for name, value in weights(recipe_of(run, kind, 1, "fsdp2")).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_what_ddp_saved_goes_on_in_a_single_process(runs: Any, recipe_of: Any, plain: Any) -> None:
    assert runs["to-plain-lora"][0]["outcome"] is None
    outcome, rows = train(recipe_of("to-plain", "lora", 0, "ddp"))
    assert outcome is not None and outcome.started_at == 2
    assert column(rows)[-2:] == pytest.approx(column(plain["lora"])[-2:], rel=1e-5)


def test_ranks_share_the_work_of_writing(runs: Any, recipe_of: Any) -> None:
    storage = run_storage(recipe_of("two-fsdp2", "full", 2, "fsdp2"))
    manifest = latest_manifest(storage)
    assert manifest is not None
    files = sorted(Path(storage.join("checkpoints", f"step_{manifest.step:08d}")).glob("*.safetensors"))
    assert len(files) == 2
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) < 0.6 * sum(sizes)


def test_a_sharded_result_is_a_standard_model(runs: Any, recipe_of: Any) -> None:
    from transformers import AutoModelForCausalLM

    recipe = recipe_of("two-fsdp2", "full", 2, "fsdp2")
    outcome = runs["two-fsdp2-full"][0]["outcome"]
    model = AutoModelForCausalLM.from_pretrained(outcome["artifact"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rows = PackedRows(prepare_split(recipe, "eval").directories)
    prepare_loss(model, FullLossKind(), FullLoss())
    found = evaluate(model, rows, DistEnv(), micro_batch=3, mixed=False)
    assert found.loss == pytest.approx(outcome["eval_loss"], rel=1e-5)


def gathered_equal(raw: dict[str, Any]) -> bool:
    """Whether the shards of all ranks are together the model that one process loads."""
    recipe = Recipe.model_validate(raw)
    sharded = build_model(recipe, DistEnv.current(recipe))
    whole = dict(build_model(recipe, DistEnv()).named_parameters())
    return all(torch.equal(p.full_tensor(), whole[name]) for name, p in sharded.named_parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("vocabulary", [128, 127], ids=["even", "uneven"])
def test_shards_are_the_rows_of_the_model(place: Path, examples: Path, tmp_path: Path, vocabulary: int) -> None:
    directory = save_model(tmp_path / "model", vocab_size=vocabulary)
    raw = make_recipe({"scaling": {"num_workers": 2, "strategy": "fsdp2"}}, model=directory).to_dict()
    assert in_processes(gathered_equal, 2, tmp_path, merged(raw)) == [True, True]


def export_from_a_hub_id(recipe: Recipe, snapshot: str, folder: str) -> str:
    """Build and export with a hub id whose download is replaced by a directory."""
    import huggingface_hub

    from raymem.training.artifacts.export import export_final
    from raymem.training.model.build import build_model

    huggingface_hub.snapshot_download = lambda *_, **__: snapshot  # type: ignore[assignment]
    dist_env = DistEnv.current(recipe)
    Path(folder).mkdir(exist_ok=True)
    return export_final(build_model(recipe, dist_env), recipe, dist_env, Storage.open(folder), {"step": 0})


def test_a_model_from_the_hub_is_exported_by_two_workers(llama: Path, tmp_path: Path) -> None:
    """Rank 0 works alone there; a collective on the way would wait for ranks that wait for it."""
    recipe = make_recipe({"scaling": {"num_workers": 2}}, model="someone/tiny-llama")
    results = in_processes(export_from_a_hub_id, 2, tmp_path / "meet", recipe, str(llama), str(tmp_path / "run"))
    assert results == [str(tmp_path / "run" / "adapter")] * 2
