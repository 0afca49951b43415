"""Storage on a local directory and on a real S3 protocol (moto on loopback)."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import StorageError
from raymem.storage.connect import copy_file
from raymem.storage.errors import user_name
from raymem.storage.storage import Storage
from tests.helpers.support import let_anyone_in


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage.open(str(tmp_path / "root"))
    return Storage.open(request.getfixturevalue("s3_uri")).child(tmp_path.name)


def checkpoint(directory: Path, **files: bytes) -> Path:
    """A directory with files below ``sub/`` and a manifest that lists them."""
    import json

    (directory / "sub").mkdir(parents=True)
    listed: dict[str, Any] = {}
    for name, data in files.items():
        (directory / "sub" / name).write_bytes(data)
        listed[f"sub/{name}"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps({"step": 3, "files": listed}))
    return directory


def tree(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_json_round_trip_and_existence(storage: Storage) -> None:
    assert not storage.exists("a/b.json")
    storage.write_json("a/b.json", {"x": [1, 2.5, None]})
    storage.write_json("a/b.json", {"x": 2})
    assert storage.exists("a/b.json")
    assert storage.exists("a")
    assert storage.read_json("a/b.json") == {"x": 2}
    with pytest.raises(
        StorageError, match=r"cannot read .*a/none\.json.*: no such file or directory; it does not exist"
    ):
        storage.read_json("a/none.json")


def test_joined_paths_open_to_the_same_place(storage: Storage) -> None:
    storage.write_json("run 1/x#y.json", {"a": 1})
    again = Storage.open(storage.join("run 1"))
    assert again.read_json("x#y.json") == {"a": 1}
    assert storage.child("run 1").path == again.path
    assert storage.child("run 1").root == again.root
    assert pickle.loads(pickle.dumps(again)).read_json("x#y.json") == {"a": 1}
    if not storage.is_local:
        assert "endpoint_override=127.0.0.1" in storage.join("run 1")
        assert storage.join("a", "b").split("?")[0].endswith("/a/b")


def test_upload_download_delete(storage: Storage, tmp_path: Path) -> None:
    local = checkpoint(tmp_path / "ck", a=b"alpha", b=os.urandom(9 << 20))
    storage.upload_dir(local, "run/ckpt_3")
    assert storage.list_dirs("run") == ["ckpt_3"]
    assert storage.list_dirs("nothing") == []
    storage.download_dir("run/ckpt_3", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(local)
    storage.delete_dir("run/ckpt_3")
    assert storage.list_dirs("run") == []
    storage.delete_dir("run/ckpt_3")


def test_archives_are_copied_as_they_are(storage: Storage, tmp_path: Path) -> None:
    packed, called_so = gzip.compress(b"rows"), b"no archive"
    (tmp_path / "in").mkdir()
    (tmp_path / "in/data.jsonl.gz").write_bytes(packed)
    (tmp_path / "in/odd.gz").write_bytes(called_so)
    storage.upload_dir(tmp_path / "in", "sent", last=None)
    storage.download_dir("sent", tmp_path / "out", last=None)
    assert (tmp_path / "out/data.jsonl.gz").read_bytes() == packed
    assert (tmp_path / "out/odd.gz").read_bytes() == called_so


def test_a_directory_is_renamed_whole(storage: Storage, tmp_path: Path) -> None:
    local = checkpoint(tmp_path / "local", a=b"alpha", b=b"")
    storage.upload_dir(local, "runs/one")
    storage.rename_dir("runs/one", "runs/two")
    assert not storage.exists("runs/one") and storage.list_dirs("runs") == ["two"]
    storage.download_dir("runs/two", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(local)
    assert storage.sha256("runs/two/sub/a") == hashlib.sha256(b"alpha").hexdigest()


def test_upload_replaces_and_merges(storage: Storage, tmp_path: Path) -> None:
    storage.upload_dir(checkpoint(tmp_path / "old", a=b"1", stale=b"2"), "c")
    new = checkpoint(tmp_path / "new", a=b"3")
    storage.upload_dir(new, "c")
    storage.download_dir("c", tmp_path / "one")
    assert tree(tmp_path / "one") == tree(new)

    (tmp_path / "rank1").mkdir()
    (tmp_path / "rank1" / "r1.bin").write_bytes(b"r1")
    storage.upload_dir(tmp_path / "rank1", "c", last=None)
    storage.download_dir("c", tmp_path / "two")
    assert tree(tmp_path / "two") == {**tree(new), "r1.bin": b"r1"}


def test_marker_is_written_last_and_removed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails in the middle of a copy and of a deletion: neither may leave a marker behind."""
    from raymem.storage import storage as module

    storage = Storage.open(str(tmp_path / "root"))
    local = checkpoint(tmp_path / "ck", z=b"late", a=b"early")
    seen: list[str] = []
    copy = copy_file

    def failing_copy(source: Any, path: str, target: Any, to: str) -> dict[str, Any]:
        assert not storage.exists("c/manifest.json")
        seen.append(to)
        if to.endswith("/z"):
            raise OSError(28, "No space left on device")
        return copy(source, path, target, to)

    storage.upload_dir(local, "c")
    monkeypatch.setattr(module, "copy_file", failing_copy)
    with pytest.raises(StorageError, match=r"cannot write .*c/sub/z: no space left on the device .* free\); free some"):
        storage.upload_dir(local, "c")
    assert [os.path.basename(p) for p in seen] == ["a", "z"]
    assert not storage.exists("c")

    monkeypatch.setattr(module, "copy_file", copy)
    storage.upload_dir(local, "c")

    class Stuck:
        def __getattr__(self, name: str) -> Any:
            if name == "delete_dir":
                raise PermissionError(13, "Permission denied")
            return getattr(storage.filesystem, name)

    stuck = Storage(storage.path, Stuck(), storage.root)
    with pytest.raises(StorageError, match=r"cannot delete .*permission denied"):
        stuck.delete_dir("c")
    assert storage.exists("c/sub/a")
    assert not storage.exists("c/manifest.json")


