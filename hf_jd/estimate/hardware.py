"""Devices to estimate costs for, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One device, and its connections to others.

    Attributes:
        name: Its maker's name for it.
        memory: Bytes of memory.
        bandwidth: Bytes per second that its memory moves.
        half_flops: Dense operations per second, in bfloat16 or float16.
        single_flops: The same in float32, without TF32, which torch doesn't use by default.
        link: Bytes per second that it sends within its node.
        network: Bytes per second that it sends to other nodes.
    """

    name: str
    memory: float
    bandwidth: float
    half_flops: float
    single_flops: float
    link: float
    network: float


# From NVIDIA's data sheets for the SXM cards, which give NVLink's bandwidth for both directions together. The network
# is that of NVIDIA's own nodes: one adapter per GPU, of 400 Gbit/s (DGX H100 and H200) or 200 Gbit/s (DGX A100).
HARDWARE = {
    "h200": Hardware("NVIDIA H200", 141e9, 4.8e12, 989e12, 67e12, 450e9, 50e9),
    "h100": Hardware("NVIDIA H100", 80e9, 3.35e12, 989e12, 67e12, 450e9, 50e9),
    "a100": Hardware("NVIDIA A100", 80e9, 2.039e12, 312e12, 19.5e12, 300e9, 25e9),
}
