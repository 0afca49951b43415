"""Folds an adapter into its base, in the base's own dtype, as a model directory.

PEFT's own layers say what is added, one at a time, on a model whose matrices take no memory: a layer gets its weight
when its place in the files has come, and gives it away when it is written. Everything else is copied tensor by tensor
under its name in the base's files. So two matrices and the adapter are all that is held, whatever the model's size.

A few adapters need the whole model: those that change the base when they are attached (PiSSA and OLoRA that were not
converted), those on parameters that lie in the files in another form (fused experts), and trained tokens.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raymem.errors import ModelError, StorageError
from raymem.methods.sentences import as_sentence
from raymem.recipe.axes import why_not_of_model
from raymem.storage.checksums import check_files, write_checksums
from raymem.storage.errors import writing
from raymem.storage.json_files import read_object
from raymem.storage.safetensors_io import (
    DTYPES,
    Spec,
    index_file,
    read_header,
    shard_files,
    write_json,
    write_tensors,
)
from raymem.training.artifacts.card import write_card
from raymem.training.artifacts.facts import FACTS
from raymem.training.artifacts.load import WHOLE, base_directory, load_artifact, same_tokenizer
from raymem.training.artifacts.skeleton import Skeleton
from raymem.training.model.adapter import continuing, is_of_own_kind
from raymem.training.model.companions import GENERATION, copy_companions

_BLOCK = 1 << 16
"""The numbers that are added at a time: they stay in the processor's cache."""
_LEAST_ROWS = 16
"""The rows of a product that are computed at once at least: of fewer, libraries may sum in another order."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def merge(adapter: str | Path, output: str | Path) -> Path:
    """Write the base with the adapter folded in.

    Raises:
        ModelError: no adapter there, one that PEFT cannot merge, or its base cannot be loaded.
        StorageError: ``output`` exists or cannot be written; nothing half-written is left.
    """
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
    facts = read_object(source / FACTS, ModelError, WHOLE) if (source / FACTS).is_file() else {}
    model, tokenizer, layers = _open(source)
    base = base_directory(source)
    staging = target.parent / f".{target.name}.part"
    try:
        with writing(target, where="--output"):
            staging.mkdir(parents=True)
            with as_sentence(ModelError, f"{source}: PEFT cannot merge this adapter", "use it beside its base"):
                digests = _write_whole(model, base, staging) if layers is None else layers.write(staging)
            tokenizer.save_pretrained(staging)
            copy_companions(base, staging, same_tokenizer=same_tokenizer(tokenizer, base))
            (staging / FACTS).write_text(json.dumps({**facts, "merged_from": str(source.resolve())}, indent=1))
            write_card(staging)
            write_checksums(staging, digests)
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _open(source: Path) -> tuple[Any, Any, Layers | None]:
    """Return model, tokenizer and, if they can be merged one by one, the layers of the model without matrices."""
    skeletons: list[Skeleton] = []

    def bare(name: str, revision: str | None) -> Any:
        skeletons.append(Skeleton(source, name, revision))
        return skeletons[0].model

    with contextlib.suppress(ModelError):  # the whole model says what is wrong, if anything is
        model, tokenizer = load_artifact(source, load_base=bare)
        if _is_layer_by_layer(model, skeletons[0]):
            return model, tokenizer, Layers(model, skeletons[0])
    model, tokenizer = load_artifact(source)
    return model, tokenizer, None


def _is_layer_by_layer(model: Any, skeleton: Skeleton) -> bool:
    """Whether merging each layer by itself, as it comes by, is merging the model."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if not isinstance(model.base_model, BaseTuner) or getattr(model.active_peft_config, "layer_replication", None):
        return False
    seen: set[int] = set()
    known = {id(module) for module, _ in skeleton.places.values()}
    converted = {id(module) for name, (module, _) in skeleton.places.items() if skeleton.key_of(name) is None}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = id(module.get_base_layer())
            if base in seen or base not in known - converted or hasattr(module, "parameter_name"):
                return False
            seen.add(base)
        if hasattr(module, "unload_and_optionally_merge_module") and not isinstance(module, ModulesToSaveWrapper):
            return False
    return skeleton.is_untouched()


class Layers:
    """The layers of a model without matrices, each merged when its turn comes.

    Args:
        model: PEFT's, on the skeleton's.
    """

    def __init__(self, model: Any, skeleton: Skeleton) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        self._skeleton = skeleton
        self._adapted: dict[int, Any] = {}
        self._saved: dict[int, nn.Module] = {}
        self._merged: dict[str, torch.Tensor] = {}
        self._merging = Merging()
        self._memory = _Alternating()
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                self._adapted[id(module.get_base_layer())] = module
            elif isinstance(module, ModulesToSaveWrapper):
                (copy,) = (module.modules_to_save[name] for name in module.active_adapters)
                pairs = zip(module.original_module.modules(), copy.modules(), strict=True)
                self._saved |= {id(original): its_copy for original, its_copy in pairs}
        self._names = {(id(module), attribute): name for name, (module, attribute) in skeleton.places.items()}

    def write(self, directory: Path) -> dict[str, str]:
        """Write config and weights in files like those of the base; return the digests of these."""
        skeleton = self._skeleton
        files, index = shard_files(skeleton.directory), index_file(skeleton.directory)
        untied = self._untied()
        with _a_core_for_writing():
            digests = {file: self._write_file(directory, file, untied if file == files[-1] else {}) for file in files}
        if index is not None:
            stored = {key: entry for file in files for key, entry in read_header(directory, file)[1].items()}
            total_bytes = sum(entry.num_bytes for entry in stored.values())
            weight_map = {key: entry.file for key, entry in stored.items()}
            write_json(directory / index.name, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
        _write_config(skeleton.directory, directory, untied=bool(untied))
        return digests

    def _write_file(self, directory: Path, file: str, untied: Mapping[str, str]) -> str:
        """Write the merged tensors of a file of the base, and those that are tied no longer; return its digest."""
        skeleton = self._skeleton
        sources = {key: (skeleton.name_of(key), key) for key, entry in skeleton.entries.items() if entry.file == file}
        sources |= {name: (name, key) for name, key in untied.items()}
        entries = {key: skeleton.entries[stored] for key, (_, stored) in sources.items()}
        specs = {key: Spec(entry.shape, DTYPES[entry.dtype]) for key, entry in entries.items()}
        digest = directory / f"{file}.sha256"
        write_tensors(
            directory / file,
            specs,
            lambda key: self._value(*sources[key], specs[key].dtype),
            {},
            sha256_at=digest,
            behind=True,
        )
        sha256: str = json.loads(digest.read_text())
        digest.unlink()
        return sha256

    def _untied(self) -> dict[str, str]:
        """Map names of tied tensors that get a value of their own to the keys of what they were tied to."""
        stored = {self._skeleton.name_of(key) for key in self._skeleton.entries}
        untied: dict[str, str | None] = {}
        for one, other in self._skeleton.ties.items():
            if self._changes(one) or self._changes(other):
                untied |= {name: self._skeleton.key_of(name) for name in (one, other) if name not in stored}
        return {name: key for name, key in untied.items() if key is not None}

    def _changes(self, name: str) -> bool:
        module = id(self._skeleton.places[name][0])
        return module in self._adapted or module in self._saved

    def _value(self, name: str | None, key: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of the merged model: stored under ``key`` in the base, called ``name`` in the model."""
        if name is None:
            return self._read(key)
        module, attribute = self._skeleton.places[name]
        if id(module) in self._saved:
            value: Any = getattr(self._saved[id(module)], attribute)
        elif id(module) in self._adapted:
            value = self._merge(name, module)
        elif self._skeleton.has_memory(name):
            value = getattr(module, attribute)
        else:
            value = self._read(key)
        merged: torch.Tensor = value.detach().to(dtype)
        return merged

    def _read(self, key: str) -> torch.Tensor:
        """Read a tensor that is written next, into memory that is used again."""
        return self._skeleton.read(key, self._memory.next(self._skeleton.entries[key].num_bytes))

    @torch.no_grad()
    def _merge(self, name: str, module: nn.Module) -> torch.Tensor:
        """Merge a layer, unless an earlier tensor of it had that done; return the tensor."""
        if name not in self._merged:
            names = {
                attribute: self._names[id(module), attribute] for attribute, _ in module.named_parameters(recurse=False)
            }
            for attribute, its_name in names.items():
                # What has memory is changed in a copy: a tied tensor that goes its own way has the old one.
                if self._skeleton.has_memory(its_name):
                    value = getattr(module, attribute).clone()
                else:
                    key = self._skeleton.key_of(its_name)
                    assert key is not None
                    # One that waits for its turn, while another of its layer is written, has memory of its own.
                    value = self._read(key) if len(names) == 1 else self._skeleton.read(key)
                module._parameters[attribute] = nn.Parameter(value, requires_grad=False)
            self._merging.merge(self._adapted[id(module)])
            self._merged |= {its_name: getattr(module, attribute) for attribute, its_name in names.items()}
            for its_name in names.values():
                if not self._skeleton.has_memory(its_name):
                    self._skeleton.take_memory(its_name)
        return self._merged.pop(name)


class Merging:
    """Merges layers of PEFT into their bases, with the numbers that PEFT's ``merge()`` gives, to the bit.

    Of plain LoRA on a linear layer it takes the product itself, and adds it, some rows at a time in fp32, rounding
    once. PEFT takes new memory for each of three matrices in fp32, and adds the last one to a weight of fewer bits by
    slow code: many times the time in all.
    """

    def merge(self, layer: Any) -> None:
        """Merge a layer; its weight is changed in place, or replaced."""
        from peft.tuners.lora import Linear

        weight, names = layer.get_base_layer().weight, layer.active_adapters
        is_plain = type(layer) is Linear and not layer.fan_in_fan_out and len(names) == 1 and names[0] in layer.lora_B
        if not is_plain or layer.lora_variant or any(layer.lora_bias.values()) or weight.dtype not in _FLOATS:
            layer.merge()
            return
        up_OR, down_RI = layer.lora_B[names[0]].weight, layer.lora_A[names[0]].weight.float()
        blocks = max(1, len(weight) // max(_LEAST_ROWS, _BLOCK // weight.shape[1]))
        for weight_BI, up_BR in zip(weight.tensor_split(blocks), up_OR.tensor_split(blocks), strict=True):
            scaled_BI = torch.matmul(up_BR.float(), down_RI).mul_(layer.scaling[names[0]]).to(up_OR.dtype)
            weight_BI.copy_(weight_BI.float().add_(scaled_BI))


class _Alternating:
    """Two pieces of memory in turn: one is written to the disk while a tensor is read into the other.

    New memory for each tensor would cost as much time as reading it: the kernel clears every page.
    """

    def __init__(self) -> None:
        self._pieces = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]

    def next(self, num_bytes: int) -> torch.Tensor:
        """Return the piece that was not returned last, of at least so many bytes."""
        self._pieces.reverse()
        if len(self._pieces[0]) < num_bytes:
            self._pieces[0] = torch.empty(0, dtype=torch.uint8)  # given back before more is taken
            self._pieces[0] = torch.empty(num_bytes, dtype=torch.uint8)
        return self._pieces[0]


@contextlib.contextmanager
def _a_core_for_writing() -> Iterator[None]:
    """Leave a core to the thread that hashes and writes: two that share one wait for each other at every block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_config(base: Path, directory: Path, *, untied: bool) -> None:
    config = read_object(base / "config.json", ModelError, WHOLE)
    if untied:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_whole(model: Any, base: Path, directory: Path) -> Mapping[str, str]:
    """Merge and write a model that is in memory."""
    from transformers import GenerationConfig

    _untie_adapted(model)
    merged = model.merge_and_unload()
    if (base / GENERATION).is_file():
        # The base's own follows, also one that would not be written.
        merged.generation_config = GenerationConfig()
    merged.save_pretrained(directory)
    return {}


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
