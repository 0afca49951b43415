"""The base classes of the kinds of an axis: what a method, of raymem or of anyone else, tells raymem about itself.

A kind is one object in its method's own room. It brings its options (the only list of its fields and defaults), what it
builds, its hooks, its bytes in closed form, its rules, and how it helps a recipe that does not fit. The registry of its
axis (:mod:`raymem.recipe.axes`) knows it by name; nothing else does. A third party extends one of these classes and
registers it with ``raymem.register_adapter`` and its like, or as an entry point of the group ``raymem.adapters``::

    @dataclass(frozen=True)
    class SGDOptions:
        kind: Literal["sgd"] = "sgd"
        lr: float = 1e-2

    class SGDKind(OptimizerKind[SGDOptions]):
        options = SGDOptions

        def build(self, parameters, options, context):
            return torch.optim.SGD(parameters.values(), lr=options.lr)

Nothing here imports torch, so that a recipe is read at once; ``Any`` stands for torch and transformers objects.
"""

from __future__ import annotations

from raymem.kinds.activations import ActivationsKind
from raymem.kinds.adapter import ADAPTER_FILE, AdapterKind, AttachContext
from raymem.kinds.base import BaseKind
from raymem.kinds.core import OPTIONS_RULES, Advice, Kind, Rule, Start
from raymem.kinds.loss import IGNORED, LossFunction, LossKind, OfLogits, cross_entropy_sum
from raymem.kinds.optimizer import OptimizerContext, OptimizerKind, TensorShape
from raymem.kinds.tracker import TrackerKind

__all__ = [
    "ADAPTER_FILE",
    "IGNORED",
    "OPTIONS_RULES",
    "ActivationsKind",
    "AdapterKind",
    "Advice",
    "AttachContext",
    "BaseKind",
    "Kind",
    "LossFunction",
    "LossKind",
    "OfLogits",
    "OptimizerContext",
    "OptimizerKind",
    "Rule",
    "Start",
    "TensorShape",
    "TrackerKind",
    "cross_entropy_sum",
]
