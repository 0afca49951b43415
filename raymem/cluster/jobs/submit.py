"""Sends a recipe to a Ray cluster as a job, follows it, stops it.

The job is only a vehicle: the *run* is identified by its name on its storage, so a job that was lost is simply sent
again and goes on from the last checkpoint.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymem.cluster.jobs.client import connect_jobs, explained
from raymem.cluster.jobs.entrypoint import check_command, entrypoint
from raymem.cluster.jobs.upload import check_package
from raymem.errors import ClusterError
from raymem.recipe.load import load_recipe
from raymem.recipe.paths import is_local
from raymem.recipe.schema import Recipe
from raymem.storage.uris import secret_in

RUN_METADATA = "raymem.run"
COMMAND_METADATA = "raymem.command"
_SECRET = re.compile("TOKEN|SECRET|PASSWORD|KEY|CREDENTIAL", re.IGNORECASE)
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_RECONNECTS = 5

Out = Callable[[str], None]


@dataclass(frozen=True)
class Submission:
    """A job that was sent, or found running."""

    submission_id: str
    address: str
    attached: bool
    """True if a job of this run was already there, and no second one was started."""
    exit_code: int | None
    """The exit code of the job; None if it was not followed."""


@dataclass(frozen=True)
class JobState:
    """The state of a job when it was looked at."""

    submission_id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str


def submit(
    recipe_path: str | Path,
    *,
    command: str = "train",
    arguments: Sequence[str] = (),
    files: Sequence[str] = (),
    run: str | None = None,
    overrides: Sequence[str] = (),
    address: str | None = None,
    working_dir: str | Path = ".",
    submission_id: str | None = None,
    follow: bool = True,
    env_passthrough: Sequence[str] = (),
    allow_remote_code: bool = False,
    out: Out | None = None,
) -> Submission:
    """Send ``python -m raymem <command> <recipe> --set ... <arguments>`` as a job; the recipe is validated here first.

    Args:
        command: One of :data:`raymem.cluster.jobs.entrypoint.COMMANDS`.
        arguments: What else the command takes; the command line checks them.
        files: Files that the arguments name, relative to ``working_dir``.
        run: What the job works on, of which only one job at a time is started; by default the recipe's name.
        overrides: ``a.b=value``, passed on as ``--set``.
        address: Dashboard; by default RAY_API_SERVER_ADDRESS, then RAY_ADDRESS, then a cluster on this machine.
        working_dir: Directory that is uploaded.
        submission_id: By default ``raymem-<run>``; ``-2``, ``-3`` ... is appended once that job has ended.
        env_passthrough: Names of environment variables that the job gets. They are readable by everyone who can list
            jobs, so names that look like secrets are refused.
        allow_remote_code: Send a recipe that lets code of its model run.
        out: Receives the job's output while it is followed; by default it is printed.

    Raises:
        RecipeError: the recipe with its overrides is not valid.
        ClusterError: no cluster, no permission, code of a model that is not allowed, a file outside of the upload, an
            upload that is too large, a secret, a storage path that would lie in the job's temporary copy of the working
            directory, no such command, or a job of this run is under way and does something else.
    """
    root = Path(working_dir).resolve()
    if not root.is_dir():
        raise ClusterError(f"working directory {root} does not exist; give the directory that holds the recipe")
    for where, word in [
        *((f"--set {override.partition('=')[0]}", override) for override in overrides),
        *((f"argument {number} of {command}", word) for number, word in enumerate(arguments, 1)),
    ]:
        if found := secret_in(word):
            raise ClusterError(
                f"{where}: an address with {found} would be visible in the list of jobs; take it out, and "
                "mount the secret on the cluster"
            )
    recipe = load_recipe(recipe_path, overrides)
    if recipe.model.trust_remote_code and not allow_remote_code:
        raise ClusterError(
            f"model.trust_remote_code: true would run code that {recipe.model.name} brings on every node, with the "
            "cluster's credentials; read it, and submit with --allow-remote-code, or take the key out"
        )
    recipe_name = _inside(root, Path(recipe_path), "recipe")
    needed = [recipe_name, *(_inside(root, root / name, "file") for name in files)]
    needed += _data_beside(load_recipe(recipe_path, overrides, resolve=False), root)
    _check_storage(recipe.storage.path, root)
    runtime_env: dict[str, Any] = {"working_dir": str(root)}
    if variables := _environment(env_passthrough):
        runtime_env["env_vars"] = variables
    line = entrypoint(command, recipe_name, overrides, arguments)
    check_package(root, needed)

    client = connect_jobs(address)
    cluster = client.get_address()
    run = run or recipe.name
    metadata = {RUN_METADATA: run, COMMAND_METADATA: check_command(command)}
    job, attached = _find_or_submit(client, submission_id or f"raymem-{run}", line, runtime_env, metadata)
    code = follow_logs(client, job, out) if follow else None
    return Submission(job, cluster, attached, code)


def follow_logs(client: Any, submission_id: str, out: Out | None = None) -> int:
    """Print a job's output until it ends; a lost connection is taken up again where it broke.

    Returns:
        0 if the job succeeded, else its own exit code (143 if it was stopped, 1 if it has none).

    Raises:
        ClusterError: no such job, or the cluster stays away.
    """
    from aiohttp import ClientError  # what the stream raises when the head goes away; Ray brings it along

    write = out or (lambda text: print(text, end="", flush=True))
    seen = failures = 0

    async def tail() -> None:
        nonlocal seen
        position = 0
        async for text in client.tail_job_logs(submission_id):
            fresh = text[max(0, seen - position) :]  # the server always begins at the beginning
            position += len(text)
            seen = max(seen, position)
            if fresh:
                write(fresh)

    with explained(client.get_address()):
        info = job_info(client, submission_id)
    while True:
        try:
            # A pending job has no log yet: the server waits for it, and closes the stream when the job has ended.
            asyncio.run(tail())
            info = client.get_job_info(submission_id)
            failures = 0
        except (OSError, RuntimeError, ClientError) as error:
            failures += 1
            if failures > _RECONNECTS:
                raise ClusterError(
                    f"lost the connection to {client.get_address()} ({' '.join(str(error).split())[:200]}); "
                    f"the job {submission_id} goes on: submit again to follow it"
                ) from error
        if info.status in ENDED:
            break
        time.sleep(min(2.0**failures, 10.0))
    if info.status == "SUCCEEDED":
        return 0
    code = info.driver_exit_code
    if code is None:
        write(f"{info.message}\n")  # it never ran, for example because its environment could not be made
    if info.status == "STOPPED":
        return 143
    return (128 - code if code < 0 else code) if code else 1


def status(submission_id: str, address: str | None = None) -> JobState:
    """Look at a job. Raises ClusterError if it or the cluster is not there."""
    client = connect_jobs(address)
    with explained(client.get_address()):
        info = job_info(client, submission_id)
    return JobState(submission_id, str(info.status), info.message or "")


def last_job(run: str, address: str | None = None) -> str:
    """Return the id of the newest job of a run. Raises ClusterError if the cluster has none, or is not there."""
    client = connect_jobs(address)
    with explained(client.get_address()):
        ours = [
            job for job in client.list_jobs() if job.submission_id and (job.metadata or {}).get(RUN_METADATA) == run
        ]
    if not ours:
        raise ClusterError(
            f"no job of run {run!r} at {client.get_address()}; submit it first, or name a job with --id "
            "(`ray job list` shows them)"
        )
    return str(max(ours, key=lambda job: job.start_time or 0).submission_id)


def stop(submission_id: str, address: str | None = None, timeout_s: float = 30.0) -> JobState:
    """Stop a job and wait until it has ended; one that has ended already is left as it is.

    The run can be resumed from its last checkpoint by submitting it again.

    Raises:
        ClusterError: no such job, no cluster, or it does not end in time.
    """
    client = connect_jobs(address)
    with explained(client.get_address()):
        job_info(client, submission_id)
        client.stop_job(submission_id)
        deadline = time.monotonic() + timeout_s
        while (info := job_info(client, submission_id)).status not in ENDED:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"job {submission_id} is still {info.status} {timeout_s:.0f} s after it was told to stop; "
                    "look at it again later, or stop the cluster"
                )
            time.sleep(0.2)
    return JobState(submission_id, str(info.status), info.message or "")


def _find_or_submit(
    client: Any, name: str, line: str, runtime_env: dict[str, Any], metadata: dict[str, str]
) -> tuple[str, bool]:
    with explained(client.get_address()):
        for _ in range(3):
            jobs = client.list_jobs()
            for job in jobs:
                # By metadata: the id raymem-a-2 is the second job of run "a", or the first of run "a-2".
                theirs = job.metadata or {}
                if job.status in ENDED or not job.submission_id or theirs.get(RUN_METADATA) != metadata[RUN_METADATA]:
                    continue
                _check_same(job, line, metadata)
                return str(job.submission_id), True
            taken = {job.submission_id for job in jobs}
            candidate, number = name, 1
            while candidate in taken:
                number += 1
                candidate = f"{name}-{number}"
            try:
                submitted = client.submit_job(
                    entrypoint=line,
                    submission_id=candidate,
                    runtime_env=runtime_env,
                    metadata=metadata,
                )
                return str(submitted), False
            except RuntimeError as error:
                if "already exists" not in str(error):  # else another submitter was faster: look again
                    raise
    raise ClusterError(f"job {name} could not be named: others keep submitting it; try again")


def _check_same(job: Any, line: str, metadata: dict[str, str]) -> None:
    """Refuse to follow a job that does something else than the caller asked for, or would not start over."""
    ours, theirs = metadata[COMMAND_METADATA], job.metadata.get(COMMAND_METADATA, "train")
    if line == job.entrypoint or (ours == theirs and "--fresh" not in shlex.split(line)):
        return
    what = f"({theirs})" if ours != theirs else "and would not start over"
    raise ClusterError(
        f"run {metadata[RUN_METADATA]!r} is under way as job {job.submission_id} {what}; wait for its end, or stop it "
        "with --stop, and submit again"
    )


def job_info(client: Any, submission_id: str) -> Any:
    """Return Ray's facts about a job. Raises ClusterError if there is none of that id."""
    try:
        return client.get_job_info(submission_id)
    except RuntimeError as error:
        if "status code 404" not in str(error):
            raise
        raise ClusterError(
            f"no job {submission_id} at {client.get_address()}; `ray job list` shows those that it knows"
        ) from error


