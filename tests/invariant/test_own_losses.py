"""`mean` is the stock Trainer for any `compute_loss`: parameters, and everything that is logged."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_jd import JDTrainer, JDTrainerMixin, JDTrainingArguments
from tests.marks import in_turn, slow
from tests.releases import needs
from tests.trainer.own_losses import CASES, ours_of, prepared, trainer_of
from tests.trainer.runs import arguments, flat, relative

GROUP = {"jd_objectives": "group", "jd_group_column": "task"}
# Seven micro-batches of 4, ..., 4 and 2 examples make four updates; the last has one micro-batch.
EXAMPLES, STEPS = 26, 4
KINDS = {
    "instance": ({}, [8, 8, 8, 2]),
    "instance-grouped": ({"jd_group_column": "task"}, [8, 8, 8, 2]),
    "group": (GROUP, [3, 3, 3, 2]),
    "batch": ({"jd_objectives": "batch"}, [2, 2, 2, 1]),
}
# GPT-2's positions [1, T] belong to no instance; heads and embeddings are used twice.
pytestmark = pytest.mark.filterwarnings("ignore:.*further passes now")


class Watch(TrainerCallback):
    """A callback that records how many objectives each update weighed."""

    def __init__(self):
        self.objectives = []

    def on_step_end(self, args, state, control, **kwargs):
        self.objectives.append(len(self.trainer.jd_state.weights))


def watched(case, directory, cls: type | None = None, **flags) -> tuple[Trainer, list[int]]:
    # Adam would amplify the rounding errors of a zero gradient.
    common = {"optim": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": 2, "max_steps": STEPS}
    flags = {**common, "per_device_train_batch_size": 4, **flags}
    trainer = prepared(case, directory, EXAMPLES, cls, **flags)
    watch = Watch()
    watch.trainer = trainer
    if isinstance(trainer, JDTrainerMixin):
        trainer.add_callback(watch)
    trainer.train()
    return trainer, watch.objectives


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Train a case with the stock Trainer; each configuration once."""
    trained_already: dict[str, Trainer] = {}

    def train(name: str, **flags) -> Trainer:
        key = f"{name} {sorted(flags.items())}"
        if key not in trained_already:
            case = CASES[name]
            cls = trainer_of(case.loss)
            trained_already[key] = watched(case, tmp_path_factory.mktemp("stock"), cls, **flags)[0]
        return trained_already[key]

    return train


def ours(name: str, directory, cls: type | None = None, **flags) -> tuple[Trainer, list[int]]:
    return watched(CASES[name], directory, cls, **{"jd_weighting": "mean", **flags})


def measured(trainer: Trainer) -> list[dict[str, float]]:
    """Return the logs, without times."""
    clock = ("runtime", "per_second")
    return [{k: v for k, v in entry.items() if not k.endswith(clock)} for entry in trainer.state.log_history]


def assert_same(trainer: Trainer, theirs: Trainer, tolerance: float = 1e-10) -> None:
    assert relative(flat(trainer.model), flat(theirs.model)) < tolerance
    assert len(measured(trainer)) == len(measured(theirs)) > STEPS
    for our, their in zip(measured(trainer), measured(theirs), strict=True):
        # Trainer logs float32.
        assert {key: our[key] for key in their} == pytest.approx(their, rel=1e-6)


def moved(trainer: Trainer, build) -> float:
    return relative(flat(trainer.model), flat(build()))


@pytest.mark.parametrize(("name", "kind"), in_turn(CASES, {kind: kind for kind in KINDS}))
def test_mean_equals_stock_trainer(name, kind, stock, tmp_path):
    theirs = stock(name)
    flags, expected = KINDS[kind]
    trainer, objectives = ours(name, tmp_path, **flags)
    assert_same(trainer, theirs)
    assert moved(theirs, CASES[name].build) > 1e-4
    if name != "some-only":
        assert objectives == expected
    assert len(trainer.jd_state.gramian) == objectives[-1]


@needs("transformers", "5.2", "train_sampling_strategy")
def test_instances_outside_the_loss_are_no_objectives(tmp_path):
    args = {"train_sampling_strategy": "sequential"}
    objectives = ours("some-only", tmp_path, **args)[1]
    labels = [example["labels"] for example in CASES["some-only"].examples(EXAMPLES)]
    batches = [labels[i : i + 4] for i in range(0, EXAMPLES, 4)]
    left = [sum(label != batch[0] for label in batch) for batch in batches]
    assert objectives == [sum(left[i : i + 2]) for i in range(0, len(left), 2)]
    assert 0 < left[-1] < 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "flags",
    [
        {"gradient_accumulation_steps": 1},
        {"max_grad_norm": 0.0},
        {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1},
        {"gradient_checkpointing": True},
        {"include_num_input_tokens_seen": "non_padding"},
        {"torch_empty_cache_steps": 1},
        {"average_tokens_across_devices": False},
    ],
    ids=lambda flags: next(iter(flags)),
)
def test_mean_equals_stock_trainer_with_flags(flags, kind, stock, tmp_path):
    trainer, _ = ours("next-tokens", tmp_path, **flags, **KINDS[kind][0])
    assert_same(trainer, stock("next-tokens", **flags))


