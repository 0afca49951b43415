"""MoRAM as a method of PEFT: files, merging, switching, and what it refuses."""

from __future__ import annotations

import enum
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from raymem.errors import AdapterError
from raymem.methods.moram import MoRAMConfig, select_indices
from raymem.methods.moram.layer import layers
from tests.helpers.moram_cases import (
    BATCH,
    logits,
    randomised,
    ready,
    small_gpt2,
    small_llama,
    token_batches,
    trainable,
    with_moram,
)
from tests.helpers.support import realigned


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """Directory of an adapter, and the logits that it gives."""
    directory = tmp_path_factory.mktemp("moram")
    model = ready()
    model.save_pretrained(directory)
    return directory, logits(model)


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
def test_loads_what_was_saved(saved: Any, options: dict[str, bool]) -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(small_llama(), saved[0], **options)
    assert torch.equal(logits(realigned(model)), saved[1])
    assert bool(trainable(model)) == options.get("is_trainable", False)


def test_auto_classes_find_the_base(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    base = small_llama()
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    model = ready(base)
    model.save_pretrained(tmp_path / "adapter")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(realigned(found)), logits(model))


def test_the_file_is_smaller_than_with_int32_indices(saved: Any) -> None:
    with safe_open(saved[0] / "adapter_model.safetensors", framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    packed = sum(t.nbytes for key, t in stored.items() if key.endswith("moram_index"))
    naive = sum(layer.moram_index["default"].nbytes for _, layer in layers(ready()))
    assert all(t.dtype == torch.uint8 for key, t in stored.items() if key.endswith("moram_index"))
    assert packed < naive / 6
    assert json.loads((saved[0] / "adapter_config.json").read_text())["peft_type"] == "MORAM"


QUICKLY = "import gc, sys; gc.disable(); sys.modules['bitsandbytes'] = None"  # it brings the whole compiler


def run_afresh(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{QUICKLY}\n{program}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_fresh_process_needs_only_the_import(saved: Any, tmp_path: Path) -> None:
    small_llama().save_pretrained(tmp_path / "base")
    run_afresh(
        "import sys, raymem.methods.moram\n"
        "assert 'peft' not in sys.modules and 'torch' not in sys.modules\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r})\n"
        f"assert type(PeftModel.from_pretrained(base, {str(saved[0])!r}).base_model).__name__ == 'MoRAMModel'"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer", "tuner", "selection", "export"])
def test_whichever_module_comes_first_peft_knows_the_method(name: str) -> None:
    run_afresh(f"import raymem.methods.moram.{name}, peft; assert 'MORAM' in peft.PeftType.__members__")


@pytest.mark.slow
def test_a_pickled_config_brings_the_method_along(tmp_path: Path) -> None:
    import cloudpickle

    (tmp_path / "config").write_bytes(cloudpickle.dumps(MoRAMConfig(r=3, k=7)))
    run_afresh(
        f"import pickle; config = pickle.loads(open({str(tmp_path / 'config')!r}, 'rb').read())\n"
        "from peft import PeftType\n"
        "assert config.peft_type is PeftType.MORAM and (config.r, config.k) == (3, 7)"
    )


def test_registering_twice_is_harmless_and_a_release_that_does_not_take_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft import PeftType

    from raymem.methods.moram import tuner

    assert tuner._extend_peft("MORAM") is PeftType.MORAM
    assert PeftType("MORAM") is PeftType.MORAM is PeftType["MORAM"]

    class Closed(enum.EnumMeta):
        def __call__(cls, value: Any, *arguments: Any, **options: Any) -> Any:
            raise ValueError(value)

    monkeypatch.setattr(
        tuner, "PeftType", Closed("PeftType", (str, enum.Enum), Closed.__prepare__("P", (str, enum.Enum)))
    )
    with pytest.raises(ImportError, match=r"cannot add a method to PEFT's list in peft \d.*tested with peft 0\.19 to"):
        tuner._extend_peft("MORAM")


@pytest.mark.parametrize("base", [small_llama, small_gpt2], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_exact_and_undone_bit_for_bit(base: Any, dtype: torch.dtype, safe: bool) -> None:
    model = ready(base().to(dtype))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapted = logits(model)
    model.merge_adapter(safe_merge=safe)
    for name, layer in layers(model):
        delta = layer.get_delta_weight("default")
        expected = (before[f"{name}.base_layer.weight"].to(delta.dtype) + delta).to(dtype)
        assert torch.equal(layer.get_base_layer().weight, expected)
    torch.testing.assert_close(logits(model), adapted, rtol=2e-5, atol=1e-5 if dtype == torch.float32 else 2e-2)
    model.unmerge_adapter()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(logits(model), adapted)


def test_merge_and_unload_leaves_a_plain_model() -> None:
    model = ready()
    adapted = logits(model)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(logits(merged), adapted)


def test_disabled_it_is_the_base() -> None:
    model = ready()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(small_llama()))
    assert not torch.allclose(logits(model), logits(small_llama()))


def test_several_adapters() -> None:
    model = ready()
    first = logits(model)
    model.add_adapter("second", MoRAMConfig(r=2, k=3, target_modules=["q_proj", "up_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    with pytest.raises(AdapterError, match="adapter 'second' has no connections yet"):
        logits(model)
    select_indices(model, token_batches(1), adapter_name="second")
    randomised(model, seed=1)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(first, second)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    merged = small_llama()
    with torch.no_grad():
        for name, layer in layers(model):
            weight = merged.get_submodule(name.removeprefix("base_model.model.")).weight
            for adapter in layer.moram_A:
                weight += layer.get_delta_weight(adapter)
    torch.testing.assert_close(both, logits(merged), rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert all(list(layer.moram_A) == ["default"] for _, layer in layers(model))


def test_injected_without_a_wrapper() -> None:
    from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

    config = MoRAMConfig(r=4, k=5, target_modules=["q_proj"])
    model = inject_adapter_in_model(config, small_llama())
    select_indices(model, token_batches(1))
    randomised(model)
    other = inject_adapter_in_model(config, small_llama())
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(logits(other), logits(model))


def test_a_bf16_base_trains_fp32_factors() -> None:
    model = ready(small_llama().bfloat16())
    assert {parameter.dtype for parameter in trainable(model)} == {torch.float32}
    model(**BATCH).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable(model))
    assert all(layer.moram_index["default"].dtype == torch.int32 for _, layer in layers(model))


def test_under_autocast_the_products_are_in_low_precision() -> None:
    model = ready()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = logits(model)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), logits(model), rtol=0.1, atol=0.1)


def nf4_llama() -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    model = small_llama(hidden_size=64, intermediate_size=128)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            linear = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4",
                                       compute_dtype=torch.float32)  # fmt: skip
            linear.weight = bnb.nn.Params4bit(module.weight.detach(), requires_grad=False, quant_type="nf4").to("cpu")
            model.set_submodule(name, linear)
    return model.train()  # in evaluation without gradients bitsandbytes may repack the weights for CPUs


def test_a_4bit_base_is_selected_trained_and_merged() -> None:
    import bitsandbytes as bnb

    model = ready(nf4_llama())
    dequantised = small_llama(hidden_size=64, intermediate_size=128)
    adapters = dict(layers(model))
    with torch.no_grad():
        for name, layer in adapters.items():
            weight = layer.get_base_layer().weight
            whole = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            dequantised.get_submodule(name.removeprefix("base_model.model.")).weight.copy_(whole)
    plain = ready(dequantised)
    for name, layer in layers(plain):
        assert torch.equal(layer.moram_index["default"], adapters[name].moram_index["default"])
        layer.moram_B["default"].data.copy_(adapters[name].moram_B["default"].data)
        layer.moram_A["default"].data.copy_(adapters[name].moram_A["default"].data)
    model(**BATCH).loss.backward()
    plain(**BATCH).loss.backward()
    for one, other in zip(trainable(model), trainable(plain), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)
    packed = {name: layer.get_base_layer().weight.data.clone() for name, layer in adapters.items()}
    model.merge_adapter()
    assert all(not torch.equal(layer.get_base_layer().weight.data, packed[name]) for name, layer in adapters.items())
    model.unmerge_adapter()
    assert all(torch.equal(layer.get_base_layer().weight.data, packed[name]) for name, layer in adapters.items())


def test_a_layer_that_does_more_keeps_doing_it() -> None:
    """A hooked base layer computes its own part; the update is added to it."""
    model = ready()
    plain = logits(model)
    layer = layers(model)[0][1].get_base_layer()
    handle = layer.register_forward_hook(lambda module, inputs, output: output + 1.0)
    assert not torch.allclose(logits(model), plain)
    handle.remove()
    layer.register_forward_hook(lambda module, inputs, output: output)
    torch.testing.assert_close(logits(model), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density: 0\.0 is outside \(0, 1\]"),
        ({"density": 1.5}, r"density: 1\.5 is outside \(0, 1\]"),
        ({"density": float("nan")}, r"density: nan is outside"),
        ({"k": 0}, "k: 0 is below 1"),
        ({"k": 3, "density": 0.5}, "give one of them"),
        ({"r": 0}, "r: 0 is below 1"),
        ({"alpha": 0.0}, r"alpha: 0\.0 must be a finite number above 0"),
        ({"alpha": float("inf")}, "alpha: inf must be"),
        ({"formulation": "quick"}, "formulation: 'quick' is not one of auto, fast, frugal"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoRAMConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 40}, r"k: 40 is more than the 32 inputs of model\.layers\.0\.self_attn\.q_proj; use k <= 32"),
        ({"target_modules": ["q_porj"]}, "q_porj.* not found in the base model"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens: MoRAM adapts linear layers .*not Embedding"),
    ],
    ids=str,
)
def test_what_a_model_does_not_have_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_moram(small_llama(), **options)


def test_an_unselected_adapter_neither_runs_nor_is_saved(tmp_path: Path) -> None:
    model = with_moram(small_llama())
    with pytest.raises(AdapterError, match=r"q_proj: adapter 'default' has no connections yet; call .*select_indices"):
        model(**BATCH)
    with pytest.raises(AdapterError, match="there is nothing to save"):
        model.save_pretrained(tmp_path)


def edited(source: Path, target: Path, edit: Any, **config: Any) -> Path:
    """A copy of an adapter directory with changed tensors or options."""
    shutil.copytree(source, target)
    tensors = load_file(target / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    options = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**options, **config}))
    return target


