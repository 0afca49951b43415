"""Uses the artefacts of training: loads a PEFT or model directory, merges adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from raymem.account import refuse_not_finite, refuse_quantised
from raymem.errors import ModelError, StorageError
from raymem.kinds import AttachContext
from raymem.methods.own_code import built_in_only
from raymem.methods.peft.files import load_adapter
from raymem.methods.peft.importing import without_bitsandbytes
from raymem.methods.probe import first_line
from raymem.methods.sentences import as_sentence
from raymem.recipe.axes import ADAPTERS, building, why_not_of_model
from raymem.recipe.schema import Recipe
from raymem.storage.checksums import check_files, write_checksums
from raymem.storage.errors import writing
from raymem.storage.json_files import read_object
from raymem.training.artifacts.card import write_card
from raymem.training.artifacts.facts import FACTS
from raymem.training.data.tokenizer import load_tokenizer, tokenizer_key
from raymem.training.dist_env import DistEnv
from raymem.training.model.adapter import continuing, is_of_own_kind, tensors_of
from raymem.training.model.base_name import base_name
from raymem.training.model.build import fetch
from raymem.training.model.companions import GENERATION, copy_companions
from raymem.training.model.revision import trained_from
from raymem.training.model.weights import NOT_FINITE, check_checkpoint

_WHOLE = "take a whole copy of the directory"


def load_artifact(directory: str | Path) -> tuple[Any, Any]:
    """Load model (in its stored dtype, evaluation mode) and tokenizer of an adapter or model directory.

    A PEFT adapter computes what plain PEFT computes with it, to the bit: it is fp32 beside a base of lower precision.

    Raises:
        ModelError: it is neither, or the base that the adapter names cannot be loaded or is quantised, or its kind is
            not installed here or does not load what it saved.
    """
    with without_bitsandbytes():
        from peft import PeftConfig

        for kind in ADAPTERS.kinds():
            kind.register()
    path = Path(directory)
    check_files(path, ModelError)
    if not (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ModelError(
            f"{path} holds neither adapter_config.json nor config.json; give the adapter or model directory of a run, "
            "for example raymem-runs/quickstart/adapter"
        )
    try:
        if is_of_own_kind(path):
            model = _with_own_kind(path)
        elif (path / "adapter_config.json").is_file():
            base = _load(*_base(path, PeftConfig.from_pretrained(str(path))))
            model = load_adapter(base, path, "cpu", in_base_dtype=False)
        else:
            model = _load(str(path), None)
    except ModelError as error:  # what training would say of the model or its adapter
        reason = str(error).removeprefix("model.name: ").removeprefix("adapter.init_from: ")
        raise ModelError(f"{path} cannot be loaded: {reason}") from None
    except Exception as error:  # model code may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} cannot be loaded: {reason}; check the base model that it names") from None
    return model.eval(), load_tokenizer(str(path))


def _with_own_kind(directory: Path) -> Any:
    """Return the model of an adapter that PEFT does not know, attached and filled by its kind, in the base's stored
    dtype.
    """
    options = continuing(directory)
    if not (directory / FACTS).is_file():
        raise ModelError(f"it holds no {FACTS}, which names its base; take the whole directory of the run")
    facts = read_object(directory / FACTS, ModelError, _WHOLE, {"recipe": (dict,)})
    try:
        recipe = Recipe.model_validate(facts["recipe"])
    except ValueError as error:
        raise ModelError(f"{directory / FACTS}: its recipe cannot be used ({first_line(error)}); {_WHOLE}") from None
    name, revision = base_name(recipe)
    if name is None:
        raise ModelError(
            "it was trained on the random weights of model.config, which lie nowhere; save them as a model directory, "
            "and train on that as model.name"
        )
    base, kind = _load(name, revision), ADAPTERS[options.kind]
    of_base = {id(tensor) for tensor in tensors_of(base).values()}
    model = kind.attach(base, options, AttachContext(base.dtype, name, revision))
    held = tensors_of(model)
    given = kind.read(str(directory), model)
    with torch.no_grad():
        for place, tensor in held.items():
            if place in given:
                tensor.copy_(given[place])
            elif id(tensor) not in of_base:
                tensor.copy_(kind.initial_value(place, tensor.shape, recipe.seed))
    kind.loaded(model, options, recipe.seed)
    return model


def _base(adapter: Path, config: Any) -> tuple[str, str | None]:
    """Return name and revision of the model that an adapter was trained on."""
    name = config.base_model_name_or_path
    trained = trained_from(str(adapter), name)
    return name, config.revision if trained is None else trained.commit


def _base_directory(adapter: Path) -> Path:
    """Return the directory of an adapter's base model, once that was loaded."""
    with without_bitsandbytes():
        from peft import PeftConfig

        name, revision = _base(adapter, PeftConfig.from_pretrained(str(adapter)))
    return Path(name) if Path(name).is_dir() else fetch(name, revision, DistEnv(), weights_too=False)


