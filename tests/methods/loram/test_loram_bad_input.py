"""What a pruning job refuses, and that it leaves nothing half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymem.errors import DataError, ModelError, RecipeError, StorageError
from raymem.methods.loram import PruneOptions, prune_model
from raymem.methods.loram.manifest import MANIFEST, read_manifest
from raymem.methods.loram.nonuniform import PRUNING_KEY, counts_of
from raymem.methods.loram.pruning.job import open_job
from raymem.methods.loram.pruning.steps import run_step, steps
from tests.helpers.loram_families import save, token_ids

RANDOM = PruneOptions(keep_first=1, keep_last=1)
IDS = token_ids(2, 16, seed=7)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in several shards; read only."""
    return save(tmp_path_factory.mktemp("loram") / "full", shard="30KB")


def copy_model(full: Path, target: Path) -> Path:
    target.mkdir()
    for path in full.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_truncated_shard_is_refused(full: Path, tmp_path: Path) -> None:
    broken = copy_model(full, tmp_path / "full")
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"{shard.name}: not a complete safetensors file .* fetch it again"):
        prune_model(broken, tmp_path / "pruned", RANDOM)


def test_a_shard_that_shrinks_meanwhile_is_noticed(full: Path, tmp_path: Path) -> None:
    broken = copy_model(full, tmp_path / "full")
    job = open_job(broken, tmp_path / "pruned", RANDOM)
    for shard in broken.glob("*.safetensors"):
        os.truncate(shard, shard.stat().st_size // 2)
    rest = steps(job)[0]
    with pytest.raises(ModelError, match="ends early; fetch the file again"):
        run_step(job, rest)
    assert not (tmp_path / "pruned").exists()


def test_a_missing_tensor_is_refused(full: Path, tmp_path: Path) -> None:
    broken = copy_model(full, tmp_path / "full")
    shard = sorted(broken.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    gone = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != gone}, shard)
    with pytest.raises(ModelError, match=f"lacks tensor {gone}"):
        prune_model(broken, tmp_path / "pruned", RANDOM)


def test_a_missing_shard_is_refused(full: Path, tmp_path: Path) -> None:
    broken = copy_model(full, tmp_path / "full")
    sorted(broken.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelError, match="No such file or directory"):
        prune_model(broken, tmp_path / "pruned", RANDOM)


def test_weights_of_another_config_are_refused(full: Path, tmp_path: Path) -> None:
    broken = copy_model(full, tmp_path / "full")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ModelError, match="config and weights do not belong together"):
        prune_model(broken, tmp_path / "pruned", RANDOM)


def test_a_damaged_result_is_noticed(full: Path, tmp_path: Path) -> None:
    prune_model(full, tmp_path / "pruned", RANDOM)
    shard = tmp_path / "pruned" / "model-00002-of-00005.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ModelError, match=f"{shard.name} is missing or not of"):
        read_manifest(tmp_path / "pruned")
    with pytest.raises(ModelError, match=f"{shard.name} is missing or not of"):
        prune_model(full, tmp_path / "pruned", RANDOM)


def test_a_full_disk_is_one_sentence_and_the_job_goes_on(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(StorageError, match=r"no space left on the device.*finished layers are not repeated"):
            prune_model(full, tmp_path / "pruned", RANDOM)
    assert not (tmp_path / "pruned").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    prune_model(full, tmp_path / "pruned", RANDOM)


def test_a_taken_directory_is_refused(full: Path, tmp_path: Path) -> None:
    prune_model(full, tmp_path / "pruned", PruneOptions(ratio=0.25, keep_first=1, keep_last=1))
    with pytest.raises(ModelError, match=f"holds no {MANIFEST}"):
        prune_model(full, tmp_path, RANDOM)
    with pytest.raises(ModelError, match=r"is not the result of this job: .*'ratio': 0.25"):
        prune_model(full, tmp_path / "pruned", RANDOM)


def test_what_is_pruned_is_not_pruned_again(full: Path, tmp_path: Path) -> None:
    prune_model(full, tmp_path / "pruned", RANDOM)
    with pytest.raises(ModelError, match="is pruned already"):
        prune_model(tmp_path / "pruned", tmp_path / "out", RANDOM)


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="model_type 'gpt2' are coupled"):
        prune_model(tmp_path, tmp_path / "out", RANDOM)


def test_a_ratio_that_leaves_no_head_is_refused(tmp_path: Path) -> None:
    full = save(tmp_path / "full", "llama_mha")
    with pytest.raises(RecipeError, match="leaves none of the 4 heads of layer 1; it is at most"):
        prune_model(full, tmp_path / "out", PruneOptions(ratio=0.8, keep_first=1, keep_last=1))


@pytest.mark.parametrize(
    ("criterion", "ids", "words"),
    [
        ("taylor", None, "criterion taylor needs token ids"),
        ("random", IDS, "criterion random looks at no data"),
        ("taylor", IDS.float(), "is not a matrix of int64 token ids"),
        ("taylor", IDS[0], "is not a matrix of int64 token ids"),
        ("taylor", IDS[:, :1], "texts of one token"),
        ("wanda", IDS + 1000, r"ids outside \[0, 96\)"),
    ],
)
def test_bad_calibration(full: Path, criterion: Any, ids: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        prune_model(full, tmp_path / "out", PruneOptions(criterion=criterion, keep_first=1, keep_last=1), ids)


def test_weights_that_are_not_finite_are_refused(full: Path, tmp_path: Path) -> None:
    broken = copy_model(full, tmp_path / "full")
    for shard in broken.glob("*.safetensors"):
        save_file({key: torch.full_like(value, torch.nan) for key, value in load_file(shard).items()}, shard)
    with pytest.raises(ModelError, match="scores are not finite"):
        prune_model(broken, tmp_path / "out", PruneOptions(criterion="magnitude", keep_first=1, keep_last=1))


@pytest.mark.parametrize(
    "counts", [[1], 3, {"a": {}}, {"0": 3}, {"0": {"attn": []}}, {"0": {"attn": 0}}, {"0": {"attn": True}}]
)
def test_counts_that_somebody_has_changed_are_named(counts: Any) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {PRUNING_KEY} is .* in place of counts .*; prune again"):
        counts_of(SimpleNamespace(**{PRUNING_KEY: counts}))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("kept", [], "kept is a list"),
        ("kept", {"0": {"attn": ["x"]}}, "the units of 'attn' are no list of whole numbers"),
        ("kept", {"x": {}}, "not a manifest of LoRAM"),
        ("files", {"a": "x"}, "files has sizes that are no whole numbers"),
        ("source", {"name": 3}, "source: name is a whole number"),
        ("format", 99, "not of format"),
        ("more", 1, "not a manifest of LoRAM"),
    ],
)
def test_a_manifest_that_somebody_has_changed_is_named(tmp_path: Path, field: str, value: Any, words: str) -> None:
    source: dict[str, Any] = {"name": "m", "revision": None, "identity": {}}
    plain = {"format": 1, "key": "k", "options": {}, "model_type": "llama", "source": source, "kept": {}, "files": {}}
    (tmp_path / "loram_manifest.json").write_text(json.dumps({**plain, field: value}))
    with pytest.raises(ModelError, match=rf"loram_manifest\.json.*{words}.*; prune again"):
        read_manifest(tmp_path)
