"""Ray Serve LLM gets its config and its layout of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raymem.cli.main import run_app
from raymem.errors import ModelError, StorageError
from raymem.storage.storage import Storage
from raymem.training.artifacts.ray_serve import serve_config, upload
from tests.training.artifacts.test_vllm import write_adapter

LORAS = "s3://bucket/loras"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "orders" / "adapter", Path("org/Base-8B"), r=24, revision="abc")


def test_the_config_names_the_base_its_revision_and_the_rank_that_vllm_needs(adapter: Path) -> None:
    (application,) = serve_config(adapter, f"{LORAS}/")["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    (served,) = application["args"]["llm_configs"]
    assert served["model_loading_config"] == {"model_id": "Base-8B", "model_source": "org/Base-8B"}
    assert served["lora_config"]["dynamic_lora_loading_path"] == LORAS
    engine = served["engine_kwargs"]
    assert (engine["enable_lora"], engine["max_lora_rank"], engine["revision"]) == (True, 32, "abc")


def test_ray_serve_takes_the_config(adapter: Path) -> None:
    """By its own classes, which need ray[serve]."""
    pytest.importorskip("grpc_reflection", reason="ray[serve] is not installed")
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
    from ray.serve.schema import ServeDeploySchema

    config = serve_config(adapter, LORAS)
    ServeDeploySchema.parse_obj(config)
    taken: Any = LLMConfig(**config["applications"][0]["args"]["llm_configs"][0])
    assert taken.model_id == "Base-8B"
    assert taken.lora_config.dynamic_lora_loading_path == LORAS


def test_a_bucket_of_another_kind_and_an_adapter_without_a_base_are_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="Ray Serve loads adapters from a bucket"):
        serve_config(adapter, "/srv/loras")
    nameless = write_adapter(tmp_path / "x" / "adapter", Path(""), base_model_name_or_path=None)
    with pytest.raises(ModelError, match="base_model_name_or_path is empty"):
        serve_config(nameless, LORAS)
    with pytest.raises(StorageError, match=r"--name: 'a:b' holds other characters"):
        upload(adapter, LORAS, "a:b")


def test_the_command_uploads_the_adapter_and_writes_the_config(
    adapter: Path, tmp_path: Path, s3_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    address, _, options = s3_uri.partition("?")
    loras, output = f"{address}/loras?{options}", tmp_path / "serve.yaml"
    command = ["export", str(adapter), "--for", "ray-serve", "--loras", loras, "-o", str(output)]
    assert run_app(*command) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert f"uploaded to {address}/loras/orders" in shown and "clients ask for the model Base-8B:orders" in shown
    assert yaml.safe_load(output.read_text()) == serve_config(adapter, f"{address}/loras/")
    stored = Storage.open(loras)
    assert sorted(stored.sizes("orders")) == sorted(path.name for path in adapter.iterdir())
    assert run_app(*command) == 1
    assert "exists, and a server may have it loaded; give the adapter another --name" in capsys.readouterr().err
    assert run_app(*command, "--name", "orders-2") == 0
    assert "Base-8B:orders-2" in capsys.readouterr().out
    output.write_text("other: true\n")
    assert run_app(*command, "--name", "orders-3") == 1
    assert "exists with another config" in capsys.readouterr().err
    assert "orders-3" not in stored.list_dirs()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--for", "tgi"], "--for tgi: its rules are not known; vllm and ray-serve are"),
        (["--for", "ray-serve"], "--for ray-serve needs --loras s3://BUCKET/FOLDER"),
        (["--loras", LORAS], "--loras goes with --for ray-serve; leave it out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    adapter: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app("export", str(adapter), *options) == 1
    assert words in " ".join(capsys.readouterr().err.split())
