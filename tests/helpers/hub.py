"""A hub without a network: the cache of huggingface_hub, with a branch that moves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

NAME = "org/tiny"


class Hub:
    """What huggingface_hub finds offline.

    Args:
        model: directory that the first commit of :data:`NAME` holds; later ones differ in every weight.
    """

    def __init__(self, folder: Path, model: Path, patch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        patch.setattr(constants, "HF_HUB_CACHE", str(folder))
        self._repository = folder / f"models--{NAME.replace('/', '--')}"
        self._model = model
        self.commits: list[str] = []
        self.move()

    def move(self, branch: str = "main") -> str:
        """Let a branch name a new commit, which is returned."""
        number = len(self.commits)
        commit = f"{number + 1:040x}"
        snapshot = self.snapshot(commit)
        shutil.copytree(self._model, snapshot)
        weights = load_file(snapshot / "model.safetensors")
        generator = torch.Generator().manual_seed(number)
        for tensor in weights.values():
            tensor += 0.01 * number * torch.randn(tensor.shape, generator=generator)
        save_file(weights, snapshot / "model.safetensors", metadata={"format": "pt"})
        self.commits.append(commit)
        self.name(branch, commit)
        return commit

    def name(self, branch: str, commit: str) -> None:
        (self._repository / "refs").mkdir(exist_ok=True)
        (self._repository / "refs" / branch).write_text(commit)

    def snapshot(self, commit: str) -> Path:
        return self._repository / "snapshots" / commit
