"""Before, after and around training: the model is left unchanged, and a run follows the current flags."""

from __future__ import annotations

import copy
import io
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torchjd.aggregation import PCDWeighting
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from hf_jd import JDTrainer
from hf_jd.collator import GroupCollator
from hf_jd.weighting import GradVacWeighting, MGDAWeighting
from tests.models import tiny_llama
from tests.trainer.runs import arguments, collate, examples, flat, logged, lora, relative, run, stock
from tests.trainer.tasks import TABLE, examples_of, model_of
from tests.trainer.tasks import collate as collate_task

GROUP = {"jd_objectives": "group", "jd_group_column": "task"}
HOOKS = [name for name in vars(nn.Linear(1, 1)) if name.endswith("_hooks") or "_hooks_" in name]


def hooks(model: nn.Module) -> dict[str, int]:
    """Count the hooks of each kind on modules and parameters."""
    counts = {name: sum(len(getattr(module, name)) for module in model.modules()) for name in HOOKS}
    return counts | {"parameters": sum(len(p._backward_hooks or ()) for p in model.parameters())}


# ---- After training ----


@pytest.mark.parametrize(
    "flags",
    [
        {},
        GROUP,
        {"jd_backward": "two_pass"},
        {"jd_scope": "micro_batch", "gradient_accumulation_steps": 2},
        {"jd_warmup_steps": 9},
        {"gradient_checkpointing": True},
        {"bf16": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_a_trained_model_has_no_hooks_of_ours(flags, tmp_path):
    settings = {name: value for name, value in flags.items() if not name.startswith("jd_")}
    theirs = stock(tiny_llama(), tmp_path, max_steps=2, **settings)
    trainer = run(tiny_llama(), arguments(tmp_path, max_steps=2, **flags))
    assert hooks(trainer.model) == hooks(theirs.model)
    modules = zip(trainer.model.modules(), theirs.model.modules(), strict=True)
    assert all(vars(ours).keys() == vars(theirs).keys() for ours, theirs in modules)


class Stops(TrainerCallback):
    def __init__(self, error: BaseException, event: str = "on_step_end"):
        def stop(*args, **kwargs):
            raise error

        setattr(self, event, stop)


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (KeyboardInterrupt(), "on_step_end"),
        (SystemExit(1), "on_train_begin"),
        (RuntimeError("no room"), "on_train_end"),
        (ValueError("no"), "on_epoch_end"),
    ],
    ids=repr,
)
def test_an_interrupted_run_leaves_no_hooks_and_a_working_trainer(error, event, tmp_path):
    trainer = JDTrainer(lora("gpt2"), arguments(tmp_path, max_steps=2), train_dataset=examples(), data_collator=collate)
    stops = Stops(error, event)
    trainer.add_callback(stops)
    with pytest.raises(type(error)):
        trainer.train()
    assert not any(hooks(trainer.model).values())
    assert trainer.evaluate(examples(4))["eval_loss"] > 0
    trainer.remove_callback(stops)
    trainer.train()
    assert trainer.state.global_step == 2


def test_an_error_in_the_backward_leaves_no_hooks(tmp_path):
    def fail(gramian):
        raise ZeroDivisionError

    model = lora("gpt2")
    with pytest.raises(ZeroDivisionError):
        run(model, arguments(tmp_path), weighting=fail)
    assert not any(hooks(model).values())


def test_a_refused_run_leaves_no_hooks(tmp_path):
    model = lora("gpt2")
    with pytest.raises(ValueError, match="--jd_ascend names `coed`"):
        run(model, arguments(tmp_path, jd_group_column="task", jd_ascend=["coed"]))
    assert not any(hooks(model).values())


def trace(model, inputs):
    model.config.return_dict = False
    try:
        return torch.jit.trace(model, (inputs,), check_trace=False)(inputs)[0]
    finally:
        model.config.return_dict = True


def export(model, inputs):
    return torch.export.export(model, (inputs,), strict=False).module()(inputs).logits


def functional(model, inputs):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def total(parameters):
        return torch.func.functional_call(model, parameters, (inputs,)).logits.sum()

    gradients = torch.func.grad(total)(parameters)
    expected = torch.autograd.grad(model(inputs).logits.sum(), list(model.parameters()))
    assert all(torch.allclose(gradients[n], g) for (n, _), g in zip(model.named_parameters(), expected, strict=True))
    return torch.func.functional_call(model, parameters, (inputs,)).logits


def vmapped(model, inputs):
    return torch.vmap(lambda ids: model(ids[None]).logits[0])(inputs)


def copied(model, inputs):
    return copy.deepcopy(model)(inputs).logits


def pickled(model, inputs):
    text = pickle.dumps(model)
    assert b"hf_jd" not in text
    return pickle.loads(text)(inputs).logits


def saved(model, inputs):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)(inputs).logits


