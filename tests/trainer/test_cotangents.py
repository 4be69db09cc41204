"""A loss that is split at the model's outputs: its rows are those of brute force, one detached instance at a time."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_jd import JDTrainer, JDTrainerMixin, JDTrainingArguments
from hf_jd.trainer import splitting
from hf_jd.weighting import UPGradWeighting
from tests.models import tiny_llama
from tests.trainer import own_losses, tasks
from tests.trainer.own_losses import CASES, Case, trainer_of
from tests.trainer.runs import arguments, flat, logged, lora, relative

GROUP = {"jd_objectives": "group", "jd_group_column": "task"}
# A gradient penalty comes past the outputs as a whole, as does what a head reads that is called again; and `Only` knows
# no other loss of a model's own than a classifier's.
UNSPLIT = ("gradient-penalty", "second-head", "scaled", "super")
SPLIT = [name for name in CASES if name not in UNSPLIT]
# How many tokens a batch has is nothing to losses that are means.
AVERAGED = {"loss_is_scaled_for_ga": False}
# GPT-2's positions [1, T] belong to no instance; heads are used twice.
pytestmark = pytest.mark.filterwarnings("ignore:.*further passes now")

Owner = Callable[[Tensor], Tensor]
"""The instance of each leading row, or token, of an output."""


class Only:
    """A model whose outputs have a graph at one instance only.

    Args:
        model: The model.
        instance: Which one; -1 for none.
        owner: Whose each row of an output is.
    """

    def __init__(self, model: nn.Module, instance: int, owner: Owner):
        self.model, self.instance, self.owner = model, instance, owner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        if isinstance(outputs, own_losses.Heads):
            return own_losses.Heads(self.one(outputs.kinds), self.one(outputs.size))
        outputs = pytree.tree_map(self.one, outputs)
        if "labels" in inputs and isinstance(outputs, dict) and "loss" in outputs:
            outputs["loss"] = F.cross_entropy(outputs["logits"], inputs["labels"])
        return outputs

    def one(self, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.dim() or not tensor.requires_grad:
            return tensor
        mine = self.owner(tensor) == self.instance
        return torch.where(mine.view(mine.shape + (1,) * (tensor.dim() - mine.dim())), tensor, tensor.detach())


def by_row(instances: int) -> Owner:
    """Row n is of instance n % B."""
    return lambda tensor: torch.arange(len(tensor)) % instances


def brute(
    case: Case, model: nn.Module, batch: dict[str, Tensor], instances: int, owner: Owner | None = None
) -> tuple[Tensor, Tensor]:
    """Each instance's part of the gradient [B, P], and what comes past the outputs [P]; one backward each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for instance in range(-1, instances):
        torch.manual_seed(0)
        only = Only(model, instance, owner or by_row(instances))
        loss = case.loss(SimpleNamespace(), only, dict(batch), None)[0]
        gradients = [None] * len(parameters)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(gradients, parameters, strict=True)
        found.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
    return torch.stack(found[1:]) - found[0], found[0]


class Recorded:
    """A trainer that has met one batch.

    Args:
        case: Its loss and model.
        directory: Of the run.
        n: How many examples.
        data: These, if not the case's.
        cls: The trainer, if not the mixin left of one with the loss.
        flags: Of the arguments.
    """

    def __init__(self, case: Case, directory: Any, n: int = 5, data: Any = None, cls: Any = None, **flags: Any):
        self.weights: Tensor | None = None
        cls = cls or type("Ours", (JDTrainerMixin, trainer_of(case.loss)), {})
        common = {"per_device_train_batch_size": n, "train_sampling_strategy": "sequential"}
        self.trainer = cls(
            case.build(),
            arguments(directory, **{**common, **flags}),
            train_dataset=case.examples(n) if data is None else data,
            data_collator=case.collate,
            weighting=self.weigh,
        )
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.engine()
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        self.inputs = {key: value for key, value in self.batch.items() if not key.startswith("jd_")}

    def weigh(self, gramian: Tensor) -> Tensor:
        return torch.zeros(len(gramian)).double() if self.weights is None else self.weights

    @property
    def gramian(self) -> Tensor:
        return self.trainer.jd_state.gramian

    def step(self, weights: Tensor | None) -> Tensor:
        """The gradient, if the objectives have these weights."""
        self.weights = weights
        self.trainer.model.zero_grad()
        torch.manual_seed(0)
        self.trainer.training_step(self.trainer.model, dict(self.batch))
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trainer.trainable()]
        return torch.cat([g.flatten() for g in gradients])

    def rows(self) -> tuple[Tensor, Tensor]:
        """Each objective's share of the gradient [M, P], and what no weighting sees [P]."""
        rest = self.step(None)
        unit = torch.eye(len(self.gramian)).double()
        return torch.stack([self.step(weights) - rest for weights in unit]) / len(unit), rest


