"""Defines the common part of PEFT's adapter kinds: attaching, initial values, and reading saved adapters."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from raymem.errors import AdapterError, ModelError, RecipeError
from raymem.kinds import ADAPTER_FILE, AdapterKind, AttachContext
from raymem.methods.peft.importing import without_bitsandbytes
from raymem.storage.json_files import read_object

if TYPE_CHECKING:
    from raymem.methods.peft.targets import Targets


class PeftOptions(Protocol):
    """The options of an adapter of PEFT."""

    @property
    def kind(self) -> str: ...
    @property
    def targets(self) -> str | list[str]: ...
    @property
    def init_from(self) -> str | None: ...


OptionsT = TypeVar("OptionsT", bound=PeftOptions)


class PeftAdapterKind(AdapterKind[OptionsT]):
    """An adapter that PEFT attaches, in PEFT's file format."""

    usage = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")"""
    peft_type: ClassVar[str]
    paths = ("init_from",)
    grows: ClassVar[tuple[str, ...]] = ("rank",)
    free: ClassVar[tuple[str, ...]] = ("alpha",)
    meaning: ClassVar[Mapping[str, str | None]]
    """Maps options of adapter_config.json that decide what its tensors mean to the keys of the recipe that set them."""
    factors: ClassVar[tuple[str, str]]
    """Parts between dots of the two factors' names: of the one that starts at random, and of the one of zeros."""

    @abstractmethod
    def peft_config(self, options: OptionsT, targets: Targets) -> Any:
        """Return the options as a ``peft.PeftConfig`` for causal language models.

        Raises:
            RecipeError: targets that it cannot adapt; begins with ``adapter.targets``.
        """

    def state(self, model: Any, saved: dict[str, Any]) -> dict[str, Any] | None:
        """Return a file's tensors under the names of ``model``, where that takes more than renaming; None where not.

        Raises:
            AdapterError: they do not fit the model.
        """
        return None

    def attach(self, model: Any, options: OptionsT, context: AttachContext) -> Any:
        with without_bitsandbytes():
            from peft import get_peft_model

            from raymem.methods.peft.targets import choose
            from raymem.methods.sentences import as_sentence

            config = self.peft_config(options, choose(model, options.targets))
            name = type(model).__name__
            try:
                # Else PEFT would make fp32 weights, and save an fp32 copy of every layer input.
                arguments = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
                with as_sentence(RecipeError, f"adapter: PEFT refuses it for {name}", "change adapter.targets"):
                    wrapped: Any = get_peft_model(model, config, **arguments)
            except AdapterError as error:
                raise RecipeError(f"adapter.{error}") from None
            # Only now: PEFT writes the directory there from which the config was read, which for a hub id is a cache.
            config.base_model_name_or_path, config.revision = context.base_name, context.base_revision
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(context.dtype)
        return wrapped

    def initial_value(self, name: str, shape: Sequence[int], seed: int) -> Any:
        """Draw from PEFT's distribution: the first factor uniform in +-1/sqrt(fan_in) (Kaiming with a = sqrt(5)), the
        second zero."""
        import torch

        from raymem.seeds import generator

        first, second = self.factors
        if f".{first}." in name:
            bound = 1 / math.sqrt(shape[1])
            return torch.empty(*shape).uniform_(-bound, bound, generator=generator(seed, "adapter", name))
        if f".{second}." in name:
            return torch.zeros(*shape)
        return super().initial_value(name, shape, seed)

    def buffers(self, model: Any) -> dict[str, Any]:
        return stored_buffers(model)

    def save(self, model: Any, directory: Path, tensors: Mapping[str, Any], options: OptionsT) -> None:
        # PEFT would save the base's head beside the adapter of a head, to overwrite another model's with.
        model.save_pretrained(directory, state_dict=tensors, save_embedding_layers=False)

    def continues(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == self.peft_type

    def read(self, directory: str, model: Any) -> dict[str, Any]:
        """Read the tensors of a PEFT directory under the names of a wrapped model. Collective if it is sharded."""
        config = read_config(directory)
        ours: dict[str, Any] = model.peft_config["default"].to_dict()
        for option, key in self.meaning.items():
            theirs, mine = config.get(option) or None, ours.get(option) or None
            if theirs != mine:
                cure = f"set adapter.{key}: {theirs}" if key else merged_instead(directory)
                raise ModelError(
                    f"adapter.init_from: {directory} was trained with {option}={theirs} but this recipe has {mine}, "
                    f"which would change what it does; {cure}"
                )
        return self._tensors(directory, model)

    def _tensors(self, directory: str, model: Any) -> dict[str, Any]:
        path = Path(directory) / ADAPTER_FILE
        saved = without_base(read_tensors(path, directory), model, directory)
        expected = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        expected |= {name: buffer.shape for name, buffer in stored_buffers(model).items()}
        by_file_name = {name.removesuffix(".default").replace(".default.", "."): name for name in expected}
        if set(by_file_name) != set(saved):
            odd = sorted(set(by_file_name) ^ set(saved))[0]
            raise ModelError(
                f"adapter.init_from: {path} was trained on other layers than adapter.targets selects "
                f"(first difference: {odd}); use the same targets, or {merged_instead(directory)}"
            )
        try:
            state = self.state(model, saved)
        except AdapterError as error:
            raise ModelError(f"adapter.init_from: {path}: {error}") from None
        if state is not None:
            return state
        for key, tensor in saved.items():
            if tensor.shape != expected[by_file_name[key]]:
                raise ModelError(
                    f"adapter.init_from: {key} is {list(tensor.shape)} in {path} but this recipe makes it "
                    f"{list(expected[by_file_name[key]])}; set adapter.rank to the rank of that adapter"
                )
        return {by_file_name[key]: tensor for key, tensor in saved.items()}


def stored_buffers(model: Any) -> dict[str, Any]:
    """Return the adapter's buffers, which a checkpoint and the exported adapter hold besides the trained tensors."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    buffers: dict[str, Any] = {}
    for prefix, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            own = {f"{prefix}.{name}": buffer for name, buffer in layer.named_buffers()}
            buffers.update({name: b for name, b in own.items() if not name.startswith(f"{prefix}.base_layer.")})
    return buffers


def tuned_layers(model: Any) -> list[tuple[str, Any]]:
    """Return name and object of every layer that has an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]


