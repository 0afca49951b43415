"""Settings and fixtures of every test: one thread per process, no network, and one tiny model with data."""

from __future__ import annotations

import os
from pathlib import Path

# Read by torch, transformers and huggingface_hub when they are imported, also in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random fp32 weights and a tokenizer; read only."""
    from support import save_model

    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with ``train.jsonl`` and ``eval.jsonl``, and the cache of what is prepared from them."""
    from support import write_examples

    directory = tmp_path_factory.mktemp("examples")
    write_examples(directory / "train.jsonl", 40, seed=0)
    write_examples(directory / "eval.jsonl", 8, seed=1)
    return directory