def assert_rows(recorded: Recorded, rows: Tensor, rest: Tensor | None = None, tolerance: float = 1e-10) -> None:
    mine, others = recorded.rows()
    assert mine.shape == rows.shape
    assert relative(mine, rows) < tolerance
    assert (others - (0 if rest is None else rest)).norm() < tolerance * rows.norm()
    # Those of the objectives: M times their shares.
    assert relative(recorded.gramian, len(rows) ** 2 * rows @ rows.T) < tolerance


def grouped(rows: Tensor, recorded: Recorded) -> Tensor:
    """The groups' sums of the instances' rows."""
    groups = recorded.batch["jd_group"]
    return torch.stack([rows[groups == k].sum(0) for k in groups.unique()])


@pytest.mark.parametrize("name", SPLIT)
def test_rows_are_brute_force(name, tmp_path):
    case = CASES[name]
    recorded = Recorded(case, tmp_path)
    rows, rest = brute(case, case.build().train(), recorded.inputs, 5)
    some = rows.norm(dim=1) > 0
    assert some.all() == (name != "some-only"), "instances whose cotangent is zero have no row"
    assert_rows(recorded, rows[some], rest)


@pytest.mark.parametrize("name", ["contrastive", "two-views", "penalised", "R-Drop", "hidden-states", "next-tokens"])
def test_rows_of_groups_are_brute_force(name, tmp_path):
    case = CASES[name]
    recorded = Recorded(case, tmp_path, **GROUP)
    rows, rest = brute(case, case.build().train(), recorded.inputs, 5)
    assert_rows(recorded, grouped(rows, recorded), rest)


@pytest.mark.parametrize("keep", ["true", "false"])
@pytest.mark.parametrize("name", ["contrastive", "two-views", "next-tokens"])
def test_rows_however_they_are_kept(name, keep, tmp_path):
    case = CASES[name]
    recorded = Recorded(case, tmp_path, jd_keep_rows=keep)
    assert_rows(recorded, *brute(case, case.build().train(), recorded.inputs, 5))


@pytest.mark.parametrize("name", CASES)
def test_what_comes_past_the_outputs_is_told(name, tmp_path, monkeypatch):
    rests = []

    def noted(*args):
        found = split(*args)
        rests.append(found.rest is not None)
        return found

    split = splitting.split
    monkeypatch.setattr(splitting, "split", noted)
    Recorded(CASES[name], tmp_path).step(None)
    assert rests == [CASES[name].rest]


def test_a_batch_is_one_objective(tmp_path):
    case = CASES["contrastive"]
    recorded = Recorded(case, tmp_path, jd_objectives="batch")
    rows, _ = brute(case, case.build().train(), recorded.inputs, 5)
    assert relative(recorded.step(None), rows.sum(0)) < 1e-10
    assert relative(recorded.gramian, rows.sum(0).square().sum().view(1, 1)) < 1e-10


# ---- Whose row? ----


