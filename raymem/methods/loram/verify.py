"""Proof that a recovered adapter does to the full model what the trained one did to the pruned model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raymem.errors import ModelError, RecoveryMismatch
from raymem.methods.loram.coupling import Coupling, couple
from raymem.methods.loram.index_map import place, put, take
from raymem.methods.loram.manifest import Manifest, check_base, read_manifest
from raymem.methods.loram.nonuniform import from_config, load_pruned, without_counts
from raymem.methods.loram.pruning.refit import readers
from raymem.methods.loram.recover import FACTOR_KEY, WEIGHTS, check_belongs, read_adapter_config
from raymem.methods.loram.recover_moram import compare_moram, rebased
from raymem.methods.loram.source import Source, open_source
from raymem.seeds import generator
from raymem.storage.checksums import check_files
from raymem.storage.safetensors_io import read_header, read_tensor
from raymem.storage.unfinished import temporary

_TOLERANCE = 1e-4
"""Largest difference of logits relative to the largest logit, in fp32."""
_TEXTS, _LENGTH = 2, 32


@dataclass(frozen=True)
class Verification:
    """Counts and differences of a recovery that passed."""

    num_factors: int
    """Tensors of the adapter that are bitwise the trained ones where kept and zero elsewhere."""
    num_weights: int | None
    """Weights of the pruned model that are bitwise the full model's, those that were fitted left out; None if no full
    model was given or the weights were trained."""
    logit_difference: float | None
    """Logits of zeroed full + recovered against pruned + trained, relative to the largest; None if not compared."""


def verify_recovery(
    adapter: str | Path,
    pruned: str | Path,
    recovered: str | Path,
    *,
    full: str | Path | Source | None = None,
    forward: bool = True,
) -> Verification:
    """Check a recovery from outside: factors, base weights, and what the two models compute.

    Args:
        adapter: what was trained on ``pruned``.
        recovered: what :func:`raymem.methods.loram.recover_adapter` made of it.
        full: the full model, a directory or opened; its identity is then compared with the manifest and its weights
            with the pruned ones, one tensor in memory at a time.
        forward: also run both models in fp32 on random tokens, which takes the memory of both.

    Raises:
        RecoveryMismatch: names what differs.
        ModelError: something cannot be read, or ``full`` is another model.
    """
    adapter, pruned, recovered = Path(adapter), Path(pruned), Path(recovered)
    for directory in (adapter, pruned, recovered):
        check_files(directory, ModelError)
    manifest, source = read_manifest(pruned), open_source(pruned)
    coupling = couple(source.config())
    configs = read_adapter_config(adapter), read_adapter_config(recovered)
    for directory, config in zip((adapter, recovered), configs, strict=True):
        check_belongs(directory, config, pruned, manifest)
    if config["base_model_name_or_path"] != manifest.source["name"]:
        raise RecoveryMismatch(f"{recovered} names {config['base_model_name_or_path']!r} as its base; recover it again")
    if configs[0]["peft_type"] == "MORAM":
        num_factors = compare_moram(adapter / WEIGHTS, recovered / WEIGHTS, configs, coupling, manifest)
    else:
        num_factors = _compare_factors(adapter, recovered, coupling, manifest)
    num_weights = None
    if full is not None:
        whole = full if isinstance(full, Source) else open_source(full)
        check_base(manifest, whole)
        num_weights = _compare_weights(source, whole, coupling, manifest)
    difference = _compare_logits(adapter, pruned, recovered, coupling, manifest) if forward else None
    return Verification(num_factors, num_weights, difference)


def _compare_factors(adapter: Path, recovered: Path, coupling: Coupling, manifest: Manifest) -> int:
    _, trained = read_header(adapter, WEIGHTS)
    _, entries = read_header(recovered, WEIGHTS)
    missing = {key for key in trained if FACTOR_KEY.fullmatch(key)} ^ entries.keys()
    if missing:
        raise RecoveryMismatch(
            f"{recovered / WEIGHTS}: {min(missing)} is only in one of the adapters; recover it again"
        )
    for key, entry in entries.items():
        match = FACTOR_KEY.fullmatch(key)
        assert match is not None
        small, large = read_tensor(adapter, trained[key]), read_tensor(recovered, entry)
        placement = place(coupling, manifest.kept, match["module"])
        axis, dim = (placement.columns, 1) if match["factor"] == "A" else (placement.rows, 0)
        inside, outside = large, torch.zeros(())
        if axis is not None and large.shape[dim] == axis.size:
            inside = axis.take(large, dim)
            outside = large.index_fill(dim, axis.indices_K, 0)
        if inside.dtype != small.dtype or not _same_bits(inside, small) or bool(outside.count_nonzero()):
            raise RecoveryMismatch(f"{recovered / WEIGHTS}: {key} is not the trained factor in zeros; recover it again")
    return len(entries)


def _compare_weights(source: Source, full: Source, coupling: Coupling, manifest: Manifest) -> int | None:
    """Check that every pruned weight is a slice of the full model's, or (zeros in dense weights) it with zeros.

    Weights that were fitted are none, and left out.
    """
    if manifest.aligned is not None or manifest.options["criterion"] == "sparsegpt":
        return None  # both change weights that stay
    changed = readers(coupling) if manifest.options.get("refit") else ()
    compared = 0
    for name in source.tensors:
        located = coupling.locate(name.removesuffix(".weight"))
        if located is not None and located[0] in manifest.kept and located[1] in changed:
            continue
        compared += 1
        small, large = source.read(name), take(coupling, manifest.kept, name, full.read(name))
        if manifest.options["structure"] != "units":
            large = torch.where(small == 0, small, large)
        if small.dtype != large.dtype or not _same_bits(small, large):
            raise RecoveryMismatch(f"{source.directory}: {name} is not what was kept of {full.directory}; prune again")
    return compared


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


@torch.no_grad()
def _compare_logits(adapter: Path, pruned: Path, recovered: Path, coupling: Coupling, manifest: Manifest) -> float:
    from peft import PeftModel

    small = load_pruned(pruned, dtype=torch.float32)
    state = {name: put(coupling, manifest.kept, name, value) for name, value in small.state_dict().items()}
    zeroed = from_config(without_counts(small.config), dtype=torch.float32)
    zeroed.load_state_dict(state)
    ids = probe_ids(small.config.vocab_size)

    def logits(model: Any, directory: Path) -> torch.Tensor:
        with temporary("verify") as folder:
            if read_adapter_config(directory)["peft_type"] == "MORAM":  # it loads on the weights that it names only
                directory = rebased(directory, model, Path(folder) / "adapter")
            adapted = PeftModel.from_pretrained(model.eval(), directory)
        output: torch.Tensor = adapted.eval()(input_ids=ids, use_cache=False).logits
        return output

    expected, actual = logits(small, adapter), logits(zeroed, recovered)
    difference = float((actual - expected).abs().max() / expected.abs().max())
    return require_same_logits(recovered, difference)


def probe_ids(vocabulary: int) -> torch.Tensor:
    """Draw the random tokens that both models run on, int64 [texts, length]."""
    return torch.randint(vocabulary, (_TEXTS, _LENGTH), generator=generator(0, "loram", "verify"))


def require_same_logits(recovered: Path, difference: float) -> float:
    """Return a difference of logits, relative to the largest, that rounding explains.

    Raises:
        RecoveryMismatch: it does not.
    """
    if not difference <= _TOLERANCE:
        raise RecoveryMismatch(
            f"{recovered}: the full model without pruned units and the pruned model differ by {difference:.1e} of the "
            f"largest logit with their adapters (at most {_TOLERANCE:.0e} is right); report this"
        )
    return difference
