"""The Gramian of a batch's losses, and J^T w. Depends on torch, not on transformers; usable alone."""

from hf_jd.gramian._rules import RULES, Rule, outer
from hf_jd.gramian.diagnosis import RowCheck, check_rows
from hf_jd.gramian.engine import Engine
from hf_jd.gramian.jacobian import Jacobian
from hf_jd.gramian.layouts import Segments, shared_features
from hf_jd.gramian.rows import DenseRows, Rows, SparseRows

__all__ = [
    "RULES",
    "DenseRows",
    "Engine",
    "Jacobian",
    "RowCheck",
    "Rows",
    "Rule",
    "Segments",
    "SparseRows",
    "check_rows",
    "outer",
    "shared_features",
]
