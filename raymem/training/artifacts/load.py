"""Loads what training leaves: a PEFT or model directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from raymem.account import refuse_not_finite, refuse_quantised
from raymem.errors import ModelError
from raymem.kinds import AttachContext
from raymem.memory.oom import is_out_of_memory
from raymem.methods.own_code import built_in_only
from raymem.methods.peft.files import load_adapter
from raymem.methods.peft.importing import without_bitsandbytes
from raymem.methods.probe import first_line
from raymem.recipe.axes import ADAPTERS, building
from raymem.recipe.schema import Recipe
from raymem.storage.checksums import check_files
from raymem.storage.json_files import read_object
from raymem.storage.safetensors_io import DTYPES, read_header, shard_files
from raymem.training.artifacts.facts import FACTS
from raymem.training.data.tokenizer import load_tokenizer, tokenizer_key
from raymem.training.dist_env import DistEnv
from raymem.training.model.adapter import continuing, fill_laid, is_of_own_kind, lay, tensors_of
from raymem.training.model.adapter import fill as fill_adapter
from raymem.training.model.base_name import base_name
from raymem.training.model.build import fetch
from raymem.training.model.companions import GENERATION
from raymem.training.model.revision import trained_from
from raymem.training.model.spread import spread
from raymem.training.model.weights import NOT_FINITE, check_checkpoint, checkpoint_source

WHOLE = "take a whole copy of the directory"
"""The cure for a directory with a part missing."""
LoadBase = Callable[[str, str | None], Any]
"""Takes name and revision of a base; returns its model."""


def load_artifact(
    directory: str | Path, *, load_base: LoadBase | None = None, dist_env: DistEnv | None = None
) -> tuple[Any, Any]:
    """Load model (in its stored dtype, evaluation mode) and tokenizer of an adapter or model directory.

    A PEFT adapter computes what plain PEFT computes with it, to the bit: it is fp32 beside a base of lower precision.

    Args:
        load_base: makes the base of a PEFT adapter; by default it is loaded whole.
        dist_env: if it is sharded, the model is spread over the workers, none of which holds the whole. Collective.

    Raises:
        ModelError: it is neither, or the base that the adapter names cannot be loaded or is quantised, or its kind is
            not installed here or does not load what it saved.
    """
    with without_bitsandbytes():
        from peft import PeftConfig

        for kind in ADAPTERS.kinds():
            kind.register()
    path = Path(directory)
    _require_artifact(path)
    try:
        if dist_env is not None and dist_env.sharded:
            model = _spread(path, dist_env)
        elif is_of_own_kind(path):
            model = _with_own_kind(path)
        elif (path / "adapter_config.json").is_file():
            base = (load_base or _load)(*_base(path, PeftConfig.from_pretrained(str(path))))
            model = load_adapter(base, path, "cpu", in_base_dtype=False)
        else:
            model = _load(str(path), None)
    except ModelError as error:  # what training would say of the model or its adapter
        reason = str(error).removeprefix("model.name: ").removeprefix("adapter.init_from: ")
        raise ModelError(f"{path} cannot be loaded: {reason}") from None
    except Exception as error:  # model code may raise anything
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} cannot be loaded: {reason}; check the base model that it names") from None
    return model.eval(), load_tokenizer(str(path))


def _with_own_kind(directory: Path) -> Any:
    """Return the model of an adapter that PEFT does not know, attached and filled by its kind, in the base's stored
    dtype.
    """
    own = _OwnKind(directory)
    base = _load(own.name, own.revision)
    of_base = {id(tensor) for tensor in tensors_of(base).values()}
    model = own.attach(base)
    held = tensors_of(model)
    given = own.kind.read(str(directory), model)
    with torch.no_grad():
        for place, tensor in held.items():
            if place in given:
                tensor.copy_(given[place])
            elif id(tensor) not in of_base:
                tensor.copy_(own.kind.initial_value(place, tensor.shape, own.recipe.seed))
    own.kind.loaded(model, own.options, own.recipe.seed)
    return model


class _OwnKind:
    """An adapter that PEFT does not know, with the recipe that it was trained by and its base."""

    def __init__(self, directory: Path) -> None:
        self.options = continuing(directory)
        self.kind = ADAPTERS[self.options.kind]
        if not (directory / FACTS).is_file():
            raise ModelError(f"it holds no {FACTS}, which names its base; take the whole directory of the run")
        facts = read_object(directory / FACTS, ModelError, WHOLE, {"recipe": (dict,)})
        try:
            self.recipe = Recipe.model_validate(facts["recipe"])
        except ValueError as error:
            raise ModelError(f"{directory / FACTS}: its recipe cannot be used ({first_line(error)}); {WHOLE}") from None
        name, self.revision = base_name(self.recipe)
        if name is None:
            raise ModelError(
                "it was trained on the random weights of model.config, which lie nowhere; save them as a model "
                "directory, and train on that as model.name"
            )
        self.name = str(fetch(name, None, DistEnv(), weights_too=True)) if "://" in name else name

    def attach(self, base: Any) -> Any:
        """Put the adapter on its base, without its values."""
        return self.kind.attach(base, self.options, AttachContext(base.dtype, self.name, self.revision))


def _spread(path: Path, dist_env: DistEnv) -> Any:
    """Return the model of any artefact spread over the workers by FSDP2; each reads its own rows of every tensor."""
    own = _OwnKind(path) if is_of_own_kind(path) else None
    name, revision = _base_of(path, own)
    directory = fetch(name, revision, dist_env, weights_too=True)
    base = _bare(name, revision, directory)
    values: dict[str, torch.Tensor] = {}

    def attach(base_model: Any) -> Any:
        if own is not None:
            return own.attach(base_model)
        if name == str(path):
            return base_model
        model, laid = lay(base_model, path, in_base_dtype=False)
        values.update(laid)
        return model

    def fill(model: Any, added: Sequence[str]) -> None:
        if own is None:
            fill_laid(model, values, dist_env)
        else:
            fill_adapter(model, added, own.recipe.model_copy(update={"adapter": own.options}), dist_env)
            own.kind.loaded(model, own.options, own.recipe.seed)

    model = spread(base, checkpoint_source(base, directory), dist_env, attach=attach, fill=fill)
    base.generation_config = _generation_config(base, directory)
    return model


def bare_model(artifact: str | Path) -> Any:
    """Return the model of an adapter or model directory without values, in its stored dtype: on the meta device.

    Raises:
        ModelError: see :func:`load_artifact`.
    """
    path = Path(artifact)
    with without_bitsandbytes():
        import peft  # noqa: F401  (below it is there, and brings nothing else)

    for kind in ADAPTERS.kinds():
        kind.register()
    _require_artifact(path)
    name, revision = _base_of(path, _OwnKind(path) if is_of_own_kind(path) else None)
    return _bare(name, revision, fetch(name, revision, DistEnv(), weights_too=True))


def _bare(name: str, revision: str | None, directory: Path) -> Any:
    config = read_config(name, revision)
    if getattr(config, "dtype", None) is None:
        config.dtype = _stored_dtype(directory)
    return on_meta(config)


def _base_of(path: Path, own: _OwnKind | None) -> tuple[str, str | None]:
    """Return name and revision of the model that an artefact is, or was trained on."""
    if own is not None:
        return own.name, own.revision
    if not (path / "adapter_config.json").is_file():
        return str(path), None
    from peft import PeftConfig

    return _base(path, PeftConfig.from_pretrained(str(path)))


def _require_artifact(path: Path) -> None:
    check_files(path, ModelError)
    if not (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ModelError(
            f"{path} holds neither adapter_config.json nor config.json; give the adapter or model directory of a run, "
            "for example raymem-runs/quickstart/adapter"
        )


def _stored_dtype(directory: Path) -> torch.dtype:
    """Return the dtype of the first floating tensor, as transformers does for a config that names none."""
    entries = read_header(directory, shard_files(directory)[0])[1].values()
    dtypes = (DTYPES[entry.dtype] for entry in entries if entry.dtype in DTYPES)
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _generation_config(model: Any, directory: Path) -> Any:
    """Return what a model directory says of generating, or else what its config does."""
    from transformers import GenerationConfig

    if not (directory / GENERATION).is_file():
        return model.generation_config
    return GenerationConfig.from_dict(read_object(directory / GENERATION, ModelError, WHOLE))


def _base(adapter: Path, config: Any) -> tuple[str, str | None]:
    """Return name and revision of the model that an adapter was trained on."""
    name = config.base_model_name_or_path
    if "://" in name:
        return str(fetch(name, None, DistEnv(), weights_too=True)), None
    trained = trained_from(str(adapter), name)
    return name, config.revision if trained is None else trained.commit


def base_directory(adapter: Path) -> Path:
    """Return the directory of a PEFT adapter's base model, once that was loaded."""
    with without_bitsandbytes():
        from peft import PeftConfig

        name, revision = _base(adapter, PeftConfig.from_pretrained(str(adapter)))
    return Path(name) if Path(name).is_dir() else fetch(name, revision, DistEnv(), weights_too=False)