def interleaved(trainer, model, inputs, number):
    """Rows 2 i and 2 i + 1 belong to example i."""
    inputs.pop("labels")
    views = {key: torch.stack([value, value.flip(1)], dim=1).flatten(0, 1) for key, value in inputs.items()}
    outputs = model(**views)
    first, second = F.normalize(outputs.logits, dim=-1).view(len(views["input_ids"]) // 2, 2, -1).unbind(1)
    return F.cross_entropy(first @ second.T / 0.1, torch.arange(len(first))), outputs


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
def test_whose_row_it_is_may_be_said(kind, tmp_path):
    class Interleaved(JDTrainerMixin, trainer_of(interleaved)):
        def jd_instances(self, output, instances):
            return torch.arange(len(output)) // (len(output) // instances)

    case = Case(interleaved)
    recorded = Recorded(case, tmp_path, cls=Interleaved, **kind)
    rows, rest = brute(case, case.build(), recorded.inputs, 5, lambda tensor: torch.arange(len(tensor)) // 2)
    assert_rows(recorded, grouped(rows, recorded) if kind else rows, rest)


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
def test_rows_of_packed_documents(kind, tmp_path):
    def per_token(trainer, model, inputs, number):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        return losses.square().mean(), outputs

    inner = DataCollatorWithFlattening()

    class Packed(Case):
        @property
        def collate(self):
            return lambda batch: inner([{k: v for k, v in e.items() if k in ("input_ids", "labels")} for e in batch])

    case = Packed(per_token, lambda: tiny_llama(use_cache=False), text=True)
    recorded = Recorded(case, tmp_path, **kind)
    starts = recorded.batch["position_ids"] == 0
    documents = starts.long().cumsum(1) - 1
    assert documents.max() == 4
    rows, rest = brute(case, case.build(), recorded.inputs, 5, lambda tensor: documents[:, : tensor.shape[1]])
    # Llama's norms compute in float32.
    assert_rows(recorded, grouped(rows, recorded) if kind else rows, rest, tolerance=1e-6)


# ---- What isn't finite ----


def spoiled(trainer, model, inputs, number):
    """The loss of the third example is no number; the others' are what they were."""
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    losses = F.cross_entropy(outputs.logits, labels, reduction="none")
    return (losses * torch.tensor([1.0, 1.0, torch.nan, 1.0, 1.0]).double()).mean(), outputs


def spoiled_inside(trainer, model, inputs, number):
    """The model itself computes infinities for the third example."""
    factors = torch.tensor([1.0, 1.0, torch.inf, 1.0, 1.0]).double()[:, None, None]
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")) * factors
    labels = inputs.pop("labels")
    outputs = model(inputs_embeds=embedded, **inputs)
    return F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:]), outputs


def plain(trainer, model, inputs, number):
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    return F.cross_entropy(outputs.logits, labels, reduction="none").mean(), outputs


def plain_text(trainer, model, inputs, number):
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    return F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:]), outputs


SPOILED = {
    "loss": (Case(spoiled), Case(plain), 1e-10),
    "lora": (*(Case(f, lambda: lora("gpt2", warm=True), text=True) for f in (spoiled_inside, plain_text)), 1e-10),
    # Llama's norms compute in float32.
    "full": (*(Case(f, tiny_llama, text=True) for f in (spoiled_inside, plain_text)), 1e-6),
}


@pytest.mark.parametrize("keep", ["true", "false"])
@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
@pytest.mark.parametrize("name", SPOILED)
def test_an_instance_that_is_not_finite_is_left_out(name, kind, keep, tmp_path):
    case, healthy, tolerance = SPOILED[name]
    recorded = Recorded(case, tmp_path, jd_check=False, jd_keep_rows=keep, **kind)
    rows, _ = brute(healthy, healthy.build(), recorded.inputs, 5)
    rows[2] = 0
    rows = grouped(rows, recorded) if kind else rows
    assert_rows(recorded, rows[rows.norm(dim=1) > 0], tolerance=tolerance)
    assert recorded.trainer.jd_metrics.take()["jd/non_finite"] == 1


def test_an_update_in_which_an_infinity_reaches_all_rows_is_no_step(tmp_path):
    # BERT's positions [1, T] have one gradient for all instances, in which 0 times NaN is NaN.
    def inside(trainer, model, inputs, number):
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        factors = torch.tensor([1.0, 1.0, torch.inf, 1.0, 1.0]).double()[:, None, None]
        outputs = model(inputs_embeds=embedded * factors, attention_mask=inputs["attention_mask"])
        return F.cross_entropy(outputs.logits, inputs["labels"]), outputs

    recorded = Recorded(Case(inside), tmp_path, jd_check=False)
    assert recorded.step(None).norm() == 0
    assert recorded.trainer.jd_metrics.take()["jd/non_finite"] == 5


def test_a_loss_that_spreads_what_is_not_finite_is_no_step(tmp_path):
    def all_of_them(trainer, model, inputs, number):
        loss, outputs = CASES["contrastive"].loss(trainer, model, inputs, number)
        return loss * torch.nan, outputs

    recorded = Recorded(Case(all_of_them), tmp_path, jd_check=False)
    assert recorded.step(None).norm() == 0
    assert recorded.trainer.jd_metrics.take()["jd/non_finite"] == 5


