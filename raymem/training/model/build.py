"""Builds a recipe's model: on the meta device for planning, or loaded and spread over the workers for training."""

from __future__ import annotations

import contextlib
import difflib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raymem.account import refuse_quantised
from raymem.errors import ModelError, RecipeError
from raymem.memory.host import lives_on_host
from raymem.methods.own_code import as_recipe_says
from raymem.methods.peft.files import load_adapter
from raymem.recipe.axes import ACTIVATIONS, ADAPTERS, BASES, LOSSES, building
from raymem.recipe.schema import Recipe
from raymem.seeds import derive
from raymem.storage.checksums import CHECKSUMS, check_files
from raymem.storage.remote.copies import fetched
from raymem.training import lean, loss
from raymem.training.dist_env import DistEnv, shard
from raymem.training.model import adapter, experts, packing, quantised, weights
from raymem.training.model.base_name import base_name
from raymem.training.model.computed import restore_computed_buffers
from raymem.training.model.spread import blocks_of

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def trainable_dtype(recipe: Recipe) -> torch.dtype:
    """Return the storage dtype of the weights that are trained."""
    return torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32


def base_dtype(recipe: Recipe) -> torch.dtype:
    """Return the storage dtype of the base weights."""
    return trainable_dtype(recipe) if recipe.model.dtype == "auto" else DTYPES[recipe.model.dtype]


def build_model(
    recipe: Recipe,
    dist_env: DistEnv | None = None,
    *,
    meta: bool = False,
    planned: bool = False,
    adapter_at: Path | None = None,
) -> nn.Module:
    """Build the recipe's model with its adapter, in training mode.

    Args:
        dist_env: this process's place; its device is where the model lands.
        meta: stop before any weight is allocated or read (only the config is needed).
        planned: only memory counts, so 4-bit layers are stand-ins that need no bitsandbytes.
        adapter_at: PEFT directory whose adapter, of whatever kind, is loaded instead of making the recipe's.

    Returns:
        A transformers model, wrapped by PEFT if there is an adapter; parameters are DTensors under FSDP2.

    Raises:
        ModelError: no such model, no config, missing or odd weights.
        RecipeError: a pattern of the adapter that matches nothing, or packing that does not keep examples apart.
    """
    dist_env = dist_env or DistEnv()
    config = load_config(recipe, dist_env)
    base_model = on_meta(config, recipe)
    packing.refuse_leaks(base_model, recipe)
    # Names are those of the bare model: quantising, wrapping and sharding change names or parameters, not the places.
    source = None if meta else _source(base_model, config, recipe, dist_env)
    tied = weights.tied_names(base_model)
    blocks = blocks_of(base_model)
    if recipe.base.quantize == "nf4":
        quantised.place(base_model, base_dtype(recipe), planned=planned, sharded=dist_env.sharded)
    places = weights.slots(base_model)
    BASES.of(recipe).prepare(base_model, recipe.base)
    activations = ACTIVATIONS.of(recipe)
    activations.prepare(base_model, recipe.activations)
    model: nn.Module = base_model
    of_base = {id(tensor) for tensor in adapter.tensors_of(base_model).values()}
    laid = None
    if adapter_at is None:
        with experts.shown_to_peft(base_model):
            model = adapter.attach(base_model, recipe, trainable_dtype(recipe))
    elif dist_env.sharded:
        model, laid = adapter.lay(base_model, adapter_at)
    added = [name for name, tensor in adapter.tensors_of(model).items() if id(tensor) not in of_base]
    if adapter_at is None or laid is not None:
        _prepare(model, recipe)
    if dist_env.sharded:
        shard(model, blocks, dist_env)
    if source is not None:
        weights.materialise(model, dist_env)
        weights.fill(places, source, dist_env, tied)
        if adapter_at is None:
            adapter.fill(model, added, recipe, dist_env)
            ADAPTERS.of(recipe).loaded(model, recipe.adapter, recipe.seed)
        elif laid is not None:
            adapter.fill_laid(model, laid, dist_env)
        restore_computed_buffers(
            base_model, [tensor for name, tensor in adapter.tensors_of(model).items() if name in added]
        )
    if adapter_at is not None and laid is None:
        for kind in ADAPTERS.kinds():
            kind.register()
        with experts.shown_to_peft(base_model):
            model = load_adapter(base_model, adapter_at, dist_env.device)
        for parameter in model.parameters():  # PEFT puts an adapter where the weight of its layer is
            if not lives_on_host(parameter):
                parameter.data = parameter.data.to(dist_env.device)
        _prepare(model, recipe)
    activations.install(model, recipe.activations, recipe.seed)
    return model


