"""The Gramian of a batch's losses, and J^T w. Knows torch and nothing of transformers; usable alone."""

from hf_jd.gramian.diagnosis import RowCheck, check_rows
from hf_jd.gramian.engine import Engine
from hf_jd.gramian.jacobian import Jacobian
from hf_jd.gramian.rules import RULES, Rule

__all__ = ["RULES", "Engine", "Jacobian", "RowCheck", "Rule", "check_rows"]
