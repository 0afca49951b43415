"""Data of a run on an object store (moto on loopback), made by steps on nodes that share nothing but that."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymem.cluster.backend import RayBackend
from raymem.errors import DataError
from raymem.recipe.data import DataSection
from raymem.recipe.schema import ScalingSection
from raymem.runs.backend import LocalBackend
from raymem.runs.prepare import index_of, prepare_data, share_tokenizer
from raymem.runs.suggest import suggest
from raymem.storage.storage import Storage
from raymem.training.data import readers
from raymem.training.data.packed import shards
from raymem.training.data.packed.shards import Prepared
from raymem.training.data.tasks import shards as tasks
from raymem.training.job import StepJob
from tests.helpers.ray_processes import RayHead
from tests.helpers.support import write_examples

Files = dict[str, bytes]


class Killed(BaseException):
    pass


class Nodes(LocalBackend):
    """Does each step on one of two nodes in turn, to which it goes as bytes; dies before a step where it is told to."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, dies_before: int | None = None) -> None:
        super().__init__()
        self.folder, self.monkeypatch, self.dies_before = folder, monkeypatch, dies_before
        self.done: list[str] = []

    def run_steps(self, job: StepJob, progress: Callable[[int, int], None]) -> None:
        if job.is_committed():
            return
        for step in [step for step in job.steps() if not job.is_done(step)]:
            if len(self.done) == self.dies_before:
                raise Killed
            there, its_step = pickle.loads(pickle.dumps((job, step)))
            with self.monkeypatch.context() as patch:
                patch.setenv("RAYMEM_CACHE", str(self.folder / f"node-{len(self.done) % 2}"))
                Path(self.folder / f"node-{len(self.done) % 2}").mkdir(parents=True, exist_ok=True)
                there.run(its_step)
            self.done.append(f"{type(job).__name__}: {step.name}")
        job.commit()