@pytest.fixture(scope="module", params=["single-label", "token", "masked"])
def trained(request, tmp_path_factory):
    task = TABLE[request.param]
    args = arguments(tmp_path_factory.mktemp("run"), max_steps=2)
    trainer = run(model_of(task, adapted=False), args, examples_of(task, 8), data_collator=collate_task)
    trainer.model.eval()
    return trainer  # An engine lives as long as its trainer.


@pytest.mark.parametrize("use", [trace, export, functional, vmapped, copied, pickled, saved], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore")
def test_a_trained_model_is_a_plain_model(use, trained):
    inputs = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
    expected = trained.model(inputs).logits.detach()
    assert torch.allclose(use(trained.model, inputs).detach(), expected, rtol=1e-10, atol=1e-12)


def test_a_stock_trainer_continues_with_a_trained_model(tmp_path):
    trained = run(lora("gpt2"), arguments(tmp_path, max_steps=2)).model
    twin = lora("gpt2")
    twin.load_state_dict(trained.state_dict())
    for model in (trained, twin):
        stock(model, tmp_path, max_steps=3)
    assert torch.equal(flat(trained), flat(twin))


def test_consecutive_runs_equal_trainers(tmp_path):
    finals = []
    for cls, args in (
        (Trainer, arguments(tmp_path, TrainingArguments, max_steps=3)),
        (JDTrainer, arguments(tmp_path, jd_weighting="mean", max_steps=3)),
    ):
        trainer = cls(lora("gpt2"), args, train_dataset=examples(), data_collator=collate)
        losses = [trainer.train().training_loss for _ in range(3)]
        finals.append((flat(trainer.model), torch.tensor(losses)))
    assert relative(finals[1][0], finals[0][0]) < 1e-10
    assert relative(finals[1][1], finals[0][1]) < 1e-6


def test_a_copy_made_between_two_steps_is_a_plain_model(tmp_path):
    copies = []

    class Copying(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            copies.append(copy.deepcopy(model))

    run(lora("gpt2"), arguments(tmp_path, max_steps=2), callbacks=[Copying()])
    left = {
        type(hook).__name__ for model in copies for module in model.modules() for hook in module._forward_hooks.values()
    }
    assert left == {"NoTap"}


def test_evaluation_before_and_after_training_equals_trainer(tmp_path):
    data = [{k: v for k, v in example.items() if k != "task"} for example in examples(6, seed=2)]
    results = []
    for cls, args in (
        (Trainer, arguments(tmp_path, TrainingArguments, max_steps=2)),
        (JDTrainer, arguments(tmp_path, jd_weighting="mean", max_steps=2, jd_group_column="task")),
    ):
        trainer = cls(lora("gpt2"), args, train_dataset=examples(), data_collator=collate)
        losses = [trainer.evaluate(data)["eval_loss"]]
        trainer.train()
        losses += [trainer.evaluate(data)["eval_loss"], trainer.predict(data).metrics["test_loss"]]
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=1e-6)


# ---- Around training: searches, and flags that change ----


class Searcher(JDTrainer):
    """A JDTrainer that sets a trial's flags like Trainer, without a search package."""

    trial: dict[str, Any] = {}

    def _hp_search_setup(self, trial):
        super()._hp_search_setup(trial)
        for name, value in self.trial.items():
            setattr(self.args, name, value)
        self._train_batch_size = self.args.train_batch_size
        self.create_accelerator_and_postprocess()


def searcher(tmp_path, data=None, flags=None, **settings) -> Searcher:
    return Searcher(
        model_init=lambda: lora("gpt2"),
        args=arguments(tmp_path, **(flags or {})),
        train_dataset=examples() if data is None else data,
        data_collator=collate,
        **settings,
    )


def tried(trainer: Searcher, **flags: Any) -> Searcher:
    """Run one trial like a search does: the model of the previous trial is gone."""
    trainer.model = trainer.model_wrapped = None
    trainer.trial = flags
    trainer.train()
    return trainer


TRIALS = [
    {"jd_weighting": "mgda"},
    {"jd_weighting": "gradvac", **GROUP},
    {"jd_weighting": "cagrad", "jd_weighting_args": ["c=0.4"]},
    {"jd_weighting": "upgrad", "jd_weighting_args": None, "jd_every": 2, "jd_preferences": ["code=3"]},
    {"jd_every": 1, "jd_preferences": None, "jd_group_reduction": "mean", "jd_sampler": "stratified"},
    {"jd_objectives": "instance", "jd_normalize": "rows", "jd_sampler": "trainer", "learning_rate": 1e-3},
    {"jd_group_column": "kind", "jd_normalize": "none", "jd_objectives": "group", "jd_warmup_steps": 1},
    {"jd_backward": "two_pass", "jd_warmup_steps": 0, "per_device_train_batch_size": 3},
    {"jd_weighting": "gradvac"},
]
FRESH = [{name: value for trial in TRIALS[: i + 1] for name, value in trial.items()} for i in range(len(TRIALS))]
KINDS = [{**example, "kind": "ab"[i % 2]} for i, example in enumerate(examples())]


@pytest.mark.slow
def test_each_trial_equals_a_fresh_trainers_run(tmp_path):
    trainer = searcher(tmp_path / "search", KINDS)
    trainer.evaluate([{k: v for k, v in example.items() if k not in ("task", "kind")} for example in KINDS])
    for flags, all_flags in zip(TRIALS, FRESH, strict=True):
        tried(trainer, **flags)
        fresh = searcher(tmp_path / "fresh", KINDS, all_flags)
        fresh.train()
        assert torch.equal(flat(trainer.model), flat(fresh.model)), flags
        assert type(trainer.weighting) is type(fresh.weighting)
        assert trainer.jd_state.names == fresh.jd_state.names
        assert trainer.jd_group_names == fresh.jd_group_names
        keys = [{k for k in entry if k.startswith("jd/")} for entry in fresh.state.log_history]
        assert [{k for k in entry if k.startswith("jd/")} for entry in trainer.state.log_history] == keys
        assert logged(trainer, "jd/min_gw").tolist() == logged(fresh, "jd/min_gw").tolist()
        assert not any(hooks(trainer.model).values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"jd_weighting": "nope"}, "Unknown weighting 'nope'. Choose one of"),
        ({"jd_weighting_args": ["speed=3"]}, "Unknown argument 'speed'"),
        ({"jd_objectives": "task"}, "--jd_objectives is `task`; choose one of"),
        ({"jd_objectives": "group"}, "--jd_objectives group needs --jd_group_column"),
        ({"jd_max_non_finite": 0}, "--jd_max_non_finite is 0; give 1 or more"),
        ({"jd_weighting": "mean", "jd_warmup_steps": 2}, "--jd_warmup_steps starts with the mean"),
        ({"jd_group_column": "tusk"}, "no group column `tusk`"),
        ({"jd_group_column": "task", "jd_ascend": ["coed"]}, "--jd_ascend names `coed`"),
        ({"use_liger_kernel": True}, "Liger's fused loss"),
    ],
    ids=str,
)
def test_a_trials_invalid_flag_is_refused_and_the_next_trial_runs(flags, message, tmp_path):
    trainer = searcher(tmp_path)
    right = {name: getattr(trainer.args, name) for name in flags}
    with pytest.raises(ValueError, match=message):
        tried(trainer, **flags)
    for name, value in right.items():
        setattr(trainer.args, name, value)
    assert tried(trainer).state.global_step == 4


