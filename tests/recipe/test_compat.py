"""Every rule of what does not go together can be reached, and says which settings clash, why, and the way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from raymem.errors import RecipeError
from raymem.kinds import Rule
from raymem.recipe import compat
from raymem.recipe.axes import OPTIMIZERS
from tests.helpers.support import make_recipe
from tests.helpers.toy_kinds import SignKind

NF4 = {"base": {"quantize": "nf4"}}
LORAM = {"base": {"kind": "loram"}}
IN_BACKWARD = {"adapter": "none", "optimizer": {"kind": "mlorc_adamw", "step_in_backward": True}}

SCORED = {"train": {"score_every": 2}, "data": {"eval": {"path": "eval.jsonl", "metric": "numeric"}}}
# The two settings of a rule -> recipes that break that rule and no other.
CASES: dict[tuple[str, ...], list[dict[str, Any]]] = {
    ("tracking.trackers: []",): [{"tracking": "several"}, {"tracking": []}],
    ("base.quantize: nf4", "adapter: none"): [{**NF4, "adapter": "none"}],
    ("base.quantize: nf4", "model.config"): [
        {**NF4, "model": {"name": None, "config": {"model_type": "llama"}, "tokenizer": "demo"}}
    ],
    ("base.kind: loram", "adapter: none"): [{**LORAM, "adapter": "none"}],
    ("base.kind: loram", "model.config"): [
        {**LORAM, "model": {"name": None, "config": {"model_type": "llama"}, "tokenizer": "demo"}}
    ],
    ("base.kind: loram", "export.push_to_hub"): [{**LORAM, "export": {"push_to_hub": "me/tuned"}}],
    ("optimizer: mlorc_adamw or mlorc_lion", "an adapter"): [{"optimizer": "mlorc_adamw"}, {"optimizer": "mlorc_lion"}],
    ("optimizer.step_in_backward: true", "train.clip_norm"): [
        {**IN_BACKWARD, "train": {"clip_norm": 1.0, "global_batch": 4, "micro_batch": 4}},
    ],
    ("optimizer.step_in_backward: true", "gradient accumulation"): [
        {**IN_BACKWARD, "train": {"clip_norm": None, "global_batch": 8, "micro_batch": 4}},
    ],
    ("optimizer.step_in_backward: true", "scaling.strategy: ddp on several workers"): [
        {
            **IN_BACKWARD,
            "train": {"clip_norm": None, "global_batch": 8, "micro_batch": 4},
            "scaling": {"num_workers": 2},
        },
    ],
    ("optimizer.step_in_backward: true", "train.master: fp32 in bf16"): [
        {
            **IN_BACKWARD,
            "train": {"clip_norm": None, "global_batch": 4, "micro_batch": 4, "precision": "bf16", "master": "fp32"},
        },
    ],
    ("activations.side_stream: true", "scaling.use_gpu: false"): [
        {"activations": {"kind": "loract", "side_stream": True}},
    ],
    ("base.offload: true", "adapter: none"): [{"base": {"offload": True}, "adapter": "none"}],
    ("base.offload: true", "an adapter that reads base weights outside of their layer's run"): [
        {"base": {"offload": True}, "adapter": "moram"}
    ],
    ("base.offload: true", "base.quantize: nf4"): [{"base": {"offload": True, "quantize": "nf4"}}],
    ("base.offload: true", "scaling.strategy: fsdp2"): [
        {"base": {"offload": True}, "scaling": {"strategy": "fsdp2", "num_workers": 2}}
    ],
    ("optimizer.paged: true", "scaling.use_gpu: false"): [{"optimizer": {"kind": "adamw_8bit", "paged": True}}],
    ("optimizer.paged: true", "scaling.strategy: fsdp2"): [
        {
            "optimizer": {"kind": "adamw_8bit", "paged": True},
            "scaling": {"use_gpu": True, "strategy": "fsdp2", "num_workers": 2},
        }
    ],
    ("scaling.strategy: fsdp2", "scaling.num_workers: 0"): [{"scaling": {"strategy": "fsdp2", "num_workers": 0}}],
    ("train.master: stochastic_rounding", "train.precision: fp32 or bf16_mixed"): [
        {"train": {"master": "stochastic_rounding"}},
        {"train": {"master": "stochastic_rounding", "precision": "bf16_mixed"}},
    ],
    ("train.master: stochastic_rounding", "an optimizer that cannot round at random"): [
        {"optimizer": "toy_sign", "train": {"master": "stochastic_rounding", "precision": "bf16"}}
    ],
    ("model.dtype", "train.precision"): [
        {"model": {"dtype": "bf16"}},
        {"model": {"dtype": "fp32"}, "train": {"precision": "bf16"}},
        {"model": {"dtype": "bf16"}, "train": {"precision": "bf16_mixed"}, "adapter": "none"},
    ],
    ("train.score_every", "no metric in data.eval"): [{"train": {"score_every": 2}, "scaling": {"num_workers": 1}}],
    ("train.score_every", "scaling.num_workers: 0"): [{**SCORED, "scaling": {"num_workers": 0}}],
    ("train.score_every", "scaling.strategy: fsdp2 on several workers"): [
        {**SCORED, "scaling": {"num_workers": 2, "strategy": "fsdp2"}}
    ],
    ("storage.keep: best", "no data.eval"): [{"storage": {"keep": "best"}}],
}


@pytest.fixture(autouse=True)
def _toy_optimizer() -> Iterator[None]:
    OPTIMIZERS.register(SignKind)
    yield
    OPTIMIZERS.unregister("toy_sign")


def test_no_case_is_left_over() -> None:
    assert set(CASES) <= {rule.settings for rule in compat.all_rules()}


@pytest.mark.parametrize("rule", compat.all_rules(), ids=lambda rule: " + ".join(rule.settings))
def test_a_clash_names_both_settings_the_reason_and_the_cure(rule: Rule) -> None:
    assert rule.settings in CASES, "add recipes that break this new rule"
    for fragment in CASES[rule.settings]:
        with pytest.raises(RecipeError) as caught:
            make_recipe(fragment)
        message = str(caught.value)
        assert len(message.splitlines()) == 1, "no other rule applies"
        assert message.startswith("recipe: ")
        for part in (*rule.settings, rule.reason, rule.cure):
            assert part in message


def test_several_clashes_are_said_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe({**NF4, "adapter": "none", "storage": {"keep": "best"}})
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    "fragment",
    [
        {},
        {**NF4, "train": {"precision": "bf16"}},
        {"base": {"kind": "loram", "quantize": "nf4"}},
        {"base": {"kind": "loram", "artifact": "/pruned"}, "storage": {"path": "s3://bucket/runs"}},
        {"scaling": {"strategy": "fsdp2", "num_workers": 1}},
        {"train": {"precision": "bf16", "master": "stochastic_rounding"}},
        {"train": {"precision": "bf16"}, "model": {"dtype": "bf16"}},
        {"train": {"precision": "bf16_mixed"}, "model": {"dtype": "bf16"}},
        {"data": {"eval": "eval.jsonl"}, "storage": {"keep": "best"}},
    ],
    ids=str,
)
def test_what_goes_together_is_accepted(fragment: dict[str, Any]) -> None:
    make_recipe(fragment)


def test_the_table_has_a_row_per_rule() -> None:
    rows = compat.table().splitlines()
    assert len(rows) == 2 + len(compat.all_rules())
    for rule, row in zip(compat.all_rules(), rows[2:], strict=True):
        assert all(f"`{setting}`" in row for setting in rule.settings)
        assert row.count("|") == rows[0].count("|"), "no column too many"
