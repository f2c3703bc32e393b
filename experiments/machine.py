"""The machine that results are measured on."""

import functools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from plumbing import processes


@functools.cache
def machine():
    """The processor's name and its number of cores, and the first GPU if there is one, as text."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    parts = [names[0] if names else platform.processor(), f"{os.cpu_count()} cores"]
    if torch.cuda.is_available():
        ask = "import torch; print(torch.cuda.get_device_name())"  # elsewhere: it takes GPU memory
        asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
        parts += asked.stdout.split("\n")[:1]
    return ", ".join(filter(None, parts))


def default_precision(device):
    """What --amp auto picks on a device, "bf16" or "float32", and why, as text."""
    fast, cuda = processes.computes_in_bf16(device), device.type == "cuda"
    if fast:
        return "bf16", "this GPU computes in it" if cuda else "this CPU has AVX512-BF16 or AMX"
    lacks = "GPU does not compute in bf16" if cuda else "CPU has neither AVX512-BF16 nor AMX"
    return "float32", f"this {lacks}"