def linear_shape(layer: Any) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear layer, also of GPT-2's Conv1D, which stores its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, Conv1D):
        return int(layer.nf), int(layer.weight.shape[0])
    return int(layer.out_features), int(layer.in_features)


def read_config(directory: str | Path) -> dict[str, Any]:
    """Read the adapter_config.json of a PEFT directory.

    Raises:
        ModelError: there is none.
    """
    path = Path(directory) / "adapter_config.json"
    try:
        return read_object(path, ModelError, "give a PEFT directory")
    except ModelError as error:
        raise ModelError(f"adapter.init_from: {error}") from None


def read_tensors(path: Path, directory: str) -> dict[str, Any]:
    """Read every tensor of an adapter's file.

    Raises:
        ModelError: there is none, or it is not whole.
    """
    from safetensors import SafetensorError, safe_open

    from raymem.methods.peft.files import finite

    if not path.is_file():
        raise ModelError(f"adapter.init_from: {directory} holds no adapter_model.safetensors; give a PEFT directory")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: finite(file.get_tensor(key), key, path) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"adapter.init_from: {path}: not a complete safetensors file ({error})") from None


def without_base(saved: dict[str, Any], model: Any, directory: str) -> dict[str, Any]:
    """Return the adapter's own tensors: PEFT saves the base's weights too if it adapts an embedding or an output head.

    Raises:
        ModelError: they are not those of the base in ``model``, so that without them the adapter is another function.
    """
    import torch
    from torch.distributed.tensor import DTensor

    of_base = [key for key in saved if ".base_layer." in key and _has(model, key)]  # else the targets differ
    for key in of_base:
        held: Any = model.get_parameter(key).detach()
        held = held.full_tensor() if isinstance(held, DTensor) else held
        value = saved[key]
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if value.shape != held.shape:
            raise ModelError(
                f"adapter.init_from: {directory} holds {name} of the base as {list(value.shape)} but this base has "
                f"{list(held.shape)}; give the base that it was trained on as model.name, or resize this one with "
                "transformers (resize_token_embeddings), merge the adapter into it with PEFT (merge_and_unload), save "
                "that as model.name, and train without init_from"
            )
        if not torch.equal(value.to(held), held):
            raise ModelError(
                f"adapter.init_from: {directory} holds {name} of the base with other values than this base; "
                + merged_instead(directory)
            )
    return {key: tensor for key, tensor in saved.items() if key not in of_base}


def merged_instead(directory: str | Path) -> str:
    """Return the cure that works for every adapter that PEFT can merge."""
    return f"merge it (raymem merge {directory} -o MERGED), give MERGED as model.name and train without init_from"


def _has(model: Any, name: str) -> bool:
    try:
        model.get_parameter(name)
    except AttributeError:
        return False
    return True