def test_flags_set_between_runs_are_followed(tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=6)
    trainer = JDTrainer(lora("gpt2"), args, train_dataset=examples(), data_collator=collate)
    trainer.train()
    trainer.args.jd_weighting = "mgda"
    trainer.train()
    assert isinstance(trainer.jd_control.weighting, MGDAWeighting)
    trainer.args = copy.copy(trainer.args)
    trainer.args.jd_objectives, trainer.args.jd_group_column = "group", "task"
    trainer.train()
    assert trainer.jd_state.names == trainer.jd_group_names == ["chat", "code", "docs"]
    trainer.train_dataset = [{**example, "task": example["task"][0]} for example in examples()]
    trainer.train()
    assert trainer.jd_group_names == ["c", "d"]
    trainer.args = arguments(tmp_path, TrainingArguments)
    with pytest.raises(ValueError, match="use JDTrainingArguments"):
        trainer.follow_flags()


def test_a_passed_weighting_stays_and_is_reset(tmp_path):
    mine = GradVacWeighting(seed=3)
    trainer = searcher(tmp_path, weighting=mine, flags=GROUP)
    first = flat(tried(trainer).model)
    assert trainer.weighting is trainer.jd_control.weighting is mine
    assert torch.equal(flat(tried(trainer).model), first)
    assert mine.memory.names
    with pytest.raises(ValueError, match="--jd_weighting is now `mgda`, and was `upgrad`, but the trainer was given"):
        tried(trainer, jd_weighting="mgda")


