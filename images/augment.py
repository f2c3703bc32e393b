"""Augmentation: colour jitter, photometric distortion, RandAugment and random erasing."""

import math

import torch
import torch.nn.functional as F

from images import batches


def grey(images):
    """Luma of RGB images: (..., 3, H, W) -> (..., 1, H, W)."""
    red, green, blue = images.split(1, -3)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def colour_jitter(images, factors):
    """Scale brightness, contrast and saturation, in this order.

    images: (B, 3, H, W) in [0, 1]; factors: (B, 3), where 1 changes nothing.
    """
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    images = (images * brightness).clamp(0, 1)
    mean = grey(images).mean((2, 3), keepdim=True)
    images = mean.lerp(images, contrast).clamp(0, 1)
    return grey(images).lerp(images, saturation).clamp(0, 1)


# -------------------------------------------------------- photometric distortion

# Ranges of mmseg's PhotoMetricDistortion.
BRIGHTNESS = 32 / 255  # added
FACTORS = 0.5, 1.5  # of contrast and saturation
HUE = 18 / 180  # of the hue circle, added: 18 of 180 steps


def rgb_to_hsv(images):
    """RGB (..., 3, H, W) in [0, 1] to hue, saturation and value, all in [0, 1], same shape.

    As Python's colorsys: hue 0 is red, 1/3 green, 2/3 blue. Greys have hue and saturation 0.
    """
    red, green, blue = images.unbind(-3)
    value = images.amax(-3)
    spread = value - images.amin(-3)
    safe = torch.where(spread > 0, spread, 1)  # greys: 0 / 1
    hue = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = torch.where(value == red, (green - blue) / safe, hue) / 6
    saturation = spread / torch.where(value > 0, value, 1)
    return torch.stack((hue % 1, saturation, value), -3)


def hsv_to_rgb(images):
    """The inverse of rgb_to_hsv: (..., 3, H, W), where hues one apart are the same colour."""
    hue, saturation, value = images.unbind(-3)
    channels = []
    for start in (5, 3, 1):  # of red, green, blue, in sixths of the circle
        k = (start + 6 * hue) % 6
        channels.append(value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, -3)


def add_brightness(images, amount):
    """Add `amount`, a share of the range, to RGB images in [0, 1]."""
    return (images + amount).clamp(0, 1)


def scale_contrast(images, factor):
    """Scale RGB images in [0, 1] about black."""
    return (images * factor).clamp(0, 1)


def scale_saturation(images, factor):
    """Scale the HSV saturation of RGB images in [0, 1]."""
    hue, saturation, value = rgb_to_hsv(images).unbind(-3)
    return hsv_to_rgb(torch.stack((hue, (saturation * factor).clamp(0, 1), value), -3))


def shift_hue(images, amount):
    """Turn the HSV hue of RGB images in [0, 1] by `amount`, a share of the circle."""
    hue, saturation, value = rgb_to_hsv(images).unbind(-3)
    return hsv_to_rgb(torch.stack((hue + amount, saturation, value), -3))


def photometric(images, rng):
    """Photometric distortion of RGB images (..., 3, H, W) in [0, 1], as mmseg's.

    Brightness, contrast, saturation and hue change, each with probability 1/2. A coin decides
    whether contrast comes before the two colour steps or after them. Values are clipped to [0, 1]
    after each step and stay floats. mmseg instead truncates to uint8 after each step and has an
    8-bit HSV; its hue has steps of 2 degrees.
    """

    def sometimes(change, images, low, high):
        return change(images, rng.uniform(low, high)) if rng.random() < 0.5 else images

    images = sometimes(add_brightness, images, -BRIGHTNESS, BRIGHTNESS)
    contrast_first = rng.random() < 0.5
    if contrast_first:
        images = sometimes(scale_contrast, images, *FACTORS)
    images = sometimes(scale_saturation, images, *FACTORS)
    images = sometimes(shift_hue, images, -HUE, HUE)
    if not contrast_first:
        images = sometimes(scale_contrast, images, *FACTORS)
    return images


