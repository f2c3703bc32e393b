"""The machine that results are measured on."""

import os
import platform
import re
from pathlib import Path

import torch

from plumbing import processes


def machine(device=None):
    """The processor's name and its number of cores, and the GPU if `device` is one, as text."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    gpu = f", {torch.cuda.get_device_name(device)}" if device and device.type == "cuda" else ""
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores{gpu}"


def default_precision(device):
    """What --amp auto picks on a device, "bf16" or "float32", and why, as text."""
    fast, cuda = processes.computes_in_bf16(device), device.type == "cuda"
    if fast:
        return "bf16", "this GPU computes in it" if cuda else "this CPU has AVX512-BF16 or AMX"
    lacks = "GPU does not compute in bf16" if cuda else "CPU has neither AVX512-BF16 nor AMX"
    return "float32", f"this {lacks}"