def test_a_torchjd_weighting_is_reset(tmp_path):
    trainer = searcher(tmp_path, weighting=PCDWeighting(tau=0.5), flags=GROUP)
    first = flat(tried(trainer).model)
    assert torch.equal(flat(tried(trainer).model), first)


def test_a_weighting_set_later_is_used(tmp_path):
    trainer = JDTrainer(lora("gpt2"), arguments(tmp_path), train_dataset=examples(), data_collator=collate)
    trainer.weighting = lambda gramian: torch.full((2,), 7.0)
    trainer.train()
    assert trainer.jd_state.weights.tolist() == [7, 7]


def test_a_users_group_collator_stays(tmp_path):
    mine = GroupCollator(collate, "task", ["chat", "code", "docs"])
    trainer = JDTrainer(lora("gpt2"), arguments(tmp_path, max_steps=1), train_dataset=examples(), data_collator=mine)
    trainer.train()
    assert trainer.data_collator is mine


def test_each_trial_of_a_search_writes_its_own_log(tmp_path):
    trainer = searcher(tmp_path)
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    for number in (0, 1):
        trainer._trial = SimpleNamespace(number=number)
        trainer.log({"loss": 1.0})
        assert "loss" in (tmp_path / f"run-{number}" / "jd_log.jsonl").read_text()
    assert not (tmp_path / "jd_log.jsonl").exists()


def test_our_parts_of_a_trainer_can_be_pickled(tmp_path):
    # Ray sends the trainer to workers like this, without its model; its accelerator shares state with other trainers.
    trainer = searcher(tmp_path, flags={"jd_weighting": "gradvac", **GROUP})
    trainer.train()
    ours = {
        name: value for name, value in vars(trainer).items() if "jd" in name or name in ("weighting", "data_collator")
    }
    copies = pickle.loads(pickle.dumps(ours))
    assert copies.keys() >= {"jd_control", "jd_metrics", "jd_state", "weighting"}
    assert torch.equal(copies["jd_state"].gramian, trainer.jd_state.gramian)


def test_a_search_frees_the_model_of_the_trial_before(tmp_path):
    trainer = searcher(tmp_path)
    tried(trainer)
    graphs = [
        value for value in vars(trainer).values() if isinstance(value, torch.Tensor) and value.grad_fn is not None
    ]
    assert not graphs
    assert trainer._jd_engine is None
