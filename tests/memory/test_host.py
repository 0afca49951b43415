"""Memory of the host: how much of it is taken, and that copies on a CUDA stream are ordered on both sides."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from raymem.memory.host import CopyLane, host_empty, host_like, pinned_bytes
from raymem.memory.target import planned_for
from raymem.memory.trace import Tracer

CPU = torch.device("cpu")


def test_page_locked_memory_is_rounded_up_to_a_power_of_two() -> None:
    assert [pinned_bytes(size) for size in (1, 4096, 4097, 3 << 20)] == [1, 4096, 8192, 4 << 20]


@pytest.mark.parametrize(("kind", "taken"), [("cpu", 4 * 3000), ("cuda", 16384)])
def test_what_is_made_on_the_host_is_told_from_the_device(kind: str, taken: int) -> None:
    with planned_for(kind), Tracer(host_is_device=kind == "cpu") as tracer:
        on_host = host_empty(3000, torch.float32, CPU)
        on_device = torch.empty(3000)
        records = [change.record for change in tracer.changes]
        assert [(record.on_host, record.num_bytes) for record in records] == [(True, taken), (False, 4 * 3000)]
        assert tracer.is_apart(on_host) == (kind == "cuda") and not tracer.is_apart(on_device)


def test_a_tensor_like_another_has_its_layout() -> None:
    other = torch.randn(6, 4).t()
    like = host_like(other, CPU).copy_(other)
    assert like.stride() == other.stride() and torch.equal(like, other)


class Recorder:
    """Stands for a CUDA stream, and writes down what it is told."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Recorder) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Any) -> None:
        self.log.append(f"{self.name} waits for {event}")


def test_on_a_stream_copies_wait_for_the_computation_and_the_computation_for_a_mark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    computation = Recorder("computation", log)

    @contextlib.contextmanager
    def on(stream: Recorder) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield
        log.append(f"off {stream.name}")

    class Event:
        def record(self, stream: Recorder) -> None:
            log.append(f"mark on {stream.name}")

        def __str__(self) -> str:
            return "the mark"

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Recorder("lane", log))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computation)
    monkeypatch.setattr(torch.cuda, "stream", on)
    lane = CopyLane(torch.device("cuda", 0))
    source, target = torch.randn(4), torch.empty(4)
    lane.copy(target, source)
    lane.wait(lane.mark())
    assert torch.equal(target, source)
    assert log == [
        "lane waits for computation", "on lane", "off lane", "mark on lane", "computation waits for the mark",
    ]  # fmt: skip
