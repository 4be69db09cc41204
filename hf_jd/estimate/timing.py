"""Operations and bytes -> seconds on a device, under assumptions; and whether rows fit into its memory."""

from __future__ import annotations

from dataclasses import dataclass

from hf_jd.estimate.cases import PARALLELISMS, Case
from hf_jd.estimate.hardware import Hardware
from hf_jd.estimate.memory import memory, row_bytes
from hf_jd.estimate.operations import formed_flops, forward_flops, gramian_flops, plain_flops, step_flops, update_flops
from hf_jd.estimate.shapes import Shape
from hf_jd.estimate.traffic import gathered_bytes, plain_bytes, step_bytes


@dataclass(frozen=True)
class Assumptions:
    """Assumptions behind the time of a step.

    Attributes:
        efficiency: The share of the device's operations per second that a model's step reaches.
        link_efficiency: The share of a link's bytes per second that collectives reach.
        node: Processes per node.
        memory_share: The share of the memory that a run may fill.
    """

    efficiency: float = 0.4
    link_efficiency: float = 0.8
    node: int = 8
    memory_share: float = 0.9


@dataclass(frozen=True)
class Time:
    """Seconds of a step: computing, moving rows through memory, and communication that computing doesn't hide."""

    computing: float
    rows: float
    sending: float

    @property
    def total(self) -> float:
        """The sum of all three."""
        return self.computing + self.rows + self.sending


def row_traffic(shape: Shape, case: Case) -> float:
    """Compute the memory traffic of rows in bytes: each is written once, and read for the Gramian and the update.

    With several processes, rows are also copied for sending, and received rows are written and read: as many for
    instances, 1 / W of them for groups.
    """
    rows = row_bytes(shape, case)
    if case.processes == 1:
        return 3 * rows
    received = rows if case.groups is None else rows / case.processes
    return (3 + 1) * rows + 2 * received


def plain_time(shape: Shape, case: Case, hardware: Hardware, assumed: Assumptions) -> Time:
    """Compute the time of a plain step. Its backward pass hides communication; with sharded weights, all of it."""
    flops = plain_flops(shape, case)
    hidden = flops if PARALLELISMS[case.parallelism].weights else flops - forward_flops(shape, case)
    rate = _rate(case, hardware) * assumed.efficiency
    sending = plain_bytes(shape, case) / _speed(case, hardware, assumed)
    return Time(flops / rate, 0.0, max(0.0, sending - hidden / rate))


def step_time(shape: Shape, case: Case, hardware: Hardware, assumed: Assumptions) -> Time:
    """Compute the time of an update by Jacobian descent. Nothing hides the rows, exchanged after the backward pass.

    The Gramian and the update are computed in float32, at the same efficiency. ZeRO 3 does not prefetch weights either,
    except for a second micro-batch of the second pass.
    """
    speed, rate = _speed(case, hardware, assumed), _rate(case, hardware) * assumed.efficiency
    products = gramian_flops(shape, case) + (0 if case.two_pass else update_flops(shape, case))
    products -= 0 if case.two_pass else formed_flops(shape, case)
    computing = (step_flops(shape, case) - products) / rate
    rows = products / (hardware.single_flops * assumed.efficiency) + row_traffic(shape, case) / hardware.bandwidth
    hidden, kind = gathered_bytes(shape, case), PARALLELISMS[case.parallelism]
    if kind.holds_trained:
        hidden = plain_bytes(shape, case) - hidden / case.accumulation
    elif case.two_pass:
        hidden += plain_bytes(shape, case)
    sending = (step_bytes(shape, case) - hidden) / speed + max(0.0, hidden / speed - computing)
    return Time(computing, rows, sending)


def _rate(case: Case, hardware: Hardware) -> float:
    return hardware.half_flops if case.number_bytes == 2 else hardware.single_flops


def _speed(case: Case, hardware: Hardware, assumed: Assumptions) -> float:
    link = hardware.link if case.processes <= assumed.node else hardware.network
    return link * assumed.link_efficiency


def fits(shape: Shape, case: Case, hardware: Hardware, assumed: Assumptions) -> bool:
    """Return whether rows fit in half of the memory that is left, the limit of `--jd_keep_rows auto`."""
    free = hardware.memory * assumed.memory_share - sum(memory(shape, case).values())
    return row_bytes(shape, case) <= free / 2
