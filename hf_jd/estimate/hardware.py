"""The devices that a cost can be calculated for, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One device, and what connects it to the others.

    Attributes:
        name: As its maker calls it.
        memory: Bytes.
        bandwidth: Bytes that its memory moves in a second.
        half_flops: Dense operations in a second, in bfloat16 or float16.
        single_flops: The same in float32, without TF32, which torch doesn't use unless it is told to.
        link: Bytes in a second that it sends to the others of its node.
        network: Bytes in a second that it sends to other nodes.
    """

    name: str
    memory: float
    bandwidth: float
    half_flops: float
    single_flops: float
    link: float
    network: float


# NVIDIA's data sheets of the SXM cards; NVLink's bandwidth is given there for both directions together. The network is
# that of NVIDIA's own nodes: one adapter for each GPU, of 400 Gbit/s (DGX H100 and H200) or 200 Gbit/s (DGX A100).
HARDWARE = {
    "h200": Hardware("NVIDIA H200", 141e9, 4.8e12, 989e12, 67e12, 450e9, 50e9),
    "h100": Hardware("NVIDIA H100", 80e9, 3.35e12, 989e12, 67e12, 450e9, 50e9),
    "a100": Hardware("NVIDIA A100", 80e9, 2.039e12, 312e12, 19.5e12, 300e9, 25e9),
}