# ---- Mixed precision ----


def states_and_tokens(trainer, model, inputs, number):
    """Reads two outputs, of which one depends on the other."""
    outputs = model(**inputs, output_hidden_states=True)
    return outputs.loss + outputs.hidden_states[-1].square().mean(), outputs


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
@pytest.mark.parametrize("loss", [own_losses.next_tokens, own_losses.scaled, states_and_tokens])
@pytest.mark.parametrize("build", [lambda: lora("gpt2", warm=True), tiny_llama], ids=["lora", "full"])
def test_rows_of_outputs_that_mixed_precision_has_cast(build, loss, kind, tmp_path):
    case = Case(loss, lambda: build().float(), text=True)
    flags = {"max_steps": 1, "per_device_train_batch_size": 5, "train_sampling_strategy": "sequential"}
    gramians = []
    for bf16 in (False, True):
        cls = type("Ours", (JDTrainerMixin, trainer_of(loss)), {})
        args = arguments(tmp_path, jd_weighting="mean", bf16=bf16, **flags, **kind)
        trainer = cls(case.build(), args, train_dataset=case.examples(5), data_collator=case.collate)
        trainer.train()
        gramians.append(trainer.jd_state.gramian)
    assert len(gramians[0]) == (3 if kind else 5)
    assert 1e-6 < relative(gramians[1], gramians[0]) < 2e-2


def test_a_gradient_scaler_finds_gradients_times_its_scale(tmp_path):
    case, found = CASES["penalised"], []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        recorded = Recorded(case, tmp_path)
        recorded.trainer.accelerator.scaler = scaler
        found.append((recorded.step(torch.arange(5).double()), recorded.gramian))
    assert relative(found[1][0], 1024 * found[0][0]) < 1e-10
    assert relative(found[1][1], found[0][1]) < 1e-10


@pytest.mark.parametrize("kind", [{}, GROUP, {"jd_objectives": "batch"}], ids=["instance", "group", "batch"])
def test_a_gradient_scaler_sees_an_overflow(kind, tmp_path):
    recorded = Recorded(Case(spoiled), tmp_path, jd_check=False, **kind)
    recorded.trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert not recorded.step(None).isfinite().any()


# ---- Batches ----


