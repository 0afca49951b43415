"""Using a result: loading, generating and merging."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.errors import ModelError, StorageError
from raymem.recipe.axes import ADAPTERS
from raymem.storage.checksums import CHECKSUMS
from raymem.training.artifacts.generate import generate
from raymem.training.artifacts.load import load_artifact
from raymem.training.artifacts.merge import merge
from tests.helpers import toy_kinds
from tests.helpers.support import make_recipe, random_batch, run_fragment, save_model, train


@pytest.fixture(scope="module")
def results(llama: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("results")
    found = {}
    for name, fragment in (("adapter", {}), ("model", {"adapter": {"kind": "none"}})):
        outcome, _ = train(make_recipe(run_fragment(examples, place), {"name": name}, fragment, model=llama))
        assert outcome is not None
        found[name] = Path(outcome.artifact)
    return found


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_result_continues_a_text(results: dict[str, Path], kind: str) -> None:
    def continued(temperature: float, seed: int = 0) -> str:
        return generate(results[kind], "w1 w3 w9", max_new_tokens=6, temperature=temperature, seed=seed).text

    greedy = continued(0.0)
    assert greedy == continued(0.0, seed=1), "the likeliest token needs no luck"
    assert continued(1.0) == continued(1.0)
    assert continued(1.0) != continued(1.0, seed=1)
    assert set(greedy.split()) <= {*(f"w{i}" for i in range(128)), "<unk>"}
    assert 0 < len(continued(1.0).split()) <= 6
    assert "w1 w3 w9" not in greedy[:8]


@pytest.mark.parametrize("prompt", ["w1 w3 w9", "<unk> w1 w3 w9"])
def test_a_prompt_begins_once(results: dict[str, Path], monkeypatch: pytest.MonkeyPatch, prompt: str) -> None:
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = load_artifact(results["model"])
    tokenizer.bos_token = "<unk>"
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", begin)]
    )
    seen: list[list[int]] = []

    def continued(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.extend(input_ids.tolist())
        return input_ids

    monkeypatch.setattr(model, "generate", continued)
    monkeypatch.setattr("raymem.training.artifacts.generate.load_artifact", lambda _, **__: (model, tokenizer))
    generate(results["model"], prompt, max_new_tokens=1, temperature=0, seed=0)
    words = tokenizer.backend_tokenizer.encode("w1 w3 w9", add_special_tokens=False).ids
    assert seen == [[begin, *words]]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**random_batch(2, 12, packed=False).model_inputs()).logits


def test_an_adapter_on_a_base_of_lower_precision_is_what_plain_peft_has(
    llama: Path, examples: Path, tmp_path: Path
) -> None:
    """It was trained in fp32 and is stored so: rounding it to the base's bf16 would change what it computes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tmp_path / "bf16"
    shutil.copytree(llama, base)
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(base)
    outcome, _ = train(make_recipe(run_fragment(examples, tmp_path), {"optimizer": {"lr": 0.05}}, model=base))
    assert outcome is not None
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), outcome.artifact).eval()
    loaded, _ = load_artifact(outcome.artifact)
    stored, ids = dict(plain.named_parameters()), random_batch(128, 2, 12).input_ids
    assert any(tensor.dtype == torch.float32 and tensor.any() for name, tensor in stored.items() if "lora_B" in name)
    for name, tensor in loaded.named_parameters():
        assert tensor.dtype == stored[name].dtype and torch.equal(tensor, stored[name]), name
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, plain(input_ids=ids).logits)
    merge(outcome.artifact, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in plain.merge_and_unload().state_dict().items():
        assert torch.equal(tensor, merged[name]), name


def test_merging_folds_the_adapter_into_a_plain_model(results: dict[str, Path], tmp_path: Path) -> None:
    merged = merge(results["adapter"], tmp_path / "deep" / "merged")
    found, _ = load_artifact(merged)
    expected, _ = load_artifact(results["adapter"])
    assert type(found).__name__ == "LlamaForCausalLM" and not found.training
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float32
    assert json.loads((merged / "raymem.json").read_text())["merged_from"] == str(results["adapter"])
    assert not list(merged.parent.glob(".*"))


def test_merging_into_a_tied_head_leaves_the_embedding(examples: Path, tmp_path: Path) -> None:
    tied = save_model(tmp_path / "tied", "llama_tied")
    targets = {"adapter": {"targets": ["lm_head", "q_proj"]}}
    outcome, _ = train(make_recipe(run_fragment(examples, tmp_path), targets, model=tied))
    assert outcome is not None
    expected, _ = load_artifact(outcome.artifact)
    found, _ = load_artifact(merge(outcome.artifact, tmp_path / "merged"))
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.model.embed_tokens.weight, expected.get_base_model().model.embed_tokens.weight)
    assert not torch.equal(found.model.embed_tokens.weight, found.lm_head.weight)


