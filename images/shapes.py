"""The data set "shapes" of the demo: synthetic images, drawn here in a few seconds."""

import math

import numpy as np

from images import sources

SHAPE_CLASSES = "disk ring square triangle star cross bar crescent".split()
SHAPES_SIZE = 24  # pixels along each side
SHAPES_COUNT = {"train": 8000, "val": 1000, "test": 1000}


def shapes(split, data_dir=None):
    """Textured images of three shapes of eight kinds, with labels and masks; no file is read.

    An image depends only on its split and index. data_dir is ignored: every named set takes it.
    """
    count, key = SHAPES_COUNT[split], sources.SPLITS.index(split)
    uniforms = np.stack([np.random.default_rng((key, index)).random(40) for index in range(count)])
    chunks = np.array_split(uniforms, count // 500)
    parts = zip(*(draw_shapes(chunk, SHAPES_SIZE) for chunk in chunks))
    images, labels, masks = (np.concatenate(part) for part in parts)
    mask_classes = ["background", *SHAPE_CLASSES]
    return sources.Arrays(f"shapes {split}", images, labels, masks, SHAPE_CLASSES, mask_classes)


def draw_shapes(uniforms, size):
    """Draw one image from each row of uniform random numbers (n, 40).

    Returns uint8 images (n, size, size, 3), labels (n,) and uint8 masks (n, size, size). On a dark
    texture lie two small shapes and, in front, a large one whose class is the label. Shapes are
    brighter towards the middle, so that their interior carries information about the outline, as
    in photographs. Mask 0 is background and c + 1 is class c.
    """
    n = len(uniforms)
    u = iter(uniforms.T[:, :, None, None].astype(np.float32))  # each next(u): (n, 1, 1)
    pixels = np.arange(size, dtype=np.float32)
    y, x = np.meshgrid(pixels, pixels, indexing="ij")
    waves = [np.sin((next(u) - 0.5) * x + (next(u) - 0.5) * y + 6.3 * next(u)) for _ in range(2)]
    images = (0.5 + 0.5 * hue(next(u))) * (0.15 + 0.1 * waves[0] * waves[1])[..., None]
    masks = np.zeros((n, size, size), np.uint8)
    for low, high in ((0.1, 0.15), (0.1, 0.15), (0.32, 0.42)):  # range of the radius, in sides
        kind = np.floor(next(u)[:, 0, 0] * len(SHAPE_CLASSES)).astype(int)
        radius = (low + (high - low) * next(u)) * size
        cx, cy = (radius + (size - 2 * radius) * next(u) for _ in range(2))
        turn = (next(u) - 0.5) * math.pi / 6  # at most 15 degrees either way
        colour = hue(np.floor(next(u) * 6) / 6)
        du, dv = (x - cx) / radius, (y - cy) / radius
        du, dv = du * np.cos(turn) + dv * np.sin(turn), dv * np.cos(turn) - du * np.sin(turn)
        distance = np.empty((n, size, size), np.float32)
        for c, name in enumerate(SHAPE_CLASSES):
            distance[kind == c] = shape_distance(name, du[kind == c], dv[kind == c])
        cover = np.clip(0.5 - distance * radius, 0, 1)[..., None]  # soft edge, one pixel wide
        shade = 0.5 + 0.5 * np.clip(-distance / 0.6, 0, 1)[..., None]
        images = images * (1 - cover) + colour * shade * cover
        masks = np.where(distance < 0, (kind[:, None, None] + 1).astype(np.uint8), masks)
    return (images * 255).round().astype(np.uint8), kind, masks


def shape_distance(kind, u, v):
    """Rough signed distance from points (u, v) to a shape of radius about 1 at the origin.

    Negative inside. The result has the shape of u and v.
    """
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    au, av = np.abs(u), np.abs(v)
    if kind == "disk":
        return radius - 0.9
    if kind == "ring":
        return np.abs(radius - 0.75) - 0.22
    if kind == "square":
        return np.maximum(au, av) - 0.8
    if kind == "triangle":
        normals = (0, 2 * math.pi / 3, -2 * math.pi / 3)  # directions of its three sides
        return np.max([u * math.cos(a) + v * math.sin(a) for a in normals], axis=0) - 0.5
    if kind == "star":
        return radius - (0.7 + 0.33 * np.cos(5 * angle))
    if kind == "cross":
        return np.minimum(np.maximum(au - 1, av - 0.3), np.maximum(au - 0.3, av - 1))
    if kind == "bar":
        return np.maximum(au - 1, av - 0.35)
    return np.maximum(radius - 0.95, 0.75 - np.hypot(u - 0.5, v))  # crescent


def hue(h):
    """Bright colour at position h of the hue circle: (n, 1, 1) in [0, 1] -> RGB (n, 1, 1, 3)."""
    offsets = np.array([0, 4, 2], np.float32)
    return np.clip(np.abs((h[..., None] * 6 + offsets) % 6 - 3) - 1, 0, 1)