class Place:
    """A bucket with source files, a driver's machine, and the same files on a disk."""

    def __init__(self, storage: Storage, folder: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.storage, self.folder, self.tokenizer, self.monkeypatch = storage, folder, tokenizer, monkeypatch
        self.disk = folder / "disk"
        for number in range(3):
            self.disk.mkdir(exist_ok=True)
            write_examples(self.disk / f"part-{number}.jsonl", 20 + number, seed=number)

    def upload(self) -> str:
        self.storage.upload_dir(self.disk, "sources", last="part-0.jsonl")
        return self.storage.join("sources")

    def driver(self, name: str) -> Path:
        cache = self.folder / name
        self.monkeypatch.setenv("RAYMEM_CACHE", str(cache))
        return cache

    def prepare(self, backend: Any, path: str, split: Any = "train", **options: Any) -> Prepared:
        section = section_of(path, **options)
        tokenizer = share_tokenizer(str(self.tokenizer), self.storage)
        return prepare_data(section, split, tokenizer, self.storage, backend)

    def expected(self, path: str | None = None) -> Prepared:
        tokenizer = share_tokenizer(str(self.tokenizer), self.storage)
        return shards.prepare(section_of(path or str(self.disk)), "train", tokenizer, self.folder / "expected")

    def left(self) -> list[str]:
        return [name for name in self.storage.list_dirs("cache/data") if name.startswith(".")]

    def in_bucket(self, key: str) -> Files:
        names = self.storage.sizes(f"cache/data/{key}")
        return {name: self.storage.read_bytes(f"cache/data/{key}/{name}") for name in names}


def section_of(path: str, **options: Any) -> DataSection:
    return DataSection.model_validate({"train": path, "sequence_length": 32} | options)


def files_of(prepared: Prepared) -> Files:
    (source,) = prepared.sources
    return {path.name: path.read_bytes() for path in source.directory.iterdir()}


@pytest.fixture
def place(s3_uri: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(shards, "BLOCK_ROWS", 7)
    monkeypatch.setattr(tasks, "PART_BLOCKS", 2)
    return Place(Storage.open(s3_uri).child(tmp_path.name), tmp_path, llama, monkeypatch)


def test_nodes_make_the_files_that_one_machine_makes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, path = place.driver("driver"), place.upload()
    nodes = Nodes(place.folder, monkeypatch)
    prepared = place.prepare(nodes, path)
    assert [name.partition(":")[0] for name in nodes.done] == ["Indexing"] * 3 + ["Sharding"] * 6
    expected = place.expected()
    assert prepared.key == expected.key and files_of(prepared) == files_of(expected)
    assert place.in_bucket(prepared.sources[0].directory.name) == files_of(expected)
    assert not (cache / "sources").exists(), "the driver has not fetched what nodes read"
    assert all(list((place.folder / f"node-{number}" / "sources").iterdir()) for number in range(2))
    assert not place.left()

    another, nothing = place.driver("another"), Nodes(place.folder, monkeypatch)
    assert place.prepare(nothing, path).key == prepared.key and not nothing.done
    assert not (another / "sources").exists()
    # Nor is it fetched for a prompt to try.
    index = index_of(section_of(path), place.storage, nothing)
    suggested = suggest(section_of(path), "train", prepared, str(place.tokenizer), place.storage, index)
    assert suggested is not None and suggested.prompt
    assert not (another / "sources").exists()


def test_what_is_trained_on_too_is_known_from_the_records(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, path = place.driver("driver"), place.upload()
    nodes = Nodes(place.folder, monkeypatch)
    place.prepare(nodes, path)
    evaluated = place.storage.join("sources/part-1.jsonl")
    place.prepare(nodes, path, "eval", eval=evaluated)
    assert "data.eval[0] is also trained on" in caplog.text and not (cache / "sources").exists()


@pytest.mark.parametrize("dies_before", [1, 5])
def test_a_killed_driver_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch, dies_before: int) -> None:
    place.driver("driver")
    path = place.upload()
    with pytest.raises(Killed):
        place.prepare(Nodes(place.folder, monkeypatch, dies_before), path)
    key = place.expected().sources[0].directory.name
    assert not place.storage.exists(f"cache/data/{key}/manifest.json"), "nothing half-made counts"
    place.driver("another")
    nodes = Nodes(place.folder, monkeypatch)
    assert files_of(place.prepare(nodes, path)) == files_of(place.expected())
    assert len(nodes.done) == 9 - dies_before and not place.left()


def test_two_drivers_may_prepare_the_same(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is slower finds its notes gone, and the data made."""
    place.driver("driver")
    path = place.upload()

    class Overtaken(Nodes):
        def run_steps(self, job: StepJob, progress: Callable[[int, int], None]) -> None:
            steps = job.steps()
            with monkeypatch.context() as patch:
                patch.setenv("RAYMEM_CACHE", str(place.folder / "faster"))
                place.prepare(LocalBackend(), path)
            for step in steps[-1:]:
                pickle.loads(pickle.dumps(job)).run(step)
            job.commit()

    assert files_of(place.prepare(Overtaken(place.folder, monkeypatch), path)) == files_of(place.expected())
    assert not place.left()


def test_an_error_is_that_of_one_machine(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.driver("driver")
    with (place.disk / "part-1.jsonl").open("a") as file:
        file.write('{"words": "?"}\n')
    path = place.upload()
    with pytest.raises(DataError) as there:
        place.prepare(Nodes(place.folder, monkeypatch), path)
    with pytest.raises(DataError) as here:
        place.expected(path)
    assert str(there.value) == str(here.value) and "/sources/part-1.jsonl:22" in str(here.value)
    key = place.storage.list_dirs("cache/data")
    assert not any(place.storage.exists(f"cache/data/{name}/manifest.json") for name in key)


def test_a_file_that_is_replaced_is_read_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.driver("driver")
    path = place.upload()
    with pytest.raises(Killed):
        place.prepare(Nodes(place.folder, monkeypatch, dies_before=3), path)
    place.storage.write_bytes("sources/part-0.jsonl", b'{"text": "another"}\n')
    nodes = Nodes(place.folder, monkeypatch)
    assert place.prepare(nodes, path).sources[0].num_examples == 1 + 21 + 22
    assert len([name for name in nodes.done if name.startswith("Indexing")]) == 1, "the others are as they were"


def test_a_file_that_is_replaced_meanwhile_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.driver("driver")
    path = place.upload()

    class Replaced(Nodes):
        def run_steps(self, job: StepJob, progress: Callable[[int, int], None]) -> None:
            if isinstance(job, tasks.Sharding):
                place.storage.write_bytes("sources/part-2.jsonl", b'{"text": "another"}\n')
                self.folder = place.folder / "new"  # nodes without a copy
            super().run_steps(job, progress)

    with pytest.raises(DataError, match=r"/sources/part-2\.jsonl changed while it was fetched: run again"):
        place.prepare(Replaced(place.folder, monkeypatch), path)


def test_damaged_shards_are_made_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place.driver("driver")
    path = place.upload()
    prepared = place.prepare(Nodes(place.folder, monkeypatch), path)
    name = f"cache/data/{prepared.sources[0].directory.name}/shard-000001.arrow"
    place.storage.write_bytes(name, b"x" * len(place.storage.read_bytes(name)))
    place.driver("another")
    nodes = Nodes(place.folder, monkeypatch)
    assert files_of(place.prepare(nodes, path)) == files_of(prepared)
    assert "is damaged: it has sha256" in caplog.text and "the data are made again" in caplog.text
    assert len(nodes.done) == 6


def test_a_file_of_this_machine_is_prepared_here(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.driver("driver")
    nodes = Nodes(place.folder, monkeypatch)
    prepared = place.prepare(nodes, str(place.disk))
    assert not nodes.done and place.in_bucket(prepared.sources[0].directory.name) == files_of(prepared)


def test_rows_of_the_hub_are_read_on_nodes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_list([json.loads(line) for line in (place.disk / "part-0.jsonl").open()])
    rows._fingerprint = "fixed"
    monkeypatch.setattr(readers, "load_hub", lambda *_: rows)
    place.driver("driver")
    nodes = Nodes(place.folder, monkeypatch)
    prepared = place.prepare(nodes, "somebody/something")
    assert [name.partition(", ")[0] for name in nodes.done] == ["Sharding: data.train[0]"] * 2
    assert files_of(prepared) == files_of(place.expected("somebody/something"))


def test_ray_makes_the_same_files(
    place: Place, cluster: RayHead, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    login = cluster.home / ".aws" / "credentials"  # the cluster may be older than the bucket's environment
    login.parent.mkdir(exist_ok=True)
    login.write_text("[default]\naws_access_key_id = test\naws_secret_access_key = test\n")
    cache, path = place.driver("driver"), place.upload()
    backend = RayBackend(ScalingSection(num_workers=1))
    prepared = place.prepare(backend, path)
    assert files_of(prepared) == files_of(place.expected())
    assert place.in_bucket(prepared.sources[0].directory.name) == files_of(prepared)
    assert not (cache / "sources").exists() and not place.left()
    with (place.disk / "part-1.jsonl").open("a") as file:
        file.write('{"words": "?"}\n')
    with pytest.raises(DataError, match=r"/sources/part-1\.jsonl:22"):
        place.prepare(backend, place.upload())
