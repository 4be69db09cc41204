"""Unlearning with NPO, a bounded forget loss, and what the model says afterwards.

The loss of a story y to forget is 2 / beta log(1 + (p(y) / p_reference(y))^beta) (Zhang et al., arXiv 2404.05868,
equation 3). Training lowers it, and its gradient fades once y is unlikely. The reference is the model without its
adapter. The loss of a story to keep is the mean of its tokens' losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from hf_jd.collator import GROUP_KEY
from hf_jd.finetune.example import HERO
from hf_jd.finetune.run import JacobianTrainer
from hf_jd.finetune.tokens import IGNORED

FORGET = "lily"
TOKENS_SAID = 8
ASKED = 32
"""The number of stories per task that the model is asked to continue."""
WORDS = 8
"""The number of words of another story that the model is given."""


class NPOTrainer(JacobianTrainer):
    """JDTrainer with NPO for the stories about Lily.

    Attributes:
        beta: NPO's beta.
    """

    beta: float = 0.1
    _forgotten: Tensor

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Note which of the batch's stories to forget, and train."""
        assert self.jd_group_names is not None
        self._forgotten = inputs[GROUP_KEY] == self.jd_group_names.index(FORGET)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_losses(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Compute each story's loss, [B]."""
        losses, lengths = story_losses(model, inputs)
        with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
            reference, _ = story_losses(model, inputs)
        npo = -2 / self.beta * logsigmoid(self.beta * (losses - reference))
        return torch.where(self._forgotten, npo, losses / lengths)


def story_losses(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Compute each story's summed loss [B] and number of tokens [B]."""
    labels = inputs["labels"][:, 1:]
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return losses.sum(1), (labels != IGNORED).sum(1)


@torch.no_grad()
def answers_of(trainer: Any, rows: Sequence[dict[str, str]]) -> tuple[dict[str, float], dict[str, float]]:
    """Let the model continue Lily's stories just before her name, and the other stories from their first words.

    Returns:
        The measures of the model, and of the model without its adapter. `says Lily`: the share of her stories in which
        the model names her. `others as before`: the share of the other stories' tokens, up to the first difference,
        that are the same without the adapter.
    """
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    about, others = ([row["completion"] for row in rows if (row["task"] == FORGET) == hers] for hers in (True, False))
    starts = [story.partition(HERO)[0] for story in about[:ASKED]]
    starts += [" ".join(story.split()[:WORDS]) for story in others[:ASKED]]

    def continued(text: str) -> list[int]:
        ids = tokenizer(text.rstrip(), return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS_SAID, do_sample=False)
        return out[0, ids.shape[1] :].tolist()

    now = [continued(start) for start in starts]
    with model.disable_adapter():
        before = [continued(start) for start in starts]
    names = [sum(HERO in tokenizer.decode(answer) for answer in answers[:ASKED]) / ASKED for answers in (now, before)]
    same = [_agreeing(*pair) for pair in zip(now[ASKED:], before[ASKED:], strict=True)]
    agreement = sum(same) / len(same)
    return (
        {"says Lily": names[0], "others as before": agreement},
        {"says Lily": names[1], "others as before": 1.0},
    )


def _agreeing(answer: list[int], other: list[int]) -> float:
    """Return the share of the other answer's tokens before the first difference."""
    agreed = [a == b for a, b in zip(answer, other, strict=False)]
    return (agreed.index(False) if False in agreed else len(agreed)) / len(other)
