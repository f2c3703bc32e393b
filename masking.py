"""Which patches to mask: Algorithm 1 (section 2.3), as released and as printed; random masking.

Every function that draws a mask takes a `random.Random`, so that a seed determines it, and returns
a bool array (h, w), True = masked. `python masking.py` prints statistics of masks on 14 x 14.
"""

import math
import random

import numpy as np

ASPECT = (0.3, 1 / 0.3)  # range of a block's aspect ratio r
TRIES = 10  # draws of a block before the released generator gives up


def mask_count(h, w, ratio):
    """Number of patches to mask, an upper limit for blocks: 75/196 gives 75 on 14 x 14.

    Raises ValueError if the ratio masks no patch or every patch.
    """
    count = round(ratio * h * w)
    if not 0 < count < h * w:
        raise ValueError(f"mask ratio {ratio} masks {count} of the {h}x{w} patches: change it")
    return count


def blockwise_mask(rng, h, w, count, min_block=16):
    """Algorithm 1 as the authors released it: at most `count` patches, and sometimes fewer.

    Differences from the printed algorithm: the aspect ratio r is log-uniform, so that tall and
    wide blocks are equally likely. Sides are rounded. A block counts only if it is smaller than the
    grid in both directions and adds at least one and at most the remaining number of patches. After
    ten failed draws in a row the mask stays short of `count`, or empty if blocks do not fit.
    """
    mask = np.zeros((h, w), dtype=bool)
    log_aspect = math.log(ASPECT[0]), math.log(ASPECT[1])
    masked = tries = 0
    while masked < count and tries < TRIES:
        tries += 1
        s = rng.uniform(min_block, count - masked)  # block size (range may reverse)
        r = math.exp(rng.uniform(*log_aspect))  # aspect ratio of block
        a, b = round(math.sqrt(s * r)), round(math.sqrt(s / r))
        if a >= h or b >= w:
            continue
        t, l = int((h - a + 1) * rng.random()), int((w - b + 1) * rng.random())
        block = mask[t : t + a, l : l + b]
        new = a * b - np.count_nonzero(block)
        if 0 < new <= count - masked:
            block[...] = True
            masked, tries = masked + new, 0
    return mask


def printed_mask(rng, h, w, ratio=0.4, min_block=16):
    """Algorithm 1 line by line, with real-valued sides and corners: it may overshoot ratio * N.

    r is uniform, so most blocks are taller than wide. The paper leaves three cases open. Near the
    end Rand(16, 0.4N - |M|) is an empty range; we reverse it. A side longer than the grid is cut.
    A block masks the patches whose centres it covers, so that opposite borders are alike.
    """
    N = h * w
    mask = np.zeros((h, w), dtype=bool)  # M <- {}
    while True:  # repeat
        s = rng.uniform(min_block, ratio * N - mask.sum())  # block size
        r = rng.uniform(*ASPECT)  # aspect ratio of block
        a, b = min(math.sqrt(s * r), h), min(math.sqrt(s / r), w)
        t, l = rng.uniform(0, h - a), rng.uniform(0, w - b)
        rows = slice(math.ceil(t - 0.5), math.ceil(t + a - 0.5))  # i + 1/2 in [t, t + a)
        columns = slice(math.ceil(l - 0.5), math.ceil(l + b - 0.5))  # j + 1/2 in [l, l + b)
        mask[rows, columns] = True  # M <- M u {(i, j)}
        if mask.sum() > ratio * N:  # until |M| > 0.4 N
            return mask


def random_mask(rng, h, w, count):
    """Table 4, "- blockwise masking": exactly `count` patches, uniformly."""
    mask = np.zeros(h * w, dtype=bool)
    mask[rng.sample(range(h * w), count)] = True
    return mask.reshape(h, w)


def most_masked(kind, grid, ratio, min_block):
    """An upper bound on the number of patches that a mask of this kind can have.

    Before the last printed block at most ratio * N patches are masked. A block of area s = ab
    covers at most (a + 1)(b + 1) = s + (a + b) + 1 centres, with a + b at most `stretch` sqrt(s).
    s is at most what is left of ratio * N (`early`), or min_block if the range was reversed.
    """
    if kind != "printed":
        return mask_count(grid, grid, ratio)
    stretch = math.sqrt(ASPECT[0]) + math.sqrt(ASPECT[1])
    early, late = stretch * math.sqrt(ratio) * grid, min_block + stretch * math.sqrt(min_block)
    return min(grid**2, int(ratio * grid**2 + max(early, late) + 1))


def make_mask(kind, rng, grid, ratio, min_block):
    """The mask of --masking: blockwise, printed, random, or none (table 4, "- masking").

    Raises ValueError on other names, and if the ratio or the blocks do not fit the grid.
    """
    count = mask_count(grid, grid, ratio)
    if kind == "random":
        return random_mask(rng, grid, grid, count)
    if kind == "none":
        return np.zeros((grid, grid), dtype=bool)
    if not 1 <= min_block <= count:
        raise ValueError(f"min block {min_block} fits nowhere: {count} of {grid}x{grid} to mask")
    if kind == "blockwise":
        return blockwise_mask(rng, grid, grid, count, min_block)
    if kind == "printed":
        return printed_mask(rng, grid, grid, ratio, min_block)
    raise ValueError(f"masking {kind!r} is none of 'blockwise', 'printed', 'random', 'none'")


def main(draws=20_000):
    for kind, ratio in (("blockwise", 75 / 196), ("printed", 0.4), ("random", 75 / 196)):
        rng = random.Random(0)
        sizes = np.array([make_mask(kind, rng, 14, ratio, 16).sum() for _ in range(draws)])
        print(f"{kind:10s} mean {sizes.mean():.2f}  min {sizes.min()}  max {sizes.max()}"
              f"  exactly 75: {np.mean(sizes == 75):.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
