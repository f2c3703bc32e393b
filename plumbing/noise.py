"""Random numbers that depend on a key such as (seed, step, sample) and not on history.

So a run can be stopped anywhere and continue with the same numbers, and the number of processes
and loader workers changes none of them.
"""

import hashlib
import random

import numpy as np
import torch


def seed_for(*key):
    """A 63-bit seed that depends on the key (seed, step, ...) alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample_rng(*key):
    """A random.Random for one sample that depends on its key (seed, epoch, index) alone."""
    return random.Random(repr(key))


def sample_noise(distribution, shape, count, seed, step, part, device):
    """Noise for `count` samples of a step: float32 (count, *shape), "uniform" or "exponential".

    The global batch is cut into parts of `count` samples, and these are the samples of part number
    `part`. Each sample's noise depends only on (seed, step, its place in the global batch). So
    neither the split into processes and accumulation passes nor --resume changes it (on one kind
    of device).
    """
    noise = torch.empty(count, *shape, device=device)
    for place, row in enumerate(noise, start=part * count):
        key = seed_for(seed, step, place)
        if device.type == "cpu":  # numpy's exponential is five times faster than torch's
            rng = np.random.Generator(np.random.SFC64(key))
            draw = rng.random if distribution == "uniform" else rng.standard_exponential
            draw(dtype=np.float32, out=row.numpy())
        else:
            generator = torch.Generator(device).manual_seed(key)
            draw = row.uniform_ if distribution == "uniform" else row.exponential_
            draw(generator=generator)
    return noise


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
