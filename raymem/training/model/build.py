"""From a recipe to a model: on the meta device for planning, or loaded and spread over the workers for training."""

from __future__ import annotations

import difflib
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raymem.account import refuse_quantised
from raymem.errors import ModelError, RecipeError
from raymem.memory import nf4
from raymem.methods.peft.files import load_adapter
from raymem.recipe.axes import ACTIVATIONS, ADAPTERS, BASES, LOSSES, building
from raymem.recipe.schema import Recipe
from raymem.seeds import derive
from raymem.training import lean, loss
from raymem.training.dist_env import DistEnv, shard
from raymem.training.model import adapter, packing, weights
from raymem.training.model.base_name import base_name

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def trainable_dtype(recipe: Recipe) -> torch.dtype:
    """Storage dtype of the weights that are trained."""
    return torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32


def base_dtype(recipe: Recipe) -> torch.dtype:
    """Storage dtype of the base weights."""
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
    bare = on_meta(config, recipe)
    packing.refuse_leaks(bare, recipe)
    # Names are those of the bare model: quantising, wrapping and sharding change names or parameters, not the places.
    source = None if meta else _source(bare, config, recipe, dist_env)
    tied = weights.tied_names(bare)
    blocks = [m for m in bare.modules() if type(m).__name__ in (bare._no_split_modules or ())]
    if recipe.base.quantize == "nf4":
        (_stand_in_nf4_linears if planned else _use_nf4_linears)(bare, base_dtype(recipe))
    places = weights.slots(bare)
    activations = ACTIVATIONS.of(recipe)
    activations.prepare(bare, recipe.activations)
    model: nn.Module = bare
    if adapter_at is None:
        model = adapter.attach(bare, recipe, trainable_dtype(recipe))
        _prepare(model, recipe)
    if dist_env.sharded:
        shard(model, blocks, dist_env)
    if source is not None:
        weights.materialise(model, dist_env)
        weights.fill(places, source, dist_env, tied)
        if adapter_at is None:
            _fill_adapter(model, recipe, dist_env)
            ADAPTERS.of(recipe).loaded(model, recipe.adapter, recipe.seed)
        _restore_computed_buffers(bare)
    if adapter_at is not None:
        for kind in ADAPTERS.kinds():
            kind.register()
        model = load_adapter(bare, adapter_at, dist_env.device)
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
    """transformers config of the recipe's model, pruned or full; no weights are downloaded for it.

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
        directory = fetch(name or "", revision, dist_env or DistEnv(), weights_too=False)
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # configs raise types of their own
            raise ModelError(f"model.name: {directory}/config.json cannot be used: {_reason(error)}") from None
        refuse_quantised(config, name)
    return base.planned_config(recipe.base, config) if planned else config


def fetch(name: str, revision: str | None, dist_env: DistEnv, *, weights_too: bool) -> Path:
    """Local directory of a model; a hub id is downloaded once per node.

    Raises:
        ModelError: neither a directory with a config.json nor a hub id that can be had.
    """
    directory = Path(name)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ModelError(f"model.name: {directory} has no config.json; give a directory that save_pretrained wrote")
        return directory
    if directory.is_absolute():
        raise ModelError(f"model.name: {directory} does not exist; give an existing directory or a Hugging Face id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [
        "*.json",
        "*.txt",
        "*.model",
        "*.jinja",
        "LICENSE*",
        "NOTICE*",
        *(["*.safetensors"] if weights_too else []),
    ]
    if dist_env.local_rank != 0:
        dist_env.barrier()
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(not_to_be_had(name, error)) from None
    if dist_env.local_rank == 0:
        dist_env.barrier()
    return found


def not_to_be_had(name: str, error: Exception) -> str:
    """What to say where a hub id is of no use."""
    return (
        f"model.name: {name!r} is no local directory and cannot be had from the Hugging Face hub ({_reason(error)}); "
        "give a path that holds config.json, or check the id, the network and HF_TOKEN"
    )


def check_fit(model: Any, tokenizer: Any, recipe: Recipe) -> None:
    """Refuse what would only show as an index error in the middle of a step.

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
    """Directory or hub id of the recipe's tokenizer: ``model.tokenizer``, or the model's own.

    Raises:
        ModelError: the model cannot be had.
    """
    if recipe.model.tokenizer is not None:
        return recipe.model.tokenizer
    planned = BASES.of(recipe).is_planned(recipe.base)
    name, revision = (recipe.model.name, recipe.model.revision) if planned else base_name(recipe)
    return str(fetch(name or "", revision, dist_env or DistEnv(), weights_too=False))