def _same_tokenizer(tokenizer: Any, directory: Path) -> bool:
    try:
        return tokenizer_key(load_tokenizer(str(directory))) == tokenizer_key(tokenizer)
    except ModelError:
        return False


def _load(name: str, revision: str | None) -> Any:
    """Load a full or pruned model in its stored dtype, with every tensor of it accounted for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    check_files(name, ModelError)
    with built_in_only(name):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    refuse_quantised(config, name)
    if Path(name).is_dir():
        check_checkpoint(_on_meta(config), Path(name))
    with built_in_only(name), building(config):
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, config=config, dtype="auto", trust_remote_code=False
        )
    if not Path(name).is_dir():
        check_checkpoint(_on_meta(config), _directory(name, revision))
    for key, parameter in model.named_parameters():
        refuse_not_finite(parameter, f"tensor {key}", NOT_FINITE)
    return model


def _on_meta(config: Any) -> Any:
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


def merge(adapter: str | Path, output: str | Path) -> Path:
    """Write the base with the adapter folded in, in the base's own dtype, as a model directory.

    Raises:
        ModelError: no adapter there, one that PEFT cannot merge, or its base cannot be loaded.
        StorageError: ``output`` exists or cannot be written; nothing half-written is left.
    """
    from transformers import GenerationConfig

    source, target = Path(adapter), Path(output)
    check_files(source, ModelError)
    if not (source / "adapter_config.json").is_file():
        raise ModelError(f"{source} holds no adapter_config.json; only adapters are merged")
    if is_of_own_kind(source):
        raise ModelError(
            f"{source} is an adapter of kind {continuing(source).kind}, which cannot be folded into its base; "
            "raymem.load and raymem generate take it as it is"
        )
    if (why := why_not_of_model(source)) is not None:
        raise ModelError(f"{source} cannot be merged into the model that it names: {why}")
    if target.exists():
        raise StorageError(f"--output: {target} already exists; choose another directory or remove it")
    facts = read_object(source / FACTS, ModelError, _WHOLE) if (source / FACTS).is_file() else {}
    model, tokenizer = load_artifact(source)
    base = _base_directory(source)
    staging = target.parent / f".{target.name}.part"
    try:
        with writing(target, where="--output"):
            staging.mkdir(parents=True)
            _untie_adapted(model)
            with as_sentence(ModelError, f"{source}: PEFT cannot merge this adapter", "use it beside its base"):
                merged = model.merge_and_unload()
            if (base / GENERATION).is_file():
                # The base's own follows, also one that would not be written.
                merged.generation_config = GenerationConfig()
            merged.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            copy_companions(base, staging, same_tokenizer=_same_tokenizer(tokenizer, base))
            (staging / "raymem.json").write_text(json.dumps({**facts, "merged_from": str(source.resolve())}, indent=1))
            write_card(staging)
            write_checksums(staging)
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _untie_adapted(model: Any) -> None:
    """Give adapted layers weights of their own: folded into a tied head, an update would change the embedding too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
    base = model.get_base_model()
    embedded = {id(embedding.weight) for embedding in base.modules() if isinstance(embedding, torch.nn.Embedding)}
    for layer in layers:
        # Routed experts have no weight of that name, and are tied to nothing.
        if not isinstance(layer, torch.nn.Embedding) and id(getattr(layer, "weight", None)) in embedded:
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
            for config in (base.config, base.config.get_text_config()):
                config.tie_word_embeddings = False
