"""Pruning from shard to shard, and what the pruned models can do."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from raymem.methods.loram import PruneOptions, load_pruned, prune_model
from raymem.methods.loram.coupling import couple
from raymem.methods.loram.manifest import read_manifest
from raymem.methods.loram.nonuniform import pruned_layers
from raymem.methods.loram.pruning import job as job_module
from raymem.methods.loram.pruning.job import commit, open_job
from raymem.methods.loram.pruning.steps import run_step, steps
from raymem.methods.loram.source import open_source
from raymem.methods.loram.validate import zeroed
from tests.helpers.loram_families import FAMILIES, config_of, logits, random_model, run_turned, save, token_ids
from tests.helpers.support import realigned

RATIOS = (0.0, 0.5, 0.7, 0.25)
RANDOM = PruneOptions(layer_ratios=RATIOS)
IDS = token_ids(2, 16, seed=7)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in several shards; read only."""
    return save(tmp_path_factory.mktemp("loram") / "full", shard="30KB")


@pytest.fixture(scope="module")
def pruned(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, another ratio for every layer; read only."""
    (full / "tokenizer.json").write_text("{}")
    out = tmp_path_factory.mktemp("loram") / "pruned"
    prune_model(full, out, RANDOM, name="org/full", revision="abc")
    return out


def contents(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_the_full_one_with_zeros(family: str, tmp_path: Path) -> None:
    manifest = prune_model(save(tmp_path / "full", family, shard="40KB"), tmp_path / "pruned", RANDOM)
    model, expected = load_pruned(tmp_path / "pruned").eval(), random_model(family)
    coupling = couple(config_of(family))
    assert sorted(manifest.kept) == [1, 2, 3]
    original = logits(expected, IDS)
    expected.load_state_dict(zeroed(coupling, manifest.kept, expected.state_dict()))
    torch.testing.assert_close(logits(model, IDS), logits(expected, IDS), rtol=1e-4, atol=1e-4)
    assert (original - logits(expected, IDS)).abs().max() > 0.05


def test_shards_hold_the_rows_and_columns_of_the_kept_units(full: Path, pruned: Path) -> None:
    kept = read_manifest(pruned).kept[2]
    before = {key: value for file in full.glob("*.safetensors") for key, value in load_file(file).items()}
    after = load_file(pruned / "model-00003-of-00005.safetensors")
    heads = [8 * unit + i for unit in kept["attn"] for i in range(8)]  # 2 query heads of 4 each
    keys = [4 * unit + i for unit in kept["attn"] for i in range(4)]
    p = "model.layers.2."
    for name, expected in {
        "self_attn.q_proj": before[f"{p}self_attn.q_proj.weight"][heads],
        "self_attn.k_proj": before[f"{p}self_attn.k_proj.weight"][keys],
        "self_attn.v_proj": before[f"{p}self_attn.v_proj.weight"][keys],
        "self_attn.o_proj": before[f"{p}self_attn.o_proj.weight"][:, heads],
        "mlp.gate_proj": before[f"{p}mlp.gate_proj.weight"][kept["mlp"]],
        "mlp.up_proj": before[f"{p}mlp.up_proj.weight"][kept["mlp"]],
        "mlp.down_proj": before[f"{p}mlp.down_proj.weight"][:, kept["mlp"]],
        "input_layernorm": before[f"{p}input_layernorm.weight"],
    }.items():
        assert torch.equal(after[f"{p}{name}.weight"], expected), name


def test_the_directory_is_a_model_with_a_manifest(full: Path, pruned: Path) -> None:
    manifest = read_manifest(pruned)
    assert manifest.source["name"] == "org/full" and manifest.source["revision"] == "abc"
    assert manifest.source["identity"] == open_source(full).identity
    assert {len(groups["attn"]) for groups in manifest.kept.values()} == {2, 3}
    config = json.loads((pruned / "config.json").read_text())
    assert config["raymem_pruning"]["3"] == {"attn": 3, "mlp": 36}
    assert config["num_key_value_heads"] == 4 and config["intermediate_size"] == 48
    assert (pruned / "tokenizer.json").is_file()
    assert not list(pruned.parent.glob(".*"))


def test_ratio_zero_copies_the_model(full: Path, tmp_path: Path) -> None:
    manifest = prune_model(full, tmp_path / "same", PruneOptions(ratio=0.0))
    assert manifest.kept == {}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "same").eval()
    assert torch.equal(logits(realigned(model), IDS), logits(random_model("llama"), IDS))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_trains_saves_and_generates(family: str, tmp_path: Path) -> None:
    manifest = prune_model(save(tmp_path / "full", family), tmp_path / "pruned", RANDOM)
    model = load_pruned(tmp_path / "pruned")
    stock_attention = model.config._attn_implementation
    plain = logits(model.eval(), IDS)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.gradient_checkpointing_disable()
    model.eval()

    cached = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=1)
    assert torch.equal(
        cached, model.generate(IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=1, use_cache=False)
    )
    hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert len(hidden) == 5
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, IDS), plain, rtol=1e-3, atol=1e-4)
    heads = model.config.num_attention_heads * len(manifest.kept[2]["attn"]) // 4
    assert model(input_ids=IDS, output_attentions=True).attentions[2].shape[1] == heads

    model.save_pretrained(tmp_path / "again")
    model.set_attn_implementation(stock_attention)
    again = load_pruned(tmp_path / "again").eval()
    assert torch.equal(logits(realigned(again), IDS), logits(realigned(model), IDS))
    assert torch.equal(logits(copy.deepcopy(model), IDS), logits(model, IDS))


def test_static_caches_work(pruned: Path) -> None:
    model = load_pruned(pruned).eval()
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    static = model.generate(IDS[:1], cache_implementation="static", **options)
    assert torch.equal(static, model.generate(IDS[:1], **options))


def test_without_the_shim_a_pruned_model_fails_loudly(pruned: Path) -> None:
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(pruned)


def test_transformers_is_left_as_it_was(pruned: Path) -> None:
    """Also by an error while building, and for full models that are built inside."""
    before = random_model("llama")
    config = AutoConfig.from_pretrained(pruned)
    with pytest.raises(ValueError, match="Unrecognized"), pruned_layers(config):
        AutoModelForCausalLM.from_config(None)
    with pruned_layers(config):
        inside = AutoModelForCausalLM.from_config(config_of("llama"))
    assert inside.model.layers[1].mlp.up_proj.out_features == 48
    after = random_model("llama")
    assert type(after.model.layers[0]) is type(before.model.layers[0])
    for model in (before, load_pruned(pruned), after):
        assert len(model(input_ids=IDS, output_hidden_states=True).hidden_states) == 5


def test_a_job_is_plain_values(full: Path, tmp_path: Path) -> None:
    job = open_job(full, tmp_path / "pruned", RANDOM)
    assert pickle.loads(pickle.dumps(job)) == job


@pytest.mark.parametrize("criterion", ["random", "taylor", "wanda"])
def test_a_killed_job_goes_on_and_ends_the_same(
    full: Path, criterion: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PruneOptions(criterion=criterion, keep_first=1, keep_last=1)
    ids = None if criterion == "random" else IDS
    prune_model(full, tmp_path / "whole", options, ids)
    expected = contents(tmp_path / "whole")

    real, writes, attempt = Path.replace, 0, 0

    def dying(self: Path, target: Path) -> Path:
        """Ends the process, as it were, between the n-th write of the n-th attempt and its rename."""
        nonlocal writes
        writes += 1
        if writes == attempt:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    while not (tmp_path / "broken").exists():
        writes, attempt = 0, attempt + 1
        assert attempt < 20, "no attempt gets further"
        with contextlib.suppress(KeyboardInterrupt):
            prune_model(full, tmp_path / "broken", options, ids)
    assert attempt > 3
    assert contents(tmp_path / "broken") == expected
    prune_model(full, tmp_path / "broken", options, ids, progress=lambda step: pytest.fail("done already"))


def test_finished_steps_are_not_repeated(full: Path, tmp_path: Path) -> None:
    job = open_job(full, tmp_path / "pruned", RANDOM)
    done = steps(job)[:3]
    for step in done:
        run_step(job, step)
    stamps = {path: path.stat().st_mtime_ns for path in job.workspace.glob("*.safetensors")}
    seen: list[str] = []
    prune_model(full, tmp_path / "pruned", RANDOM, progress=lambda step: seen.append(step.name))
    assert seen == [step.name for step in steps(job)[3:]]
    assert all((tmp_path / "pruned" / path.name).stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_steps_may_run_in_any_order_that_after_allows(full: Path, tmp_path: Path) -> None:
    options = PruneOptions(criterion="taylor", keep_first=1, keep_last=1)
    prune_model(full, tmp_path / "one", options, IDS)
    job = open_job(full, tmp_path / "two", options, IDS)
    run_turned(job)
    commit(job)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_process_may_do_the_same_job_twice(full: Path, tmp_path: Path) -> None:
    """It keeps the model that steps compute with, of which the weights outside the layers come and go."""
    options = PruneOptions(criterion="taylor", keep_first=1, keep_last=1)
    for name in ("one", "two"):
        prune_model(full, tmp_path / name, options, IDS)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_late_step_of_a_committed_job_does_nothing(full: Path, tmp_path: Path) -> None:
    job = open_job(full, tmp_path / "pruned", RANDOM)
    prune_model(full, tmp_path / "pruned", RANDOM)
    for step in steps(job):
        run_step(job, step)
    assert commit(job) == read_manifest(tmp_path / "pruned")
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_another_seed_keeps_other_units(full: Path, pruned: Path, tmp_path: Path) -> None:
    other = prune_model(full, tmp_path / "other", dataclasses.replace(RANDOM, seed=1))
    assert other.kept != read_manifest(pruned).kept
    assert other.digest != read_manifest(pruned).digest


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_zeros_in_dense_weights(full: Path, criterion: Any, tmp_path: Path) -> None:
    options = PruneOptions(structure="4:8", criterion=criterion, keep_first=1, keep_last=1)
    manifest = prune_model(full, tmp_path / "zeros", options, None if criterion == "magnitude" else IDS)
    assert manifest.kept == {}
    before = random_model("llama").state_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "zeros")
    for name, weight in model.state_dict().items():
        if name.startswith(("model.layers.1.", "model.layers.2.")) and "_proj" in name:
            assert (weight.view(-1, 8) == 0).sum(1).eq(4).all()
            moved = criterion == "sparsegpt"
            assert moved != torch.equal(weight, torch.where(weight == 0, 0.0, before[name]))
        else:
            assert torch.equal(weight, before[name])


def test_two_processes_may_finish_the_same_job(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_job(full, tmp_path / "pruned", RANDOM)
    appear = job_module._appear

    def late(job: job_module.PruneJob) -> None:
        monkeypatch.setattr(job_module, "_appear", appear)
        prune_model(full, tmp_path / "elsewhere" / "pruned", RANDOM)
        (tmp_path / "elsewhere" / "pruned").rename(tmp_path / "pruned")
        appear(job)

    for step in steps(first):
        run_step(first, step)
    monkeypatch.setattr(job_module, "_appear", late)
    assert commit(first).kept == read_manifest(tmp_path / "pruned").kept
