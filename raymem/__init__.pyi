# The same names for type checkers, which do not see what loads on first use.
from raymem import errors as errors
from raymem.api import evaluate as evaluate
from raymem.api import load as load
from raymem.api import load_recipe as load_recipe
from raymem.api import merge as merge
from raymem.api import plan as plan
from raymem.api import sweep as sweep
from raymem.api import train as train
from raymem.planner.module import plan_module as plan_module
from raymem.planner.types import Plan as Plan
from raymem.recipe.axes import register_activations as register_activations
from raymem.recipe.axes import register_adapter as register_adapter
from raymem.recipe.axes import register_base as register_base
from raymem.recipe.axes import register_loss as register_loss
from raymem.recipe.axes import register_optimizer as register_optimizer
from raymem.recipe.axes import register_tracker as register_tracker
from raymem.recipe.schema import Recipe as Recipe
from raymem.runs.results import EvaluationResult as EvaluationResult
from raymem.runs.results import TrainResult as TrainResult
from raymem.sweeps.result import SweepResult as SweepResult

__version__: str
__all__: list[str]