def _inside(root: Path, path: Path, what: str) -> str:
    resolved = path.resolve()
    if not resolved.is_file():
        raise ClusterError(f"{what} {path} does not exist; give a file below the working directory {root}")
    if not resolved.is_relative_to(root):
        raise ClusterError(
            f"{what} {path} lies outside of the working directory {root} and would not reach the cluster; "
            "move it below, or give another --working-dir"
        )
    return resolved.relative_to(root).as_posix()


def _data_beside(recipe: Recipe, root: Path) -> list[str]:
    """List data that the recipe names relative to the working directory, from which it travels with the job."""
    names = []
    for split in ("train", "eval"):
        for index, source in enumerate(getattr(recipe.data, split) or ()):
            path = Path(source.path)
            if not is_local(source.path, root) or path.is_absolute() or source.path.startswith("~"):
                continue
            where = f"data.{split}[{index}].path: {path}"
            below = Path(os.path.normpath(root / path))  # a link stays: Ray packs what it points to
            if not below.exists():
                raise ClusterError(
                    f"{where} does not exist below the working directory {root}, which is what the job gets; put it "
                    "there, or give a path that every node sees"
                )
            if not below.is_relative_to(root):
                raise ClusterError(
                    f"{where} lies outside of the working directory {root} and would not reach the cluster; move it "
                    "below, or give a path that every node sees"
                )
            names.append(below.relative_to(root).as_posix())
    return names


def _check_storage(path: str, root: Path) -> None:
    if "://" not in path and any(Path(path).is_relative_to(base) for base in (root, Path.cwd())):
        raise ClusterError(
            f"storage.path: {path} lies in the working directory, of which a job has only a temporary copy; "
            "set it to a directory that every node sees, s3:// or gs:// (--set storage.path=...)"
        )


def _environment(names: Sequence[str]) -> dict[str, str]:
    variables = {}
    for name in names:
        if _SECRET.search(name):
            raise ClusterError(
                f"environment variable {name} looks like a secret, and the environment of a job is readable by "
                "everyone who can list jobs; mount it on the cluster instead (a Kubernetes Secret with envFrom, or "
                "the environment of `ray start`)"
            )
        if name not in os.environ:
            raise ClusterError(f"environment variable {name} is to be passed on but is not set here; export it first")
        variables[name] = os.environ[name]
    return variables