# -------------------------------------------------------- RandAugment

# Operations on one uint8 image (3, H, W). They round or truncate where Pillow does, as in timm.


def taps(position, side):
    """The four pixels around each position along an axis, and the position after the second.

    position: float64, 0 at the centre of the first pixel. Pixels outside the image are its border.
    """
    first = position.floor()
    around = [(first.long() + offset).clamp(0, side - 1) for offset in (-1, 0, 1, 2)]
    return around, (position - first).float()


def cubic(p, q, r, s, t):
    """The cubic through q at t = 0 and r at t = 1 with slopes r - p and s - q.

    It is the kernel with a = -1 of Pillow's affine maps; Pillow's resizing and torch have others.
    """
    return q + t * (r - p + t * (2 * (p - q) + r - s + t * (q - p + s - r)))


def warp(image, matrix, fill):
    """Affine map of an image, bicubic; `fill` is the colour of what lies outside it.

    matrix: (a, b, c, d, e, f), which takes the output's (x, y) to (a x + b y + c, d x + e y + f)
    in the input. Both count pixels from the top left corner, as in Pillow's Image.transform.
    """
    a, b, c, d, e, f = matrix
    _, H, W = image.shape
    y = torch.arange(H, dtype=torch.float64)[:, None] + 0.5
    x = torch.arange(W, dtype=torch.float64) + 0.5
    x, y = a * x + b * y + c, d * x + e * y + f  # (H, W) each
    inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
    columns, right = taps(x[inside] - 0.5, W)
    rows, below = taps(y[inside] - 0.5, H)
    pixels = image.flatten(1).float()
    lines = [
        cubic(*(pixels.index_select(1, row * W + column) for column in columns), right)
        for row in rows
    ]
    result = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, H, W)
    result[:, inside] = cubic(*lines, below).clamp(0, 255).byte()
    return result


def rotate(image, degrees, fill):
    """Rotation about the centre; positive angles turn anticlockwise."""
    _, H, W = image.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    c = W / 2 - cos * W / 2 + sin * H / 2
    f = H / 2 - sin * W / 2 - cos * H / 2
    return warp(image, (cos, -sin, c, sin, cos, f), fill)


def shear(image, horizontal, vertical, fill):
    """Shear about the top left corner: a shift by `horizontal` per row, `vertical` per column."""
    return warp(image, (1, horizontal, 0, vertical, 1, 0), fill)


def shift(image, horizontal, vertical, fill):
    """Shift to the left and up by shares of the width and of the height."""
    _, H, W = image.shape
    return warp(image, (1, 0, horizontal * W, 0, 1, vertical * H), fill)


def luma(image):
    """Grey values (1, H, W): 0.299 R + 0.587 G + 0.114 B, rounded from 16-bit weights."""
    weights = torch.tensor([19595, 38470, 7471]).view(3, 1, 1)
    return ((image * weights).sum(0, keepdim=True) + 2**15 >> 16).byte()


def blend(image, other, factor):
    """other + factor (image - other), truncated: factor 1 gives the image, factor 0 the other."""
    image, other = image.float(), other.float()
    return (other + factor * (image - other)).clamp(0, 255).byte()


def change_contrast(image, factor):
    """Scale about the image's rounded mean grey value."""
    mean = (luma(image).double().mean() + 0.5).floor()
    return blend(image, mean, factor)


def smooth(image):
    """3 x 3 average with weight 5 at the centre and 1 around it; the border is left unchanged."""
    kernel = torch.ones(3, 1, 3, 3)
    kernel[:, :, 1, 1] = 5
    blurred = image.clone()
    total = F.conv2d(image[None].float(), kernel, groups=3)[0]  # 13 times the average, exact
    blurred[:, 1:-1, 1:-1] = (total / 13).round().byte()
    return blurred


def look_up(image, tables):
    """Each channel's values replaced through its table: (3, 256) int64 -> as the image."""
    return tables.clamp(0, 255).byte().gather(1, image.flatten(1).long()).view_as(image)


