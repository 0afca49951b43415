"""Groups of processes for tests of several ranks, forked from a server that imported the large libraries once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import raymem

PRELOADED = "raymem.testing.preloaded"


def start_server(preloaded: str = PRELOADED) -> ForkServerContext:
    """Let the server that forks processes begin its imports; they go on in the background.

    Args:
        preloaded: the module that it imports; a server that runs keeps its own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preloaded])
    before = os.environ.get("PYTHONPATH")
    # The server is not told sys.path and skips what it cannot find.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(raymem.__file__).parents[1]), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def in_processes(work: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> list[Any]:
    """Call ``work(*arguments)`` on every rank of a fresh gloo group; returns what each rank returned.

    A group costs about a second.

    Args:
        work: a function at the top of a module, since processes import it by name.
        world_size: number of ranks; 0 is one process without a group.
        folder: where the ranks meet.
    """
    context = start_server()
    folder.mkdir(parents=True, exist_ok=True)
    pipes = [context.Pipe(duplex=False) for _ in range(max(1, world_size))]
    started = [
        context.Process(target=_work, args=(sender, work, rank, world_size, str(folder / "meet"), arguments))
        for rank, (_, sender) in enumerate(pipes)
    ]
    try:
        for process in started:
            process.start()
        for _, sender in pipes:
            sender.close()
        outcomes = [pickle.loads(receiver.recv_bytes()) for receiver, _ in pipes]
    except EOFError:
        raise AssertionError(f"a process died: exit codes {[process.exitcode for process in started]}") from None
    finally:
        for process in started:
            process.join(timeout=10)
            process.kill()
        (folder / "meet").unlink(missing_ok=True)
    failures = [f"rank {rank}:\n{trace}" for rank, (_, trace) in enumerate(outcomes) if trace]
    assert not failures, "\n".join(failures)
    return [result for result, _ in outcomes]


def _work(
    sender: Connection, work: Callable[..., Any], rank: int, world_size: int, meet: str, arguments: Sequence[Any]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if world_size:
            dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world_size)
        # Plain pickle copies tensors; the pickler of multiprocessing would share memory with a process that ends.
        sender.send_bytes(pickle.dumps((work(*arguments), None)))
    except BaseException:
        sender.send_bytes(pickle.dumps((None, traceback.format_exc())))
    finally:
        sender.close()
        os._exit(0)  # what is left of a failed group would wait for its peers
