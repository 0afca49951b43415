"""Reading recipes: whatever is wrong is said with file, YAML path, value, rule and the nearest valid name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymem.errors import RecipeError
from raymem.recipe.load import load_recipe, packaged_recipe, parse_recipe
from raymem.recipe.schema import Recipe
from tests.helpers.support import PLAIN, make_recipe, merged

MINIMAL = "model: {name: org/model}\ndata: {train: data.jsonl}\ntrain: {steps: 10}\n"


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a recipe file; the test runs in its directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str = MINIMAL, name: str = "mine.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return Path(name)

    return write


def refusal(*fragments: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        make_recipe(*fragments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fragment", "parts"),
    [
        ({"adaptor": "lora"}, ["adaptor: unknown key", "did you mean 'adapter'"]),
        ({"adapter": {"rnk": 3}}, ["adapter.rnk: unknown key", "did you mean 'rank'"]),
        ({"data": {"train": ["a", {"path": "b", "wieght": 2}]}}, ["data.train[1].wieght", "'weight'"]),
        ({"tracking": {"experimnt": "x"}}, ["tracking.experimnt", "'experiment'"]),
        ({"train": {"xyz": 1}}, ["train.xyz: unknown key", "known here: ", "global_batch", "warmup"]),
        ({"adapter": {"rank": -3}}, ["adapter.rank: -3", "greater than or equal to 1"]),
        ({"adapter": {"dropout": 1.0}}, ["adapter.dropout: 1.0", "less than 1"]),
        ({"optimizer": {"lr": 0}}, ["optimizer.lr: 0", "greater than 0"]),
        ({"optimizer": {"betas": [0.9, 2.0]}}, ["optimizer.betas[1]: 2.0", "less than 1"]),
        ({"train": {"steps": "many"}}, ["train.steps: 'many'", "integer"]),
        ({"train": {"precision": "fp16"}}, ["train.precision: 'fp16'", "fp32, bf16, bf16_mixed", "'bf16'"]),
        ({"base": {"quantize": "nf5"}}, ["base.quantize: 'nf5'", "did you mean 'nf4'"]),
        ({"adapter": "lroa"}, ["adapter.kind: 'lroa'", "did you mean 'lora'"]),
        ({"optimizer": {"kind": "adamW"}}, ["optimizer.kind: 'adamW'", "did you mean 'adamw'"]),
        ({"tracking": {"kind": "comet"}}, ["tracking.kind: 'comet'", "mlflow, tensorboard, wandb"]),
        ({"adapter": 3}, ["adapter: 3"]),
        ({"train": None}, ["train: None", "mapping"]),
        ({"data": {"train": []}}, ["data.train: []", "at least 1 item"]),
        ({"data": {"train": [{"split": "train"}]}}, ["data.train[0].path: is missing"]),
        ({"name": "a b"}, ["name: 'a b'", "pattern"]),
        ({"seed": -1}, ["seed: -1", "greater than or equal to 0"]),
        ({"train": {"steps": None}}, ["train: give exactly one of train.steps and train.epochs"]),
        ({"train": {"epochs": 1}}, ["train: give exactly one of train.steps and train.epochs"]),
        ({"model": {"name": None}}, ["model: give exactly one of model.name", "model.config"]),
        ({"model": {"name": None, "config": {}, "tokenizer": "demo"}}, ["model: model.config needs a model_type"]),
        ({"model": {"name": None, "config": {"model_type": "llama"}}}, ["set model.tokenizer"]),
        ({"scaling": {"num_workers": [3, 1]}}, ["scaling.num_workers is [min, max], got [3, 1]"]),
        ({"scaling": {"num_workers": -1}}, ["scaling.num_workers: -1"]),
        ({"scaling": {"num_workers": [0, 1]}}, ["scaling.num_workers[0]: 0"]),
        ({"scaling": {"hang_timeout": "1:30"}}, ["scaling.hang_timeout", "'1:30' is no time; write it as 90s, 10m"]),
        ({"scaling": {"hang_timeout": 0}}, ["scaling.hang_timeout", "outside (0, 30d]"]),
        ({"scaling": {"hang_timeout": True}}, ["scaling.hang_timeout: True"]),
    ],
    ids=str,
)
def test_a_bad_setting_is_named_with_value_and_rule(fragment: dict[str, Any], parts: list[str]) -> None:
    message = refusal(fragment)
    assert message.startswith("recipe: ")
    for part in parts:
        assert part in message
    for inside in ("Section", "pydantic", "constrained", "function-before"):
        assert inside not in message, "no words of the validator"


@pytest.mark.parametrize("section", ["model", "data", "train"])
def test_a_missing_section_is_named(section: str) -> None:
    raw = {key: value for key, value in PLAIN.items() if key != section}
    with pytest.raises(RecipeError, match=rf"^recipe: {section}: is missing$"):
        parse_recipe(raw)


def test_every_problem_gets_a_line_of_its_own() -> None:
    lines = refusal({"adaptor": "lora", "seed": -1, "adapter": {"rank": 0}}).splitlines()
    assert sorted(line.split(": ")[1] for line in lines) == ["adapter.rank", "adaptor", "seed"]


def test_a_message_begins_with_the_file(written: Any) -> None:
    with pytest.raises(RecipeError, match=r"^mine\.yaml: train\.step: unknown key; did you mean 'steps'\?"):
        load_recipe(written(MINIMAL.replace("steps", "step")))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\n b: 2\n", 2),
        ("model:\n  name: x\n\tconfig: y\n", 3),
        ("a: [1, 2\n", 2),
        ("a: 1\nb: !!python/object:os.system x\n", 2),
        (MINIMAL + "train: {steps: 20}\n", 4),
    ],
    ids=["indentation", "tab", "open bracket", "python object", "key given twice"],
)
def test_malformed_yaml_is_refused_with_its_line(written: Any, text: str, line: int) -> None:
    with pytest.raises(RecipeError, match=r"^mine\.yaml:\d+: not valid YAML: ") as caught:
        load_recipe(written(text))
    found = int(str(caught.value).split(":")[1])
    assert found in (line, line - 1), "an unclosed bracket is noticed where the text ends"


@pytest.mark.parametrize(("text", "kind"), [("- a\n", "list"), ("", "NoneType"), ("hello\n", "str")])
def test_a_recipe_is_a_mapping(written: Any, text: str, kind: str) -> None:
    with pytest.raises(RecipeError, match=rf"^mine\.yaml: a recipe is a YAML mapping .*, got {kind}$"):
        load_recipe(written(text))


def test_a_missing_file_is_named_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.yaml: no such recipe file; `raymem init` writes one"):
        load_recipe(tmp_path / "absent.yaml")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(RecipeError, match=r"model\.yaml: cannot be read as text"):
        load_recipe(tmp_path / "model.yaml")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(tmp_path)


def test_the_file_gives_the_name_unless_the_recipe_does(written: Any) -> None:
    assert load_recipe(written()).name == "mine"
    assert load_recipe(written("name: other\n" + MINIMAL)).name == "other"


def test_shorthands_mean_the_long_form() -> None:
    short = make_recipe({"adapter": "none", "activations": "checkpoint", "data": {"train": "a.jsonl", "eval": "b.csv"}})
    long = make_recipe(
        {"activations": {"kind": "checkpoint"}, "data": {"train": [{"path": "a.jsonl"}], "eval": [{"path": "b.csv"}]}},
        {"adapter": "none"},
    )
    assert short == long
    raw = merged(PLAIN, {"adapter": None, "optimizer": None})
    options = parse_recipe({**raw, "adapter": {"rank": 4}, "optimizer": {"lr": 0.5}})
    assert (options.adapter.kind, options.optimizer.kind) == ("lora", "adamw")
    mixed = make_recipe({"data": {"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}]}})
    assert [(source.path, source.weight) for source in mixed.data.train] == [("a.jsonl", 1.0), ("b.jsonl", 2.0)]


def test_a_mapping_of_names_is_a_list_of_named_sources() -> None:
    data = {"train": "a.jsonl", "eval": {"math": "m.jsonl", "chat": ["b.jsonl", {"path": "c", "split": "test"}]}}
    recipe = make_recipe({"data": data})
    assert [(source.name, source.path) for source in recipe.data.eval or ()] == [
        ("math", "m.jsonl"), ("chat", "b.jsonl"), ("chat", "c")]  # fmt: skip
    places = ["data.eval.math", "data.eval.chat[0]", "data.eval.chat[1]"]
    assert [recipe.data.path_of("eval", index) for index in range(3)] == places
    assert Recipe.model_validate(recipe.to_dict()) == recipe
    single = make_recipe({"data": {"train": "a.jsonl", "eval": {"path": "c", "split": "test"}}})
    assert [(source.name, source.split) for source in single.data.eval or ()] == [(None, "test")]
    assert single.data.path_of("eval", 0) == "data.eval[0]"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"eval": {"pth": "a.jsonl", "split": "test"}}, r"data\.eval\[0\]\.path: is missing"),
        ({"eval": {"math": []}}, r"data\.eval: math: has no source; give it at least one"),
        ({"eval": {"math": {"path": "a", "name": "b"}}}, r"data\.eval: math: has a name already, the key"),
        ({"eval": {"ma/th": "a"}}, r"data\.eval\[0\]\.name: 'ma/th'"),
        ({"eval": [{"path": "a", "name": "b"}, "c"]}, r"either every source of data\.eval has a name or none"),
        ({"train": {"path": "a", "name": "b"}}, r"only sources of data\.eval have names; leave name='b' out"),
        ({"train": {"math": "a"}}, r"data\.train\[0\]\.path: is missing"),
        ({"mix": {"by": "tokens"}}, r"data\.mix\.temperature: is missing"),
        ({"mix": {"temperature": 0}}, r"data\.mix\.temperature: 0: input should be greater than 0"),
    ],
)
def test_names_and_mixes_that_mean_nothing_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(merged(PLAIN, {"data": {"train": "a.jsonl", **data}}))


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("train.steps=7", lambda r: r.train.steps, 7),
        ("optimizer.lr=1e-3", lambda r: r.optimizer.lr, 0.001),
        ("optimizer.lr=-.5E+2", lambda r: r.optimizer.lr, None),
        ("adapter.rank=8", lambda r: r.adapter.rank, 8),
        ("adapter=none", lambda r: r.adapter.kind, "none"),
        ("adapter.targets=[q_proj, v_proj]", lambda r: r.adapter.targets, ["q_proj", "v_proj"]),
        ("optimizer.betas=[0.8, 0.9]", lambda r: r.optimizer.betas, (0.8, 0.9)),
        ("train.clip_norm=null", lambda r: r.train.clip_norm, None),
        ("train.clip_norm=", lambda r: r.train.clip_norm, None),
        ("scaling.use_gpu=true", lambda r: r.scaling.use_gpu, True),
        ("storage.path=s3://bucket/a=b", lambda r: r.storage.path, "s3://bucket/a=b"),
        ("name=infinity", lambda r: r.name, "infinity"),
        ("data.train.1.weight=3", lambda r: r.data.train[1].weight, 3.0),
    ],
)
def test_an_override_is_a_yaml_value_at_a_path(written: Any, override: str, read: Any, expected: Any) -> None:
    text = MINIMAL.replace("train: data.jsonl", "train: [{path: a.jsonl}, {path: b.jsonl}]") + "adapter: lora\n"
    if expected is None and "lr" in override:
        with pytest.raises(RecipeError, match=r"optimizer\.lr: -50\.0"):
            load_recipe(written(text), [override])
        return
    assert read(load_recipe(written(text), [override])) == expected


def test_later_overrides_win_and_the_file_stays(written: Any) -> None:
    path = written()
    assert load_recipe(path, ["train.steps=3", "train.steps=4"]).train.steps == 4
    assert path.read_text() == MINIMAL


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", r"--set train\.steps: write it as path=value"),
        ("=3", r"--set =3: write it as path=value"),
        ("train.steps=[1", r"--set train\.steps=\[1: the value is not valid YAML"),
        ("train.step=1", r"train\.step: unknown key; did you mean 'steps'"),
        ("trian.steps=1", r"trian: unknown key; did you mean 'train'"),
        ("train.steps.x=1", r"--set train\.steps\.x=1: 'x' cannot be looked up in int 10"),
        ("data.sources.0=a", r"data\.sources: unknown key"),
    ],
)
def test_a_bad_override_is_named(written: Any, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(), [override])


def test_plain_exponents_are_numbers_everywhere_in_a_file(written: Any) -> None:
    config = "{model_type: llama, rms_norm_eps: 1e-5, initializer_range: 2E-2, note: 1e5x}"
    recipe = load_recipe(written(MINIMAL.replace("name: org/model", f"config: {config}, tokenizer: demo")))
    assert recipe.model.config == {
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "note": "1e5x",
    }


def test_local_paths_become_absolute_and_ids_stay(written: Any, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    text = """
model: {name: here, tokenizer: ./tok}
data:
  train: [{path: data.jsonl}, {path: "org/set"}, {path: "demo:text"}, {path: "~/x.csv"}, {path: "hf://a/b.json"}]
  eval: sub/../eval.parquet