def test_failed_json_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage.open(str(tmp_path))
    storage.write_json("m.json", {"v": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space left"):
        storage.write_json("m.json", {"v": 2})
    assert os.listdir(tmp_path) == ["m.json"]
    assert storage.read_json("m.json") == {"v": 1}


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda d: (d / "sub" / "a").write_bytes(b"alphA"), r"sub/a is damaged: it has sha256 \w+, its manifest says"),
        (lambda d: (d / "sub" / "a").write_bytes(b"alp"), r"sub/a is damaged: it has bytes 3, its manifest says 5"),
        (lambda d: (d / "sub" / "a").unlink(), r"ck is damaged: sub/a is listed but missing"),
        (lambda d: (d / "manifest.json").unlink(), r"ck has no manifest\.json: its upload never finished"),
        (lambda d: (d / "manifest.json").write_text("{"), r"manifest\.json is not JSON .* damaged"),
    ],
)
def test_download_refuses_damage(tmp_path: Path, harm: Any, words: str) -> None:
    storage = Storage.open(str(tmp_path))
    checkpoint(tmp_path / "ck", a=b"alpha")
    harm(tmp_path / "ck")
    with pytest.raises(StorageError, match=words):
        storage.download_dir("ck", tmp_path / "to")
    assert not (tmp_path / "to").exists()
    assert not list(tmp_path.glob(".to*"))


def test_download_does_not_overwrite(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    checkpoint(tmp_path / "ck", a=b"alpha")
    checkpoint(tmp_path / "to", a=b"mine")
    with pytest.raises(StorageError, match="to already exists; remove it"):
        storage.download_dir("ck", tmp_path / "to")
    assert (tmp_path / "to/sub/a").read_bytes() == b"mine"


def test_upload_without_marker(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(StorageError, match=r"x has no manifest\.json"):
        Storage.open(str(tmp_path / "root")).upload_dir(tmp_path / "x", "c")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("raymem-runs", r"'raymem-runs' is relative, .*; give an absolute path"),
        ("hdfs://host/x", r"scheme hdfs:// is not supported"),
        ("s3://", r"names no bucket"),
        ("s3://bucket/my run", r"write spaces and other special characters as %20"),
        ("s3://bucket/x?bogus=1", r"use only options that pyarrow knows"),
    ],
)
def test_open_refuses(path: str, words: str) -> None:
    with pytest.raises(StorageError, match=words):
        Storage.open(path)


