"""What accelerators can do, by their makers' data sheets, and how much of that we assume a job to reach."""
from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..types import UsageError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One rank's. Shares are assumptions, until a campaign's own runs correct them (`cost.Correction`)."""

    name: str
    flops: float                 # dense matrix products per second, in the type that trains (bfloat16; on a CPU float32)
    bandwidth: float             # bytes per second
    memory_gb: float | None      # GiB; None: as much as the host has
    update_share: float = 0.40   # of `flops` that the update reaches (MFU)
    rollout_share: float = 0.50  # of `flops`, or of `bandwidth`, that decoding reaches
    layer_s: float = 6e-4        # of one layer of one decoding step, however small: launching its kernels from Python


# Data sheets: dense bfloat16 (without sparsity); memory as nvidia-smi shows it, about.
GPUS = {
    "b200": Device("B200", 2250e12, 8.0e12, 179),
    "h200": Device("H200", 989e12, 4.8e12, 140),
    "h100": Device("H100", 989e12, 3.35e12, 79),
    "h100-pcie": Device("H100 PCIe", 756e12, 2.0e12, 79),
    "gh200": Device("GH200", 989e12, 4.0e12, 94),
    "a100": Device("A100 80 GB", 312e12, 2.0e12, 79),
    "a100-40": Device("A100 40 GB", 312e12, 1.555e12, 39),
    "l40s": Device("L40S", 362e12, 0.864e12, 45),
    "a40": Device("A40", 150e12, 0.696e12, 45),
    "a10": Device("A10", 125e12, 0.6e12, 22),
    "rtx4090": Device("RTX 4090", 165e12, 1.008e12, 24),
}
# One thread of a core with AVX-512: 95 GFLOP/s measured in matrix products of some size (docs/TRAINER.md).
CPU = Device("CPU", 95e9, 8e9, None, update_share=0.5, rollout_share=0.25, layer_s=1.5e-4)


def find(name: str) -> Device:
    """By any word for it: "H100", "nvidia_a100-sxm4-40gb", "NVIDIA GeForce RTX 4090". UsageError naming the known ones."""
    word = re.sub(r"[^a-z0-9]+", "", name.lower())
    if "a100" in word and ("40gb" in word or word.endswith("a10040")):
        return GPUS["a100-40"]
    for key in sorted(GPUS, key=len, reverse=True):
        if key.replace("-", "") in word:
            return GPUS[key]
    raise UsageError(f"gpus.device: {name!r} is not known here; known: {', '.join(GPUS)}. gpus.memory_gb alone is enough for the memory's estimate")


def cpu(threads: int, memory_gb: float) -> Device:
    return replace(CPU, name=f"CPU, {threads} thread{'s' * (threads > 1)}", flops=CPU.flops * threads, memory_gb=memory_gb)


def with_memory(device: Device, memory_gb: float | None) -> Device:
    return replace(device, memory_gb=memory_gb)
