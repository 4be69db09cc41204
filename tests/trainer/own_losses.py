"""Losses as users write them in `compute_loss`, with tiny float64 models and data for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from hf_jd import JDTrainerMixin, JDTrainingArguments
from tests.models import VOCABULARY, tiny_gpt2
from tests.trainer import runs, tasks
from tests.trainer.runs import arguments, in_order, lora

Computed = tuple[Tensor, Any]
"""A loss [], and the model's outputs."""

OwnLoss = Callable[[Trainer, nn.Module, dict[str, Tensor], Any], Computed]


def classifier(**config: Any) -> nn.Module:
    """Build a BERT with one layer; without dropout by default."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
    positions = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "num_labels": tasks.CLASSES}
    config_class = BertForSequenceClassification.config_class
    return BertForSequenceClassification(config_class(**{**sizes, **quiet, **positions, **config})).double()


class Trunk(nn.Module):
    """A model that embeds, averages, and has two heads; a function decides what it returns."""

    def __init__(self, returned: Callable[[Tensor, Tensor], Any]):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.hidden = nn.Linear(12, 12)
        self.kinds = nn.Linear(12, tasks.CLASSES)
        self.size = nn.Linear(12, 1)
        self.returned = returned

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        mask = attention_mask.to(self.hidden.weight.dtype)[..., None]
        mean = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        hidden = self.hidden(mean).tanh()
        return self.returned(self.kinds(hidden), self.size(hidden))


@dataclass
class Heads:
    """The output of a model that doesn't use transformers."""

    kinds: Tensor
    size: Tensor


class Towers(nn.Module):
    """One tower for queries and one for passages, and a temperature parameter, as in retrievers and CLIP."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Sequential(nn.Embedding(VOCABULARY, 12), nn.Linear(12, 8))
        self.passages = nn.Sequential(nn.Embedding(VOCABULARY, 12), nn.Linear(12, 8))
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, input_ids: Tensor, passages: Tensor) -> dict[str, Tensor]:
        embeddings = {"queries": self.queries(input_ids).mean(1), "passages": self.passages(passages).mean(1)}
        return {**embeddings, "temperature": self.temperature.exp()}


def towers() -> nn.Module:
    """Build `Towers` in float64."""
    torch.manual_seed(0)
    return Towers().double()


class Tempered(nn.Module):
    """A model that computes its own loss, and divides its logits by a parameter."""

    def __init__(self):
        super().__init__()
        self.classifier = classifier()
        self.temperature = nn.Parameter(torch.tensor(2.0).double())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.classifier(input_ids, attention_mask).logits / self.temperature
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trunk(returned: Callable[[Tensor, Tensor], Any]) -> Callable[[], nn.Module]:
    """Return a function that builds a `Trunk` in float64."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Trunk(returned).double()

    return build


@cache
def _teacher() -> nn.Module:
    model = classifier(initializer_range=0.2).eval()
    return model.requires_grad_(False)


def focal(trainer, model, inputs, number):
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    logs = outputs.logits.log_softmax(-1).gather(1, labels[:, None])
    return -((1 - logs.exp()) ** 2 * logs).mean(), outputs


def weighted(trainer, model, inputs, number):
    """Compute the loss of the example in Trainer's documentation."""
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    classes = torch.tensor([1.0, 2.0, 3.0], dtype=outputs.logits.dtype)
    return nn.CrossEntropyLoss(weight=classes)(outputs.logits, labels), outputs


def smoothed(trainer, model, inputs, number):
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    logs = outputs.logits.log_softmax(-1)
    return -(0.9 * logs.gather(1, labels[:, None]).mean() + 0.1 * logs.mean()), outputs


def distilled(trainer, model, inputs, number):
    outputs = model(**inputs)
    with torch.no_grad():
        theirs = _teacher()(**inputs).logits
    return outputs.loss + F.kl_div(outputs.logits.log_softmax(-1), theirs.softmax(-1), reduction="batchmean"), outputs


def r_drop(trainer, model, inputs, number):
    first, second = model(**inputs), model(**inputs)
    logs, other = first.logits.log_softmax(-1), second.logits.log_softmax(-1)
    return (first.loss + second.loss) / 2 + F.kl_div(logs, other.exp(), reduction="batchmean"), first


