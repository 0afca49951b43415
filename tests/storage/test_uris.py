"""Secrets in addresses are found wherever they are written, and never repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymem.cli.main import run_app
from raymem.cli.options import refuse_secrets
from raymem.errors import RaymemError, RecipeError
from raymem.recipe.load import recipe_of
from raymem.storage.storage import Storage
from raymem.storage.uris import secret_in
from raymem.tracking.mlflow.uri import resolve_tracking
from raymem.training.data.sources.remote import RemoteDirectory

SECRET = "hunter2"
LEAKS = [
    f"http://{SECRET}@host:5000",
    f"https://me:{SECRET}@host",
    f"https://host/?token={SECRET}",
    f"https://host/x?a=1&access_token={SECRET}",
    f"https://host/x?a=1;X-Amz-Signature={SECRET}",
    f"https://host/x?sig={SECRET}",
    f"https://host/#access_token={SECRET}",
    f"s3://bucket/x?access_key=a&secret_key={SECRET}",
    f"s3://bucket/x?client_secret={SECRET}",
    f"s3://{SECRET}@bucket/x",
    f"s3://bucket/x?endpoint_override=http%3A%2F%2Fme%3A{SECRET}%40host",
    f"hf://{SECRET}@datasets/a/b",
    f"postgresql://me:{SECRET}@host/db",
]
SAFE = [
    "http://host:5000/path",
    "s3://anonymous@bucket/x",
    "s3://bucket/x?endpoint_override=host:9000&scheme=http&region=us-east-1",
    "hf://datasets/owner/name@main/x.jsonl",
    "postgresql://me@host/db",
    "sqlite:////data/a@b.db",
    "org/model",
    "/data/token=1/key@x",
    "http://[broken",
]
RAW = {"name": "a", "model": {"name": "org/model"}, "data": {"train": "d.jsonl"}, "train": {"steps": 1}}


@pytest.mark.parametrize("uri", LEAKS)
def test_a_secret_is_found_and_not_repeated(uri: str) -> None:
    found = secret_in(uri)
    assert found and SECRET not in found


@pytest.mark.parametrize("uri", SAFE)
def test_other_addresses_stay(uri: str) -> None:
    assert secret_in(uri) is None


@pytest.mark.parametrize("uri", LEAKS)
@pytest.mark.parametrize("path", ["storage.path", "tracking.uri", "data.train", "model.name", "model.tokenizer"])
def test_no_key_of_a_recipe_takes_one(uri: str, path: str) -> None:
    section, key = path.split(".")
    raw: dict[str, Any] = {**RAW, section: {**RAW.get(section, {}), key: uri}}  # type: ignore[dict-item]
    for make in (lambda: recipe_of(raw, where="mine"), lambda: recipe_of(RAW, [f"{path}={uri}"])):
        with pytest.raises(RecipeError, match=rf"{path}: .* would be stored.*; take it out and use") as caught:
            make()
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("uri", LEAKS)
def test_nothing_opens_one(uri: str) -> None:
    for opened in (
        lambda: Storage.open(uri),
        lambda: resolve_tracking(uri, "/tmp/x"),
        lambda: RemoteDirectory(uri, "data.train[0]"),
    ):
        with pytest.raises(RaymemError) as caught:
            opened()
        assert SECRET not in str(caught.value)


def test_a_command_line_is_looked_at_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_app("train", str(tmp_path / "no.yaml"), "--set", f"storage.path={LEAKS[0]}") == 1
    said = capsys.readouterr()
    assert "--set storage.path: a user or key before the @" in said.err.replace("\n", " ")
    assert SECRET not in said.err + said.out


def test_texts_for_the_model_are_not_addresses() -> None:
    refuse_secrets(["generate", "run", "--prompt", LEAKS[0]])
    refuse_secrets(["generate", "run", f"read {LEAKS[0]}"])
    with pytest.raises(RecipeError, match=r"^--address: ") as caught:
        refuse_secrets(["submit", "a.yaml", "--address", LEAKS[0]])
    assert SECRET not in str(caught.value)
    with pytest.raises(RecipeError, match=r"^argument 2: "):
        refuse_secrets(["evaluate", LEAKS[2]])
