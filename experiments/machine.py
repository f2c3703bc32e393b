"""The machine that results are measured on, and the memory settings that make its CPU faster."""

import os
import platform
import re
from pathlib import Path

# By default glibc returns freed memory to the system and requests it again at every step, which
# costs a small model up to a third of its time on CPUs. Other C libraries ignore these variables.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(12 << 30),
    "MALLOC_TOP_PAD_": str(512 << 20),
}


def machine():
    """The processor's name and its number of cores, as text."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
