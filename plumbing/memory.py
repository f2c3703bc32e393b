"""Memory: how much a run needs at least, against what there is, before anything is allocated.

Everything here is a lower bound, so that no run is refused that would have fitted: half precision
for activations, only the largest tensors, nothing for the loader, and all of the machine's memory
and swap.
"""

import math
import os
from pathlib import Path

import torch
import torch.distributed as dist

from plumbing import outputs, processes

HELP = (
    "raise --accumulate (more, smaller passes), add --recompute (not for the "
    "tokenizer, a linear probe or --eval), or lower --batch-size"
)
SIZES = ("image_size", "model", "decoder_dim", "vocab_size", "hidden", "blocks_per_group",
         "code_dim")  # fmt: skip


def available(device):
    """Bytes available to this process: a GPU's free memory, or a share of the machine's.

    The machine's is limited by its cgroups, and shared among torchrun's processes on it. Its swap
    counts as memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not hasattr(os, "sysconf"):  # Windows: not known
        return math.inf
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *cgroup_limits()]
    return (min(limits) + swap()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def swap(path="/proc/meminfo"):
    """Bytes of swap that the machine has; 0 if it does not say."""
    try:
        sizes = dict(line.split(":") for line in Path(path).read_text().splitlines())
        return 1024 * int(sizes["SwapTotal"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux
        return 0


def cgroup_limits(root="/sys/fs/cgroup", groups="/proc/self/cgroup"):
    """The memory limits of this process's cgroups, versions 1 and 2, and of all above them."""
    try:
        lines = Path(groups).read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds in ("", "memory"):
            top = Path(root, kinds)
            folder = top / path.lstrip("/")
            name = "memory.limit_in_bytes" if kinds else "memory.max"
            for place in {folder, top, *folder.parents} - {*top.parents}:
                try:
                    found.append(int((place / name).read_text()))
                except (OSError, ValueError):  # none here, or "max"
                    continue
    return found


def backbone(config, args, on_gpu):
    """(weights, values that the backward pass keeps of an image) of a BeitConfig's model."""
    D, tokens = config.dim, config.grid**2 + 1
    weights = config.depth * int(4 + 2 * config.mlp_ratio) * D**2 + 3 * config.patch_size**2 * D
    weights += tokens * D if config.positions == "absolute" else 0
    # A block keeps the inputs of its norms, of q, k, v, the projection, fc1, GELU and fc2, and on
    # CPUs the attention weights; after attention, block L computes only the masked positions.
    scores = 0 if on_gpu or args.compile else config.heads * tokens**2
    kept = (config.depth - 1) * (16 * tokens * D + scores)
    if args.recompute or args.compile or getattr(args, "linear_probe", False):
        kept = max(tokens * D, scores)  # what one block needs at a time
    if decoder := getattr(args, "decoder_dim", 0):  # its layers' weights, and its last layer
        layers = int(math.log2(config.patch_size))
        weights += 16 * decoder * (D + (layers - 1) * decoder)
        kept += 3 * decoder * config.image_size**2
    return weights, kept


def tokenizer(config, args):
    """(weights, values that the backward pass keeps of an image) of a DVAEConfig's model."""
    weights, kept = config.vocab_size * config.code_dim, 0
    for group in range(config.groups):  # of the encoder and of the decoder
        width, blocks = config.hidden * 2**group, config.blocks_per_group
        weights += int(2 * (blocks - 1) * 3.6 * width**2 + 2 * 2.5 * width**2)
        kept += 2 * blocks * width * (args.image_size // 2**group) ** 2  # the inputs of its ReLUs
    codes = config.vocab_size * (args.image_size // config.downsampling) ** 2
    if config.quantizer == "gumbel":  # noise and relaxed sample in float32, twice as large
        return weights + config.vocab_size * width, 4 * codes + (0 if args.compile else kept)
    return weights, 2 * codes + (0 if args.compile else kept)  # the codes' distances


def check(args, config):
    """Raise ValueError if a run with a model of this configuration cannot fit into memory.

    config: a BeitConfig or a DVAEConfig. Counts float32 weights, their gradients and AdamW's two
    moments, the batch, and what the backward pass of one accumulation pass keeps.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    device = processes.find_device(args.device)
    on_gpu = device.type == "cuda"
    of_backbone = hasattr(config, "grid")
    weights, kept = backbone(config, args, on_gpu) if of_backbone else tokenizer(config, args)
    images = 0 if args.eval else max(args.batch_size // world, 1)  # of this process
    frozen = args.eval or getattr(args, "linear_probe", False)
    copies = 1 if frozen else 4 + (getattr(args, "ema", 0) > 0)
    parts = {
        "the weights and their optimiser": 4 * copies * weights,
        "the backward pass": 2 * kept * max(images // args.accumulate, min(images, 1)),
        "the batch": 4 * images * 3 * args.image_size**2,
    }
    needed, there = sum(parts.values()), available(device)
    if needed > there:
        largest = max(parts, key=parts.get)
        sizes = [f"--{name.replace('_', '-')}" for name in SIZES if hasattr(args, name)]
        raise ValueError(
            f"this run needs at least {outputs.in_words(needed)} of memory and there are "
            f"{outputs.in_words(there)}; most is for {largest}: lower {', '.join(sizes)}"
            + (f"; or {HELP}" if largest == "the backward pass" else ", --batch-size")
        )


def exhausted(error):
    """What an error of an allocator, Python's, numpy's or torch's, says; None for any other."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):  # its first two sentences: what, how much
        return ". ".join(text.split(". ")[:2])
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: " in text:
        what = text.split("DefaultCPUAllocator: ")[-1].split(". ")[0]
        return f"the memory is full ({what or 'no details'})"
    return None