def penalised(trainer, model, inputs, number):
    outputs = model(**inputs)
    return outputs.loss + 0.1 * sum(p.square().sum() for p in model.parameters() if p.requires_grad), outputs


def mixed_up(trainer, model, inputs, number):
    labels, mask = inputs.pop("labels"), inputs["attention_mask"]
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    outputs = model(inputs_embeds=0.7 * embedded + 0.3 * embedded.flip(0), attention_mask=mask | mask.flip(0))
    losses = [F.cross_entropy(outputs.logits, labels), F.cross_entropy(outputs.logits, labels.flip(0))]
    return 0.7 * losses[0] + 0.3 * losses[1], outputs


def contrastive(trainer, model, inputs, number):
    inputs.pop("labels")
    outputs = model(**inputs)
    z = F.normalize(outputs.logits, dim=-1)
    return F.cross_entropy(z @ z.flip(0).T / 0.1, torch.arange(len(z))), outputs


def two_views(trainer, model, inputs, number):
    """Compute the loss of two views in one call: rows i and i + B belong to example i."""
    inputs.pop("labels")
    views = {"input_ids": torch.cat([inputs["input_ids"], inputs["input_ids"].flip(1)])}
    mask = inputs["attention_mask"]
    outputs = model(**views, attention_mask=torch.cat([mask, mask.flip(1)]))
    first, second = F.normalize(outputs.logits, dim=-1).chunk(2)
    return F.cross_entropy(first @ second.T / 0.1, torch.arange(len(first))), outputs


def hidden_states(trainer, model, inputs, number):
    outputs = model(**inputs, output_hidden_states=True)
    return outputs.loss + sum(states.square().mean() for states in outputs.hidden_states), outputs


def gradient_penalty(trainer, model, inputs, number):
    labels = inputs.pop("labels")
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    outputs = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"])
    (slope,) = torch.autograd.grad(outputs.logits.logsumexp(-1).sum(), embedded, create_graph=True)
    return F.cross_entropy(outputs.logits, labels) + slope.square().sum(), outputs


def adversarial(trainer, model, inputs, number):
    labels = inputs.pop("labels")
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    outputs = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"])
    loss = F.cross_entropy(outputs.logits, labels)
    (slope,) = torch.autograd.grad(loss, embedded, retain_graph=True)
    other = model(inputs_embeds=embedded + 0.1 * F.normalize(slope, dim=-1), attention_mask=inputs["attention_mask"])
    return loss + F.cross_entropy(other.logits, labels), outputs


def second_head(trainer, model, inputs, number):
    """Compute a loss that also calls a part of the model outside its forward."""
    outputs = model(**inputs, output_hidden_states=True)
    again = model.classifier(outputs.hidden_states[-1].mean(1))
    return outputs.loss + F.cross_entropy(again, inputs["labels"]), outputs


def theirs_doubled(trainer, model, inputs, number):
    loss, outputs = Trainer.compute_loss(trainer, model, inputs, True, number)
    return 2 * loss, outputs


def sign(trainer, model, inputs, number):
    """Compute a loss to which some instances contribute nothing."""
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    return (F.cross_entropy(outputs.logits, labels, reduction="none") * (labels != labels[0])).mean(), outputs


def two_heads(trainer, model, inputs, number):
    outputs = model(**inputs)
    kinds, size = outputs
    length = inputs["attention_mask"].sum(1, keepdim=True).to(size)
    return F.cross_entropy(kinds, inputs["labels"]) + F.mse_loss(size, length / 10), outputs


def retrieved(trainer, model, inputs, number):
    """Compute the loss of two passages per query in one call; the temperature belongs to no instance."""
    ids = inputs["input_ids"]
    outputs = model(input_ids=ids, passages=torch.cat([ids.flip(1), ids.roll(1, 0)]))
    scores = outputs["queries"] @ outputs["passages"].T * outputs["temperature"]
    return F.cross_entropy(scores, torch.arange(len(ids))), outputs


def heads_by_name(trainer, model, inputs, number):
    outputs = model(**inputs)
    kinds, size = (outputs["kinds"], outputs["size"]) if isinstance(outputs, dict) else (outputs.kinds, outputs.size)
    return F.cross_entropy(kinds, inputs["labels"]) + (size[:, 0] - inputs["labels"]).abs().mean(), outputs


