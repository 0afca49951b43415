"""The lean forward passes against the stock ones: values, gradients, and bytes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from raymem.memory.trace import Tracer, peak_of
from raymem.methods.loract.config import LoRActOptions
from raymem.planner.plan import make_plan
from raymem.planner.tracing.step_trace import trace_step
from raymem.planner.types import Target
from raymem.testing import measure_step
from raymem.training import lean
from raymem.training.lean import functions, nf4
from raymem.training.lean.forwards import Lean, LeanLora, LeanMlp, LeanNorm
from raymem.training.lean.functions import LoraFunction
from raymem.training.model.build import build_model
from tests.helpers.support import FAMILIES, make_recipe, save_model

# T tokens, H hidden size, I inner size, R rank
TOKENS, HIDDEN, INNER, RANK = 512, 64, 256, 4
KINDS = {"llama": 3, "qwen3": 3, "gemma3_text": 2, "gpt_neox": 2, "gpt2": 2, "opt": 2, "phi3": 2, "qwen3_moe": 2}
"""Family -> how many of the kinds of lean modules it has (norm, LoRA, gated MLP with names that are known)."""


def lora_model(family: str = "llama", dropout: float = 0.0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with LoRA whose B is not zero, in training mode."""
    options = {**FAMILIES[family], **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    config = LoraConfig(r=RANK, lora_alpha=6.0, lora_dropout=dropout, target_modules="all-linear")
    wrapped = get_peft_model(model.to(dtype), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
            if "norm" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return wrapped.train()


def pair(model: Any) -> tuple[Any, Any]:
    """The stock model and the same with lean modules."""
    ours = copy.deepcopy(model)
    lean.install(ours)
    return model, ours


def gradients(model: Any, tokens: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Loss and gradients by name."""
    model.zero_grad()
    torch.manual_seed(0)  # some families have dropout of their own
    tokens = torch.arange(48).view(2, 24) * 5 % 128 if tokens is None else tokens
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Relative error of all gradients together (Frobenius)."""
    names = [name for name in exact if name != "loss"]
    missed = sum(float((found[n].double() - exact[n].double()).square().sum()) for n in names)
    return (missed / sum(float(exact[n].double().square().sum()) for n in names)) ** 0.5


@pytest.mark.parametrize("family", KINDS)
def test_values_and_gradients_are_those_of_the_stock_layers(family: str) -> None:
    stock, ours = pair(lora_model(family))
    kinds = {type(m.__dict__["forward"]) for m in ours.modules() if isinstance(m.__dict__.get("forward"), Lean)}
    assert len(kinds) == KINDS[family]
    expected, found = gradients(stock), gradients(ours)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_in_full_has_the_gradients_of_the_stock_layers(family: str) -> None:
    """With weights and biases of norms."""
    model = lora_model(family).unload()
    stock, ours = pair(model.requires_grad_(True))
    expected, found = gradients(stock), gradients(ours)
    assert found.keys() == expected.keys() and any("norm" in name or "ln_" in name for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-6, msg=name)


def test_half_precision_comes_closer_to_the_exact_gradients() -> None:
    """Every sum is rounded once where the stock layers round it, its parts and their scaled copies."""
    exact = gradients(lora_model(dtype=torch.bfloat16, num_hidden_layers=4).double())
    stock, ours = pair(lora_model(dtype=torch.bfloat16, num_hidden_layers=4))
    assert error(gradients(ours), exact) < 1.05 * error(gradients(stock), exact) < 0.05


def test_dropout_is_that_of_its_mask() -> None:
    x, up = (torch.randn(8, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 6), (5, 3)))
    layer = nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    weight = nf4.Weight.of(layer, torch.float64)
    assert weight is not None
    for second in (None, up):
        leaves = [t for t in (x, second, a, b) if t is not None]
        torch.manual_seed(1)
        y = LoraFunction.apply(x, second, a, b, weight.dense, weight, 1.5, 0.25)
        found = torch.autograd.grad(y.sin().sum(), leaves)
        torch.manual_seed(1)
        mask = torch.empty(8, 6, dtype=torch.bool).bernoulli_(0.75)
        h = x if second is None else F.silu(x) * second
        stock = layer(h) + 1.5 * (h * mask / 0.75) @ a.mT @ b.mT
        assert not bool(mask.all())
        torch.testing.assert_close(y, stock)
        for one, other in zip(found, torch.autograd.grad(stock.sin().sum(), leaves), strict=True):
            torch.testing.assert_close(one, other)


def test_an_mlp_that_clamps_is_left_as_it_is() -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Clamping(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.gate_proj(x).clamp(max=50.0), self.up_proj(x).clamp(-50.0, 50.0)
            made: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
            return made

    options = {key: value for key, value in FAMILIES["llama"].items() if key != "model_type"}
    config = AutoConfig.for_model("llama", **options)
    for kind in (LlamaMLP, Clamping):
        module = kind(config)
        lean.install(module)
        assert ("forward" in module.__dict__) == (kind is LlamaMLP)


def test_masks_are_packed_without_loss() -> None:
    for columns in (8, 13, 64):
        mask = torch.rand(5, columns) < 0.5
        packed = functions.pack_bits(mask)
        assert packed.dtype == torch.uint8 and packed.shape == (5, -(-columns // 8))
        assert torch.equal(functions.unpack_bits(packed, columns), mask)


def test_what_a_lean_pass_was_not_made_for_goes_to_the_stock_one() -> None:
    stock, ours = pair(lora_model())
    tokens = torch.arange(24).view(1, 24)

    def logits(model: Any, *, mixed: bool = False) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
            return found

    adapted = logits(ours)
    torch.testing.assert_close(logits(stock, mixed=True), logits(ours, mixed=True), rtol=0, atol=0)
    with stock.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(logits(stock), logits(ours))
        assert (logits(ours) - adapted).abs().max() > 1e-3
    ours.merge_adapter()
    torch.testing.assert_close(logits(ours), adapted, rtol=1e-4, atol=1e-5)
    ours.unmerge_adapter()
    torch.testing.assert_close(logits(ours.merge_and_unload()), adapted, rtol=1e-4, atol=1e-5)


def test_lean_modules_are_copied_and_pickled_with_their_model() -> None:
    _, ours = pair(lora_model())
    expected = gradients(ours)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        lean_modules = [m for m in again.modules() if "forward" in m.__dict__]
        assert lean_modules and all(m.__dict__["forward"].module is m for m in lean_modules)
        for name, value in gradients(again).items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("scope", ["layer", "linear"])
def test_compression_by_what_linear_layers_keep_has_stock_layers(scope: Any) -> None:
    config = {"name": None, "config": FAMILIES["llama"], "tokenizer": "demo"}
    recipe = make_recipe({"model": config})
    recipe = recipe.model_copy(update={"activations": LoRActOptions(scope=scope)})
    model = build_model(recipe, meta=True)
    found = any(isinstance(m.__dict__.get("forward"), LeanLora) for m in model.modules())
    assert found == (scope == "layer")


# ---- 4-bit weights in blocks


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A 4-bit layer [192, 320] that counts as large, in blocks that do not divide it."""
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(nf4, "WHOLE_BYTES", 1)
    monkeypatch.setattr(nf4, "_FEW_TOKENS", 1)
    monkeypatch.setattr(nf4, "BLOCK_BYTES", 2 * 192 * 128)
    layer: Any = bnb.nn.Linear4bit(320, 192, compute_dtype=torch.bfloat16, quant_type="nf4")
    torch.manual_seed(0)
    layer.weight = bnb.nn.Params4bit(torch.randn(192, 320), requires_grad=False, quant_type="nf4", module=layer)
    layer.bias = nn.Parameter(torch.randn(192, dtype=torch.bfloat16), requires_grad=False)
    return layer.to("cpu")


def test_products_with_blocks_are_those_with_the_whole_weight(packed: Any) -> None:
    weight = nf4.Weight.of(packed, torch.bfloat16)
    assert weight is not None and weight.dense is None
    x = torch.randn(3, 5, 320).bfloat16().requires_grad_()
    stock = packed(x)
    slope = torch.randn_like(stock)
    (expected,) = torch.autograd.grad(stock, x, slope)
    with torch.no_grad():
        made = weight.times(x)
        found = weight.gradient(slope.flatten(0, 1), None)
    torch.testing.assert_close(made, stock, rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(found.view_as(x), expected, rtol=1e-2, atol=2e-2)


def test_a_large_weight_is_never_there_whole(packed: Any) -> None:
    weight = nf4.Weight.of(packed, torch.bfloat16)
    assert weight is not None
    x, slope = torch.randn(15, 320).bfloat16(), torch.randn(15, 192).bfloat16()
    whole = 2 * 192 * 320
    for result_bytes, work in (
        (2 * 15 * 192, lambda: weight.times(x)),
        (2 * 15 * 320, lambda: weight.gradient(slope, None)),
    ):
        with torch.no_grad(), Tracer() as tracer:
            work()
        peak = peak_of(tracer.changes, wanted=lambda _: True).num_bytes
        # Beside a block: its packed form, the scales in fp32 twice, and the packed weight, which counts as seen anew.
        beside = nf4.BLOCK_BYTES // 4 + 2 * 4 * (192 * 320 // 64) + whole // 4
        assert peak <= result_bytes + nf4.BLOCK_BYTES + beside < whole + result_bytes


# ---- bytes


def kept_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """What autograd holds for the backward pass of ``module(x)``, parameters and input apart."""
    apart = {t.untyped_storage().data_ptr() for t in [*module.parameters(), x]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
        total = sum(kept.values())
        del y
    return total


def backward_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Peak of what is allocated by forward and backward pass."""
    slope = torch.ones_like(x)
    with Tracer() as tracer:
        tracer.phase = "forward"
        module(x).backward(slope)
    return peak_of(tracer.changes, wanted=lambda _: True).num_bytes


def parts(dropout: float) -> tuple[list[nn.Module], list[nn.Module], torch.Tensor]:
    """Norm and MLP of a llama layer in bf16, stock and lean, and an input."""
    shape: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": INNER, "head_dim": 16}
    both = pair(lora_model(dropout=dropout, dtype=torch.bfloat16, **shape))
    layers = [model.base_model.model.model.layers[0] for model in both]
    x = torch.randn(1, TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    stock, ours = ([layer.input_layernorm, layer.mlp] for layer in layers)
    assert isinstance(ours[0].__dict__["forward"], LeanNorm) and isinstance(ours[1].__dict__["forward"], LeanMlp)
    return stock, ours, x


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporaries as small beside the tensors as they are in a large model."""
    monkeypatch.setattr(functions, "_CHUNK_BYTES", 16 << 10)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_kept_for_backward(dropout: float) -> None:
    (stock_norm, stock_mlp), (norm, mlp), x = parts(dropout)
    assert kept_bytes(stock_norm, x) >= 4 * TOKENS * HIDDEN
    assert kept_bytes(norm, x) == 0
    ranks = 3 * 2 * TOKENS * RANK
    masks = TOKENS * (2 * HIDDEN + INNER) // 8 if dropout else 0
    assert kept_bytes(mlp, x) == 2 * 2 * TOKENS * INNER + ranks + masks
    assert kept_bytes(stock_mlp, x) >= 4 * 2 * TOKENS * INNER + ranks + (16 * masks if dropout else 0)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_peak_of_an_mlp_is_four_times_its_inner_width(dropout: float) -> None:
    """Gate and up projection and their gradients; the stock layers come to six, and more with dropout."""
    (_, stock), (_, mlp), x = parts(dropout)
    width = 2 * TOKENS * INNER
    beside = 6 * 2 * TOKENS * HIDDEN + 64 * 1024  # input and output, their gradients and masks; the adapter's gradients
    assert backward_bytes(mlp, x) <= (4 + (1 / 16 if dropout else 0)) * width + beside
    assert backward_bytes(stock, x) >= 6 * width


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("quantised", [False, True])
def test_the_peak_of_a_step_is_as_predicted(quantised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the MLP decides; and what lean layers take off it is really gone."""
    if quantised:
        pytest.importorskip("bitsandbytes")
    wide: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 1024,
        "max_position_embeddings": 256,
        "head_dim": 16,
    }
    model = save_model(tmp_path / "model", **wide)
    recipe = make_recipe(
        {"train": {"precision": "bf16", "global_batch": 2, "micro_batch": 2}, "data": {"sequence_length": 256}},
        {"activations": "checkpoint", "base": {"quantize": "nf4" if quantised else "none"}},
        {"adapter": {"dropout": 0.1}},
        model=model,
    )
    measured = measure_step(recipe).allocated_bytes
    plan = make_plan(trace_step(recipe, Target.of(recipe)), Target.of(recipe), None)
    assert abs(plan.step_peak_bytes - measured) <= 0.01 * measured
    monkeypatch.setattr(lean, "install", lambda model: None)
    assert measured <= measure_step(recipe).allocated_bytes - 2 * 2 * 512 * 1024
