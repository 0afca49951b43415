"""Has a job that trains save a checkpoint at its next step boundary, without ending it.

Whoever asks may reach nothing of the cluster but its job server. So a small job is sent, on the cluster's side of it:
that one finds the mailbox of the run, leaves the request there, waits for the answer and prints it.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
import uuid
from typing import Any

from raymem.cluster.jobs.client import connect_jobs, explained
from raymem.cluster.jobs.submit import COMMAND_METADATA, ENDED, follow_logs, job_info
from raymem.errors import ClusterError
from raymem.recipe.schema import ScalingSection

_TRAIN = ("train", "loram run", "loram align", "loram train")
"""The commands of jobs that train one run."""
_AGAIN = "submit the recipe again to go on from its last checkpoint"
_MARK = "raymem-answer:"
_LOOK_EVERY_S = 0.5


def save(submission_id: str, address: str | None, scaling: ScalingSection) -> str:
    """Have a job save a checkpoint, and say which it is; waits until it is whole where it belongs.

    Args:
        address: dashboard, see :func:`raymem.cluster.jobs.submit.submit`.
        scaling: of the job's recipe.

    Raises:
        ClusterError: no such job, it does not train, it has ended, or it ends before the checkpoint is whole.
    """
    client = connect_jobs(address)
    with explained(client.get_address()):
        job = job_info(client, submission_id)
    _check_trains(submission_id, job, scaling)
    driver = job.driver_info.id if job.driver_info is not None else job.job_id
    if not driver:
        raise ClusterError(f"job {submission_id} is {job.status} and takes no steps yet; ask again once it does")
    line = shlex.join(["python", "-m", "raymem.cluster.jobs.checkpoint", driver])
    with explained(client.get_address()):
        asking = client.submit_job(entrypoint=line, submission_id=f"{submission_id}-ask-{uuid.uuid4().hex[:8]}")
    output: list[str] = []
    follow_logs(client, asking, output.append)
    lines = "".join(output).splitlines()
    with explained(client.get_address()):
        client.delete_job(asking)
    answer = next((json.loads(text.removeprefix(_MARK)) for text in lines if text.startswith(_MARK)), None)
    if answer is None:
        said = " ".join(" ".join(lines[-3:]).split())[-300:]
        raise ClusterError(
            f"job {submission_id} could not be asked: the job {asking}, which was to do that, says: {said}; install "
            "the same raymem on the cluster as here"
        )
    if "problem" in answer:
        raise ClusterError(f"job {submission_id} {answer['problem']}")
    return f"step {answer['step']} is saved in {answer['checkpoints']}"


def _check_trains(submission_id: str, job: Any, scaling: ScalingSection) -> None:
    if job.status in ENDED:
        raise ClusterError(f"job {submission_id} has ended ({job.status}) and saves no more; {_AGAIN}")
    command = (job.metadata or {}).get(COMMAND_METADATA, "train")
    if command not in _TRAIN:
        raise ClusterError(
            f"job {submission_id} runs `raymem {command}`, which trains no run of its own; checkpoints are for "
            f"{', '.join(_TRAIN)}"
        )
    if scaling.num_workers == 0:
        raise ClusterError(
            f"job {submission_id}: scaling.num_workers: 0 trains in the job's own process, which nobody can ask; it "
            "saves every train.save_every steps, and its last step before --stop ends it"
        )


def main(job_id: str) -> int:
    """Ask the run of a job on this cluster for a checkpoint, and print the answer; returns an exit status."""
    import ray

    from raymem.cluster.train.mailbox import mailbox_of

    ray.init(log_to_driver=False, logging_level="ERROR")
    try:
        box = mailbox_of(job_id)
        if box is None:
            return _answer(problem="takes no steps now (it prepares, or has trained already); ask again once it does")
        try:
            request = ray.get(box.ask_to_save.remote())
            while (saved := ray.get(box.answer.remote(request))) is None:
                time.sleep(_LOOK_EVERY_S)
        except ray.exceptions.RayActorError:
            return _answer(problem=f"ended before it had saved; {_AGAIN}")
        step, checkpoints = saved
        return _answer(step=step, checkpoints=checkpoints)
    finally:
        ray.shutdown()


def _answer(**values: Any) -> int:
    print(f"{_MARK}{json.dumps(values)}", flush=True)
    return int("problem" in values)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