def next_tokens(trainer, model, inputs, number):
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, targets, reduction="sum") / (1 if number is None else number), outputs


def scaled(trainer, model, inputs, number):
    outputs = model(**inputs)
    return 3 * outputs.loss, outputs


def of_model(trainer, model, inputs, number):
    outputs = model(**inputs)
    return outputs["loss"], outputs


def tied_head(trainer, model, inputs, number):
    """Multiply by the head's weight without calling its module, as fused losses do."""
    labels = inputs.pop("labels")
    outputs = model(**inputs, output_hidden_states=True)
    logits = outputs.hidden_states[-1][:, :-1] @ model.get_output_embeddings().weight.T
    return F.cross_entropy(logits.transpose(1, 2), labels[:, 1:]), outputs


class Case(NamedTuple):
    """A user's own loss.

    Attributes:
        loss: The function.
        build: Builds its model.
        rest: Whether a part of it bypasses the model's outputs.
        text: Whether the data are sequences to continue, instead of to classify.
    """

    loss: OwnLoss
    build: Callable[[], nn.Module] = classifier
    rest: bool = False
    text: bool = False

    def examples(self, n: int) -> list[dict[str, Any]]:
        """Return n examples, with the groups in turn."""
        return runs.examples(n) if self.text else tasks.examples_of(tasks.TABLE["single-label"], n)

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        """The function that collates examples into a batch."""
        return runs.collate if self.text else tasks.collate


CASES = {
    "focal": Case(focal),
    "weighted": Case(weighted),
    "smoothed": Case(smoothed),
    "distilled": Case(distilled),
    "R-Drop": Case(r_drop, lambda: classifier(classifier_dropout=0.2)),
    "penalised": Case(penalised, rest=True),
    "mixup": Case(mixed_up),
    "contrastive": Case(contrastive, lambda: classifier(initializer_range=0.3)),
    "two-views": Case(two_views, lambda: classifier(initializer_range=0.3)),
    "hidden-states": Case(hidden_states),
    "gradient-penalty": Case(gradient_penalty, rest=True),
    "adversarial": Case(adversarial),
    "second-head": Case(second_head, rest=True),
    "super": Case(theirs_doubled),
    "some-only": Case(sign),
    "tuple": Case(two_heads, trunk(lambda kinds, size: (kinds, size))),
    "nested": Case(
        heads_by_name, trunk(lambda kinds, size: {"kinds": kinds, "size": size, "others": [kinds, (size,)]})
    ),
    "towers": Case(retrieved, towers, rest=True),
    "tempered": Case(of_model, Tempered),
    "dataclass": Case(heads_by_name, trunk(Heads)),
    "next-tokens": Case(next_tokens, lambda: lora("gpt2", warm=True), text=True),
    "next-tokens-full": Case(next_tokens, tiny_gpt2, text=True),
    "scaled": Case(scaled, lambda: lora("gpt2", warm=True), text=True),
    "tied-head": Case(tied_head, tiny_gpt2, rest=True, text=True),
}


def trainer_of(loss: OwnLoss, base: type = Trainer) -> type:
    """Return a subclass of a Trainer whose `compute_loss` is the given function."""

    class Own(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            computed, outputs = loss(self, model, inputs, num_items_in_batch)
            return (computed, outputs) if return_outputs else computed

    return Own


def ours_of(loss: OwnLoss, base: type = Trainer, **attributes: Any) -> type:
    """Return a class with the mixin to the left of such a trainer."""
    return type("Ours", (JDTrainerMixin, trainer_of(loss, base)), attributes)


def prepared(case: Case, directory: Any, n: int, cls: type | None = None, data: Any = None, **flags: Any) -> Trainer:
    """Return a trainer of the case, by default the mixin to the left of a Trainer with its loss, on n examples."""
    cls = cls or ours_of(case.loss)
    args = arguments(directory, JDTrainingArguments if issubclass(cls, JDTrainerMixin) else TrainingArguments, **flags)
    data = case.examples(n) if data is None else data
    return in_order(cls(case.build(), args, train_dataset=data, data_collator=case.collate))


def trained(case: Case, directory: Any, n: int, cls: type | None = None, data: Any = None, **flags: Any) -> Any:
    """Return the same trainer after its run."""
    trainer = prepared(case, directory, n, cls, data, **flags)
    trainer.train()
    return trainer
