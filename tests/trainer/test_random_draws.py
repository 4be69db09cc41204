"""Random numbers are drawn as in the stock Trainer, by models that use torch's, numpy's or Python's generator."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, Wav2Vec2Config, Wav2Vec2ForSequenceClassification, set_seed

from hf_jd import JDTrainer, JDTrainingArguments
from tests.trainer.runs import arguments, flat, relative

WIDTH = 16
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Freeze them if they matter little.*"),
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
]


class Encoder(nn.Module):
    """One of torch's layers: its attention holds its parts' weights, and is called again; draws from torch."""

    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.3, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


class Recurrent(nn.Module):
    """A model that draws from torch between its layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0].mean(1))


class DroppedLayers(nn.Module):
    """A model that drops layers at random, and reads their weights itself; draws from Python."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ParameterList([0.3 * torch.randn(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.layers:
            if not self.training or random.random() < 0.6:
                x = x + torch.tanh(x @ weight)
        return x.mean(1)


class MaskedSpectra(nn.Module):
    """Wav2Vec2 with SpecAugment, which draws from numpy, dropout and dropped layers, which draw from torch."""

    def __init__(self):
        super().__init__()
        config = Wav2Vec2Config(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            conv_dim=[16, 16],
            conv_kernel=[3, 3],
            conv_stride=[2, 2],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            feat_extract_norm="layer",
            mask_time_prob=0.4,
            mask_time_length=2,
            layerdrop=0.3,
            classifier_proj_size=WIDTH,
            num_labels=3,
        )
        self.model = Wav2Vec2ForSequenceClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.flatten(1)).logits


MODELS = [Encoder, Recurrent, DroppedLayers, MaskedSpectra]
DATA = [{"x": torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(i)).double()} for i in range(24)]


class Stock(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).square().mean()


class Jacobian(JDTrainer):
    def compute_losses(self, model, inputs):
        return model(**inputs).square().mean(1)


def trained(kind: type[nn.Module], args: Any, resume: str | None = None) -> tuple[nn.Module, list[float]]:
    """Return the trained model, and the next number of each random stream."""
    set_seed(1)
    model = kind().double()
    cls = Jacobian if isinstance(args, JDTrainingArguments) else Stock
    cls(model, args, train_dataset=DATA).train(resume_from_checkpoint=resume)
    return model, [float(torch.rand(())), float(np.random.rand()), random.random()]


FLAGS = {"per_device_train_batch_size": 3, "max_steps": 4, "learning_rate": 0.1, "optim": "sgd"}


@pytest.mark.parametrize("backward", ["one_pass", "two_pass"])
@pytest.mark.parametrize("kind", MODELS)
def test_mean_equals_trainer_draw_for_draw(kind, backward: str, tmp_path):
    flags = {**FLAGS, "gradient_accumulation_steps": 2}
    theirs, after_theirs = trained(kind, arguments(tmp_path / "stock", TrainingArguments, **flags))
    ours, after_ours = trained(kind, arguments(tmp_path, jd_weighting="mean", jd_backward=backward, **flags))
    assert relative(flat(ours), flat(theirs)) < 1e-12
    assert after_ours == after_theirs


@pytest.mark.parametrize("kind", MODELS)
def test_a_resumed_run_equals_an_uninterrupted_one(kind, tmp_path):
    """They are bitwise equal, although the resumed run verifies its rows once more."""
    args = arguments(tmp_path, **FLAGS, jd_weighting="upgrad", save_strategy="steps", save_steps=2)
    whole, after_whole = trained(kind, args)
    resumed, after_resumed = trained(kind, args, str(tmp_path / "checkpoint-2"))
    assert torch.equal(flat(resumed), flat(whole))
    assert after_resumed == after_whole