@pytest.mark.parametrize("kind", [slow("instance"), "group", slow("batch")])
@pytest.mark.parametrize("flags", [{"jd_scope": "micro_batch"}, {"jd_keep_rows": "false"}], ids=str)
@pytest.mark.parametrize("name", ["focal", "penalised", "next-tokens-full"])
def test_mean_equals_stock_trainer_however_rows_are_stored(name, flags, kind, stock, tmp_path):
    trainer, _ = ours(name, tmp_path, **flags, **KINDS[kind][0])
    assert_same(trainer, stock(name))


@pytest.mark.parametrize("kind", KINDS)
def test_mean_equals_stock_trainer_in_bfloat16(kind, stock, tmp_path):
    exact = CASES["next-tokens"]
    case = exact._replace(build=lambda: exact.build().float())
    theirs, _ = watched(case, tmp_path, trainer_of(case.loss), bf16=True)
    trainer, objectives = watched(case, tmp_path, bf16=True, jd_weighting="mean", **KINDS[kind][0])
    assert moved(theirs, case.build) > 1e-3
    assert relative(flat(trainer.model), flat(theirs.model)) < 1e-4
    assert objectives == KINDS[kind][1]


class Mine(JDTrainer):
    """A trainer with the mixin to the right of its `compute_loss`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        computed, outputs = CASES["focal"].loss(self, model, inputs, num_items_in_batch)
        return (computed, outputs) if return_outputs else computed


class OnTop(JDTrainer):
    """A trainer that adds to JDTrainer's loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return (2 * loss, {}) if return_outputs else 2 * loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cls", "name"), [(Mine, "focal"), (OnTop, "super")])
def test_a_subclass_of_jdtrainer_may_compute_its_loss(cls, name, kind, stock, tmp_path):
    trainer, objectives = ours(name, tmp_path, cls, **KINDS[kind][0])
    assert_same(trainer, stock(name))
    assert objectives == KINDS[kind][1]


@pytest.mark.parametrize("kind", KINDS)
def test_compute_loss_may_be_set_on_the_trainer(kind, stock, tmp_path):
    class Set(JDTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.compute_loss = lambda model, inputs, num_items_in_batch=None: CASES["focal"].loss(
                self, model, inputs, num_items_in_batch
            )[0]

    trainer, objectives = ours("focal", tmp_path, Set, **KINDS[kind][0])
    assert_same(trainer, stock("focal"))
    assert objectives == KINDS[kind][1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_custom_training_step_runs(kind, stock, tmp_path):
    class Counts(trainer_of(CASES["focal"].loss)):
        def training_step(self, *args, **kwargs):
            self.steps = getattr(self, "steps", 0) + 1
            return super().training_step(*args, **kwargs)

        def log(self, logs, *args):
            super().log({**logs, "steps": self.steps}, *args)

    trainer, _ = ours("focal", tmp_path, type("Ours", (JDTrainerMixin, Counts), {}), **KINDS[kind][0])
    assert_same(trainer, stock("focal"))
    assert [entry["steps"] for entry in trainer.state.log_history] == [2, 4, 6, 7, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_equals_stock_trainer(kind, tmp_path):
    case, flags = CASES["focal"], {"eval_strategy": "steps", "eval_steps": 2, "optim": "sgd", "max_steps": 4}

    def run(cls, **own):
        args = arguments(tmp_path, JDTrainingArguments if own else TrainingArguments, **flags, **own)
        data = {"train_dataset": case.examples(EXAMPLES), "eval_dataset": case.examples(10)}
        trainer = cls(case.build(), args, data_collator=case.collate, **data)
        trainer.train()
        return [entry for entry in measured(trainer) if "eval_loss" in entry]

    theirs = run(trainer_of(case.loss))
    evaluated = run(ours_of(case.loss), jd_weighting="mean", **KINDS[kind][0])
    assert len(theirs) == 2
    for our, their in zip(evaluated, theirs, strict=True):
        assert {key: our[key] for key in their} == pytest.approx(their, rel=1e-6)


def test_another_weighting_takes_another_step(stock, tmp_path):
    trainer, _ = ours("contrastive", tmp_path, jd_weighting="upgrad")
    assert relative(flat(trainer.model), flat(stock("contrastive").model)) > 1e-6
    assert isinstance(trainer.model, nn.Module)
