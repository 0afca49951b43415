"""``raymem evaluate`` and ``raymem generate`` on workers of Ray that share a model, as a person meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raymem.cli.main import run_app
from raymem.runs.inference.sharing import Sizes
from raymem.training.artifacts.load import bare_model
from tests.helpers.ray_processes import RayHead
from tests.helpers.run_files import write_recipe
from tests.helpers.support import save_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EACH = ["-s", "scaling.resources_per_worker={CPU: 1}"]
SHARED = ["-s", "scaling.num_workers=2", "-s", "scaling.strategy=fsdp2", *EACH]


def test_both_commands_say_what_they_say_in_one_process(
    cluster: RayHead, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(tmp_path / "base", num_hidden_layers=12)
    recipe = write_recipe(tmp_path / "tiny.yaml", tmp_path, base, examples)
    assert run_app("train", recipe) == 0
    assert "--workers" not in capsys.readouterr().out

    def evaluated(*options: str) -> tuple[dict[str, Any], str]:
        assert run_app("evaluate", recipe, "--json", "--predictions", "1", *options) == 0
        shown = capsys.readouterr()
        return json.loads(shown.out), shown.err

    alone, silent = evaluated()
    assert "share" not in silent and "worker" not in silent
    weights = Sizes.of(bare_model(base)).weights
    small = ["-s", "scaling.num_workers=1", "-s", f"budget={weights}B", *EACH]
    for options, told in ((SHARED, "connecting the workers"), (small, ": 2 FSDP2 workers share the model\n")):
        found, said = evaluated(*options)
        assert found["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)
        assert found["predictions"] == alone["predictions"]
        assert told in said

    adapter = tmp_path / "runs" / "tiny" / "adapter"
    prompt = ["-p", "w1 w2 w3", "--max-new-tokens", "4"]
    assert run_app("generate", adapter, *prompt) == 0
    expected = capsys.readouterr().out
    assert expected.strip()
    assert run_app("generate", adapter, *prompt, "--workers", "2") == 0
    shown = capsys.readouterr()
    assert shown.out == expected
    assert "loading the weights" in shown.err
    assert run_app("generate", tmp_path / "absent", *prompt, "--workers", "2") == 1
    shown = capsys.readouterr()
    assert not shown.out
    assert "absent holds neither adapter_config.json nor config.json" in shown.err.splitlines()[-1]
