"""The cases of `benchmark.py gpu` that time models: what a step costs on a GPU, compared with a plain step."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._gpu_setting import NotHereError, Setting, Step, compare
from hf_jd.gramian import Engine
from hf_jd.weighting import UPGradWeighting

SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 28, "num_attention_heads": 16},
    "0.5B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 32, "num_attention_heads": 16},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}


@dataclass(frozen=True)
class Cost:
    """A model and its batch.

    Attributes:
        shape: One of `SHAPES`.
        batch: Instances B.
        tokens: Tokens T per instance.
        lora: Whether LoRA adapters of rank 16 on all linear layers are trained, instead of all parameters.
        ways: One or more of "instance", "groups", "passes", "torchjd", in addition to the plain step.
        checkpointing: Whether the backward recomputes activations.
        autocast: Whether parameters are float32 under autocast to bfloat16, instead of bfloat16 themselves.
        groups: Number of groups K.
    """

    shape: str
    batch: int
    tokens: int
    lora: bool = True
    ways: tuple[str, ...] = ("instance", "groups", "passes", "torchjd")
    checkpointing: bool = False
    autocast: bool = False
    groups: int = 4

    def __call__(self, setting: Setting) -> dict[str, Any]:
        """Time the case; if it fails, return the error instead of a result."""
        case = replace(self, shape="tiny", batch=4, tokens=8) if setting.tiny else self
        return Contest(case, setting.device).run(setting)


class Contest:
    """The steps of one case, on three copies of one model: the engine and TorchJD must not see each other's hooks.

    Args:
        case: The case.
        device: Of the models.
    """

    def __init__(self, case: Cost, device: torch.device):
        self._case, self._device = case, device
        self._ids = torch.randint(0, 512, (case.batch, case.tokens), device=device)
        self._segments = (torch.arange(case.batch, device=device) * case.groups) // case.batch
        self._weigh = UPGradWeighting()

    def run(self, setting: Setting) -> dict[str, Any]:
        """Time the plain step and the case's ways."""
        plain = self._build()
        trainable = sum(p.numel() for p in plain.parameters() if p.requires_grad)
        steps: dict[str, Step] = {"plain": self._plain(plain)}
        left_out: dict[str, Any] = {}
        for way in self._case.ways:
            try:
                steps |= {way: self._passes(plain)} if way == "passes" else {way: getattr(self, f"_{way}")()}
            except NotHereError as reason:
                left_out[way] = {"not_here": str(reason)}
        row = 4 if self._case.autocast else 2
        return {"trainable": trainable, "row_mb": row * trainable / 2**20} | compare(steps, setting) | left_out

    def _build(self) -> nn.Module:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"vocab_size": 512 if self._case.shape == "tiny" else 32000, "use_cache": False}
        sizes["attn_implementation"] = "sdpa"
        with self._device:
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[self._case.shape], **sizes))
        if not self._case.autocast:
            model = model.to(torch.bfloat16)
        if self._case.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self._case.lora:
            adapters = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
            model = get_peft_model(model, adapters, autocast_adapter_dtype=self._case.autocast)
        return model.train()

    def _losses(self, model: nn.Module) -> Tensor:
        """Return the mean token loss of each instance, [B]."""
        cast = torch.autocast(self._device.type, torch.bfloat16) if self._case.autocast else contextlib.nullcontext()
        with cast:
            logits = model(input_ids=self._ids).logits[:, :-1]
            return F.cross_entropy(logits.float().transpose(1, 2), self._ids[:, 1:], reduction="none").mean(dim=1)

    def _by_group(self, losses: Tensor) -> Tensor:
        sums = losses.new_zeros(self._case.groups).index_add(0, self._segments, losses)
        return sums * self._case.groups / self._case.batch

    def _plain(self, model: nn.Module) -> Step:
        def step() -> None:
            model.zero_grad(set_to_none=True)
            self._losses(model).mean().backward()

        return step

    def _instance(self, segments: Tensor | None = None) -> Step:
        model = self._build()
        engine = Engine(model, keep_rows=True)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            losses = self._losses(model)
            losses = losses if segments is None else self._by_group(losses)
            gramian = engine.compute_gramian(losses, segments, retain_graph=False)
            del losses
            engine.accumulate_grad(self._weigh(gramian))

        return step

    def _groups(self) -> Step:
        return self._instance(self._segments)

    def _passes(self, model: nn.Module) -> Step:
        parameters = [p for p in model.parameters() if p.requires_grad]

        def step() -> None:
            losses = self._by_group(self._losses(model))
            last = len(losses) - 1
            rows = [torch.autograd.grad(x, parameters, retain_graph=i < last) for i, x in enumerate(losses)]
            gramian = torch.stack([torch.stack([_inner(first, second) for second in rows]) for first in rows])
            weights = self._weigh(gramian).tolist()
            for i, p in enumerate(parameters):
                p.grad = sum(w * row[i] for w, row in zip(weights, rows, strict=True))

        return step

    def _torchjd(self) -> Step:
        try:
            from torchjd.autogram import Engine as TorchJD
        except ImportError:
            raise NotHereError("needs torchjd") from None
        model = self._build()
        engine = TorchJD(model, batch_dim=0)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            losses = self._losses(model)
            losses.backward(self._weigh(engine.compute_gramian(losses)).to(losses.dtype))

        return step


def _inner(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([(a * b).sum(dtype=torch.float32) for a, b in zip(first, second, strict=True)]).sum()
