"""Augmentation: colour jitter for batches; RandAugment and random erasing for single images."""

import math

import torch
import torch.nn.functional as F


def grey(images):
    """Luma of RGB images: (..., 3, H, W) -> (..., 1, H, W)."""
    return (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(-3, keepdim=True)


def colour_jitter(images, factors):
    """Scale brightness, contrast and saturation, in this order.

    images: (B, 3, H, W) in [0, 1]; factors: (B, 3), where 1 changes nothing.
    """
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    images = (images * brightness).clamp(0, 1)
    mean = grey(images).mean((2, 3), keepdim=True)
    images = (mean + (images - mean) * contrast).clamp(0, 1)
    return (grey(images) + (images - grey(images)) * saturation).clamp(0, 1)


# -------------------------------------------------------- RandAugment


def warp(image, matrix):
    """Affine map of an image (3, H, W) about its centre, bilinear, with grey outside the image.

    matrix: two rows of three numbers that map output coordinates to input coordinates; both run
    from -1 to 1.
    """
    theta = torch.tensor(matrix, dtype=torch.float32)[None]
    grid = F.affine_grid(theta, [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None] - 0.5, grid, align_corners=False)[0] + 0.5


def rotate(image, angle):
    """Rotation by an angle in radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return warp(image, [[cos, -sin, 0], [sin, cos, 0]])


def blend(image, other, factor):
    """other + factor (image - other): factor 1 gives the image, factor 0 the other."""
    return (other + factor * (image - other)).clamp(0, 1)


def smooth(image):
    """3 x 3 average with weight 5 at the centre and 1 around it; the border is left unchanged."""
    kernel = torch.ones(3, 1, 3, 3) / 13
    kernel[:, :, 1, 1] = 5 / 13
    blurred = image.clone()
    blurred[:, 1:-1, 1:-1] = F.conv2d(image[None], kernel, groups=3)[0]
    return blurred


def equalise(image):
    """Spread the values of each channel evenly over 0..1, by their cumulative histogram."""
    levels = (image * 255).round().long().flatten(1)  # (3, HW)
    histogram = torch.zeros(3, 256).scatter_add_(1, levels, torch.ones(levels.shape))
    below = histogram.cumsum(1) - histogram / 2
    return (below / below.new_tensor(levels.shape[1])).gather(1, levels).view_as(image)


def autocontrast(image):
    """Stretch the values of each channel to 0..1."""
    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    return torch.where(high > low, (image - low) / (high - low).clamp_min(1e-6), image)


def posterise(image, bits):
    """Keep the upper `bits` bits of each value, 0 to 8."""
    return (image * 255).byte().bitwise_and(256 - 2 ** (8 - bits)) / 255


def solarise(image, threshold):
    """Invert the values from the threshold on."""
    return torch.where(image < threshold, image, 1 - image)


def solarise_add(image, value):
    """Add a value to the dark half of the range."""
    return torch.where(image < 0.5, (image + value).clamp(max=1), image)


# Each operation takes an image x (3, H, W) in [0, 1], a strength m in 0..1 and a sign s = -1 or 1.
# A larger m changes the image more. Shifts are shares of the side, which is 2 long for warp.
OPERATIONS = [
    lambda x, m, s: autocontrast(x),
    lambda x, m, s: equalise(x),
    lambda x, m, s: 1 - x,  # invert
    lambda x, m, s: rotate(x, math.radians(30 * m * s)),
    lambda x, m, s: posterise(x, 4 - int(4 * m)),
    lambda x, m, s: solarise(x, 1 - m),
    lambda x, m, s: solarise_add(x, m * 110 / 255),
    lambda x, m, s: blend(x, grey(x), 1 + 0.9 * m * s),  # saturation
    lambda x, m, s: blend(x, grey(x).mean(), 1 + 0.9 * m * s),  # contrast
    lambda x, m, s: blend(x, x * 0, 1 + 0.9 * m * s),  # brightness
    lambda x, m, s: blend(x, smooth(x), 1 + 0.9 * m * s),  # sharpness
    lambda x, m, s: warp(x, [[1, 0.3 * m * s, 0], [0, 1, 0]]),  # horizontal shear
    lambda x, m, s: warp(x, [[1, 0, 0], [0.3 * m * s, 1, 0]]),  # vertical shear
    lambda x, m, s: warp(x, [[1, 0, 0.9 * m * s], [0, 1, 0]]),  # horizontal shift, up to 0.45
    lambda x, m, s: warp(x, [[1, 0, 0], [0, 1, 0.9 * m * s]]),  # vertical shift, up to 0.45
]


def randaugment(image, magnitude, rng):
    """RandAugment, uint8 (3, H, W) -> uint8 (3, H, W); the paper's "9/0.5" has magnitude 9.

    Two random operations, each applied with probability 1/2 and strength N(magnitude, 0.5) / 10.
    """
    x = image / 255
    for operation in rng.choices(OPERATIONS, k=2):
        strength = min(max(rng.gauss(magnitude, 0.5) / 10, 0), 1)
        sign = rng.choice((-1, 1))
        if rng.random() < 0.5:
            x = operation(x, strength, sign)
    return (x * 255).round().clamp(0, 255).byte()


# -------------------------------------------------------- random erasing


def erase(image, rng):
    """Random erasing, in place: fill a random rectangle of a uint8 image (3, H, W) with noise.

    Its area is 2 % to 1/3 of the image's and its aspect ratio 0.3 to 1/0.3. The image stays as it
    is if no rectangle fits in ten tries.
    """
    _, H, W = image.shape
    for _ in range(10):
        area = H * W * rng.uniform(0.02, 1 / 3)
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < H and 0 < w < W:
            top, left = rng.randint(0, H - h), rng.randint(0, W - w)
            pixels = torch.frombuffer(bytearray(rng.randbytes(3 * h * w)), dtype=torch.uint8)
            image[:, top : top + h, left : left + w] = pixels.view(3, h, w)
            return
