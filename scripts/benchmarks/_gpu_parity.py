"""The cases of `benchmark.py gpu` that compare numbers: does a GPU compute what a loop over objectives does?"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from benchmarks._gpu_setting import Setting, compare, message
from hf_jd import JDTrainer, JDTrainingArguments
from hf_jd.gramian import Engine
from hf_jd.weighting import UPGradWeighting
from hf_jd.weighting._solvers.projection import one_by_one

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gpt2", "gpt_neox", "opt", "phi")
VOCABULARY, BATCH, TOKENS = 128, 5, 7
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "use_cache": False,
}
SAME = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Compute the mean token loss of each instance, [B]."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)


def batch(setting: Setting) -> Tensor:
    """Draw token ids, [B, T]."""
    return torch.randint(1, VOCABULARY, (BATCH, TOKENS), device=setting.device)


def parity(setting: Setting) -> dict[str, Any]:
    """Compare the Gramian and the update of ten families, fully fine-tuned, with one backward per instance."""
    results: dict[str, Any] = {}
    for family in FAMILIES[:2] if setting.tiny else FAMILIES:
        for dtype in SAME:
            try:
                results[f"{family}, {str(dtype)[6:]}"] = _difference(family, dtype, setting)
            except Exception as error:
                results[f"{family}, {str(dtype)[6:]}"] = {"error": message(error)}
    results["equal"] = all(line.get("equal", False) for line in results.values())
    return results


def _difference(family: str, dtype: torch.dtype, setting: Setting) -> dict[str, Any]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES)).to(setting.device, dtype).eval()
    ids, parameters = batch(setting), [p for p in model.parameters() if p.requires_grad]
    rows = []
    for loss in losses(model, ids):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten().double() for g in gradients]))
    jacobian = torch.stack(rows)
    engine = Engine(model, keep_rows=True)
    gramian = engine.compute_gramian(losses(model, ids), retain_graph=False)
    weights = UPGradWeighting()(gramian)
    engine.accumulate_grad(weights)
    update = torch.cat([p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]).double()
    expected, wanted = jacobian @ jacobian.T, weights.double() @ jacobian
    errors = [((gramian - expected).norm() / expected.norm()).item(), ((update - wanted).norm() / wanted.norm()).item()]
    return {"gramian": errors[0], "update": errors[1], "equal": max(errors) <= SAME[dtype]}


def trained(setting: Setting, ours: bool, **flags: Any) -> nn.Module:
    """Train a small Llama for five steps, with Trainer or JDTrainer."""
    model = _start()
    ids = torch.randint(1, VOCABULARY, (40, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {"output_dir": folder, "max_steps": 5, "per_device_train_batch_size": 8}
        common |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": not setting.is_cuda}
        common |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
        common |= {"dataloader_pin_memory": False, "logging_strategy": "no"}
        arguments = (JDTrainingArguments if ours else TrainingArguments)(**common | flags)
        data: Any = [{"input_ids": row, "labels": row} for row in ids]
        (JDTrainer if ours else Trainer)(model, arguments, train_dataset=data).train()
    return model


def _apart(first: nn.Module, second: nn.Module) -> float:
    """Return the distance between two trained models, relative to how far the second has moved."""
    start, ends = _flat(_start()), [_flat(model) for model in (first, second)]
    return ((ends[0] - ends[1]).norm() / (ends[1] - start).norm()).item()


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double().cpu() for p in model.parameters()])


def _start() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def stock(setting: Setting) -> dict[str, Any]:
    """Compare `mean` with the stock Trainer over five steps in bfloat16."""
    plain = trained(setting, ours=False, bf16=True)
    return {"difference": _apart(trained(setting, ours=True, bf16=True, jd_weighting="mean"), plain)}


def scaler(setting: Setting) -> dict[str, Any]:
    """Take five steps in float16, under a real GradScaler."""
    setting.require_cuda()
    models = [trained(setting, ours=ours, fp16=True, **flags) for ours, flags in _SCALED]
    finite = all(bool(p.isfinite().all()) for p in models[2].parameters())
    return {"difference_of_mean": _apart(models[0], models[1]), "upgrad_is_finite": finite}


_SCALED: list[tuple[bool, dict[str, Any]]] = [
    (False, {}),
    (True, {"jd_weighting": "mean"}),
    (True, {"jd_weighting": "upgrad"}),
]


def copies(setting: Setting) -> dict[str, Any]:
    """Count a step's copies from the device to the host, without and with UPGrad; only the weights should need any."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(setting.device)
    ids, engine = batch(setting), Engine(model, keep_rows=True)
    results: dict[str, Any] = {}
    for name, weigh in (("fixed weights", lambda g: torch.full_like(g[0], 1 / BATCH)), ("upgrad", UPGradWeighting())):
        for _ in range(2):  # the first step proves the rows
            with profile(activities=_activities(setting)) as profiler:
                gramian = engine.compute_gramian(losses(model, ids), retain_graph=False)
                engine.accumulate_grad(weigh(gramian))
        events = profiler.key_averages()
        results[name] = {
            "memcpy_dtoh": sum(e.count for e in events if "DtoH" in e.key),
            "item": sum(e.count for e in events if e.key == "aten::_local_scalar_dense"),
        }
    return results


def _activities(setting: Setting) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.is_cuda else [])]


def compiled(setting: Setting) -> dict[str, Any]:
    """Compare the Gramian of a compiled model with that of the model before compilation."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(setting.device)
    ids, engine = batch(setting), Engine(model)
    expected = engine.compute_gramian(losses(model, ids), retain_graph=False)
    # Otherwise compiled backwards refuse a retained graph, and code compiled without the engine would run instead.
    with functorch_config.patch(donated_buffer=False), dynamo_config.patch(skip_nnmodule_hook_guards=False):
        model.compile(backend="inductor" if setting.is_cuda else "aot_eager")
        gramian = engine.compute_gramian(losses(model, ids), retain_graph=False)
    return {"gramian": ((gramian - expected).norm() / expected.norm()).item()}


def weightings(setting: Setting) -> dict[str, Any]:
    """Time UPGrad's projections on the device, and with quadprog on the host, including the copies there and back."""
    results: dict[str, Any] = {}
    for m in (8, 33) if setting.tiny else (8, 64, 256):
        rows = torch.randn(m, 4 * m, device=setting.device)
        gramian, weigh = rows @ rows.T, UPGradWeighting()
        targets = torch.eye(m, dtype=torch.float64, device=setting.device) / m
        steps = {
            "quadprog on the host": lambda g=gramian, t=targets: one_by_one((g.double() + g.double().mT) / 2, t),
            "as chosen": lambda g=gramian, w=weigh: w(g),
        }
        results[f"m = {m}"] = compare(steps, setting)
    return results
