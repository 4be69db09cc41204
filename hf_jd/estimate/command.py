"""`hf-jd estimate`: the cost of an update for a model and hardware, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_jd.estimate.cases import PARALLELISMS, Case
from hf_jd.estimate.hardware import HARDWARE, Hardware
from hf_jd.estimate.memory import memory, row_bytes
from hf_jd.estimate.operations import gramian_flops, plain_flops, step_flops
from hf_jd.estimate.shapes import Shape, read_shape
from hf_jd.estimate.timing import Assumptions, Time, fits, plain_time, step_time
from hf_jd.estimate.traffic import plain_bytes, step_bytes
from hf_jd.finetune.parser import Parser

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_POSITIVE = ("lora", "batch", "tokens", "accumulation", "processes", "processes_per_node")


@dataclass
class EstimateArguments:
    """The model, the update and the hardware."""

    model: str = field(
        default="",
        metadata={
            "aliases": ["--model_name_or_path"],
            "help": "A transformers configuration: a folder with a config.json, such a file, or the name of a model "
            "on the Hub. No weights are loaded.",
        },
    )
    lora: int = field(default=8, metadata={"help": "The rank of LoRA matrices on all linear layers except the head."})
    full: bool = field(default=False, metadata={"help": "Train all parameters, instead of a LoRA adapter."})
    batch: int = field(default=8, metadata={"help": "Instances per micro-batch and process."})
    tokens: int = field(default=512, metadata={"help": "Tokens per instance."})
    accumulation: int = field(default=1, metadata={"help": "Micro-batches per update."})
    groups: int = field(default=0, metadata={"help": "The number of groups as objectives; 0: each instance is one."})
    processes: int = field(default=1, metadata={"help": "The number of processes, each with a device."})
    parallelism: str = field(
        default="ddp", metadata={"help": f"Accelerate's backend: {', '.join(f'`{p}`' for p in PARALLELISMS)}."}
    )
    two_pass: bool = field(
        default=False,
        metadata={"help": "As with --jd_backward two_pass. Always so with ZeRO, which owns the backward pass."},
    )
    checkpointing: bool = field(default=False, metadata={"help": "Activation checkpointing."})
    dtype: str = field(
        default="bfloat16",
        metadata={"help": f"The dtype of frozen weights and activations: {', '.join(f'`{d}`' for d in _BYTES)}."},
    )
    trained_dtype: str = field(
        default="float32", metadata={"help": "The dtype of trained weights, gradients and rows."}
    )
    hardware: str = field(
        default="h200", metadata={"help": f"The device of each process: {', '.join(f'`{h}`' for h in HARDWARE)}."}
    )
    processes_per_node: int = field(
        default=Assumptions.node, metadata={"help": "Processes connected by links; more of them use the network."}
    )
    efficiency: float = field(
        default=Assumptions.efficiency,
        metadata={"help": "The share of the device's peak operations per second to reach."},
    )

    def __post_init__(self):
        """Validate the flags.

        Raises:
            ValueError: A flag has a value that isn't allowed, or two flags contradict each other.
        """
        if not self.model:
            raise ValueError("No model is given: name its configuration with --model.")
        for name, allowed in (
            ("parallelism", PARALLELISMS), ("hardware", HARDWARE), ("dtype", _BYTES), ("trained_dtype", _BYTES),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} is `{getattr(self, name)}`; choose one of {', '.join(allowed)}.")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; give at least 1.")
        if self.groups < 0:
            raise ValueError(f"--groups is {self.groups}; give the number of groups, or 0 for instances.")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"--efficiency is {self.efficiency}; give a share above 0, at most 1.")
        if self.processes == 1 and self.parallelism != "ddp":
            raise ValueError(f"--parallelism {self.parallelism} needs --processes 2 or more.")

    def case(self) -> Case:
        """Return the update that the flags describe."""
        return Case(
            batch=self.batch,
            tokens=self.tokens,
            accumulation=self.accumulation,
            processes=self.processes,
            groups=self.groups or None,
            parallelism=self.parallelism,
            two_pass=self.two_pass or PARALLELISMS[self.parallelism].owns_backward,
            checkpointing=self.checkpointing,
            number_bytes=_BYTES[self.dtype],
            trained_bytes=_BYTES[self.trained_dtype],
        )


def main(argv: Sequence[str]) -> int:
    """Run `hf-jd estimate`; return the exit code."""
    print(report(parse(argv)))
    return 0


def parse(argv: Sequence[str]) -> EstimateArguments:
    """Parse flags.

    Raises:
        ValueError: A flag is unknown, or has a value that isn't allowed.
    """
    types: Any = EstimateArguments
    parser = Parser(
        types,
        prog="hf-jd estimate",
        usage="%(prog)s --model CONFIG [--flag value ...]",
        description="Estimate what an update costs: bytes of rows, bytes sent, operations, time. Measures nothing.",
        allow_abbrev=False,
    )
    (arguments,) = parser.parse(argv, {})
    return arguments


def report(arguments: EstimateArguments) -> str:
    """Format what the command prints.

    Raises:
        ValueError: There is no such model.
    """
    shape, case = read_shape(arguments.model, None if arguments.full else arguments.lora), arguments.case()
    hardware = HARDWARE[arguments.hardware]
    assumed = Assumptions(efficiency=arguments.efficiency, node=arguments.processes_per_node)
    smaller = replace(case, materialise=False)
    if not fits(shape, case, hardware, assumed) and row_bytes(shape, smaller) < row_bytes(shape, case):
        case = smaller  # like `--jd_keep_rows auto`
    plain, step = plain_time(shape, case, hardware, assumed), step_time(shape, case, hardware, assumed)
    lines = [
        ("model", _model(shape, arguments)),
        ("update", _update(case, hardware)),
        ("rows", _rows(shape, case)),
        ("memory", _memory(shape, case, hardware, assumed)),
        ("one-pass", _one_pass(shape, case, hardware, assumed)),
        ("sent", _sent(shape, case)),
        ("operations", _operations(shape, case)),
        ("time", _time(plain, step)),
        ("assumed", _assumed(case, hardware, assumed)),
    ]
    return "\n".join(f"{name:<12}{text}" for name, text in lines)


def _model(shape: Shape, arguments: EstimateArguments) -> str:
    trained = "all" if arguments.full else f"{shape.trainable:,}, LoRA r = {arguments.lora}"
    return f"{shape.name}, {shape.parameters:,} parameters, trained: {trained}"


def _update(case: Case, hardware: Hardware) -> str:
    objectives = f"{case.groups} groups" if case.groups else f"{case.objectives:,} instances"
    passes = "two passes" if case.two_pass else "one pass"
    instances = f"{case.instances * case.processes:,} x {case.tokens:,} tokens"
    processes = f"{case.processes:,} x {hardware.name}" + (f", {case.parallelism}" if case.processes > 1 else "")
    return f"{instances} on {processes}; objectives: {objectives}; {passes}"


def _rows(shape: Shape, case: Case) -> str:
    size = f"{_size(row_bytes(shape, case))} per process"
    how = "as rows" if case.materialise else "as layers' inputs and gradients, where those are smaller"
    fused = "; experts' adapters take one backward pass per objective" if shape.fused else ""
    return f"{size}, {case.rows:,} of {case.objectives:,} objectives, {how}{fused}"


def _memory(shape: Shape, case: Case, hardware: Hardware, assumed: Assumptions) -> str:
    parts = memory(shape, case)
    listed = ", ".join(f"{name} {_size(value)}" for name, value in parts.items())
    return f"{_size(sum(parts.values()))} besides rows ({listed}), of {_size(hardware.memory)}"


def _one_pass(shape: Shape, case: Case, hardware: Hardware, assumed: Assumptions) -> str:
    free = hardware.memory * assumed.memory_share - sum(memory(shape, case).values())
    if free <= 0:
        return "does not fit: not even a plain step fits"
    room = f"rows may take half of the {_size(free)} left"
    if fits(shape, case, hardware, assumed):
        return f"fits: {room}"
    lever = "fewer groups, rows in bfloat16" if case.groups else "groups, fewer instances per update"
    return f"does not fit: {room}; use {lever}, or LoRA"


def _sent(shape: Shape, case: Case) -> str:
    if case.processes == 1:
        return "nothing: one process"
    sent, plain = step_bytes(shape, case), plain_bytes(shape, case)
    return f"{_size(sent)} per process, x {sent / plain:.2f} of a plain step's {_size(plain)}"


def _operations(shape: Shape, case: Case) -> str:
    step, plain = step_flops(shape, case), plain_flops(shape, case)
    return (
        f"{step / 1e12:.1f} TFLOP per process, x {step / plain:.3f} of a plain step's {plain / 1e12:.1f}; "
        f"{gramian_flops(shape, case) / 1e12:.3g} of them for the Gramian"
    )


def _time(plain: Time, step: Time) -> str:
    parts = {"computing": step.computing, "rows and Gramian": step.rows, "sending": step.sending}
    listed = ", ".join(f"{_seconds(seconds)} {name}" for name, seconds in parts.items())
    ratio = step.total / plain.total
    return f"x {ratio:.2f} of a plain step's {_seconds(plain.total)}: {listed}; not counting the weighting"


def _assumed(case: Case, hardware: Hardware, assumed: Assumptions) -> str:
    peak = hardware.half_flops if case.number_bytes == 2 else hardware.single_flops
    single = hardware.single_flops
    text = (
        f"{assumed.efficiency:.0%} of {peak / 1e12:.0f} TFLOP/s (rows and Gramian: of {single / 1e12:.0f}), "
        f"memory {hardware.bandwidth / 1e12:.1f} TB/s"
    )
    if case.processes == 1:
        return text
    link = ("link", hardware.link) if case.processes <= assumed.node else ("network", hardware.network)
    return f"{text}, {assumed.link_efficiency:.0%} of the {link[0]}'s {link[1] / 1e9:.0f} GB/s, no latency"


def _size(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
