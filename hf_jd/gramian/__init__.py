"""The Gramian of a batch's losses, and J^T w (torch only)."""

from hf_jd.gramian.engine import Engine
from hf_jd.gramian.jacobians import Jacobian

__all__ = ["Engine", "Jacobian"]