def _prepare(model: nn.Module, recipe: Recipe) -> None:
    """Arrange the forward pass of a model with its adapter."""
    if not ACTIVATIONS.of(recipe).keeps_stock_layers(recipe.activations):
        lean.install(model)
    model.train()
    loss.prepare(model, LOSSES.of(recipe), recipe.loss)


def load_config(recipe: Recipe, dist_env: DistEnv | None = None) -> Any:
    """Return the transformers config of the recipe's model, pruned or full; no weights are downloaded for it.

    Raises:
        RecipeError: pruning options that leave nothing of a layer.
        ModelError: unknown model type, no config at the path, hub not reachable, a quantised model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    base = BASES.of(recipe)
    planned = base.is_planned(recipe.base)
    if recipe.model.config is not None:
        options = dict(recipe.model.config)
        kind = options.pop("model_type")
        if kind not in CONFIG_MAPPING_NAMES:
            near = difflib.get_close_matches(kind, CONFIG_MAPPING_NAMES, n=3)
            raise ModelError(
                f"model.config.model_type: {kind!r} is unknown to transformers"
                f"{'; near names: ' + ', '.join(near) if near else ''}"
            )
        try:
            config = AutoConfig.for_model(kind, **options)
        except Exception as error:  # configs raise types of their own
            raise ModelError(f"model.config: transformers refuses it: {_reason(error)}") from None
        refuse_quantised(config, "model.config")
    else:
        name, revision = (recipe.model.name, recipe.model.revision) if planned else base_name(recipe)
        trusted = recipe.model.trust_remote_code
        directory = fetch(name or "", revision, dist_env or DistEnv(), weights_too=False, code_too=trusted)
        try:
            config = as_recipe_says(
                AutoConfig.from_pretrained, directory, trusted=trusted, path=directory, local_files_only=True
            )
        except ModelError:
            raise
        except Exception as error:  # configs raise types of their own
            raise ModelError(f"model.name: {directory}/config.json cannot be used: {_reason(error)}") from None
        refuse_quantised(config, name)
    return base.planned_config(recipe.base, config) if planned else config


def fetch(
    name: str, revision: str | None, dist_env: DistEnv, *, weights_too: bool, code_too: bool = False
) -> Path:  # fmt: skip
    """Return the local directory of a model; from the hub or an object store it is fetched once per node.

    Args:
        code_too: the recipe trusts the code that the model brings.

    Raises:
        ModelError: neither a directory with a config.json nor a hub id that can be had, or a file of it is not as
            raymem wrote it.
        StorageError: it cannot be fetched from its object store.
    """
    directory = Path(name)
    if directory.is_dir():
        return _checked(directory, name, weights_too)
    if directory.is_absolute():
        raise ModelError(
            f"model.name: {directory} does not exist; give an existing directory, s3://, gs:// or a Hugging Face id"
        )
    patterns = [
        "*.json",
        "*.txt",
        "*.model",
        "*.jinja",
        "LICENSE*",
        "NOTICE*",
        *(["*.safetensors"] if weights_too else []),
        *(["*.py"] if code_too else []),
    ]
    if dist_env.local_rank != 0:
        dist_env.barrier()
    if "://" in name:  # code, too, of which a list of checksums may tell: it is copied, not run
        downloaded = _checked(fetched(name, [*patterns, "*.py", CHECKSUMS]), name, weights_too)
    else:
        downloaded = _downloaded(name, revision, patterns)
    if dist_env.local_rank == 0:
        dist_env.barrier()
    return downloaded


def _checked(directory: Path, name: str, weights_too: bool) -> Path:
    if not (directory / "config.json").is_file():
        raise ModelError(f"model.name: {name} has no config.json; give a directory that save_pretrained wrote")
    check_files(directory, ModelError, weights=weights_too)
    return directory


def _downloaded(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise ModelError(not_to_be_had(name, error)) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        # Without a network, huggingface_hub before 2 does not look for a commit in its cache.
        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
        raise ModelError(not_to_be_had(name, error)) from None


def not_to_be_had(name: str, error: Exception) -> str:
    """Return the error for a hub id that is of no use."""
    return (
        f"model.name: {name!r} is no local directory and cannot be had from the Hugging Face hub ({_reason(error)}); "
        "give a path that holds config.json, or check the id, the network and HF_TOKEN"
    )


def check_fit(model: Any, tokenizer: Any, recipe: Recipe) -> None:
    """Refuse rows and tokens that would fail with an index error in the middle of a step.

    Args:
        model: may be on the meta device.

    Raises:
        RecipeError: rows longer than the model has positions.
        ModelError: the tokenizer makes ids that the embedding does not have.
    """
    config = model.config.get_text_config()
    rows, largest = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ModelError(
            f"model.tokenizer: its largest id is {largest} but the model embeds {rows} tokens; "
            "use the tokenizer that belongs to the model"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and recipe.data.sequence_length > positions:
        raise RecipeError(
            f"data.sequence_length: {recipe.data.sequence_length} is more than the {positions} positions of the model; "
            "lower it"
        )


def tokenizer_path(recipe: Recipe, dist_env: DistEnv | None = None) -> str:
    """Return directory or hub id of the recipe's tokenizer: ``model.tokenizer``, or the model's own.

    Raises:
        ModelError: the model cannot be had.
    """
    if recipe.model.tokenizer is not None:
        return recipe.model.tokenizer
    planned = BASES.of(recipe).is_planned(recipe.base)
    name, revision = (recipe.model.name, recipe.model.revision) if planned else base_name(recipe)
    return str(fetch(name or "", revision, dist_env or DistEnv(), weights_too=False))


def on_meta(config: Any, recipe: Recipe) -> Any:
    """Return the bare model without weights, tied ones joined.

    Raises:
        ModelError: it cannot be built.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        with torch.device("meta"), no_init_weights(), building(config):
            base_model = as_recipe_says(
                AutoModelForCausalLM.from_config,
                config,
                trusted=recipe.model.trust_remote_code,
                path=getattr(config, "_name_or_path", "") or recipe.model.name,
                dtype=base_dtype(recipe),
                attn_implementation=None if recipe.model.attention == "auto" else recipe.model.attention,
            )
            # Without weights transformers leaves tied ones apart. Freezing, adapters and FSDP2 must see one parameter:
            # FSDP2 would gather and reduce two, and round the sum of their gradients in another order.
            base_model.tie_weights()
            return base_model
    except ModelError:
        raise
    except Exception as error:  # model code may raise anything
        raise ModelError(f"model: cannot be built from its config: {_reason(error)}") from None


def _source(base_model: Any, config: Any, recipe: Recipe, dist_env: DistEnv) -> weights.TensorSource:
    """Open the source of the base weights before anything is allocated, so that a bad one is an error at once."""
    name, revision = base_name(recipe)
    if name is not None:
        directory = fetch(name, revision, dist_env, weights_too=True)
        return weights.checkpoint_source(base_model, directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(recipe.seed, "init"))
        return weights.StateDictSource(type(base_model)._from_config(config).state_dict())


def _reason(error: Exception) -> str:
    """Return an error's words on one line; of a strict config those of the validator behind it."""
    error = error.__cause__ if isinstance(error.__cause__, ValueError | TypeError) else error
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
