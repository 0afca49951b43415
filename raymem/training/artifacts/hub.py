"""Uploads artefacts to the Hugging Face hub, or to what ``HF_ENDPOINT`` names.

What leaves is a copy made for others: its card has the licence of the base, and of the paths and addresses of this
machine that raymem notes beside a result only the last part is left.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raymem.errors import ModelError, RaymemError, StorageError
from raymem.methods.probe import first_line
from raymem.recipe.paths import is_local
from raymem.recipe.schema import Recipe
from raymem.storage.checksums import check_files, write_checksums
from raymem.storage.inside import leads_out
from raymem.storage.json_files import read_object
from raymem.storage.unfinished import temporary
from raymem.training.artifacts.card import CARD, public
from raymem.training.artifacts.facts import FACTS
from raymem.training.model.revision import on_hub

_ADAPTER = "adapter_config.json"
_WHOLE = "take a whole copy of the directory"


def check_push(repo: str) -> None:
    """See that the hub can be written to, before hours of training.

    Raises:
        StorageError: ``repo`` is no name of a repository, or there is no token.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise StorageError(f"{repo!r} is no name of a repository on the hub ({first_line(error)})") from None
    if constants.HF_HUB_OFFLINE:
        raise StorageError(f"{repo} cannot be pushed to: HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise StorageError(
            f"{repo} cannot be pushed to without a token of the hub; log in with `hf auth login`, or set HF_TOKEN"
        )


def check_export(recipe: Recipe) -> None:
    """See that a run's result can be pushed to where its recipe says, if it says so, before hours of training.

    Raises:
        ModelError: the result is an adapter of a base that nobody else has.
        StorageError: see :func:`check_push`.
    """
    if recipe.export.push_to_hub is None:
        return
    check_push(recipe.export.push_to_hub)
    if recipe.trains_adapter and not on_hub(recipe.model):
        raise ModelError(
            f"export.push_to_hub: the adapter's base is {recipe.model.name!r}, which nobody else can load; push the "
            "base first and give its repository as model.name, or leave export out and push the whole model later: "
            "raymem merge writes it"
        )


def push(directory: Path, repo: str, *, private: bool | None = None, message: str | None = None) -> str:
    """Upload an adapter or a model; return the address of the commit.

    Args:
        repo: ``owner/name``, or a name alone for one's own; it is made if it does not exist.
        private: of a repository that is made here; None takes the owner's default.
        message: of the commit.

    Raises:
        ModelError: no artefact, a damaged one, or an adapter whose base nobody else has.
        StorageError: no token, no right to write, or the hub does not answer.
    """
    check_push(repo)
    check_files(directory, ModelError)
    base = _public_base(directory)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="raymem")
    try:
        with _for_others(directory, _licence(api, base)) as staged:
            made = api.create_repo(repo, private=private, exist_ok=True)
            said = message or f"Upload {directory.name} with raymem"
            commit = api.upload_folder(repo_id=made.repo_id, folder_path=staged, commit_message=said)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        cure = "ask its owner for the right to write, or take another name" if status in (401, 403) else "push it again"
        raise StorageError(f"{repo}: the hub refuses the upload ({first_line(error)}); {cure}") from None
    except RaymemError:
        raise
    except Exception as error:  # of whichever HTTP client the hub's library comes with
        raise StorageError(f"{repo}: the upload failed ({first_line(error)}); push it again") from None
    return str(commit.commit_url)


def _public_base(directory: Path) -> str | None:
    """Return the hub id of an adapter's base; None of a whole model."""
    if (directory / _ADAPTER).is_file():
        base = read_object(directory / _ADAPTER, ModelError, _WHOLE).get("base_model_name_or_path")
        if not isinstance(base, str) or is_local(base) or "://" in base or base.count("/") != 1:
            raise ModelError(
                f"{directory / _ADAPTER}: base_model_name_or_path is {base!r}, which nobody else can load; push the "
                "base first and name its repository there, or push the whole model: raymem merge writes it"
            )
        return base
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} holds neither an adapter nor a model; give the result of a run")
    return None


def _licence(api: Any, base: str | None) -> str | None:
    """Return the licence that the base's card names, if it has a card that can be read."""
    from huggingface_hub.errors import HfHubHTTPError

    if base is None:
        return None
    try:
        data = api.model_info(base).card_data
    except HfHubHTTPError:  # gone or gated: others will be told so when they load it
        return None
    licence = None if data is None else data.get("license")
    return licence if isinstance(licence, str) else None


@contextmanager
def _for_others(directory: Path, licence: str | None) -> Iterator[Path]:
    """Yield a copy of an artefact that is made to be shared; large files are links."""
    from huggingface_hub import ModelCard

    with temporary("push") as folder:
        staged = Path(folder) / directory.name
        staged.mkdir()
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(directory)
            if any(part.startswith(".") for part in name.parts):
                continue
            if leads_out(path, directory):
                raise StorageError(
                    f"{path} is a link to {path.resolve()}, outside of the artefact, and would be uploaded; replace it "
                    "by the file itself if that is meant"
                )
            if path.is_dir():
                (staged / name).mkdir()
            elif path.suffix == ".safetensors":
                (staged / name).symlink_to(path.resolve())
            else:
                shutil.copyfile(path, staged / name)
        if (staged / FACTS).is_file():
            facts = read_object(staged / FACTS, ModelError, _WHOLE)
            (staged / FACTS).write_text(json.dumps(_without_places(facts), indent=1) + "\n")
        if licence is not None and (staged / CARD).is_file():
            card = ModelCard.load(staged / CARD)
            card.data.license = licence
            card.save(staged / CARD)
        write_checksums(staged)
        yield staged


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_places(one) for one in value]
    return public(value) if isinstance(value, str) and not re.search(r"\s", value) else value
