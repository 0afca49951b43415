"""What can be rendered: the overlays of ``k8s/``, the GPUs that nodes are labelled with, the folder itself."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from raymem.errors import ClusterError
from raymem.memory.devices import ALIASES

GPU_PRODUCTS = {
    "T4": "Tesla-T4",
    "V100-16GB": "Tesla-V100-SXM2-16GB",
    "V100-32GB": "Tesla-V100-SXM2-32GB",
    "A10G": "NVIDIA-A10G",
    "L4": "NVIDIA-L4",
    "L40S": "NVIDIA-L40S",
    "A100-40GB": "NVIDIA-A100-SXM4-40GB",
    "A100-80GB": "NVIDIA-A100-SXM4-80GB",
    "H100-80GB": "NVIDIA-H100-80GB-HBM3",
    "H200": "NVIDIA-H200",
}
"""Maps a name in :data:`raymem.memory.devices.GPUS` to the value of the node label ``nvidia.com/gpu.product``, which
NVIDIA's feature discovery sets."""


@dataclass(frozen=True)
class Overlay:
    """What an overlay makes, and how it may be filled in."""

    gpu: bool | None
    """Whether its workers have GPUs; None: where ``--gpu`` asks for them."""
    elastic: bool = False
    """Whether the number of workers may be a range."""
    kind: str = "RayJob"
    """The Ray object in it: ``RayJob``, ``RayCluster`` or ``RayCronJob``."""
    command: str | None = None
    """The command of raymem that it runs; None for the usual one of the recipe."""

    @property
    def job(self) -> str | None:
        """The path of the job's description in the object, for JSON patches; None where there is no job."""
        return {"RayJob": "/spec", "RayCronJob": "/spec/jobTemplate"}.get(self.kind)

    @property
    def cluster(self) -> str:
        """The path of the cluster's description in the object, for JSON patches."""
        return "/spec" if self.job is None else f"{self.job}/rayClusterSpec"


OVERLAYS = {
    "cpu-demo": Overlay(gpu=False),
    "gpu": Overlay(gpu=True),
    "gpu-spot-elastic": Overlay(gpu=True, elastic=True),
    "kueue": Overlay(gpu=True),
    "kueue-elastic": Overlay(gpu=True, elastic=True),
    "loram": Overlay(gpu=True, command="loram run"),
    "sweep": Overlay(gpu=True, command="sweep"),
    "interactive": Overlay(gpu=None, elastic=True, kind="RayCluster"),
    "scheduled-evaluation": Overlay(gpu=None, kind="RayCronJob", command="evaluate"),
}


def overlay_named(name: str) -> Overlay:
    """Return an overlay. Raises ClusterError."""
    if name not in OVERLAYS:
        raise ClusterError(f"--overlay {name}: is not one of {', '.join(OVERLAYS)}; choose one of them")
    return OVERLAYS[name]


def gpu_of(gpu: str | None, overlay: str) -> str | None:
    """Return the kind of GPU that an overlay's workers get, as :data:`GPU_PRODUCTS` names it; None for none.

    Raises:
        ClusterError: one that has no label, or one for an overlay without GPUs.
    """
    has_gpus = OVERLAYS[overlay].gpu
    if has_gpus is False and gpu is not None:
        raise ClusterError(f"--gpu {gpu}: overlay {overlay} has no GPUs; leave it out, or use --overlay gpu")
    if gpu is None and not has_gpus:
        return None
    kind = ALIASES.get(gpu or "H100", gpu or "")
    if kind not in GPU_PRODUCTS:
        raise ClusterError(
            f"--gpu {gpu}: is not in the table ({', '.join(GPU_PRODUCTS)}; short: {', '.join(ALIASES)}); choose the "
            "one with the same memory and edit nodeSelector in the result"
        )
    return kind


def manifests_dir() -> Path:
    """Return the folder ``k8s`` of this installation."""
    installed = Path(str(resources.files("raymem"))) / "manifests"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "k8s"
