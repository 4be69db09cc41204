"""`mean` equals sentence-transformers' own trainer, for its losses; and rows of two datasets equal brute force."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, set_seed

from tests.invariant.test_trl_trainers import measured, words
from tests.trainer.runs import DESCENT, arguments, flat, joined, relative

pytest.importorskip("sentence_transformers", reason="an extra")
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.cross_encoder.losses import MSELoss as CrossEncoderMSELoss
from sentence_transformers.sentence_transformer import losses, modules

from hf_jd import JDSentenceTransformerTrainer, JDSentenceTransformerTrainingArguments
from hf_jd.trainer.embeddings import DatasetGroupsArguments, DatasetGroupsMixin

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "examples" / "stories15m")


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    """Save a tiny float64 BERT, without dropout."""
    directory = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=len(TOKENIZER), max_position_embeddings=64, **sizes, **dropout)
    BertModel(config).save_pretrained(directory)
    config.num_labels = 1
    BertForSequenceClassification(config).save_pretrained(directory / "cross")
    TOKENIZER.save_pretrained(directory / "cross")
    TOKENIZER.save_pretrained(directory)
    return str(directory)


def encoder(path):
    transformer = modules.Transformer(path)
    return SentenceTransformer(modules=[transformer, modules.Pooling(16, "mean")], device="cpu").double()


def dataset(n, seed, *columns, scored=False):
    rows = [{c: words(seed + 50 * k + i, 3 + (i + k) % 3) for k, c in enumerate(columns)} for i in range(n)]
    return Dataset.from_list([{**row, **({"score": (i % 5) / 4} if scored else {})} for i, row in enumerate(rows)])


PAIRS = dataset(11, 0, "anchor", "positive")
TRIPLETS = dataset(11, 1000, "anchor", "positive", "negative")
SCORED = dataset(11, 2000, "first", "second", scored=True)
CASES = {
    "cosine": (losses.CosineSimilarityLoss, SCORED),
    "cosent": (losses.CoSENTLoss, SCORED),
    "mnrl": (losses.MultipleNegativesRankingLoss, PAIRS),
    "mnrl-negatives": (losses.MultipleNegativesRankingLoss, TRIPLETS),
    "triplet": (losses.TripletLoss, TRIPLETS),
    "matryoshka": (
        lambda model: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [16, 8]),
        TRIPLETS,
    ),
    "two": (losses.MultipleNegativesRankingLoss, {"pairs": PAIRS, "triplets": TRIPLETS}),
    "two-losses": (
        {"pairs": losses.MultipleNegativesRankingLoss, "scored": losses.CoSENTLoss},
        {"pairs": PAIRS, "scored": SCORED},
    ),
}
CHOICES = [(name, kind) for name in CASES for kind in ("instance", "group") if kind == "instance" or "two" in name]


def trainer_of(name, path, directory, ours, weighting=None, **flags):
    loss, data = CASES[name]
    set_seed(0)
    model = encoder(path)
    made = {k: make(model) for k, make in loss.items()} if isinstance(loss, dict) else loss(model)
    cls, config = SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    if ours:
        cls, config = JDSentenceTransformerTrainer, JDSentenceTransformerTrainingArguments
    data = dict(data) if isinstance(data, dict) else data  # The trainer adds the datasets' names in place.
    extra = {} if weighting is None else {"weighting": weighting}
    args = arguments(directory, config, **{**DESCENT, "gradient_accumulation_steps": 3, "max_steps": 3, **flags})
    return cls(model, args, train_dataset=data, loss=made, **extra)


@pytest.mark.parametrize(("name", "kind"), CHOICES)
def test_mean_equals_the_stock_trainer(name, kind, path, tmp_path):
    theirs = trainer_of(name, path, tmp_path, ours=False)
    theirs.train()
    ours = trainer_of(name, path, tmp_path, ours=True, jd_weighting="mean", jd_objectives=kind)
    ours.train()
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
    assert relative(flat(theirs.model), flat(encoder(path))) > 1e-4
    for our, their in zip(measured(ours), measured(theirs), strict=True):
        assert {key: our[key] for key in their} == pytest.approx(their, rel=1e-4, abs=1e-6)
    if kind == "group":
        assert set(ours.jd_state.names) <= set(CASES[name][1])


@pytest.mark.parametrize("name", ["two", "two-losses"])
def test_rows_of_two_datasets_equal_brute_force(name, path, tmp_path):
    found = []
    trainer = trainer_of(
        name,
        path,
        tmp_path,
        ours=True,
        jd_objectives="group",
        weighting=lambda g: found.append(g) or torch.ones(2).double() / 2,
        max_steps=1,
        gradient_accumulation_steps=6,
    )
    batches = []
    stock = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *args, **kwargs: (
        batches.append((inputs["dataset_name"], dict(inputs))) or stock(model, inputs, *args, **kwargs)
    )
    trainer.train()
    assert sorted({name for name, _ in batches}) == trainer.jd_state.names
    model = encoder(path)
    loss, _ = CASES[name]
    rows = []
    for group in trainer.jd_state.names:
        total = 0.0
        for which, inputs in batches:
            if which == group:
                features, labels = trainer.collect_features(inputs)
                made = loss[group](model) if isinstance(loss, dict) else loss(model)
                total = total + made(features, labels) / len(batches)
        gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        rows.append(joined(gradients, model.parameters()))
    rows = torch.stack(rows)
    assert relative(found[0], 4 * rows @ rows.T) < 1e-8


@pytest.mark.parametrize("kind", ["instance", "group"])
def test_cached_losses_need_batches_as_objectives(kind, path, tmp_path, monkeypatch):
    cached = (losses.CachedMultipleNegativesRankingLoss, {"pairs": PAIRS, "triplets": TRIPLETS})
    monkeypatch.setitem(CASES, "cached", cached)
    with pytest.raises(ValueError, match="Choose --jd_objectives batch|choose --jd_objectives batch"):
        trainer_of("cached", path, tmp_path, ours=True, jd_objectives=kind).train()
    theirs = trainer_of("cached", path, tmp_path, ours=False)
    theirs.train()
    ours = trainer_of("cached", path, tmp_path, ours=True, jd_objectives="batch", jd_weighting="mean")
    ours.train()
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
    assert len(ours.jd_state.names) == 3


@dataclass
class JDCrossEncoderTrainingArguments(DatasetGroupsArguments, CrossEncoderTrainingArguments):
    """The arguments of cross-encoders with the flags of Jacobian descent."""


class JDCrossEncoderTrainer(DatasetGroupsMixin, CrossEncoderTrainer):
    """Cross-encoders with Jacobian descent."""


def cross_encoder_trainer(cls, config, path, directory, several, **flags):
    set_seed(0)
    model = CrossEncoder(f"{path}/cross", num_labels=1, device="cpu")
    loss = {"pairs": CrossEncoderMSELoss(model), "scored": BinaryCrossEntropyLoss(model)}
    data = {"pairs": dataset(11, 3000, "first", "second", scored=True), "scored": SCORED}
    args = arguments(directory, config, **{**DESCENT, "gradient_accumulation_steps": 3, "max_steps": 3, **flags})
    return cls(model, args, train_dataset=data, loss=loss if several else loss["pairs"])


@pytest.mark.parametrize("several", [False, True], ids=["loss", "losses"])
def test_cross_encoders_have_groups_by_dataset(several, path, tmp_path):
    theirs = cross_encoder_trainer(CrossEncoderTrainer, CrossEncoderTrainingArguments, path, tmp_path, several)
    theirs.train()
    flags = {"jd_objectives": "group", "jd_weighting": "mean"}
    kinds = JDCrossEncoderTrainer, JDCrossEncoderTrainingArguments
    ours = cross_encoder_trainer(*kinds, path, tmp_path, several, **flags)
    ours.train()
    assert relative(flat(ours.model), flat(theirs.model)) < 1e-6
    assert ours.jd_state.names == ["pairs", "scored"]


def test_one_dataset_needs_a_group_column(path, tmp_path):
    with pytest.raises(ValueError, match="there is only one dataset: give a dict of datasets, or choose the column"):
        trainer_of("mnrl", path, tmp_path, ours=True, jd_objectives="group")


def test_arguments_without_the_flags_are_refused(path, tmp_path):
    with pytest.raises(ValueError, match="JDSentenceTransformerTrainingArguments"):
        JDSentenceTransformerTrainer(encoder(path), SentenceTransformerTrainingArguments(str(tmp_path)), PAIRS)