def test_secrets_in_the_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID") as caught:
        Storage.open("s3://AKIA123:hunter2@bucket/x?region=us-east-1")
    assert "hunter2" not in str(caught.value)
    assert "AKIA123" not in str(caught.value)


def test_names_cannot_leave_the_root(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    for name in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(AssertionError):
            storage.join(name)
    with pytest.raises(AssertionError):
        storage.delete_dir("")


def test_a_file_uri_is_its_path(tmp_path: Path) -> None:
    assert Storage.open(f"file://{tmp_path}/a%20b").path == f"{tmp_path}/a b"


def test_check_writable(storage: Storage) -> None:
    storage.check_writable()
    assert storage.list_dirs() == []
    if storage.is_local:
        assert os.listdir(storage.root) == []


def test_check_writable_s3_errors(s3_uri: str) -> None:
    with pytest.raises(StorageError, match="create the bucket, or correct its name"):
        Storage.open(s3_uri.replace("s3://raymem-test", "s3://no-such-bucket")).check_writable()


def test_check_writable_on_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(StorageError, match=rf"cannot create {path}: not a directory; a part of the path is a file"):
            Storage.open(str(path)).check_writable()


def unprivileged(path: Path) -> str:
    """Run check_writable as user 65534; the interpreter may be readable by root only, so drop after the imports."""
    code = textwrap.dedent(
        """
        import os, sys
        from raymem.errors import StorageError
        from raymem.storage.storage import Storage
        storage = Storage.open(sys.argv[1])
        if os.geteuid() == 0:
            os.setgroups([]); os.setegid(65534); os.seteuid(65534)
        try:
            storage.check_writable()
        except StorageError as error:
            print(error)
        """
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_check_writable_without_permission(tmp_path: Path) -> None:
    let_anyone_in(tmp_path)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    cure = (
        f"permission denied ({closed} belongs to root, mode dr-xr-xr-x; this user is {user_name(65534)}); "
        "give this user write permission there, or set storage.path to a directory that it owns"
    )
    assert unprivileged(closed) == f"storage: cannot write to {closed}: {cure}"
    assert unprivileged(closed / "runs") == f"storage: cannot create {closed}/runs: {cure}"
    closed.chmod(0o777)
    assert unprivileged(closed / "runs") == ""


def mounted(tmp_path: Path, options: str, code: str) -> str:
    """Run Python code in a private mount namespace with a tmpfs at ``tmp_path/m``."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare to mount a private tmpfs")
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("unshare -m is refused here")
    (tmp_path / "m").mkdir()
    script = f'mount -t tmpfs -o {options} tmpfs "$1" || exit 77; exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", str(tmp_path / "m"), sys.executable, textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode == 77:
        pytest.skip(f"mount is refused here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_full_disk(tmp_path: Path) -> None:
    checkpoint(tmp_path / "ck", a=b"x" * (3 << 20))
    out = mounted(
        tmp_path,
        "size=1m",
        f"""
        import os, sys
        from raymem.errors import StorageError
        from raymem.storage.storage import Storage
        storage = Storage.open(sys.argv[1])
        try:
            storage.upload_dir({str(tmp_path / "ck")!r}, "c")
        except StorageError as error:
            print(error)
        print(storage.exists("c"))
        with open(sys.argv[1] + "/fill", "wb", buffering=0) as file:
            try:
                while file.write(b"x" * 4096): pass
            except OSError:
                pass
        try:
            storage.check_writable()
        except StorageError as error:
            print(error)
        print(os.listdir(sys.argv[1]))
        """,
    ).splitlines()
    place, cure = tmp_path / "m", "free some, or set storage.path to a larger disk"
    full = "no space left on the device"
    assert out == [
        f"storage: cannot write {place}/c/sub/a: {full} (0 B free); {cure}",
        "False",
        f"storage: cannot write to {place}: {full} (0 B free); {cure}",
        "['fill']",
    ]


def test_read_only_file_system(tmp_path: Path) -> None:
    out = mounted(
        tmp_path,
        "ro",
        """
        import sys
        from raymem.errors import StorageError
        from raymem.storage.storage import Storage
        try:
            Storage.open(sys.argv[1]).check_writable()
        except StorageError as error:
            print(error)
        """,
    )
    assert out == (
        f"storage: cannot write to {tmp_path}/m: read-only file system; "
        "mount it read-write, or set storage.path to a writable directory"
    )