class Normalised(nn.Module):
    """Its instances depend on one another."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(own_losses.VOCABULARY, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, tasks.CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.norm(self.embedding(input_ids).mean(1)).tanh())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return Normalised().double()


def cached(trainer, model, inputs, number):
    """Runs the model once without a graph, and again in the backward of its loss, row by row."""
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    with torch.no_grad():
        logits = model(**inputs).logits
    logits = logits.requires_grad_()
    z = F.normalize(logits, dim=-1)
    loss = F.cross_entropy(z @ z.flip(0).T / 0.1, torch.arange(len(z)))
    (cotangent,) = torch.autograd.grad(loss, logits)

    def again(scale: Tensor) -> None:
        with torch.enable_grad():
            for i in range(len(z)):
                one = {key: value[i : i + 1] for key, value in inputs.items()}
                (model(**one).logits * cotangent[i] * scale).sum().backward()

    value = loss.detach().requires_grad_()
    value.register_hook(again)
    return value, None


BATCHES = {"BatchNorm": Case(lambda t, m, i, n: ((o := m(**i))["loss"], o), normalised), "cached": Case(cached)}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_need_nothing_of_the_model(name, tmp_path):
    case = BATCHES[name]
    flags = {"optim": "sgd", "gradient_accumulation_steps": 2, "max_steps": 3, "per_device_train_batch_size": 4}

    def run(cls, config, **own):
        args = arguments(tmp_path, config, **flags, **own)
        trainer = cls(case.build(), args, train_dataset=case.examples(26), data_collator=case.collate)
        trainer.train()
        return trainer

    theirs = run(trainer_of(case.loss), TrainingArguments)
    cls = type("Ours", (JDTrainerMixin, trainer_of(case.loss)), {})
    ours = run(cls, JDTrainingArguments, jd_objectives="batch", jd_weighting="mean")
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-10
    assert relative(logged(ours, "grad_norm"), logged(theirs, "grad_norm")) < 1e-6
    assert relative(flat(theirs.model), flat(case.build())) > 1e-4
    assert len(ours.jd_state.gramian) == 2


def test_the_gramian_of_batches_is_that_of_their_gradients(tmp_path):
    case = BATCHES["cached"]
    gradients = []
    for part in (slice(0, 4), slice(4, 8)):
        model = case.build()
        batch = case.collate([{k: v for k, v in e.items() if k != "task"} for e in case.examples(8)[part]])
        case.loss(None, model, batch, None)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    rows = torch.stack(gradients)  # Each is half of the update's mean, and one of two objectives.
    flags = {"gradient_accumulation_steps": 2, "max_steps": 1, "per_device_train_batch_size": 4}
    args = arguments(tmp_path, train_sampling_strategy="sequential", jd_objectives="batch", **flags)
    cls = type("Ours", (JDTrainerMixin, trainer_of(case.loss)), AVERAGED)
    trainer = cls(case.build(), args, train_dataset=case.examples(8), data_collator=case.collate)
    trainer.train()
    assert relative(trainer.jd_state.gramian, rows @ rows.T) < 1e-10


# ---- Errors ----


def refused(directory: Any, match: str, loss: Any = None, cls: Any = None, **flags: Any) -> None:
    case = Case(loss or CASES["focal"].loss)
    cls = cls or type("Ours", (JDTrainerMixin, trainer_of(case.loss)), {})
    args = arguments(directory, per_device_train_batch_size=8, **flags)
    trainer = cls(case.build(), args, train_dataset=case.examples(8), data_collator=case.collate)
    with pytest.raises(ValueError, match=match):
        trainer.train()


def of_parameters(trainer, model, inputs, number):
    return sum(p.square().sum() for p in model.parameters()), None


def past_forward(trainer, model, inputs, number):
    states = model.bert(inputs["input_ids"]).last_hidden_state
    return F.cross_entropy(model.classifier(states[:, 0]), inputs["labels"]), None


def without_graph(trainer, model, inputs, number):
    outputs = model(**inputs)
    return outputs.loss.detach(), outputs


@pytest.mark.parametrize(
    ("loss", "shapes"),
    [(of_parameters, "none"), (past_forward, "none"), (cached, "none"), (without_graph, r"\[8, 3\]")],
    ids=["parameters", "past-forward", "own-backward", "without-graph"],
)
def test_a_loss_that_does_not_read_the_outputs_is_refused(loss, shapes, tmp_path):
    match = rf"does not depend on what the model returned .*outputs of shapes {shapes}.*--jd_objectives batch"
    refused(tmp_path, match, loss)


@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("kind", [{}, GROUP, {"jd_objectives": "batch"}], ids=["instance", "group", "batch"])
def test_a_step_that_calls_backward_another_time_is_refused(kind, times, tmp_path):
    class Steps(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            for _ in range(times):
                loss = self.compute_loss(model, dict(inputs))
                self.accelerator.backward(loss)
            return torch.zeros(())

    own = trainer_of(CASES["focal"].loss, Steps)
    match = rf"training step of Ours called accelerator.backward {times} times .*: call it, or super\(\).training_step"
    refused(tmp_path, match, cls=type("Ours", (JDTrainerMixin, own), {}), **kind)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"jd_backward": "two_pass"}, "--jd_backward two_pass"),
        ({"jd_normalize": "loss"}, "--jd_normalize loss"),
        ({"jd_weighting": "dwa", **GROUP}, "the weighting `dwa`"),
        ({"jd_extra_losses": "objective"}, "--jd_extra_losses objective"),
        ({"jd_extra_losses": "error"}, "--jd_extra_losses error"),
    ],
    ids=str,
)
def test_what_needs_values_is_refused(flags, named, tmp_path):
    refused(tmp_path, f"{named} needs the value of each objective, and the `compute_loss` of Ours returns one", **flags)


def test_batches_have_no_values_either(tmp_path):
    match = "--jd_normalize loss needs the value of each objective, and --jd_objectives batch takes one"
    refused(tmp_path, match, cls=JDTrainer, jd_objectives="batch", jd_normalize="loss")


@pytest.mark.parametrize("objectives", ["loss", "instance_loss"])
def test_losses_by_name_are_refused(objectives, tmp_path):
    match = f"--jd_objectives {objectives} weighs several losses by name, and Ours.compute_loss returns one"
    refused(tmp_path, match, jd_objectives=objectives)


def test_unreduced_losses_beside_an_own_loss_are_taken(tmp_path):
    class Both(JDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            raise AssertionError("in training, the unreduced losses count")

        def compute_losses(self, model, inputs):
            return F.cross_entropy(model(**inputs).logits, inputs["labels"], reduction="none")

    case = CASES["focal"]
    args = arguments(tmp_path, jd_normalize="loss", max_steps=1)
    with pytest.raises(AssertionError, match="unreduced losses count"):
        Both(case.build(), args, train_dataset=case.examples(4), data_collator=case.collate).evaluate(case.examples(4))
    trainer = Both(case.build(), args, train_dataset=case.examples(4), data_collator=case.collate)
    assert not trainer.splits_loss


# ---- Control ----

PLAIN = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def trained(case: Case, directory: Any, cls: Any = None, data: Any = None, **flags: Any) -> Any:
    """Four updates of 4 examples in order, by plain SGD."""
    cls = cls or type("Ours", (JDTrainerMixin, trainer_of(case.loss)), {})
    config = JDTrainingArguments if issubclass(cls, JDTrainerMixin) else TrainingArguments
    common = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential", **PLAIN}
    args = arguments(directory, config, **{**common, **flags})
    data = case.examples(16) if data is None else data
    trainer = cls(case.build(), args, train_dataset=data, data_collator=case.collate)
    trainer.train()
    return trainer


def by_hand(case: Case, weights_of: Callable[[int, Tensor], Tensor], factors: Any = None) -> Tensor:
    """The parameters after four updates by groups, from brute force.

    Args:
        case: The loss and the model.
        weights_of: The number of an update and its Gramian -> weights.
        factors: What multiplies the groups' shares of the loss, by their sizes; 1 if None.
    """
    model = case.build()
    parameters = list(model.parameters())
    data = case.examples(16)
    for step in range(4):
        examples = data[4 * step : 4 * step + 4]
        names = [example["task"] for example in examples]
        batch = case.collate([{k: v for k, v in e.items() if k != "task"} for e in examples])
        rows, rest = brute(case, model, batch, 4)
        picked = [torch.tensor([name == group for name in names]) for group in sorted(set(names))]
        shares = torch.stack([rows[mine].sum(0) for mine in picked])
        objectives = len(shares) * shares
        if factors is not None:
            objectives = torch.stack([factors(int(mine.sum())) * s for mine, s in zip(picked, shares, strict=True)])
        change = PLAIN["learning_rate"] * (weights_of(step, objectives @ objectives.T) @ objectives + rest)
        with torch.no_grad():
            for p, part in zip(parameters, change.split([p.numel() for p in parameters]), strict=True):
                p -= part.view_as(p)
    return flat(model)


def mean_of(gramian: Tensor) -> Tensor:
    return torch.full((len(gramian),), 1 / len(gramian), dtype=torch.float64)


UPGRAD = UPGradWeighting()
CONTROL = [CASES["contrastive"], CASES["penalised"]]


@pytest.mark.parametrize("case", CONTROL, ids=["contrastive", "penalised"])
def test_upgrad_is_brute_forces(case, tmp_path):
    ours = trained(case, tmp_path, **GROUP)
    assert relative(flat(ours.model), by_hand(case, lambda step, gramian: UPGRAD(gramian))) < 1e-8


@pytest.mark.parametrize("case", CONTROL, ids=["contrastive", "penalised"])
def test_weights_that_are_taken_over(case, tmp_path):
    last = []

    def weights(step, gramian):
        if step % 2 == 0:
            last[:] = [UPGRAD(gramian)]
        return last[0]

    ours = trained(case, tmp_path, jd_every=2, **GROUP)
    assert relative(flat(ours.model), by_hand(case, weights)) < 1e-8
    assert relative(flat(trained(case, tmp_path, **GROUP).model), flat(ours.model)) > 1e-6


@pytest.mark.parametrize("case", CONTROL, ids=["contrastive", "penalised"])
def test_a_warmup_is_the_mean(case, tmp_path):
    ours = trained(case, tmp_path, jd_warmup_steps=2, **GROUP)
    expected = by_hand(case, lambda step, gramian: mean_of(gramian) if step < 2 else UPGRAD(gramian))
    assert relative(flat(ours.model), expected) < 1e-8
    stock = trained(case, tmp_path, trainer_of(case.loss))
    for kind in ({}, GROUP):
        whole = trained(case, tmp_path, jd_warmup_steps=4, **kind)
        assert relative(flat(whole.model), flat(stock.model)) < 1e-10
        assert whole.jd_state is None
        assert logged(whole, "loss").tolist() == logged(stock, "loss").tolist()


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
@pytest.mark.parametrize("case", CONTROL, ids=["contrastive", "penalised"])
def test_watching_changes_nothing(case, kind, tmp_path):
    stock = trained(case, tmp_path, trainer_of(case.loss))
    ours = trained(case, tmp_path, jd_weighting="mean", jd_monitor_every=2, **kind)
    assert relative(flat(ours.model), flat(stock.model)) < 1e-10
    assert ["jd/min_gw" in entry for entry in ours.state.log_history[:4]] == [True, False, True, False]


def test_groups_that_are_their_own_means(tmp_path):
    # Of losses that are a mean of instances: a group's share, times B over its number of instances, is its mean.
    case = CASES["focal"]
    ours = trained(case, tmp_path, jd_group_reduction="mean", **GROUP)
    expected = by_hand(case, lambda step, gramian: UPGRAD(gramian), lambda size: 4 / size)
    assert relative(flat(ours.model), expected) < 1e-8


def test_groups_that_are_their_own_means_of_tokens(tmp_path):
    case = CASES["next-tokens"]
    recorded = Recorded(case, tmp_path, jd_group_reduction="mean", **GROUP)
    rows, _ = brute(case, case.build(), recorded.inputs, 5)
    counts, groups = (recorded.inputs["labels"][:, 1:] != -100).sum(1).double(), recorded.batch["jd_group"]
    # Nothing divides the sum here: it is as if it were by the number of tokens of the batch.
    scale = torch.stack([counts.sum() / counts[groups == k].sum() for k in groups.unique()])
    objectives = scale[:, None] * grouped(rows, recorded)
    recorded.step(None)
    assert relative(recorded.gramian, objectives @ objectives.T) < 1e-10


def test_groups_that_are_raised(tmp_path):
    case = CASES["focal"]
    recorded = Recorded(case, tmp_path, jd_ascend=["docs"], **GROUP)
    rows, _ = brute(case, case.build(), recorded.inputs, 5)
    names = recorded.trainer.jd_group_names
    signs = torch.tensor([-1.0 if name == "docs" else 1.0 for name in names]).double()
    assert relative(recorded.step(torch.ones(3).double()), 3 * signs @ grouped(rows, recorded)) < 1e-10


@pytest.mark.parametrize("kind", [{}, GROUP], ids=["instance", "group"])
def test_micro_batches_may_be_weighed_alone(kind, tmp_path):
    # Each of two equal micro-batches is the update of one.
    case = CASES["contrastive"]
    data = case.examples(4)
    one = trained(case, tmp_path, data=data * 4, **kind)
    flags = {"jd_scope": "micro_batch", "gradient_accumulation_steps": 2}
    cls = type("Ours", (JDTrainerMixin, trainer_of(case.loss)), AVERAGED)
    two = trained(case, tmp_path, cls, data=data * 8, **flags, **kind)
    assert relative(flat(two.model), flat(one.model)) < 1e-10


@pytest.mark.parametrize("case", ["R-Drop", "penalised"])
def test_rows_that_are_too_many_are_weighed_apart_where_that_is_asked(case, tmp_path, caplog):
    flags = {"gradient_accumulation_steps": 2, "max_steps": 3}
    with pytest.raises(ValueError, match="rows of the 2 micro-batches .* GB: accumulate fewer"):
        trained(CASES[case], tmp_path, jd_keep_rows="100", **flags)
    runs = []
    for own in (
        {"jd_scope": "micro_batch"},
        {"jd_keep_rows": "100", "jd_when_full": "micro_batch"},
        {"jd_keep_rows": "1GB", "jd_when_full": "micro_batch"},
        {},
    ):
        runs.append(flat(trained(CASES[case], tmp_path, **flags, **own).model))
        assert caplog.text.count("each micro-batch is weighed by itself from now on") == (len(runs) > 1)
    assert relative(runs[1], runs[0]) < 1e-12
    assert torch.equal(runs[2], runs[3])
    assert relative(runs[2], runs[0]) > 1e-8
