"""Every tensor of a checkpoint is loaded, known to be of no use, or the model is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymem.account import NO_USE, Header, of_no_use
from raymem.errors import ModelError
from raymem.methods.loram.nonuniform import read_config
from raymem.methods.loram.source import open_source
from raymem.training.artifacts.load import load_artifact
from raymem.training.model.build import build_model
from tests.helpers.support import make_recipe, random_batch, realigned, save_model, write_examples

FULL = {"adapter": {"kind": "none"}}
Q = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


def changed(directory: Path, change: Callable[[Tensors], Any], **config: Any) -> Path:
    """Change a model directory's tensors and config in place."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    described = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**described, **config}))
    return directory


def build(directory: Path, *, meta: bool = False) -> Any:
    return build_model(make_recipe(FULL, model=directory), meta=meta)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**random_batch(2, 12, packed=False).model_inputs()).logits


def assert_as_transformers(directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = realigned(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))
    assert torch.equal(logits(build(directory)), logits(reference))


def stored_as(dtype: torch.dtype, scale: str | None) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        weight = tensors[f"{Q}.weight"]
        step = weight.abs().max() / (100 if dtype in (torch.int8, torch.uint8) else 1)
        tensors[f"{Q}.weight"] = (weight / step).to(dtype)
        if scale is not None:
            tensors[f"{Q}.{scale}"] = step.reshape(1)

    return change


