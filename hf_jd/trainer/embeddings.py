"""`JDSentenceTransformerTrainer`: Jacobian descent in sentence-transformers; needs `hf-jd[sentence-transformers]`.

Sentence-transformers fills each batch from one of several datasets. Here each dataset is a group, without a column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_jd.arguments import JDArguments
from hf_jd.groups import DATASET_COLUMN
from hf_jd.trainer.mixin import JDTrainerMixin

try:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
except ImportError as error:
    raise ImportError(
        f"JDSentenceTransformerTrainer needs sentence-transformers ({error}): pip install "
        "'hf-jd[sentence-transformers]'."
    ) from error


@dataclass
class DatasetGroupsArguments(JDArguments):
    """The flags of Jacobian descent for sentence-transformers' trainers.

    `--jd_objectives group` without `--jd_group_column` has one objective per dataset.
    """

    def validate(self) -> None:
        """Validate the flags as they are now; see JDArguments."""
        if self.jd_objectives == "group" and self.jd_group_column is None:
            self.jd_group_column = DATASET_COLUMN
        super().validate()


class DatasetGroupsMixin(JDTrainerMixin):
    """Jacobian descent for sentence-transformers' trainers: `JDTrainerMixin`, with each dataset a group.

    The flags are those of `DatasetGroupsArguments`. Losses with in-batch negatives are split exactly, too: a pair's row
    includes its effect as a negative.
    """

    def follow_flags(self) -> None:
        """Apply the flags; see JDTrainerMixin."""
        if self.jd_args.jd_group_column == DATASET_COLUMN and not isinstance(self.train_dataset, Mapping):
            raise ValueError(
                "--jd_objectives group has one objective per dataset, but there is only one dataset: give a dict of "
                "datasets, or choose the column of groups with --jd_group_column."
            )
        super().follow_flags()

    def should_dataset_name_column_be_added(self, dataset: Any, args: Any, loss: Any) -> bool:
        """Return whether examples include the name of their dataset; see sentence-transformers."""
        by_dataset = getattr(args, "jd_group_column", None) == DATASET_COLUMN and isinstance(dataset, Mapping)
        trainer: Any = super()
        return by_dataset or trainer.should_dataset_name_column_be_added(dataset, args, loss)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # The collator and a dict of losses read it, too.
        self.jd_model_takes_groups |= self.jd_args.jd_group_column == DATASET_COLUMN


@dataclass
class JDSentenceTransformerTrainingArguments(DatasetGroupsArguments, SentenceTransformerTrainingArguments):
    """`SentenceTransformerTrainingArguments` with the flags of `DatasetGroupsArguments`."""


class JDSentenceTransformerTrainer(DatasetGroupsMixin, SentenceTransformerTrainer):
    """`SentenceTransformerTrainer` with Jacobian descent; its `args` are `JDSentenceTransformerTrainingArguments`."""

    training_args_class = JDSentenceTransformerTrainingArguments
