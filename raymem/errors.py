"""Every error that raymem raises for a user.

Each one carries a single finished sentence: the place (recipe path or ``file:line``), the value, the rule and the
cure. One string argument also means that all of them survive pickling between Ray processes unchanged.
"""

from raymem.text import MESSAGE, cut


class RaymemError(Exception):
    """Base of all errors that are the user's to mend; the command line prints them as one line and exits with 1.

    A sentence may show what somebody wrote: it is cut where it is very long, and half a character in it, which no
    terminal, file or tracker takes, is escaped.
    """

    def __init__(self, sentence: str = "") -> None:
        super().__init__(cut(sentence.encode(errors="backslashreplace").decode(), MESSAGE))


class RecipeError(RaymemError):
    """A recipe that is malformed, or whose parts do not go together."""


class DataError(RaymemError):
    """Training or evaluation data that cannot be read, tokenised or trained on."""


class ModelError(RaymemError):
    """A model, tokenizer or adapter that cannot be found, built or loaded."""


class AdapterError(RaymemError, ValueError):
    """An adapter that cannot be attached, given its connections, loaded, merged or exported."""


class CheckpointError(RaymemError):
    """A checkpoint that is damaged, or belongs to another recipe."""


class RecoveryMismatch(RaymemError):
    """An adapter, a pruned model and a full model of which two do not belong together."""


class StorageError(RaymemError):
    """A storage path that cannot be read or written (permissions, space, not shared between nodes)."""


class RunBusy(StorageError):
    """A run or a sweep that another process works on."""


class TransientStorageError(StorageError):
    """A storage that did not answer for longer than it was asked again; a later try may succeed."""


class TrackingError(RaymemError):
    """A tracking server or registry that cannot be reached or refuses a request before training starts."""


class ClusterError(RaymemError):
    """A Ray cluster that cannot be reached, cannot hold the job, or lost it."""


class BudgetError(RaymemError):
    """A memory budget or device that cannot be read or is unknown."""


class BudgetExceeded(RaymemError):
    """A recipe whose predicted peak is above its budget; no worker was started."""


class PlanError(RaymemError):
    """A recipe that cannot be planned: its model code cannot be traced, or planning took too long."""


class OutOfMemory(RaymemError):
    """A worker's device cannot hold a step; trying again would fail the same way."""


class NonFiniteError(RaymemError):
    """Loss or gradient became NaN or infinite; nothing of that step is saved."""
