"""Kernel fusion and mixed precision for PyTorch training, with a certificate for every rewritten site."""

try:
    import fusekit.kernels  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "fusekit.kernels":
        raise
    raise ImportError("fusekit is not installed; from its folder run: pip install -e .") from error

from fusekit.auto_precision import AutoPrecision
from fusekit.certificate import Certificate
from fusekit.explanation import explain
from fusekit.kernels.recipe import Recipe
from fusekit.loss_scaler import LossScaler
from fusekit.optimize import optimize, restore
from fusekit.precision_plan import PrecisionPlan
from fusekit.precision_state import precision_state
from fusekit.report import Report
from fusekit.session import auto_precision
from fusekit.verification import verify

__all__ = [
    "AutoPrecision", "Certificate", "LossScaler", "PrecisionPlan", "Recipe", "Report", "auto_precision",
    "explain", "optimize", "precision_state", "restore", "verify",
]  # fmt: skip
__version__ = "0.1.0"