KEY = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "config", "message"),
    [
        (lambda t: None, {"r": 8}, r"moram_A is \[4, 32\] in the adapter's file but \[8, 32\]"),
        (lambda t: None, {"density": 0.5}, "moram_index is .* with another r, k or density"),
        (lambda t: t.pop(f"{KEY}.moram_index"), {}, r"up_proj: moram_index is missing"),
        (lambda t: t[f"{KEY}.moram_index"].zero_(), {}, "up_proj: the stored index set is damaged"),
        (lambda t: t[f"{KEY}.moram_base"].add_(torch.tensor([0, 1, 0])), {}, "up_proj: the base weight is not the one"),
    ],
    ids=["rank", "density", "missing", "damaged", "other base"],
)
def test_a_file_that_does_not_belong_is_refused(
    saved: Any, tmp_path: Path, edit: Any, config: Any, message: str
) -> None:
    from peft import PeftModel

    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(small_llama(), edited(saved[0], tmp_path / "copy", edit, **config))


def test_a_base_of_another_shape_is_refused(saved: Any) -> None:
    from peft import PeftModel

    with pytest.raises(AdapterError, match="trained on a base of another shape"):
        PeftModel.from_pretrained(small_llama(intermediate_size=96), saved[0])


def test_a_base_in_another_dtype_is_taken_with_a_warning(saved: Any) -> None:
    from peft import PeftModel

    with pytest.warns(UserWarning, match="base of 14 layers .* is stored in another format .* not verified"):
        PeftModel.from_pretrained(small_llama().bfloat16(), saved[0])


def test_what_is_not_finite_is_not_merged() -> None:
    model = ready()
    with torch.no_grad():
        layers(model)[0][1].moram_B["default"].fill_(float("nan"))
    with pytest.raises(AdapterError, match="is not finite; it cannot be merged"):
        model.merge_adapter(safe_merge=True)
