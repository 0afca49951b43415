"""Settings and fixtures of every test: one thread per process, no network, and one tiny model with data."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Read by torch, transformers and huggingface_hub when they are imported, also in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Plans and calibration of the person who runs the tests are neither read nor written.
os.environ["RAYMEM_CACHE"] = os.path.join(tempfile.gettempdir(), f"raymem-tests-{os.getpid()}")

import pytest

pytest_plugins = ["tests.helpers.ray_fixtures", "tests.helpers.tracking_fixtures"]
pytest.register_assert_rewrite("raymem.testing.suite", "raymem.testing.tensors")

RAY_FIXTURES = {"ray_head", "cluster", "login"}


@pytest.hookimpl(tryfirst=True)  # before -m takes its pick
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts Ray: tests with one of its fixtures. Others that do so carry the mark themselves."""
    for item in items:
        if isinstance(item, pytest.Function) and RAY_FIXTURES & set(item.fixturenames):
            item.add_marker("ray")


def pytest_collection() -> None:
    gc.disable()  # libraries are imported now, which make a million objects to keep


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["RAYMEM_CACHE"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_no_garbage() -> None:
    """A million objects of imported libraries would make every ``gc.collect()`` of the memory tests take 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _environment_is_left_as_it_was() -> Iterator[None]:
    """mlflow writes its tracking URI there, and raymem the token of its local Ray: other modules would use them."""

    def theirs() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if "MLFLOW" in name or name.startswith("RAY_")}

    before = theirs()
    yield
    for name in theirs().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random fp32 weights and a tokenizer; read only."""
    from tests.helpers.support import save_model, start_server

    start_server()  # most tests with a model are in files that also start processes
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with ``train.jsonl`` and ``eval.jsonl``, and the cache of what is prepared from them."""
    from tests.helpers.support import write_examples

    directory = tmp_path_factory.mktemp("examples")
    write_examples(directory / "train.jsonl", 40, seed=0)
    write_examples(directory / "eval.jsonl", 8, seed=1)
    return directory


@pytest.fixture
def planned_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made in this process."""
    from raymem.planner import process
    from tests.helpers.support import PlansHere

    monkeypatch.setattr(process, "PlannerProcess", PlansHere)


@pytest.fixture(scope="session")
def s3_uri() -> Iterator[str]:
    """An empty bucket of a moto server in this process, as URI with its options."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    saved = {key: os.environ.get(key) for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
    try:
        options = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        maker = fs.FileSystem.from_uri(f"s3://raymem-test?{options}&allow_bucket_creation=true")[0]
        maker.create_dir("raymem-test")
        yield f"s3://raymem-test/team%20a/runs?{options}"
    finally:
        server.stop()
        for key, value in saved.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