def test_merging_overwrites_nothing_and_takes_only_adapters(results: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"--output: .* already exists"):
        merge(results["adapter"], tmp_path)
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json; only adapters are merged"):
        merge(results["model"], tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"--output: cannot write "):
        merge(results["adapter"], tmp_path / "file" / "below")


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds neither adapter_config\.json nor config\.json; give the adapter"):
        load_artifact(tmp_path)
    with pytest.raises(ModelError, match="holds neither"):
        generate(tmp_path / "absent", "a", max_new_tokens=1, temperature=0, seed=0)


def test_an_adapter_whose_base_is_gone_names_it(results: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(results["adapter"], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ModelError, match=r"adapter_config\.json is not as raymem wrote it .* delete .*raymem\.sha256"):
        load_artifact(tmp_path / "adapter")
    (tmp_path / "adapter" / CHECKSUMS).unlink()
    with pytest.raises(ModelError, match=r"adapter cannot be loaded: .*gone"):
        load_artifact(tmp_path / "adapter")


@pytest.mark.parametrize(("kind", "file"), [("adapter", "adapter_model.safetensors"), ("model", "model.safetensors")])
def test_a_truncated_result_is_refused(results: dict[str, Path], tmp_path: Path, kind: str, file: str) -> None:
    shutil.copytree(results[kind], tmp_path / kind)
    path = tmp_path / kind / file
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(ModelError, match=f"{file} is not as raymem wrote it"):
        load_artifact(tmp_path / kind)
    (tmp_path / kind / CHECKSUMS).unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_artifact(tmp_path / kind)


@pytest.fixture(scope="module")
def shifted(llama: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An adapter of a kind that PEFT does not know."""
    ADAPTERS.register(toy_kinds.ShiftKind)
    place = tmp_path_factory.mktemp("shifted")
    outcome, _ = train(make_recipe(run_fragment(examples, place), {"adapter": {"kind": "toy_shift"}}, model=llama))
    assert outcome is not None
    yield Path(outcome.artifact)
    ADAPTERS.unregister("toy_shift")


def test_an_adapter_of_a_kind_of_its_own_continues_a_text_but_is_not_merged(shifted: Path, tmp_path: Path) -> None:
    assert generate(shifted, "w1 w3 w9", max_new_tokens=6, temperature=0.0, seed=0)
    with pytest.raises(ModelError, match="is an adapter of kind toy_shift, which cannot be folded into its base"):
        merge(shifted, tmp_path / "merged")


def test_what_is_missing_for_an_adapter_of_a_kind_of_its_own(shifted: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shifted, tmp_path / "copy"))
    (copy / "raymem.json").unlink()
    (copy / CHECKSUMS).unlink()
    with pytest.raises(ModelError, match=r"copy cannot be loaded: it holds no raymem\.json, which names its base"):
        load_artifact(copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "raymem_kind": "nobodys"}))
    with pytest.raises(ModelError, match=r"copy is an adapter of kind nobodys, which is not known here; install"):
        load_artifact(copy)
