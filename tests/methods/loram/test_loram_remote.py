"""Pruning on an object store: whatever process a step runs in, it writes what pruning on a disk writes, to the bit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import ModelError, StorageError
from raymem.methods.loram import PruneOptions, prune_model
from raymem.methods.loram.manifest import MANIFEST
from raymem.methods.loram.pruning.job import describe_job
from raymem.methods.loram.pruning.remote import RemotePruning
from raymem.methods.loram.pruning.steps import Step
from raymem.methods.loram.source import Source, open_source
from raymem.storage.storage import Storage
from tests.helpers.loram_families import save, token_ids

IDS = token_ids(2, 16, seed=7)
UNITS: dict[str, Any] = {"layer_ratios": (0.0, 0.5, 0.7, 0.25)}
OPTIONS = {
    "random": PruneOptions(**UNITS),
    "magnitude": PruneOptions(criterion="magnitude", **UNITS),
    "taylor, refit": PruneOptions(criterion="taylor", refit=True, **UNITS),
    "wanda": PruneOptions(criterion="wanda", **UNITS),
    "random, refit": PruneOptions(refit=True, **UNITS),
    "zeros by wanda": PruneOptions(structure="2:4", criterion="wanda", keep_first=1, keep_last=1),
}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in several shards; read only."""
    directory = save(tmp_path_factory.mktemp("loram") / "full", shard="30KB")
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def storage(s3_uri: str, tmp_path: Path) -> Storage:
    return Storage.open(s3_uri).child(f"remote-{tmp_path.name}")


def begun(source: Source, options: PruneOptions, storage: Storage) -> RemotePruning:
    ids = IDS if options.needs_calibration else None
    pruning = RemotePruning(describe_job(source, "cache/loram/key", options, ids), storage, "cache/loram/key")
    pruning.begin(ids)
    return pruning


def elsewhere(pruning: RemotePruning) -> RemotePruning:
    """Return it as another process gets it."""
    copy: RemotePruning = pickle.loads(pickle.dumps(pruning))
    return copy


def do_all(pruning: RemotePruning, turned: bool = False) -> None:
    """Do every step as if in a process of its own, and twice."""
    waiting: list[Step] = list(reversed(pruning.steps())) if turned else pruning.steps()
    done: set[str] = set()
    while waiting:
        step = next(step for step in waiting if done.issuperset(step.after))
        elsewhere(pruning).run(step)
        elsewhere(pruning).run(step)
        done.add(step.name)
        waiting.remove(step)


def contents(storage: Storage, name: str) -> dict[str, bytes]:
    return {file: storage.read_bytes(f"{name}/{file}") for file in storage.sizes(name)}


@pytest.mark.parametrize(
    "name", ["wanda", *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS if name != "wanda")]
)
def test_it_writes_what_pruning_on_a_disk_writes(name: str, full: Path, storage: Storage, tmp_path: Path) -> None:
    options = OPTIONS[name]
    prune_model(full, tmp_path / "pruned", options, IDS if options.needs_calibration else None)
    pruning = begun(open_source(full), options, storage)
    do_all(pruning, turned=True)
    assert not pruning.is_committed()
    elsewhere(pruning).commit()
    assert pruning.is_committed()
    expected = {path.name: path.read_bytes() for path in (tmp_path / "pruned").iterdir()}
    assert contents(storage, "cache/loram/key") == expected
    assert storage.list_dirs("cache/loram") == ["key"], "nothing is left over"


@pytest.mark.slow
def test_a_model_in_a_bucket_is_read_there(full: Path, storage: Storage, tmp_path: Path) -> None:
    """Of the node's disk only the files beside the weights are used."""
    storage.upload_dir(full, "model", last="config.json")
    beside = tmp_path / "beside"
    beside.mkdir()
    for path in full.iterdir():
        if path.suffix != ".safetensors":
            (beside / path.name).write_bytes(path.read_bytes())
    source = open_source(beside, "org/full", "abc", weights=storage.join("model"))
    on_disk = open_source(full, "org/full", "abc")
    assert (source.identity, source.tensors) == (on_disk.identity, on_disk.tensors)
    prune_model(full, tmp_path / "pruned", OPTIONS["wanda"], IDS, name="org/full", revision="abc")
    pruning = begun(source, OPTIONS["wanda"], storage)
    do_all(pruning)
    pruning.commit()
    expected = {path.name: path.read_bytes() for path in (tmp_path / "pruned").iterdir()}
    assert contents(storage, "cache/loram/key") == expected


@pytest.mark.slow
def test_a_step_that_is_killed_while_it_uploads_is_done_again(
    full: Path, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each upload and each deletion of the job, in turn."""
    options = PruneOptions(criterion="wanda", keep_first=3, keep_last=0)
    prune_model(full, tmp_path / "pruned", options, IDS)
    changes, killed_at = 0, 0
    originals = {name: getattr(Storage, name) for name in ("upload_file", "delete_file", "delete_dir")}

    def dying(name: str) -> Any:
        def change(self: Storage, *arguments: Any, **options: Any) -> Any:
            nonlocal changes
            changes += 1
            if changes == killed_at:
                raise KeyboardInterrupt
            return originals[name](self, *arguments, **options)

        return change

    for name in originals:
        monkeypatch.setattr(Storage, name, dying(name))
    while True:
        changes, killed_at = 0, killed_at + 1
        assert killed_at < 40, "no attempt gets further"
        try:
            pruning = begun(open_source(full), options, storage)
            for step in pruning.steps():
                if not pruning.is_done(step):
                    elsewhere(pruning).run(step)
            pruning.commit()
            break
        except KeyboardInterrupt:
            continue
    assert killed_at > 3
    expected = {path.name: path.read_bytes() for path in (tmp_path / "pruned").iterdir()}
    assert contents(storage, "cache/loram/key") == expected


def test_a_shard_that_is_missing_is_named(full: Path, storage: Storage) -> None:
    pruning = begun(open_source(full), OPTIONS["random"], storage)
    for step in pruning.steps()[:-1]:
        pruning.run(step)
    with pytest.raises(ModelError, match=r"key/model-0000\d-of-00005.safetensors.* is missing: run the steps"):
        pruning.commit()
    assert not storage.exists(f"cache/loram/key/{MANIFEST}")


def test_a_node_without_the_model_says_what_to_do(full: Path, storage: Storage, tmp_path: Path) -> None:
    import shutil

    there = tmp_path / "there"
    shutil.copytree(full, there)
    pruning = begun(open_source(there), OPTIONS["random"], storage)
    shutil.rmtree(there)
    with pytest.raises(ModelError, match=f"{there} is not there on node .*copy the model into the bucket"):
        pruning.run(pruning.steps()[0])


def test_what_a_step_reads_must_be_there(full: Path, storage: Storage) -> None:
    pruning = begun(open_source(full), OPTIONS["wanda"], storage)
    last = next(step for step in pruning.steps() if step.name == "forward-1")
    with pytest.raises(StorageError, match=r"cannot download .*hidden-1\.safetensors"):
        pruning.run(last)