def on_meta(config: Any, recipe: Recipe) -> Any:
    """The bare model without weights, tied ones joined.

    Raises:
        ModelError: it cannot be built.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        with torch.device("meta"), no_init_weights(), building(config):
            bare = AutoModelForCausalLM.from_config(
                config,
                dtype=base_dtype(recipe),
                attn_implementation=None if recipe.model.attention == "auto" else recipe.model.attention,
            )
            # Without weights transformers leaves tied ones apart. Freezing, adapters and FSDP2 must see one parameter:
            # FSDP2 would gather and reduce two, and round the sum of their gradients in another order.
            bare.tie_weights()
            return bare
    except Exception as error:  # model code may raise anything
        raise ModelError(f"model: cannot be built from its config: {_reason(error)}") from None


def _source(bare: Any, config: Any, recipe: Recipe, dist_env: DistEnv) -> weights.TensorSource:
    """Where the base weights come from: opened before anything is allocated, so that a bad one is an error at once."""
    name, revision = base_name(recipe)
    if name is not None:
        directory = fetch(name, revision, dist_env, weights_too=True)
        return weights.checkpoint_source(bare, directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(recipe.seed, "init"))
        return weights.StateDictSource(type(bare)._from_config(config).state_dict())


def _use_nf4_linears(bare: Any, dtype: torch.dtype) -> None:
    """Swap every linear layer but the output head for bitsandbytes' 4-bit one (double quantisation, as QLoRA)."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ModelError("base.quantize: nf4 needs bitsandbytes: pip install 'raymem[quant]'") from None
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    replace_with_bnb_linear(bare, modules_to_not_convert=get_keys_to_not_convert(bare), quantization_config=config)
    for module in bare.modules():
        # On CPUs with AVX512-BF16 the first evaluation would repack the weights for a kernel that has no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _stand_in_nf4_linears(bare: Any, dtype: torch.dtype) -> None:
    """As :func:`_use_nf4_linears`, with layers that only stand for memory."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(bare)
    for name, module in list(bare.named_modules()):
        if (isinstance(module, Conv1D) or type(module) is nn.Linear) and should_convert_module(name, kept):
            inputs, outputs = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
            bare.set_submodule(name, nf4.Linear4bit(inputs, outputs, module.bias is not None, dtype))


@torch.no_grad()
def _fill_adapter(model: nn.Module, recipe: Recipe, dist_env: DistEnv) -> None:
    """Give the adapter's weights their start, or those of ``adapter.init_from``."""
    kind = ADAPTERS.of(recipe)
    if kind.trains_base:
        return
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    source = kind.source(recipe.adapter)
    given = {} if source is None else adapter.read_adapter(source, model, recipe)
    for name, buffer in kind.buffers(model).items():
        if name in given:
            buffer.copy_(given[name])
    places = weights.slots(model)
    for name, parameter in trainable.items():
        full = given.get(name)
        if full is None:
            full = kind.initial_value(name, parameter.shape, recipe.seed)
        weights.put(*places[name], lambda rows, full=full: full if rows is None else full[rows], dist_env, name)  # type: ignore[misc]


@torch.no_grad()
def _restore_computed_buffers(bare: Any) -> None:
    """Recompute buffers that no checkpoint holds (rotary frequencies, embedding scales) through transformers' own rule.

    transformers initialises what is not flagged; so everything that was just loaded is flagged, and of the modules
    only those that own such buffers are visited. A buffer that its own module leaves alone is that of a module around
    it to fill.

    Raises:
        ModelError: nothing fills one of them.
    """
    for tensor in [*bare.parameters(), *bare.buffers()]:
        tensor._is_hf_initialized = True
    computed = {
        f"{prefix}.{name}" if prefix else name: module
        for prefix, module in bare.named_modules()
        for name in module._non_persistent_buffers_set
        if getattr(module, name) is not None
    }
    visited = {name.rpartition(".")[0] for name in computed}
    for name in computed:
        buffer = bare.get_buffer(name)
        buffer._is_hf_initialized = False
        buffer.fill_(_untouched(buffer))
    _initialise(bare, visited)
    left = [name for name in computed if _is_untouched(bare.get_buffer(name))]
    if left:
        around = {".".join(name.split(".")[:end]) for name in left for end in range(name.count("."))}
        _initialise(bare, around - visited)
        left = [name for name in left if _is_untouched(bare.get_buffer(name))]
    if left:
        raise ModelError(
            f"model: {type(bare).__name__} computes {left[0]} in a way that transformers does not repeat after "
            "loading, so that it would hold no value; load and save the model with a class that transformers ships"
        )


def _initialise(bare: Any, paths: set[str]) -> None:
    """Run transformers' initialisation of some modules; it leaves out what is flagged."""
    for path, module in bare.named_modules():
        module._is_hf_initialized = path not in paths
    bare.initialize_weights()


def _untouched(buffer: torch.Tensor) -> float | int | bool:
    """A value that no computed buffer is full of."""
    if buffer.dtype == torch.bool:
        return False
    return math.nan if buffer.is_floating_point() or buffer.is_complex() else torch.iinfo(buffer.dtype).min


def _is_untouched(buffer: torch.Tensor) -> bool:
    if buffer.dtype == torch.bool or not buffer.numel():
        return False
    if buffer.is_floating_point() or buffer.is_complex():
        return bool(buffer.isnan().all())
    return bool((buffer == torch.iinfo(buffer.dtype).min).all())


def _reason(error: Exception) -> str:
    """What an error says, in one line; of a strict config the validator's words behind it."""
    error = error.__cause__ if isinstance(error.__cause__, ValueError | TypeError) else error
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
