"""Runs the two models of a recovery on workers that share each, where one process cannot hold the full one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from raymem.methods.loram.coupling import Coupling, couple
from raymem.methods.loram.index_map import put
from raymem.methods.loram.manifest import Manifest, read_manifest
from raymem.methods.loram.nonuniform import meta_model, read_config, without_counts
from raymem.methods.loram.verify import probe_ids, require_same_logits
from raymem.runs.inference.sharing import more_workers, named_memory
from raymem.runs.loram.results import whole
from raymem.runs.resolved import ResolvedRun
from raymem.training.dist_env import DistEnv
from raymem.training.job import Doing
from raymem.training.model.adapter import fill_laid, lay
from raymem.training.model.build import fetch
from raymem.training.model.spread import spread
from raymem.training.model.weights import TensorSource, checkpoint_source
from raymem.training.reporter import Status


def shared_difference(run: ResolvedRun, pruned: str, adapter: str, recovered: str, status: Status) -> float:
    """Return how far the logits of the two models differ, run by workers that share each; see :func:`logits_task`.

    Args:
        pruned, adapter, recovered: directories or addresses.

    Raises:
        RecoveryMismatch: further than rounding explains.
        RaymemError: see :func:`logits_task` and :meth:`.Backend.group`.
    """
    run.backend.connect(run.storage, status)
    config = {"pruned": pruned, "adapter": adapter, "recovered": recovered}
    return require_same_logits(Path(recovered), run.backend.group(logits_task, config, status))


class ZeroedSource:
    """The tensors of the full model with zeros for the units that were pruned, read from those of the pruned model.

    Args:
        pruned: its tensors.
    """

    def __init__(self, pruned: TensorSource, coupling: Coupling, manifest: Manifest) -> None:
        self._pruned, self._coupling, self._kept = pruned, coupling, manifest.kept

    def names(self) -> Iterator[str]:
        return self._pruned.names()

    def read(self, name: str, rows: slice | None) -> torch.Tensor:
        full = put(self._coupling, self._kept, name, self._pruned.read(name, None))
        return full if rows is None else full[rows]


def logits_task(config: dict[str, Any], dist_env: DistEnv, doing: Doing) -> float:
    """Return the largest difference of the two models' logits relative to the largest logit; every rank the same.

    Args:
        config: directories or addresses of the ``pruned`` model, the ``adapter`` and the ``recovered`` adapter.

    Raises:
        ModelError: one of them cannot be loaded.
        OutOfMemory: the workers cannot hold the full model in fp32.
    """
    pruned = fetch(config["pruned"], None, dist_env, weights_too=True)
    manifest, adapter, recovered = read_manifest(pruned), whole(config["adapter"]), whole(config["recovered"])
    with named_memory(dist_env, more_workers("set scaling.num_workers:", dist_env)), torch.no_grad():
        small_config = _in_fp32(read_config(pruned))
        coupling = couple(small_config)
        doing("running the pruned model with its adapter", brief=False, told=True)
        small = meta_model(small_config)
        source = checkpoint_source(small, pruned)
        expected = _logits(small, source, adapter, dist_env)
        del small
        doing("running the full model without pruned units", brief=False, told=True)
        full = meta_model(_in_fp32(without_counts(small_config)))
        actual = _logits(full, ZeroedSource(source, coupling, manifest), recovered, dist_env)
    return float((actual - expected).abs().max() / expected.abs().max())


def _in_fp32(config: Any) -> Any:
    config.dtype = torch.float32
    return config


def _logits(bare: Any, source: TensorSource, adapter: Path, dist_env: DistEnv) -> torch.Tensor:
    """Spread a model with an adapter, run it on the random tokens, and let it go."""
    values: dict[str, torch.Tensor] = {}

    def attach(base_model: Any) -> Any:
        model, laid = lay(base_model, adapter)
        values.update(laid)
        return model

    def fill(model: Any, added: object) -> None:
        fill_laid(model, values, dist_env, any_base=True)  # of zeros in part, and in fp32

    model = spread(bare, source, dist_env, attach=attach, fill=fill)
    ids = probe_ids(bare.config.vocab_size).to(dist_env.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits
