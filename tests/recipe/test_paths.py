"""What a path in a recipe means."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymem.recipe.paths import absolute, is_local


@pytest.mark.parametrize("path", ["/data/x", "./x", "../x", "~/x", "x.csv", "a/b.parquet"])
def test_local(path: str) -> None:
    assert is_local(path)


@pytest.mark.parametrize("path", ["s3://bucket/x.csv", "org/name", "squad", "demo:text"])
def test_not_local(path: str) -> None:
    assert not is_local(path)


def test_what_exists_is_local(tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert is_local("org/name", tmp_path)
    assert not is_local("org/other", tmp_path)


def test_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute("runs/../r") == f"{tmp_path}/r"
    assert absolute("~/r") == "/home/me/r"
    assert absolute("r", "/b") == "/b/r"
    assert absolute("s3://b/r?x=1") == "s3://b/r?x=1"
