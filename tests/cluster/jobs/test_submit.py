"""Job submission: refusals without a cluster, and the whole life of jobs on a real head with token authentication."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shlex
import shutil
import socket
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from raymem.cluster.jobs.client import connect_jobs
from raymem.cluster.jobs.submit import COMMAND_METADATA, RUN_METADATA, follow_logs, status, stop, submit
from raymem.cluster.jobs.upload import check_package, packaged_files
from raymem.errors import ClusterError, RecipeError
from tests.helpers.jobs import jobs_sent
from tests.helpers.ray_processes import RayHead
from tests.helpers.support import make_recipe

STEPS = 1_000_000
RECIPE = """
name: run1
model: {name: demo}
data: {train: "demo:functions"}
train: {steps: 2}
storage: {path: %s}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with nothing but a recipe, and a storage path outside of it."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "work"
    root.mkdir()
    (root / "my recipe.yaml").write_text(RECIPE % (tmp_path / "store"))
    return root


def send(project: Path, **arguments: Any) -> Any:
    return submit(project / "my recipe.yaml", **{"working_dir": project, "address": "http://127.0.0.1:9", **arguments})


# ---- refused before any cluster is asked


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "my_password", "API_KEY", "GCP_CREDENTIALS"])
def test_secrets_are_not_passed_on(project: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "hunter2")
    with pytest.raises(ClusterError, match=rf"environment variable {name} looks like a secret.* mount it on") as caught:
        send(project, env_passthrough=[name])
    assert "hunter2" not in str(caught.value)


def test_unset_variable(project: Path) -> None:
    with pytest.raises(ClusterError, match="environment variable NOT_SET_AT_ALL is to be passed on but is not set"):
        send(project, env_passthrough=["NOT_SET_AT_ALL"])


def test_password_in_an_override(project: Path) -> None:
    with pytest.raises(ClusterError, match=r"--set tracking.uri: an address with a password before the @") as caught:
        send(project, overrides=["tracking.uri=http://me:hunter2@host"])
    assert "hunter2" not in str(caught.value)


