"""Faults of files that raymem reads: the command is killed, files are damaged, and the command is given again."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from raymem.storage.storage import Storage
from tests.faults.checks import names_in
from tests.faults.fault import Fault
from tests.faults.sessions import Session

if TYPE_CHECKING:
    from tests.faults.rounds import Round


class _Damage(Fault):
    """Kill, then damage some files; when the next session stops because of it, what was there is put back."""

    def inject(self, round_: Round, session: Session) -> None:
        session.kill()

    def before(self, round_: Round, number: int) -> None:
        if number != 2:
            return
        storage = Storage.open(round_.storage)
        files = [name for name in names_in(round_.storage) if _is_file(storage, name) and not name.startswith(".locks")]
        self._copy = {name: storage.read_bytes(name) for name in files}
        targets = [name for name in files if self._copy[name] and not name.endswith("metrics.jsonl")]
        if not targets:
            return
        # By kind of file first: there are many more checkpoints than anything else.
        by_kind: dict[str, list[str]] = {}
        for name in targets:
            by_kind.setdefault(_kind_of(name), []).append(name)
        kind = self.draw.choice(sorted(by_kind))
        chosen = self.draw.sample(by_kind[kind], k=min(len(by_kind[kind]), self.draw.choice((1, 1, 1, 2))))
        for name in chosen:
            self.damage(storage, name, self._copy[name])
        round_.detail = f"{kind}: {', '.join(chosen)}"

    def damage(self, storage: Storage, name: str, content: bytes) -> None:
        """Do harm to one file."""

    def heal(self, round_: Round, session: Session) -> None:
        if len(round_.sessions) != 2 or session.status == 0 or not hasattr(self, "_copy"):
            return
        storage = Storage.open(round_.storage)
        for name in names_in(round_.storage):
            top = name.split("/")
            for depth, part in enumerate(top):
                if part.startswith("damaged-") and depth == len(top) - 1:
                    storage.delete_dir(name)
        for name, content in self._copy.items():
            _write(storage, name, content)


class Truncated(_Damage):
    """Files end too early, or are empty."""

    name = "file truncated"

    def damage(self, storage: Storage, name: str, content: bytes) -> None:
        _write(storage, name, content[: self.draw.choice((0, self.draw.randrange(len(content))))])


class BitFlipped(_Damage):
    """One bit of a file is another."""

    name = "bit flipped"

    def damage(self, storage: Storage, name: str, content: bytes) -> None:
        changed, at = bytearray(content), self.draw.randrange(len(content))
        changed[at] ^= 1 << self.draw.randrange(8)
        _write(storage, name, bytes(changed))


class Deleted(_Damage):
    """Files are gone."""

    name = "file deleted"

    def damage(self, storage: Storage, name: str, content: bytes) -> None:
        storage.filesystem.delete_file(f"{storage.root}/{name}")


class Garbled(_Damage):
    """Files hold something else: other JSON, zeros, another file's bytes."""

    name = "file garbled"

    def damage(self, storage: Storage, name: str, content: bytes) -> None:
        other = self.draw.choice(
            (b"[]", b"{}", b"null\n", bytes(len(content)), random.Random(1).randbytes(len(content)))
        )
        _write(storage, name, other)


class Strays(Fault):
    """Other people's files and directories lie among raymem's, as do those of a killed save."""

    name = "stray files"
    can_fail = False

    def inject(self, round_: Round, session: Session) -> None:
        session.kill()

    def before(self, round_: Round, number: int) -> None:
        storage = Storage.open(round_.storage)
        strays = {
            "run/checkpoints/step_abc/manifest.json": b"{}",
            "run/checkpoints/step_00000099/shard-00001-model-00001-of-00001.safetensors": b"half",
            "run/checkpoints/step_00000098/manifest.json": b"[]",
            "run/checkpoints/.step_00000097.part/manifest.json": b"{}",
            "run/checkpoints/notes.txt": b"mine",
            "run/adapter/notes.txt": b"mine",
            "cache/data/README": b"mine",
            "cache/data/0123/manifest.json": b"{}",
        }
        if not latest_steps(round_):  # a run whose only checkpoint is damaged stops, and rightly
            del strays["run/checkpoints/step_00000098/manifest.json"]
        if not storage.is_local:  # there a save is staged on the node
            del strays["run/checkpoints/.step_00000097.part/manifest.json"]
        chosen = self.draw.sample(sorted(strays), k=self.draw.randint(1, 4))
        for name in chosen:
            _write(storage, name, strays[name])
        round_.detail = ", ".join(chosen)


def latest_steps(round_: Round) -> list[str]:
    """The checkpoints of the run."""
    return [name for name in round_.run.list_dirs("checkpoints") if name.startswith("step_")]


def _is_file(storage: Storage, name: str) -> bool:
    return bool(storage.filesystem.get_file_info(f"{storage.root}/{name}").is_file)


def _kind_of(name: str) -> str:
    parts = name.split("/")
    folder = next((part for part in parts if part in ("checkpoints", "data", "loram", "adapter", "model")), parts[0])
    return f"{folder}/*.{parts[-1].rsplit('.', 1)[-1]}"


def _write(storage: Storage, name: str, content: bytes) -> None:
    target = f"{storage.root}/{name}"
    if storage.is_local:
        storage.filesystem.create_dir(target.rsplit("/", 1)[0])
    with storage.filesystem.open_output_stream(target, compression=None) as stream:
        stream.write(content)