def packed(*suffixes: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[f"{Q}.weight"]
        tensors.update({f"{Q}.{suffix}": torch.ones(4, 4, dtype=torch.int32) for suffix in suffixes})

    return change


PACKED = {
    "fp8 e4m3 with scales": (stored_as(torch.float8_e4m3fn, "weight_scale_inv"), "F8_E4M3"),
    "fp8 e4m3 without": (stored_as(torch.float8_e4m3fn, None), "F8_E4M3"),
    "fp8 e5m2": (stored_as(torch.float8_e5m2, "weight_scale"), "F8_E5M2"),
    "int8": (stored_as(torch.int8, "SCB"), "I8"),
    "bool": (lambda tensors: tensors.update({f"{Q}.weight": tensors[f"{Q}.weight"] > 0}), "BOOL"),
    "int64": (stored_as(torch.int64, None), "I64"),
    "uint8": (stored_as(torch.uint8, None), "U8"),
    "gptq": (packed("qweight", "qzeros", "scales", "g_idx"), "I32"),
    "nf4 tables": (
        lambda tensors: tensors.update({f"{Q}.weight.absmax": torch.ones(4), f"{Q}.weight.quant_map": torch.ones(16)}),
        "F32",
    ),
    "scale alone": (lambda tensors: tensors.update({f"{Q}.weight_scale": torch.ones(1)}), "F32"),
}


@pytest.mark.parametrize("kind", PACKED)
def test_weights_in_fewer_bits_are_refused_by_name_everywhere(kind: str, tmp_path: Path) -> None:
    change, dtype = PACKED[kind]
    directory = changed(save_model(tmp_path / "model"), change)
    message = rf"{directory} holds .*tensor {Q}\.\w+.* of dtype {dtype}.*base\.quantize: nf4"
    for use in (build, open_source, load_artifact):
        with pytest.raises(ModelError, match=message):
            use(directory)


CONFIGS: dict[str, Any] = {
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "bitsandbytes": {"quantization_config": {"load_in_4bit": True}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4"}},
    "compressed-tensors": {"compression_config": {"quant_method": "compressed-tensors"}},
}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_config_that_says_quantised_is_refused_before_anything_is_read(method: str, tmp_path: Path) -> None:
    directory = changed(save_model(tmp_path / "model"), lambda tensors: None, **CONFIGS[method])
    (directory / "model.safetensors").unlink()
    message = rf"{directory} is quantised: .* quant_method {method}; .*base\.quantize: nf4"
    for use in (build, lambda place: build(place, meta=True), read_config, open_source, load_artifact):
        with pytest.raises(ModelError, match=message):
            use(directory)


def test_every_command_refuses_a_quantised_model(tmp_path: Path) -> None:
    import raymem

    directory = changed(save_model(tmp_path / "model"), lambda tensors: None, **CONFIGS["fp8"])
    write_examples(tmp_path / "rows.jsonl", 40, 0)
    rows = str(tmp_path / "rows.jsonl")
    recipe = {
        "name": "quantised",
        "model": {"name": str(directory)},
        "data": {"train": rows, "eval": rows, "sequence_length": 32},
        "train": {"steps": 1},
        "storage": {"path": str(tmp_path / "runs")},
        "scaling": {"num_workers": 0},
    }
    for use in (raymem.train, raymem.plan, lambda recipe: raymem.evaluate(recipe, artifact="base")):
        with pytest.raises(ModelError, match=rf"model\.name: {directory} is quantised: .* quant_method fp8"):
            use(recipe)
    assert not (tmp_path / "runs" / "cache" / "data").exists(), "and no data were prepared for it"


UNFIT: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "scales alone": (lambda t: t.update({f"{Q}.weight_scale": torch.ones(1)}), "fewer bits than their value has"),
    "one more": (lambda t: t.update({"model.layers.0.extra.weight": torch.ones(2)}), "has no place"),
    "one less": (lambda t: t.pop(f"{Q}.weight"), f"1 tensors are missing .* {Q}"),
    "of another shape": (
        lambda t: t.update({f"{Q}.weight": torch.ones(3, 3)}),
        r"has shape \[3, 3\] in the c",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_weights_that_do_not_fit_are_refused_before_anything_starts(kind: str, tmp_path: Path) -> None:
    """Of their headers alone, also by a plan, which needs no weights."""
    import raymem

    change, message = UNFIT[kind]
    directory = changed(save_model(tmp_path / "model"), change)
    write_examples(tmp_path / "rows.jsonl", 40, 0)
    recipe = {
        "model": {"name": str(directory)},
        "data": {"train": str(tmp_path / "rows.jsonl"), "sequence_length": 32},
        "train": {"steps": 1, "micro_batch": 1},
        "storage": {"path": str(tmp_path / "runs")},
        "scaling": {"num_workers": 0},
        "tracking": "none",
    }
    for use in (raymem.plan, raymem.train):
        with pytest.raises(ModelError, match=message):
            use(recipe)
    assert not (tmp_path / "runs" / "cache" / "data").exists()


def test_an_adapter_of_a_quantised_base_is_refused_by_the_name_of_the_base(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    model: Any = build_model(make_recipe(model=base))
    model.save_pretrained(tmp_path / "adapter")
    changed(base, lambda tensors: None, **CONFIGS["fp8"])
    with pytest.raises(ModelError, match=rf"{base} is quantised: .* quant_method fp8"):
        load_artifact(tmp_path / "adapter")


def test_a_null_quantization_config_is_none(tmp_path: Path) -> None:
    assert_as_transformers(changed(save_model(tmp_path / "m"), lambda tensors: None, quantization_config=None))


OF_NO_USE = {
    "angles": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "positions": {"model.position_ids": torch.arange(64)[None]},
    "a head of another task": {"v_head.weight": torch.ones(1, 32)},
    "a mask": {"model.layers.1.attention.masked_bias": torch.tensor(-1e9)},
}


@pytest.mark.parametrize("kind", OF_NO_USE)
def test_what_is_of_no_use_is_left_out(kind: str, tmp_path: Path) -> None:
    directory = changed(save_model(tmp_path / "model"), lambda tensors: tensors.update(OF_NO_USE[kind]))
    assert_as_transformers(directory)
    assert not set(open_source(directory).tensors) & set(OF_NO_USE[kind])


def test_the_masks_of_old_gpt2_files_are_left_out(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["h.0.attn.bias"] = torch.ones(64, 64).tril()[None, None]
        tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)

    assert_as_transformers(changed(save_model(tmp_path / "model", "gpt2"), change))


@pytest.mark.parametrize(
    "name", [f"{Q}.bias", "model.layers.2.mlp.up_proj.weight", "model.layers.0.attention.bias", "vision.patch.weight"]
)
def test_what_a_model_has_no_place_for_is_refused(name: str, tmp_path: Path) -> None:
    """A bias that the config denies, a layer above its number: without them it is another model."""
    directory = changed(save_model(tmp_path / "model"), lambda tensors: tensors.update({name: torch.ones(32)}))
    message = rf"{directory} holds tensor {name} of dtype F32 and shape \[32\].*give the config\.json"
    for use in (build, open_source, load_artifact):
        with pytest.raises(ModelError, match=message):
            use(directory)


def test_what_transformers_leaves_out_of_a_class_is_left_out() -> None:
    class Model:
        _keys_to_ignore_on_load_unexpected = {r"^mtp\."}

    assert of_no_use(Model(), "mtp.fc.weight", Header("BF16", (2, 2))) == "transformers leaves it out of Model"
    assert of_no_use(Model(), "model.fc.weight", Header("BF16", (2, 2))) is None
    assert all(reason for _, reason in NO_USE)


def test_a_missing_expert_is_missing(tmp_path: Path) -> None:
    """These are fused while loading, by transformers, which would make up what is not there."""
    directory = save_model(tmp_path / "model", "qwen3_moe")
    changed(directory, lambda tensors: [tensors.pop(n) for n in list(tensors) if "layers.1.mlp.experts" in n])
    with pytest.raises(ModelError, match=r"tensors are missing from the checkpoint"):
        build(directory)


def test_experts_in_fewer_bits_are_refused(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        name = next(name for name in sorted(tensors) if "experts" in name)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    with pytest.raises(ModelError, match=r"tensor model\.layers\.0\.mlp\.experts\.\S+ of dtype F8_E4M3"):
        build(changed(save_model(tmp_path / "model", "qwen3_moe"), change))


# Two sources of truth.


def other(directory: Path, **options: Any) -> Path:
    """Another model of the same shape."""
    save_model(directory, **options)
    for path in directory.glob("*.safetensors"):
        save_file({n: t * 0.5 for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    return directory


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model")
    alone = logits(build(directory))
    for path in other(tmp_path / "other", max_shard_size="20KB").glob("model*"):
        shutil.copy(path, directory)
    assert (directory / "model.safetensors.index.json").is_file()
    assert_as_transformers(directory)
    assert torch.equal(logits(build(directory)), alone)
    assert {entry.file for entry in open_source(directory).tensors.values()} == {"model.safetensors"}


def test_of_two_sets_of_shards_the_index_says_which(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", max_shard_size="20KB")
    alone = logits(build(directory))
    for path in other(tmp_path / "other", max_shard_size="40KB").glob("model-*"):
        assert not (directory / path.name).exists()
        shutil.copy(path, directory)
    assert_as_transformers(directory)
    assert torch.equal(logits(build(directory)), alone)


def test_a_file_that_the_config_names_goes_first(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model")
    alone = logits(build(directory))
    shutil.copy(other(tmp_path / "other") / "model.safetensors", directory / "chosen.safetensors")
    changed(directory, lambda tensors: None, transformers_weights="chosen.safetensors")
    assert_as_transformers(directory)
    assert not torch.equal(logits(build(directory)), alone)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", max_shard_size="20KB")
    first, *_, last = sorted(directory.glob("model-*"))
    extra = {name: tensor * 2 for name, tensor in list(load_file(first).items())[:1]}
    save_file({**load_file(last), **extra}, last, metadata={"format": "pt"})
    for use in (build, open_source):
        with pytest.raises(ModelError, match=rf"twice, as .* in {first.name} and as .* in {last.name}; remove"):
            use(directory)


def test_a_head_of_its_own_against_a_tied_config_is_refused(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", "llama_tied")
    changed(directory, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    message = (
        rf"{directory} holds lm_head\.weight and model\.embed_tokens\.weight with different values.*; "
        r"set tie_word_embeddings: false in its config\.json"
    )
    for use in (build, open_source, load_artifact):
        with pytest.raises(ModelError, match=message):
            use(directory)
    assert_as_transformers(changed(directory, lambda tensors: None, tie_word_embeddings=False))  # the cure


def test_an_equal_head_is_the_embedding(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", "llama_tied")
    changed(directory, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert_as_transformers(directory)
    model = build(directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_tensor_under_its_other_name_alone_is_loaded(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", "llama_tied")
    changed(directory, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    assert_as_transformers(directory)


def test_a_tied_tensor_under_neither_name_is_missing(tmp_path: Path) -> None:
    directory = changed(
        save_model(tmp_path / "model", "llama_tied"), lambda tensors: tensors.pop("model.embed_tokens.weight")
    )
    with pytest.raises(ModelError, match="tensors are missing from the checkpoint, the first is lm_head"):
        build(directory)


def test_an_untied_config_without_a_head_is_incomplete(tmp_path: Path) -> None:
    directory = changed(save_model(tmp_path / "model"), lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"1 tensors are missing .*lm_head\.weight"):
        build(directory)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_model_that_computes_nan_is_refused(llama: Path, tmp_path: Path, number: float) -> None:
    directory = shutil.copytree(llama, tmp_path / "model")

    def change(tensors: Tensors) -> None:
        tensors[f"{Q}.weight"].view(-1)[3] = number

    changed(directory, change)
    for use in (build, load_artifact):
        with pytest.raises(ModelError, match=rf"tensor {Q}\.weight holds numbers that are nan or infinite; fetch"):
            use(directory)
