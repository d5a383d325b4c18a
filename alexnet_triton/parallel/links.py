"""What devices and machines send over, as far as models of several of them depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

LINK_SHARE = 0.7
"""Of a line rate, what transfers and collectives reach. Assumed, as the latencies are, the same for all links."""

INSIDE_LATENCY, NETWORK_LATENCY = 5e-6, 15e-6
"""Seconds of a message between two GPUs of one machine, and of two machines."""


class Link(NamedTuple):
    """What joins two devices, or a machine with others; it carries both directions at once."""

    name: str
    bytes_per_second: float
    """That are reached, each way."""
    latency: float
    """Seconds that a transfer takes whatever its size."""

    def seconds(self, moved: float) -> float:
        """Of a transfer of so many bytes."""
        return self.latency + moved / self.bytes_per_second


def network(gigabits: float) -> Link:
    """All of a machine's network.

    Args:
        gigabits: its line rate in Gb/s, of which a part is reached.
    """
    return Link(f"{gigabits:g} Gb/s", LINK_SHARE * gigabits * 1e9 / 8, NETWORK_LATENCY)


def inside(name: str, gigabytes: float) -> Link:
    """What joins the GPUs of a machine, of so many GB/s each way as specified."""
    return Link(name, LINK_SHARE * gigabytes * 1e9, INSIDE_LATENCY)


LINKS: Mapping[str, Link] = MappingProxyType(
    {
        "pcie2": inside("pcie2", 8.0),
        "pcie3": inside("pcie3", 15.75),
        "pcie4": inside("pcie4", 31.5),
        "pcie5": inside("pcie5", 63.0),
        "nvlink2": inside("nvlink2", 150.0),
        "nvlink3": inside("nvlink3", 300.0),
        "nvlink4": inside("nvlink4", 450.0),
        "loopback": Link("loopback", 1.5e9, 200e-6),
    }
)
"""Inside a machine, one GPU's. PCI Express x16: PCI-SIG's rate of a lane after line coding. NVLink: half of what
NVIDIA's data sheets of V100, A100 and H100 give for both directions, 300, 600 and 900 GB/s. Loopback is gloo between
two processes of one machine, as two cores of a Xeon were measured to reach with sends of 1 to 10 MB; its latency is
assumed."""

USUAL = MappingProxyType({"nvlink": "nvlink4", "pcie": "pcie5"})
"""Names without a generation: that of an H100."""