def equalise(image):
    """Spread the values of each channel evenly, by its cumulative histogram.

    As Pillow's ImageOps.equalize, whose step is a whole number of pixels: a channel with one value,
    or with fewer than 255 pixels below its largest value, stays as it is.
    """
    tables = []
    for channel in image:
        histogram = torch.bincount(channel.flatten(), minlength=256)
        step = (channel.numel() - histogram[int(channel.max())]) // 255
        if step == 0:
            tables.append(torch.arange(256))
        else:
            tables.append((histogram.cumsum(0) - histogram + step // 2) // step)
    return look_up(image, torch.stack(tables))


def autocontrast(image):
    """Stretch the values of each channel to 0..255; a channel with one value stays as it is."""
    low, high = image.flatten(1).aminmax(dim=1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64)
    scale = levels[255] / (high - low)  # 255 / tensor would round twice
    stretched = (levels * scale - low * scale).clamp(0, 255).long()
    return look_up(image, torch.where(high > low, stretched, levels.long()))


def posterise(image, bits):
    """Keep the upper `bits` bits of each value, 0 to 8."""
    return image & (256 - 2 ** (8 - bits))


def solarise(image, threshold):
    """Invert the values from the threshold on."""
    return torch.where(image.int() < threshold, image, 255 - image)  # 256 is not a uint8


def solarise_add(image, amount):
    """Add a whole number to values below 128."""
    return torch.where(image < 128, (image.int() + amount).clamp(max=255).byte(), image)


# Each operation takes an image x, uint8 (3, H, W), a strength m in 0..1, a sign s = -1 or 1 and the
# colour for what lies outside the image. A larger m changes the image more ("inc1").
OPERATIONS = [
    lambda x, m, s, fill: autocontrast(x),
    lambda x, m, s, fill: equalise(x),
    lambda x, m, s, fill: 255 - x,  # invert
    lambda x, m, s, fill: rotate(x, 30 * m * s, fill),
    lambda x, m, s, fill: posterise(x, 4 - int(4 * m)),
    lambda x, m, s, fill: solarise(x, 256 - int(256 * m)),
    lambda x, m, s, fill: solarise_add(x, int(110 * m)),
    lambda x, m, s, fill: blend(x, luma(x), 1 + 0.9 * m * s),  # saturation
    lambda x, m, s, fill: change_contrast(x, 1 + 0.9 * m * s),
    lambda x, m, s, fill: blend(x, torch.zeros(1), 1 + 0.9 * m * s),  # brightness
    lambda x, m, s, fill: blend(x, smooth(x), 1 + 0.9 * m * s),  # sharpness
    lambda x, m, s, fill: shear(x, 0.3 * m * s, 0, fill),
    lambda x, m, s, fill: shear(x, 0, 0.3 * m * s, fill),
    lambda x, m, s, fill: shift(x, 0.45 * m * s, 0, fill),
    lambda x, m, s, fill: shift(x, 0, 0.45 * m * s, fill),
]


def randaugment(image, magnitude, rng, fill):
    """RandAugment, uint8 (3, H, W) -> uint8 (3, H, W); the paper's "9/0.5" has magnitude 9.

    The distribution is that of timm's rand-m9-mstd0.5-inc1: two random operations, which may be the
    same, each applied with probability 1/2 and strength N(magnitude, 0.5) / 10, clipped to 0..1.
    fill: R, G, B of what a warp leaves empty; the authors take the pixel mean, see mean_colour.
    """
    for operation in rng.choices(OPERATIONS, k=2):
        strength = min(max(rng.gauss(magnitude, 0.5) / 10, 0), 1)
        sign = rng.choice((-1, 1))
        if rng.random() < 0.5:
            image = operation(image, strength, sign, fill)
    return image


def mean_colour(normalise):
    """The pixel mean as three whole numbers of 0..255; normalise: a key of batches.NORMALISE."""
    mean, _ = batches.NORMALISE[normalise]
    return tuple(round(255 * value) for value in mean)


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