def same_tokenizer(tokenizer: Any, directory: Path) -> bool:
    """Whether the tokenizer of a model directory is the given one."""
    try:
        return tokenizer_key(load_tokenizer(str(directory))) == tokenizer_key(tokenizer)
    except ModelError:
        return False


def _load(name: str, revision: str | None) -> Any:
    """Load a full or pruned model in its stored dtype, with every tensor of it accounted for."""
    from transformers import AutoModelForCausalLM

    config = read_config(name, revision)
    if Path(name).is_dir():
        check_checkpoint(on_meta(config), Path(name))
    with built_in_only(name), building(config):
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, config=config, dtype="auto", trust_remote_code=False
        )
    if not Path(name).is_dir():
        check_checkpoint(on_meta(config), _directory(name, revision))
    for key, parameter in model.named_parameters():
        refuse_not_finite(parameter, f"tensor {key}", NOT_FINITE)
    return model


def read_config(name: str, revision: str | None) -> Any:
    """Read the config of a model whose weights are numbers; a directory is compared with its checksums.

    Raises:
        ModelError: its weights are quantised, or a file is not as raymem wrote it.
    """
    from transformers import AutoConfig

    check_files(name, ModelError)
    with built_in_only(name):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    refuse_quantised(config, name)
    return config


def on_meta(config: Any) -> Any:
    """Build the model without weights, for names and shapes; tied parameters are one."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    own_name = getattr(config, "_name_or_path", "")
    with built_in_only(own_name), torch.device("meta"), no_init_weights(), building(config):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.tie_weights()  # part of the initialisation that was left out
    return model


def _directory(name: str, revision: str | None) -> Path:
    """Return the directory with the files of a model that was loaded."""
    from transformers.utils import cached_file

    return Path(str(cached_file(name, "config.json", revision=revision))).parent