adapter: {init_from: adapters/one}
train: {steps: 1}
storage: {path: runs}
"""
    recipe = load_recipe(written(text))
    assert recipe.model.name == str(tmp_path / "here")
    assert recipe.model.tokenizer == str(tmp_path / "tok")
    assert [source.path for source in recipe.data.train] == [
        str(tmp_path / "data.jsonl"),
        "org/set",
        "demo:text",
        str(Path("~/x.csv").expanduser()),
        "hf://a/b.json",
    ]
    assert recipe.data.eval is not None
    assert recipe.data.eval[0].path == str(tmp_path / "eval.parquet")
    assert recipe.adapter.init_from == str(tmp_path / "adapters" / "one")
    assert recipe.storage.path == str(tmp_path / "runs")
    assert load_recipe(written(), ["storage.path=gs://bucket/x"]).storage.path == "gs://bucket/x"
    assert load_recipe(written()).model.name == "org/model"


FULL: dict[str, Any] = {
    "adapter": {"kind": "lora", "targets": ["q_proj"], "dropout": 0.1},
    "activations": "checkpoint",
    "optimizer": {"betas": [0.8, 0.95], "weight_decay": 0.1, "implementation": "foreach"},
    "data": {"train": [{"path": "a", "weight": 0.5, "columns": {"text": "body"}}], "eval": "b"},
    "scaling": {"num_workers": [1, 4], "resources_per_worker": {"CPU": 2}},
    "tracking": {"kind": "mlflow", "register_as": "m"},
}


@pytest.mark.parametrize("fragment", [{}, FULL, {"adapter": "none"}], ids=["plain", "full", "no adapter"])
def test_the_plain_dict_is_the_same_recipe(fragment: dict[str, Any]) -> None:
    recipe = make_recipe(fragment)
    assert Recipe.model_validate(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.model_validate(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


def test_a_recipe_is_frozen() -> None:
    recipe = make_recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


def test_a_packaged_recipe_is_found_by_name() -> None:
    assert packaged_recipe("quickstart").is_file()
    with pytest.raises(RecipeError, match="no recipe named 'quikstart' ships with raymem; did you mean 'quickstart'"):
        packaged_recipe("quikstart")


@pytest.mark.parametrize(("written", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), (45, 45), (None, None)])
def test_times_are_written_as_people_do(written: Any, seconds: float | None) -> None:
    recipe = parse_recipe(merged(PLAIN, {"scaling": {"hang_timeout": written}}))
    assert recipe.scaling.hang_timeout_s == seconds
    assert parse_recipe(recipe.to_dict()) == recipe
