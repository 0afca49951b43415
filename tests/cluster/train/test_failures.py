"""What a run says that Ray gave up: the number of failures that there were, the cause, and the cure."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

from raymem.cluster import connection, local
from raymem.cluster.connection import HeadCheck, connect, named_losses
from raymem.cluster.train.failures import explain, first_rank
from raymem.errors import ClusterError, DataError, RaymemError, StorageError, TransientStorageError
from raymem.recipe.schema import ScalingSection

SCALING = ScalingSection(num_workers=2, max_failures=2)
LOST = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")


def failed(**causes: Exception) -> ray.train.WorkerGroupError:
    return ray.train.WorkerGroupError("...", {int(name[1:]): cause for name, cause in causes.items()})


def test_failures_are_counted_by_the_rank_that_began_them() -> None:
    last = failed(r0=LOST, r1=OSError("No such device"))
    assert explain(last, [1, 0, 1], {}, SCALING) == (
        "scaling: the workers failed 3 times (worker 0: 1, worker 1: 2), one more than scaling.max_failures=2 allows, "
        "at last worker 1 with: No such device; the last checkpoint is kept: run the same command again to resume, "
        "with --verbose for the workers' output"
    )


def test_one_failure_is_one_failure() -> None:
    alone = ScalingSection(num_workers=1, max_failures=0)
    assert explain(failed(r0=OSError("No such device")), [0], {}, alone).startswith(
        "scaling: the workers failed 1 time, one more than scaling.max_failures=0 allows, at last worker 0 with: No"
    )


def test_a_rank_that_lost_its_neighbour_is_not_the_cause() -> None:
    assert first_rank({0: LOST, 1: OSError("x")}) == 1
    assert first_rank({0: LOST, 1: LOST}) == 0


def test_what_hung_is_said_instead_of_how_ray_saw_it_die() -> None:
    died = RuntimeError("The actor died unexpectedly.\n\tpid: 77\n\tip: 10.0.0.1\nSIGKILL")
    assert ", at last rank 1 hangs: so and so; the last" in explain(
        failed(r0=LOST, r1=died), [1, 1, 1], {7: "another", 77: "rank 1 hangs: so and so"}, SCALING
    )


@pytest.mark.parametrize(
    ("cause", "sentence"),
    [
        (
            WorkerGroupStartupTimeoutError(2),
            "the cluster had no room for 2 workers in 11 tries of a minute each; lower",
        ),
        (
            WorkerGroupStartupFailedError("One of them died"),
            "the workers died 11 times while they started, at last with",
        ),
        (OSError("No space\nleft"), "Ray Train could not start or lead the workers (OSError: No space left); the last"),
    ],
)
def test_a_group_that_never_ran_is_no_failure_of_a_worker(cause: Exception, sentence: str) -> None:
    message = explain(ray.train.ControllerError(cause), [], {}, SCALING)
    assert message.startswith(f"scaling: {sentence}")
    assert "max_failures" not in message


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (
            ray.exceptions.ActorDiedError(),
            ClusterError,
            r"^the run was lost with a process of Ray or its node \(ActorDied",
        ),
        (ray.exceptions.LocalRayletDiedError(), ClusterError, "; what is done is kept: run the same command again"),
        (ray.exceptions.RayTaskError("f", "trace", DataError("mine")), DataError, "^mine$"),
    ],
)
def test_losses_of_ray_are_sentences_and_errors_of_users_stay(
    raised: Exception, kind: type[RaymemError], text: str
) -> None:
    with pytest.raises(kind, match=text), named_losses("the run"):
        raise raised


@pytest.mark.parametrize(
    "error", [Exception("The current node timed out during startup. This could"), OSError(28, "x")]
)
def test_a_local_cluster_that_does_not_start_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**options: Any) -> None:
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(local, "start", start)
    with pytest.raises(ClusterError, match=r"^a local cluster: Ray did not start \(.*\); this machine may be too busy"):
        connect(SCALING)


def test_a_head_that_has_gone_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(connection, "_HEAD_CHECK_EVERY_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check = HeadCheck(f"127.0.0.1:{port}")
        check.look()
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="raymem"):
        for _ in range(5):
            check.look()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"Ray's head at 127.0.0.1:{port} does not answer (")


@pytest.mark.parametrize("error", [StorageError("full"), TransientStorageError("away")])
def test_a_storage_that_is_away_is_a_crash_and_not_the_users_mistake(
    error: RaymemError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent to the mailbox ends the run; the rest Ray tries again."""
    from raymem.cluster.train import worker
    from tests.helpers.support import make_recipe

    sent: list[Any] = []

    class Remote:
        def __init__(self, call: Any) -> None:
            self.remote = call

    class Box:
        error = Remote(lambda: None)
        fail = Remote(sent.append)

    def localise(*_: Any) -> Any:
        raise error

    class Context:
        def get_local_rank(self) -> int:
            return 0

        def get_world_rank(self) -> int:
            return 0

    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray.train, "get_context", Context)
    monkeypatch.setattr(worker, "localise", localise)
    recipe = make_recipe({"scaling": {"hang_timeout": None}, "storage": {"path": str(tmp_path)}}).to_dict()
    config = {
        "recipe": recipe,
        "kinds": {},
        "run": str(tmp_path / "r"),
        "storage_id": None,
        "lease": None,
        "train_data": {},
        "eval_data": None,
        "mailbox": Box(),
    }
    with pytest.raises(type(error)):
        worker.train_worker(config)
    assert sent == ([] if isinstance(error, TransientStorageError) else [error])
