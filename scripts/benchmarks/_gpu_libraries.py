"""Processes, quantised bases and TRL on a GPU: cases of `benchmark.py gpu` that need more than torch and a model."""

from __future__ import annotations

import os
import socket
import tempfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import distributed, multiprocessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks._gpu_parity import SIZES, batch, losses, trained
from benchmarks._gpu_setting import NotHereError, Setting, require
from hf_jd.finetune.example import example_path
from hf_jd.gramian import Engine


def gloo(setting: Setting) -> dict[str, Any]:
    """Compare two gloo processes that share a batch of 8 on one device with a single process."""
    return _processes(setting, "gloo", 2)


def nccl(setting: Setting) -> dict[str, Any]:
    """Train with one NCCL process."""
    setting.require_cuda()
    if not distributed.is_nccl_available():
        raise NotHereError("needs NCCL")
    return _processes(setting, "nccl", 1)


def _processes(setting: Setting, backend: str, count: int) -> dict[str, Any]:
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        result = os.path.join(folder, "parameters.pt")
        multiprocessing.spawn(_process, (count, port, backend, setting, result), nprocs=count)
        together = torch.load(result)
    alone = {name: p.detach().cpu() for name, p in trained(setting, ours=True).named_parameters()}
    return {"difference": max((alone[name] - p).abs().max().item() for name, p in together.items())}


def _process(rank: int, count: int, port: int, backend: str, setting: Setting, result: str) -> None:
    # All processes are on device 0.
    world = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in world.items()}
    torch.set_num_threads(1)
    model = trained(setting, ours=True, ddp_backend=backend, per_device_train_batch_size=8 // count)
    if rank == 0:
        torch.save({name: p.detach().cpu() for name, p in model.named_parameters()}, result)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def four_bit(setting: Setting) -> dict[str, Any]:
    """Compare the Gramian of LoRA on a 4-bit base with one backward per instance."""
    setting.require_cuda()
    require("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        sizes: dict[str, Any] = SIZES | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, device_map={"": 0})
    adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False), adapters)
    ids, parameters = batch(setting), [p for p in model.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(x, parameters, retain_graph=True) for x in losses(model, ids)]
    jacobian = torch.stack([torch.cat([g.flatten().double() for g in row]) for row in rows])
    gramian, expected = Engine(model).compute_gramian(losses(model, ids)), jacobian @ jacobian.T
    return {"gramian": ((gramian - expected).norm() / expected.norm()).item()}


def _rewards() -> list[Any]:
    def short(completions: list[str], **columns: Any) -> list[float]:
        return [-float(len(text)) for text in completions]

    def happy(completions: list[str], **columns: Any) -> list[float]:
        return [float(text.count("happy")) for text in completions]

    def dialogue(completions: list[str], **columns: Any) -> list[float]:
        return [float(text.count('"')) for text in completions]

    def variety(completions: list[str], **columns: Any) -> list[float]:
        return [len(set(text.split())) / max(1, len(text.split())) for text in completions]

    return [short, happy, dialogue, variety]


def grpo(setting: Setting) -> dict[str, Any]:
    """Run two updates of TRL's GRPO on the embedded model, with four rewards as objectives."""
    require("trl")
    require("datasets")
    from datasets import Dataset

    from hf_jd import JDGRPOConfig, JDGRPOTrainer

    try:
        path = example_path("stories15m")
    except ValueError as reason:
        raise NotHereError(str(reason).split(":")[0]) from None

    with tempfile.TemporaryDirectory() as folder:
        sizes = {"num_generations": 2, "max_completion_length": 8} if setting.tiny else {"max_completion_length": 64}
        flags: dict[str, Any] = {"output_dir": folder, "max_steps": 2, "logging_steps": 1, "report_to": "none"}
        flags |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": not setting.is_cuda, "bf16": setting.is_cuda}
        config = JDGRPOConfig(**flags, **sizes, jd_objectives="reward", per_device_train_batch_size=8)
        data = Dataset.from_list([{"prompt": f"Once upon a time {name}"} for name in ("Tom", "Sue", "a cat", "we")] * 4)
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path)
        trainer: Any = JDGRPOTrainer(model, _rewards(), config, train_dataset=data, processing_class=tokenizer)
        trainer.train()
    log = [line for line in trainer.state.log_history if "train_runtime" in line][-1]
    last = [line for line in trainer.state.log_history if "loss" in line][-1]
    return {"train_runtime": log["train_runtime"]} | {k: v for k, v in last.items() if k.startswith("jd/")}