def test_password_in_an_argument(project: Path) -> None:
    with pytest.raises(
        ClusterError, match=r"argument 2 of evaluate: an address with a password before the @"
    ) as caught:
        send(project, command="evaluate", arguments=["--artifact", "http://me:hunter2@host/adapter"])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("trian", r"--command trian: no command that a job can run; did you mean 'train'\?"),
        ("loram", r"--command loram: no command that a job can run; did you mean 'loram \w+'\?"),
        ("xyz", r"--command xyz: .*; known here: evaluate, loram align, .*, sweep, train"),
        ("submit", r"--command submit: no command that a job can run"),
    ],
)
def test_unknown_command(project: Path, command: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    from raymem.cli.main import run_app

    with pytest.raises(ClusterError, match=words):
        send(project, command=command)
    assert run_app("submit", project / "my recipe.yaml", "--command", command, "--status") == 1
    assert re.match(f"error: {words}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--", "--forse"], 2, "No such option: --forse (Possible options: --force"),
        (["--", "--force", "twice"], 2, "unexpected extra argument(s) (twice)"),
        (["--forse"], 2, "No such option: --forse"),
        (["--command", "loram prune", "--", "--fresh"], 2, "No such option: --fresh"),
        (["--command", "sweep", "--", "--samples", "many"], 2, "unable to parse string as an integer"),
        (["--command", "sweep", "--", "--samples", "3"], 1, "error: there is no budget to search under; give --budget"),
        (["--command", "sweep", "--", "--budget", "much"], 1, "error: --budget: "),
        (["--command", "sweep", "--", "--budget", "1GiB"], 1, "error: there is no search space: give --space (joint,"),
        (["--command", "sweep", "--", "--budget", "1GiB", "--space", "mine.yaml"], 1, "mine.yaml: no such recipe file"),
        (["--command", "sweep", "--", "--budget", "1GiB", "--space", "join"], 1, "did you mean 'joint'"),
        (["--", "--set", "train.stepps=3"], 1, "train.stepps: unknown key; did you mean 'steps'?"),
    ],
)
def test_wrong_arguments_are_found_here(
    project: Path, arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from raymem.cli.main import run_app

    here = ("submit", project / "my recipe.yaml", "--working-dir", project, "--address", "http://127.0.0.1:9")
    assert run_app(*here, *arguments) == status
    shown = re.sub(r"[\s|\u2502]+", " ", capsys.readouterr().err)
    assert words in shown


def test_files_outside_of_the_upload(project: Path, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(RECIPE % "/store")
    with pytest.raises(ClusterError, match=r"recipe .*other\.yaml lies outside of the working directory .*work"):
        submit(tmp_path / "other.yaml", working_dir=project)
    with pytest.raises(ClusterError, match=r"file .*mine\.py does not exist"):
        send(project, command="sweep", arguments=["--space", "mine.py"], files=["mine.py"])
    with pytest.raises(ClusterError, match=r"working directory .*nowhere does not exist"):
        send(project, working_dir=tmp_path / "nowhere")
    (project / ".gitignore").write_text("*.yaml\n")
    with pytest.raises(ClusterError, match=r"my recipe\.yaml exists in .* keeps it out of the upload; take it out"):
        send(project)


def test_data_that_would_not_travel(project: Path, tmp_path: Path) -> None:
    """What the recipe names relatively must be in the upload; absolute paths, ids and URIs are the cluster's."""
    (project / "data").mkdir()
    for path in (project / "data" / "a.jsonl", project / "b.jsonl", tmp_path / "c.jsonl"):
        path.write_text("{}\n")
    (project / "link.jsonl").symlink_to(tmp_path / "c.jsonl")  # Ray packs what it points to
    no_cluster = "no Ray cluster answers"
    for train, words in [
        ("data/a.jsonl", no_cluster),
        ("data/../data", no_cluster),
        ("link.jsonl", no_cluster),
        ("[./b.jsonl, some/dataset, 's3://bucket/d.jsonl', /shared/d.jsonl]", no_cluster),
        (f"{project}/gone.jsonl", no_cluster),
        ("[some/dataset, gone.jsonl]", r"data\.train\[1\]\.path: gone\.jsonl does not exist below the working dir"),
        ("../c.jsonl", r"data\.train\[0\]\.path: \.\./c\.jsonl lies outside of the working directory .*; move it"),
    ]:
        with pytest.raises(ClusterError, match=words):
            send(project, overrides=[f"data.train={train}"])
    (project / ".gitignore").write_text("data\nb.jsonl\n")
    for train in ("data/a.jsonl", "data", "b.jsonl"):
        with pytest.raises(ClusterError, match=rf"{train} exists in .*work but \.gitignore or \.rayignore keeps it"):
            send(project, overrides=[f"data.train={train}"])
    with pytest.raises(ClusterError, match=no_cluster):
        send(project, overrides=[f"data.train={project}/b.jsonl"])


def test_code_of_a_model_is_sent_only_where_that_is_allowed(project: Path) -> None:
    trusting = ["model.trust_remote_code=true"]
    with pytest.raises(
        ClusterError, match=r"^model\.trust_remote_code: true would run .* submit with --allow-remote-code"
    ):
        send(project, overrides=trusting)
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        send(project, overrides=trusting, allow_remote_code=True)


def test_invalid_recipe_is_found_here(project: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.stepps"):
        send(project, overrides=["train.stepps=3"])


@pytest.mark.parametrize("path", ["raymem-runs", "{project}/runs"])
def test_storage_in_the_working_directory(project: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.parent)
    with pytest.raises(ClusterError, match=r"storage\.path: .* lies in the working directory, .* copy; set it"):
        send(project, overrides=[f"storage.path={path.format(project=project)}"])


def test_upload_size(tmp_path: Path) -> None:
    for name, size in {
        "a.bin": 10, "big/1": 4000, "big/deep/2": 3000, "data/x": 900, "c": 800, "d": 700, "e": 600,
        ".git/objects": 9999, "skip/x": 9999, "data/tmp/y": 9999, "venv/z": 9999,
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / ".gitignore").write_text("skip/\n")
    (tmp_path / "data" / ".rayignore").write_text("tmp\n")
    sizes = packaged_files(tmp_path)
    ignore_files = {".gitignore", "data/.rayignore"}
    assert set(sizes) - ignore_files == {"a.bin", "big/1", "big/deep/2", "data/x", "c", "d", "e"}
    assert sizes["big/1"] == 4000
    check_package(tmp_path, ["big/1"], limit_bytes=20_000)
    with pytest.raises(ClusterError, match=r"more than the 0\.0 MiB that Ray takes; largest: .*; list") as caught:
        check_package(tmp_path, [], limit_bytes=10_000)
    largest = str(caught.value).split("largest: ")[1].split(";")[0]
    assert [entry.split()[0] for entry in largest.split(", ")] == ["big/", "data/", "c", "d", "e"]


def test_what_is_uploaded_is_what_ray_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own walk is private; ours has to choose the same files, whatever the ignore files say."""
    from ray._private.runtime_env.packaging import create_package

    project = tmp_path / "project"
    names = [
        "keep.py",
        "skip/x",
        "skip/keep.me",
        "logs/a.log",
        "logs/b.txt",
        "deep/logs/c.log",
        "deep/tmp/y",
        "deep/tmp.txt",
        "deep/only/here",
        "root",
        "deep/root",
        "a_b.txt",
        ".git/HEAD",
        "venv/lib",
        "deep/__pycache__/z.pyc",
        "data.bin",
        "deep/data.bin",
        "deeper/still/data.bin",
        "star/one/two/three",
        "question1",
        "question12",
        "sub/.hidden",
    ]
    for name in names:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(name)
    (project / ".gitignore").write_text("skip/*\n!skip/keep.me\n*.log\n/root\n# a comment\n\na_[a-c].txt\nquestion?\n")
    (project / ".rayignore").write_text("star/**/three\ndeeper/\n")
    (project / "deep" / ".gitignore").write_text("tmp\n!data.bin\nonly/here/\n")
    (project / "deep" / ".rayignore").write_text("/data.bin\n")
    (project / "link").symlink_to(project / "deep")
    everything = glob.glob("**/*", root_dir=project, recursive=True, include_hidden=True)
    usual = ".git,.venv,venv,__pycache__"
    for git, excludes in (("0", usual), ("1", usual), ("0", "sub, *.py")):
        monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", git)
        monkeypatch.setenv("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", excludes)
        package = tmp_path / f"{git}{len(excludes)}.zip"
        patterns = [word.strip() for word in excludes.split(",")]
        create_package(str(project), package, include_gitignore=git == "0", excludes=patterns)
        with zipfile.ZipFile(package) as archive:
            packed = {entry.filename: entry.file_size for entry in archive.infolist() if not entry.is_dir()}
        assert packaged_files(project) == packed
        assert len(names) // 3 < len(packed) < len(everything)


# ---- addresses


def test_no_cluster(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r"no Ray cluster answers at http://127.0.0.1:9 \(from --address\).*start"):
        send(project)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ClusterError, match=r"no Ray cluster answers at 127.0.0.1:9 \(from RAY_ADDRESS\)"):
        send(project, address=None)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:10")
    with pytest.raises(ClusterError, match=r"http://127.0.0.1:10 \(from RAY_API_SERVER_ADDRESS\)"):
        send(project, address=None)
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:9"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://head:10001", r"is a Ray Client address, which cannot take jobs; give the dashboard's"),
        ("ftp://head:1", r"--address: 'ftp://head:1' is no address; write http://<head>:8265"),
        ("http://head:port", r"is no address"),
    ],
)
def test_wrong_kind_of_address(project: Path, address: str, words: str) -> None:
    with pytest.raises(ClusterError, match=words):
        send(project, address=address)


@contextlib.contextmanager
def web_server(answer: bytes) -> Iterator[str]:
    """Something on loopback that is no Ray dashboard."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        if connection.recv(65536):
                            connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_not_a_dashboard(project: Path, answer: bytes) -> None:
    with web_server(answer) as address, pytest.raises(ClusterError, match=r"check that this is a Ray dashboard|no Ray"):
        send(project, address=address)


# ---- following, with a client that breaks on demand


class Flaky:
    """The log of a job whose connection breaks after each of some prefixes; each time it begins from the beginning."""

    def __init__(self, text: str, breaks: list[int], end: str = "SUCCEEDED", code: int | None = 0) -> None:
        self.text, self.breaks = text, breaks
        self.end = SimpleNamespace(status=end, driver_exit_code=code, message="why it ended")

    def get_address(self) -> str:
        return "http://head"

    def get_job_info(self, submission_id: str) -> Any:
        return SimpleNamespace(status="RUNNING") if self.breaks else self.end

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        stop_at = self.breaks.pop(0) if self.breaks else len(self.text)
        for start in range(0, stop_at, 4):
            yield self.text[start : min(start + 4, stop_at)]
        if stop_at < len(self.text):
            raise ConnectionResetError("reset by peer")


@pytest.fixture
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymem.cluster.jobs.submit.time.sleep", lambda seconds: None)


@pytest.mark.usefixtures("_no_pauses")
def test_output_is_taken_up_where_it_broke() -> None:
    text, got = "0123456789abcdefghij", list[str]()
    assert follow_logs(Flaky(text, [7, 3, 20, 10]), "j", got.append) == 0
    assert "".join(got) == text


@pytest.mark.usefixtures("_no_pauses")
def test_following_gives_up() -> None:
    with pytest.raises(ClusterError, match=r"lost the connection to http://head \(reset by peer\); the job j goes on"):
        follow_logs(Flaky("0123456789", [3] * 9), "j", lambda text: None)


@pytest.mark.parametrize(
    ("end", "code", "expected", "told"),
    [
        ("SUCCEEDED", 0, 0, False),
        ("FAILED", 7, 7, False),
        ("FAILED", -9, 137, False),
        ("FAILED", None, 1, True),
        ("STOPPED", None, 143, True),
    ],
)
def test_exit_codes(end: str, code: int | None, expected: int, told: bool) -> None:
    got: list[str] = []
    assert follow_logs(Flaky("", [], end, code), "j", got.append) == expected
    assert got == (["why it ended\n"] if told else [])


def test_names_of_jobs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which id a job gets, when a running one is joined, and that a lost race is run again."""

    def job(submission_id: str, state: str, run: str, line: str = "") -> Any:
        metadata = {RUN_METADATA: run, COMMAND_METADATA: "train"}
        return SimpleNamespace(submission_id=submission_id, status=state, metadata=metadata, entrypoint=line)

    class Client:
        def __init__(self, *jobs: Any, rival: Any = None) -> None:
            self.jobs, self.rival, self.sent = list(jobs), rival, list[dict[str, Any]]()

        def get_address(self) -> str:
            return "http://head"

        def list_jobs(self) -> list[Any]:
            return list(self.jobs)

        def submit_job(self, **arguments: Any) -> str:
            if self.rival:
                self.jobs.append(self.rival)
                self.rival = None
                raise RuntimeError("status code 500: Job with submission_id x already exists.")
            self.sent.append(arguments)
            return str(arguments["submission_id"])

    def sent(client: Client, **arguments: Any) -> tuple[str, bool]:
        monkeypatch.setattr("raymem.cluster.jobs.submit.connect_jobs", lambda address: client)
        done = send(project, follow=False, **arguments)
        return done.submission_id, done.attached

    a = ["name=a"]
    assert sent(Client(), overrides=a) == ("raymem-a", False)
    assert sent(Client(), overrides=a, submission_id="mine") == ("mine", False)
    assert sent(Client(job("raymem-a", "RUNNING", "a")), overrides=a) == ("raymem-a", True)
    assert sent(Client(job("raymem-a", "PENDING", "a")), overrides=a) == ("raymem-a", True)
    ended = [job("raymem-a", "FAILED", "a"), job("raymem-a-2", "STOPPED", "a")]
    assert sent(Client(*ended), overrides=a) == ("raymem-a-3", False)
    # run "a-2" is another run, although its job has the name of the second job of "a"
    assert sent(Client(job("raymem-a", "FAILED", "a"), job("raymem-a-2", "RUNNING", "a-2")), overrides=a) == (
        "raymem-a-3",
        False,
    )
    assert sent(Client(rival=job("raymem-a", "PENDING", "a")), overrides=a) == ("raymem-a", True)
    assert sent(Client(rival=job("raymem-a", "PENDING", "b")), overrides=a) == ("raymem-a-2", False)

    # What a job under way does not do is not answered by following it; the very same command line is.
    fresh = {"overrides": a, "arguments": ["--fresh"]}
    client = Client()
    assert sent(client, **fresh) == ("raymem-a", False)
    line = client.sent[0]["entrypoint"]
    assert line == "python -m raymem train 'my recipe.yaml' --set name=a --fresh"
    assert client.sent[0]["metadata"] == {RUN_METADATA: "a", COMMAND_METADATA: "train"}
    assert sent(Client(job("raymem-a", "RUNNING", "a", line)), **fresh) == ("raymem-a", True)
    assert sent(Client(job("raymem-a", "RUNNING", "a", line)), overrides=a) == ("raymem-a", True)
    under_way = r"run 'a' is under way as job raymem-a {}; wait for its end, or stop it with --stop, and submit again"
    with pytest.raises(ClusterError, match=under_way.format("and would not start over")):
        sent(Client(job("raymem-a", "RUNNING", "a", "python -m raymem train")), **fresh)
    with pytest.raises(ClusterError, match=under_way.format(r"\(train\)")):
        sent(Client(job("raymem-a", "RUNNING", "a", line)), overrides=a, command="evaluate")
    assert sent(Client(job("raymem-a", "FAILED", "a", line)), overrides=a, command="evaluate") == ("raymem-a-2", False)


def test_command_line(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--status and --stop look at the newest job of the run, and --id at any."""
    from raymem.cli.main import run_app

    def job(submission_id: str, state: str, start: int, run: str = "run1") -> Any:
        return SimpleNamespace(
            submission_id=submission_id, status=state, metadata={RUN_METADATA: run}, start_time=start, message="why"
        )

    jobs = {
        j.submission_id: j
        for j in (job("raymem-run1", "FAILED", 1), job("raymem-run1-2", "RUNNING", 3), job("other", "FAILED", 9, "x"))
    }

    class Client:
        def get_address(self) -> str:
            return "http://head"

        def list_jobs(self) -> list[Any]:
            return list(jobs.values())

        def get_job_info(self, submission_id: str) -> Any:
            return jobs[submission_id]

        def stop_job(self, submission_id: str) -> None:
            jobs[submission_id].status = "STOPPED"

    monkeypatch.setattr("raymem.cluster.jobs.submit.connect_jobs", lambda address: Client())

    def run(*arguments: str) -> tuple[int, str]:
        code = run_app("submit", project / "my recipe.yaml", "--set", "name=run1", *arguments)
        return code, "".join(capsys.readouterr())

    assert run("--status") == (0, "raymem-run1-2: RUNNING\n")
    assert run("--status", "--id", "raymem-run1") == (1, "raymem-run1: FAILED\nwhy\n")
    assert run("--stop") == (0, "raymem-run1-2: STOPPED\n")
    code, shown = run("--status", "--set", "name=none")
    assert (code, shown.startswith("error: no job of run 'none' at http://head; submit it first, or name a")) == (
        1,
        True,
    )
    code, shown = run("--status", "--command", "sweep", "--", "--name", "x")
    assert (code, shown) == (1, "other: FAILED\nwhy\n"), "a sweep is a run of its own"
    code, shown = run("--status", "--command", "sweep")
    assert (code, shown.startswith("error: no job of run 'run1-sweep' at")) == (1, True)
    code, shown = run("--status", "--stop")
    assert (code, "give one of --status, --stop and --checkpoint" in shown) == (2, True)


def test_what_the_command_line_sends(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from raymem.cli.main import run_app

    sent = jobs_sent(monkeypatch)
    monkeypatch.chdir(project)
    space = "adapter.rank: {type: choice, choices: [2, 4]}\n"
    (project / "mine.yaml").write_text(space)

    def line(*arguments: str) -> tuple[str, str]:
        assert run_app("submit", "my recipe.yaml", "--no-follow", *arguments) == 0, capsys.readouterr().err
        return sent[-1]["submission_id"], sent[-1]["entrypoint"].removeprefix("python -m raymem ")

    recipe = "'my recipe.yaml'"
    assert line() == ("raymem-run1", f"train {recipe}")
    shown = capsys.readouterr().out
    assert "submitted as raymem-run1" in shown
    assert "next: raymem submit my recipe.yaml --id raymem-run1 --status" in shown
    assert line("-s", "seed=1", "--", "--force", "-s", "name=a") == (
        "raymem-a",
        f"train {recipe} --set seed=1 --set name=a --force",
    )
    assert line("--command", "loram run", "--", "--with-lora", "--no-forward") == (
        "raymem-run1",
        f"loram run {recipe} --with-lora --no-forward",
    )
    assert line("--command", "loram  train", "--", "--fresh") == ("raymem-run1", f"loram train {recipe} --fresh")
    arguments = ("--space", "mine.yaml", "--budget", "1GiB", "--name", "search")
    assert line("--command", "sweep", "--", *arguments) == ("raymem-search", f"sweep {recipe} {' '.join(arguments)}")
    assert sent[-1]["metadata"] == {RUN_METADATA: "search", COMMAND_METADATA: "sweep"}
    assert line("--command", "sweep", "--", "--space", "joint", "--budget", "1GiB")[0] == "raymem-run1-sweep"
    (project / ".gitignore").write_text("mine.yaml\n")
    count = len(sent)
    assert run_app("submit", "my recipe.yaml", "--command", "sweep", "--", *arguments) == 1
    assert "mine.yaml exists in" in capsys.readouterr().err
    assert len(sent) == count


# ---- a real head


def test_missing_and_wrong_tokens(ray_head: RayHead, login: Callable[..., None], project: Path, tmp_path: Path) -> None:
    got_none = rf"Ray cluster {ray_head.dashboard} \(from --address\) wants a token and got none; export RAY_AUTH_MODE"
    login(mode="disabled")
    with pytest.raises(ClusterError, match=got_none):
        send(project, address=ray_head.dashboard)
    login(token_path=None)
    with pytest.raises(ClusterError, match=got_none):
        send(project, address=ray_head.dashboard)
    login(token_path=tmp_path / "absent")
    with pytest.raises(ClusterError, match="token"):
        send(project, address=ray_head.dashboard)
    (tmp_path / "wrong").write_text("not-the-token")
    login(token_path=tmp_path / "wrong")
    for call in (lambda: send(project, address=ray_head.dashboard), lambda: status("x", ray_head.dashboard)):
        with pytest.raises(ClusterError, match=r"refused the token; export RAY_AUTH_MODE=token") as caught:
            call()
        assert "not-the-token" not in str(caught.value)


def test_every_kind_of_address(ray_head: RayHead, login: Callable[..., None]) -> None:
    login()
    for address in (
        ray_head.dashboard,
        ray_head.dashboard + "/",
        ray_head.dashboard.removeprefix("http://"),
        ray_head.gcs,
    ):
        assert connect_jobs(address).get_address() == ray_head.dashboard


def test_unknown_job(ray_head: RayHead, login: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    login()
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")  # the argument wins over it
    words = rf"no job raymem-none at {ray_head.dashboard}; `ray job list` shows"
    with pytest.raises(ClusterError, match=words):
        status("raymem-none", ray_head.dashboard)
    with pytest.raises(ClusterError, match=words):
        stop("raymem-none", ray_head.dashboard)
    with pytest.raises(ClusterError, match=words):
        follow_logs(connect_jobs(ray_head.dashboard), "raymem-none")


@pytest.mark.slow  # tests/e2e/test_installed.py sends jobs in the default tier
def test_a_job_from_start_to_end(
    ray_head: RayHead,
    login: Callable[..., None],
    project: Path,
    tmp_path: Path,
    llama: Path,
    examples: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Submit a long run and look at it; stop it, send it again and follow it to its end; then one that fails.

    The data lies beside the recipe, which names it relatively, and travels with it.
    """
    login()
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray_head.dashboard)
    monkeypatch.setenv("MY_SETTING", "7")
    monkeypatch.chdir(project)
    shutil.copy(examples / "train.jsonl", project)
    recipe = make_recipe({"name": "e2e", "train": {"steps": STEPS, "save_every": 1}}, model=llama).to_dict()
    recipe["data"]["train"] = "train.jsonl"
    (project / "my recipe.yaml").write_text(yaml.safe_dump(recipe))
    overrides = [f"storage.path={tmp_path}/a b'c"]  # through two shells
    checkpoints = tmp_path / "a b'c" / "e2e" / "checkpoints"

    first = send(project, address=None, overrides=overrides, arguments=["--force"], follow=False)
    assert (first.submission_id, first.attached, first.exit_code) == ("raymem-e2e", False, None)
    assert first.address == ray_head.dashboard
    second = send(project, address=None, overrides=overrides, follow=False)
    assert (second.submission_id, second.attached) == ("raymem-e2e", True)
    assert status("raymem-e2e").status in ("PENDING", "RUNNING")
    with pytest.raises(ClusterError, match=r"run 'e2e' is under way as job raymem-e2e \(train\); wait for its end"):
        send(project, address=None, overrides=overrides, command="evaluate")
    with pytest.raises(ClusterError, match=r"is under way as job raymem-e2e and would not start over"):
        send(project, address=None, overrides=overrides, arguments=["--fresh"])
    wait_for_checkpoint(checkpoints, "raymem-e2e")
    assert status("raymem-e2e").status == "RUNNING"
    assert stop("raymem-e2e").status == "STOPPED"
    assert stop("raymem-e2e").status == "STOPPED"
    reached = max(int(file.parent.name.removeprefix("step_")) for file in checkpoints.glob("step_*/manifest.json"))
    assert f"step 1/{STEPS}" in connect_jobs().get_job_logs("raymem-e2e")
    capfd.readouterr()

    overrides.append(f"train.steps={reached + 3}")
    third = send(project, address=None, overrides=overrides, env_passthrough=["MY_SETTING"])
    output, errors = capfd.readouterr()
    assert (third.submission_id, third.attached, third.exit_code) == ("raymem-e2e-2", False, 0), output
    assert f"trained {reached + 3} steps (resumed at {reached})" in output
    assert errors == ""  # Ray's own chatter
    info = connect_jobs().get_job_info("raymem-e2e-2")
    assert shlex.split(info.entrypoint)[:5] == ["python", "-m", "raymem", "train", "my recipe.yaml"]
    assert set(info.runtime_env) <= {"working_dir", "env_vars", "_ray_commit"}
    assert info.runtime_env["env_vars"] == {"MY_SETTING": "7"}

    fourth = send(project, address=None, arguments=["--forse"])  # the command line would have seen it
    assert (fourth.submission_id, fourth.exit_code) == ("raymem-e2e-3", 2)
    assert "No such option: --forse" in capfd.readouterr().out
    assert status("raymem-e2e-3").status == "FAILED"


def wait_for_checkpoint(checkpoints: Path, submission_id: str) -> int:
    """Step of the newest one, as soon as there is one."""
    deadline = time.monotonic() + 120
    while not (found := list(checkpoints.glob("step_*/manifest.json"))):
        assert time.monotonic() < deadline, connect_jobs().get_job_logs(submission_id)
        assert status(submission_id).status in ("PENDING", "RUNNING"), connect_jobs().get_job_logs(submission_id)
        time.sleep(0.2)
    return max(int(file.parent.name.removeprefix("step_")) for file in found)
