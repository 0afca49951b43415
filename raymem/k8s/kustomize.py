"""Runs kustomize on a copy of ``k8s/``, and writes YAML as people do."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from raymem.errors import ClusterError
from raymem.k8s.overlays import manifests_dir


class _Blocks(yaml.SafeDumper):
    """Writes text of several lines as a block, as a person would, rather than with escapes."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Blocks.add_representer(str, _block)


def to_yaml(*documents: Any) -> str:
    """Return documents as YAML, with text of several lines in readable blocks."""
    text = yaml.dump_all(documents, Dumper=_Blocks, sort_keys=False, allow_unicode=True, width=1 << 20)
    return text if text.endswith("\n") else f"{text}\n"  # none is written after a block


def overlay_file(overlay: str) -> dict[str, Any]:
    """Return the kustomization of an overlay."""
    return yaml.safe_load(_file(manifests_dir(), overlay).read_text())  # type: ignore[no-any-return]


def build(overlay: str, with_components: list[str], kustomization: Mapping[str, Any]) -> str:
    """Build a kustomization that lies beside a copy of ``k8s/``: kustomize takes bases by relative paths only.

    Args:
        overlay: the overlay that it takes up.
        with_components: components that the overlay is to have before its own.

    Raises:
        ClusterError: there is no kustomize, or it refused.
    """
    command = ["kubectl", "kustomize"] if shutil.which("kubectl") else ["kustomize", "build"]
    if shutil.which(command[0]) is None:
        raise ClusterError(
            "neither kubectl nor kustomize is on the PATH, and one of them puts the manifests together; install "
            "kubectl (https://kubernetes.io/docs/tasks/tools)"
        )
    with tempfile.TemporaryDirectory(prefix="raymem-k8s-") as folder:
        tree = Path(folder) / "k8s"
        shutil.copytree(manifests_dir(), tree)
        own = overlay_file(overlay)
        own["components"] = [*(f"../../components/{name}" for name in with_components), *own.get("components", [])]
        _file(tree, overlay).write_text(yaml.safe_dump(own))
        (tree / "render").mkdir()
        (tree / "render" / "kustomization.yaml").write_text(yaml.safe_dump(dict(kustomization)))
        try:
            done = subprocess.run(  # noqa: S603 - a fixed command on files of our own
                [*command, str(tree / "render")], capture_output=True, text=True, timeout=120, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ClusterError(f"{' '.join(command)} cannot be run: {error}; try it by hand on k8s/overlays") from None
    if done.returncode != 0:
        raise ClusterError(
            f"{' '.join(command)} refused the manifests: {' '.join(done.stderr.split())[:500]}; "
            "use kubectl 1.27 or later"
        )
    return done.stdout


def _file(tree: Path, overlay: str) -> Path:
    return tree / "overlays" / overlay / "kustomization.yaml"
