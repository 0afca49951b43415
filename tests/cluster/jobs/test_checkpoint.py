"""A running job is asked for a checkpoint: it saves one, says which, and goes on as if nobody had asked."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import yaml

from raymem.cluster.jobs import checkpoint
from raymem.cluster.jobs.checkpoint import save
from raymem.cluster.train.mailbox import Mailbox
from raymem.cluster.train.progress import RayReporter
from raymem.cluster.train.pulse import Pulse
from raymem.errors import ClusterError
from raymem.recipe.schema import ScalingSection
from raymem.training.dist_env import DistEnv
from raymem.training.reporter import Wanted
from tests.helpers.ray_processes import RayHead, workers_of
from tests.helpers.run_files import losses, result_bytes
from tests.helpers.runs import ray_recipe, train_here
from tests.helpers.support import in_processes

WORKERS = ScalingSection(num_workers=2)


class Called:
    """An actor in this process, whose methods are called at once."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._inner, name))


@pytest.fixture
def mailbox(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray.train, "report", lambda metrics: None)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None, raising=False)
    plain: Any = Mailbox
    return plain.__ray_metadata__.modified_class("s3://bucket/run/checkpoints")


def reporter_of(mailbox: Any) -> RayReporter:
    return RayReporter(DistEnv(), Pulse(None, 0, None), Called(mailbox))


def step(reporter: RayReporter, number: int) -> Wanted:
    reporter.log({"step": float(number)})
    reporter.flush()
    return reporter.wanted()


def test_a_request_is_answered_by_one_checkpoint(mailbox: Any) -> None:
    reporter = reporter_of(mailbox)
    assert step(reporter, 1) is Wanted.NOTHING
    assert mailbox.ask_to_save() == 1 and mailbox.answer(1) is None
    assert step(reporter, 2) is Wanted.SAVE
    reporter.flush()  # as before every checkpoint
    assert mailbox.ask_to_save() == 2, "while it is being written, which does not answer it"
    reporter.saved(2)
    assert mailbox.answer(1) == (2, "s3://bucket/run/checkpoints") and mailbox.answer(2) is None
    assert step(reporter, 3) is Wanted.SAVE
    reporter.saved(3)
    assert mailbox.answer(2) == (3, "s3://bucket/run/checkpoints")
    assert step(reporter, 4) is Wanted.NOTHING


def test_a_group_that_starts_again_answers_what_the_one_before_left(mailbox: Any) -> None:
    mailbox.ask_to_save()
    assert step(reporter_of(mailbox), 7) is Wanted.SAVE, "and dies before it is saved"
    again = reporter_of(mailbox)
    assert step(again, 7) is Wanted.SAVE
    again.saved(7)
    assert mailbox.answer(1) == (7, "s3://bucket/run/checkpoints")
    assert step(reporter_of(mailbox), 8) is Wanted.NOTHING


def test_the_end_of_a_run_comes_before_a_request(mailbox: Any) -> None:
    reporter = reporter_of(mailbox)
    mailbox.ask_to_save()
    mailbox.stop()
    assert step(reporter, 1) is Wanted.STOP


class Head:
    """A head with one job, which prints what the asking job is to print."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, says: str = "", **facts: Any) -> None:
        self.job = SimpleNamespace(status="RUNNING", metadata={}, job_id="02000000", driver_info=None)
        vars(self.job).update(facts)
        self.says, self.sent, self.deleted = says, [], []  # type: ignore[var-annotated]
        monkeypatch.setattr(checkpoint, "connect_jobs", lambda address: self)
        monkeypatch.setattr(checkpoint, "follow_logs", lambda client, job, out: out(self.says))

    def get_address(self) -> str:
        return "http://head"

    def get_job_info(self, submission_id: str) -> Any:
        return self.job

    def submit_job(self, **arguments: Any) -> str:
        self.sent.append(arguments)
        return str(arguments["submission_id"])

    def delete_job(self, submission_id: str) -> None:
        self.deleted.append(submission_id)


def test_what_was_saved_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = json.dumps({"step": 12, "checkpoints": "/runs/x/checkpoints"})
    head = Head(monkeypatch, says=f"some chatter\nraymem-answer:{answer}\n")
    assert save("raymem-x", None, WORKERS) == "step 12 is saved in /runs/x/checkpoints"
    (sent,) = head.sent
    assert sent["entrypoint"] == "python -m raymem.cluster.jobs.checkpoint 02000000"
    assert head.deleted == [sent["submission_id"]] and sent["submission_id"].startswith("raymem-x-ask-")
    assert "metadata" not in sent, "it is no job of the run"


@pytest.mark.parametrize(
    ("facts", "scaling", "words"),
    [
        ({"status": "SUCCEEDED"}, WORKERS, r"has ended \(SUCCEEDED\) and saves no more; submit the recipe again"),
        ({"status": "FAILED"}, WORKERS, r"has ended \(FAILED\)"),
        ({"metadata": {"raymem.command": "sweep"}}, WORKERS, r"runs `raymem sweep`, which trains no run of its own"),
        ({"metadata": {"raymem.command": "evaluate"}}, WORKERS, r"runs `raymem evaluate`"),
        ({"job_id": None, "status": "PENDING"}, WORKERS, r"is PENDING and takes no steps yet; ask again"),
        ({}, ScalingSection(num_workers=0), r"scaling\.num_workers: 0 trains in the job's own process"),
    ],
)
def test_why_nothing_is_saved(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], scaling: ScalingSection, words: str
) -> None:
    head = Head(monkeypatch, **facts)
    with pytest.raises(ClusterError, match=f"^job raymem-x:? {words}"):
        save("raymem-x", None, scaling)
    assert not head.sent


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ('raymem-answer:{"problem": "ended before it had saved"}\n', "^job raymem-x ended before it had saved$"),
        (
            "Traceback ...\nModuleNotFoundError: no raymem\n",
            "could not be asked: .* no raymem; install the same raymem",
        ),
    ],
)
def test_what_the_asking_job_found(monkeypatch: pytest.MonkeyPatch, says: str, words: str) -> None:
    head = Head(monkeypatch, says=says)
    with pytest.raises(ClusterError, match=words):
        save("raymem-x", None, WORKERS)
    assert head.deleted, "nothing stays in the list of jobs"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_saves_and_goes_on(ray_head: RayHead, llama: Path, examples: Path, tmp_path: Path) -> None:
    """Two workers, of which one is killed right after: they go on from what was asked for, bit for bit."""
    steps = {"steps": 300, "save_every": 300, "eval_every": 300}
    wanted = ray_recipe(llama, examples, tmp_path / "runs", "asked", scaling={"num_workers": 2}, train=steps)
    project = tmp_path / "project"
    project.mkdir()
    (project / "asked.yaml").write_text(yaml.safe_dump(wanted.to_dict()))

    def raymem(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "raymem", "submit", "asked.yaml", *arguments]
        return subprocess.run(
            command, cwd=project, env=ray_head.client_env(), capture_output=True, text=True, timeout=280
        )

    unknown = raymem("--checkpoint")
    assert unknown.returncode == 1 and "no job of run 'asked'" in unknown.stderr
    assert raymem("--no-follow").returncode == 0
    deadline = time.monotonic() + 200
    while (asked := raymem("--checkpoint")).returncode != 0:
        assert "ask again once it does" in asked.stderr, asked.stderr
        assert time.monotonic() < deadline
    checkpoints = tmp_path / "runs" / "asked" / "checkpoints"
    saved = {int(file.parent.name.removeprefix("step_")) for file in checkpoints.glob("step_*/manifest.json")}
    said = int(asked.stdout.partition(": step ")[2].split()[0])
    assert said in saved and said % 300, "it is one that was not due"
    workers_of(ray_head)[0].kill()
    assert f"is saved in {checkpoints}; training goes on" in "".join(asked.stdout.split("\n"))
    ended = raymem()  # follows it to its end
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"taking step {said + 1}, the first of this session" in ended.stdout
    assert "has ended (SUCCEEDED)" in " ".join(raymem("--checkpoint").stderr.split())

    untouched = ray_recipe(
        llama, examples, tmp_path / "untouched", "asked", train=steps,
        scaling={"num_workers": 2, "resources_per_worker": None},
    )  # fmt: skip
    expected = in_processes(train_here, 2, tmp_path / "meet", untouched)[0]
    run = tmp_path / "runs" / "asked"
    assert (losses(run), result_bytes(run)) == (expected, result_bytes(tmp_path / "untouched" / "asked"))
