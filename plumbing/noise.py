"""Random numbers that depend on a key such as (seed, step, sample) and not on history.

So a run can be stopped anywhere and continue with the same numbers, and the number of processes
and loader workers changes none of them.
"""

import hashlib
import math
import random

import torch


def seed_for(*key):
    """A 63-bit seed that depends on the key (seed, step, ...) alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample_rng(*key):
    """A random.Random for one sample that depends on its key (seed, epoch, index) alone."""
    return random.Random(repr(key))


def scramble(x):
    """A hash of 32 bits, in place: lowbias32 of Chris Wellons' hash prospector. x: int32.

    Whole numbers wrap around in the same way on every device. `&` makes each shift a logical one.
    """
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16) & 0xFFFF
    return x


def sample_noise(distribution, shape, count, seed, step, part, device):
    """Noise for `count` samples of a step: float32 (count, *shape), "uniform" or "exponential".

    The global batch is cut into parts of `count` samples, and these are the samples of part number
    `part`. Each sample's noise depends only on (seed, step, its place in the global batch). So
    neither the split into processes and accumulation passes nor --resume changes it, nor the kind
    of device: uniform noise has the same bits everywhere; of exponential noise the last bits may
    differ, because log's do.
    """
    n = math.prod(shape)
    keys = [seed_for(seed, step, place) | 1 for place in range(part * count, (part + 1) * count)]
    halves = torch.tensor(keys).view(torch.int32).view(count, 2).to(device, non_blocking=True)
    factors, summands = halves.split(1, dim=1)  # a factor must be odd
    noise = torch.empty(count, n, device=device)
    block = 2**17 if device.type == "cpu" else 2**26  # values at a time: what fits a CPU's cache
    rows = max(1, block // n)
    for start in range(0, n, block):
        end = min(start + block, n)
        place = scramble(torch.arange(start, end, dtype=torch.int32, device=device))
        columns = noise[:, start:end]
        for values, a, b in zip(*(part.split(rows) for part in (columns, factors, summands))):
            x = scramble((place * a).add_(b))
            # The middles of 2^23 equal parts of (0, 1), which float32 holds exactly.
            torch.mul(x.bitwise_right_shift_(9), 2.0**-23, out=values).add_(0.5 + 2.0**-24)
            if distribution == "exponential":
                values.log_().neg_()
    return noise.view(count, *shape)


def depth_noise(config, count, seed, step, process):
    """Uniform numbers for stochastic depth in Beit.forward: (count, L, 2).

    count: samples of this process. Zeros, which nothing reads, for a model without it.
    """
    if config.drop_path == 0:
        return torch.zeros(count, config.depth, 2, device=process.device)
    shape, cpu = (config.depth, 2), torch.device("cpu")
    u = sample_noise("uniform", shape, count, seed, step, process.rank, cpu)
    return u.to(process.device, non_blocking=True)


def code_noise(config, x, seed, step, part):
    """Exp(1) noise for the Gumbel-softmax of images x (B, 3, H, W): (B, h, w, |V|).

    part: the number of this accumulation pass among those of all processes. None for VQ-VAE.
    """
    if config.quantizer == "vq":
        return None
    h, w = (side // config.downsampling for side in x.shape[-2:])
    shape = (h, w, config.vocab_size)
    return sample_noise("exponential", shape, len(x), seed, step, part, x.device)
