"""Figure 2: the attention of the last layer, from each of a few reference patches to all patches.

    python -m experiments.attention runs/beit/checkpoint.pt photo.jpg --out attention.png \\
        --points 4,4 9,7
    python -m experiments.attention runs/beit/checkpoint.pt 3 7 --data shapes --out attention.png
    python -m experiments.attention runs/beit/checkpoint.pt --data shapes --measure 500

The second command takes images 3 and 7 of the validation split, counted from 0.

The picture has two rows for each image: the pre-trained model, and the same network with random
weights. A row shows the image with the reference patches framed. Then it shows, for each reference
patch, the mean over heads of softmax(q k^T / sqrt(D/heads)), with the relative bias if the model
has one: brightest = most attended. Points are row,column in patches, from 0 at the top left.

The paper claims that attention separates objects. --measure tests this on images with masks: how
well does the attention from a patch on an object rank patches of the same class before all others
(average precision)? It prints the same for random weights, and for two rankings that need no
network: by distance in the image, and by similarity of the pixels.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from beit import Beit, BeitConfig, load_backbone
from images import batches, sets, sources, views
from plumbing import command_line, noise, outputs, pictures, published


def load_image(image, data, split, data_dir, size):
    """Load an image, cropped to its central square: (1, 3, size, size) in [0, 1].

    image: an image file, or a number in the `split` of the data set that --data names. Raises
    ValueError if there is no such image.
    """
    if image.isdigit():
        source, index = sets.open_source(data, split, data_dir), int(image)
        if index >= len(source):
            raise ValueError(f"image {image}: {source.name} has only images 0 to {len(source) - 1}")
    elif Path(image).is_file():
        source, index = sources.Files(image, [Path(image)]), 0
    else:
        raise ValueError(f"image {image}: no such file, and not a number")
    return views.centre_square(source.read([index]), size) / 255


def parse_point(text, grid):
    """'row,column' -> (row, column). Raises ValueError if the point is outside the grid."""
    try:
        row, column = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"point {text!r} is not of the form row,column") from None
    if not (0 <= row < grid and 0 <= column < grid):
        raise ValueError(f"point {text} is outside the {grid}x{grid} patches")
    return row, column


def default_points(grid):
    """Five reference patches across the image."""
    near, middle, far = grid // 4, grid // 2, grid - 1 - grid // 4
    return [(near, near), (near, far), (middle, middle), (far, near), (far, far)]


def frame(image, point, patch):
    """A copy of the image (3, H, W) with a red frame around one patch of `patch` pixels."""
    top, left = (p * patch for p in point)
    red = torch.tensor([1.0, 0.1, 0.1]).view(3, 1, 1)
    rows, columns = slice(top + 1, top + patch - 1), slice(left + 1, left + patch - 1)
    framed = image.clone()
    framed[:, top : top + patch, left : left + patch] = red
    framed[:, rows, columns] = image[:, rows, columns]
    return framed


def patch_attention(model, x):
    """The last layer's attention between patches, the mean over heads: (1, 3, H, W) -> (N, N)."""
    return model.last_attention(x)[0].mean(0)[1:, 1:]  # without e_[S]


def attention_row(model, x, pixels, points):
    """One row of the picture: (1 + points, 3, H, W) in [0, 1].

    x: the image as the model sees it, (1, 3, H, W); pixels: the same in [0, 1].
    """
    grid, patch = model.config.grid, model.config.patch_size
    attention = patch_attention(model, x)
    marked, maps = pixels[0], []
    for row, column in points:
        marked = frame(marked, (row, column), patch)
        seen = attention[row * grid + column].view(1, 1, grid, grid)
        seen = F.interpolate(seen / seen.max(), scale_factor=patch, mode="nearest")
        maps.append(frame(seen[0].expand(3, -1, -1), (row, column), patch))
    return torch.stack([marked, *maps])


def average_precision(scores, relevant):
    """Average precision of ranking by `scores`, highest first: both (..., n) -> (...).

    That is the mean, over the relevant items (bool), of the share of relevant ones among all items
    ranked no lower. NaN where no item is relevant. Items with equal scores are ranked in the order
    of a fixed permutation.
    """
    order = torch.randperm(scores.shape[-1], generator=torch.Generator().manual_seed(0))
    scores, relevant = scores[..., order], relevant[..., order]
    hits = relevant.gather(-1, scores.argsort(dim=-1, descending=True, stable=True)).float()
    precision = hits.cumsum(-1) / torch.arange(1, hits.shape[-1] + 1)
    return (precision * hits).sum(-1) / hits.sum(-1)


def patch_classes(mask, patch):
    """The commonest class in each patch of `patch` pixels: (H, W) -> (N,)."""
    rows = mask.unfold(0, patch, patch).unfold(1, patch, patch).flatten(2).flatten(0, 1)  # (N, P²)
    return rows.mode(-1).values


def random_crop(source, index, size):
    """A square of an image and its mask: pixels (1, 3, size, size) in [0, 1], mask (size, size).

    The place depends on the image's number only. Raises ValueError if the image is too small.
    """
    image = torch.from_numpy(source.read([index]))  # (1, H, W, 3)
    mask = torch.from_numpy(source.read_masks([index]))  # (1, H, W)
    height, width = mask.shape[1:]
    if min(height, width) < size:
        raise ValueError(
            f"{source.name}: image {index} has {height}x{width} pixels, fewer than the model's "
            f"{size}x{size}"
        )
    rng = noise.sample_rng(0, index)
    top, left = rng.randint(0, height - size), rng.randint(0, width - size)
    image, mask = (a[:, top : top + size, left : left + size] for a in (image, mask))
    return image.permute(0, 3, 1, 2).float() / 255, mask[0]


@torch.no_grad()
def separation(models, normalise, source, count):
    """How well each model's attention separates objects in the first `count` images of a source.

    models: {name: Beit}; normalise: name of the pixel mean and std that they were trained with.
    For every patch on an object, all other patches are ranked by the attention they get from it;
    patches of the same class are relevant. Returns {name: mean average precision in percent} for
    the models and for three references: nearness and pixels rank by distance in the image and in
    pixel values, and chance is the share of relevant patches. Raises ValueError if the source has
    no masks or no object.
    """
    if source.masks is None:
        raise ValueError(
            f"{source.name} has no masks, which show where objects are; shapes and "
            "fashion-scenes have them"
        )
    config = next(iter(models.values())).config
    size, grid, patch = config.image_size, config.grid, config.patch_size
    cells = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float()  # (N, 2)
    found = {name: [] for name in (*models, "nearness", "pixels", "chance")}
    others = ~torch.eye(grid**2, dtype=torch.bool)  # (N, N)
    for index in range(min(count, len(source))):
        pixels, mask = random_crop(source, index, size)
        classes = patch_classes(mask, patch)
        same = classes[:, None] == classes  # (N, N)
        on_object = (classes != 0) & (classes != sources.IGNORE)
        queries = on_object & ((same & others).sum(1) > 0)
        patches = F.pixel_unshuffle(pixels, patch)[0].flatten(1).T  # (N, 3P²)
        x = batches.standardise(pixels, normalise)
        scores = {name: patch_attention(model, x) for name, model in models.items()}
        scores["nearness"] = -torch.cdist(cells, cells)
        scores["pixels"] = -torch.cdist(patches, patches)
        relevant = same[others].view(grid**2, -1)[queries]  # (queries, N - 1)
        for name, score in scores.items():
            ranked = score[others].view(grid**2, -1)[queries]
            found[name].append(average_precision(ranked, relevant))
        found["chance"].append(relevant.float().mean(1))
    if not sum(map(len, found["chance"])):
        raise ValueError(f"{source.name}: no object in its first {count} images fills two patches")
    return {name: 100 * torch.cat(values).mean().item() for name, values in found.items()}


def load_models(checkpoint, seed=0, normalise="auto"):
    """({name: Beit}, normalise) for a checkpoint of ours or for published weights.

    The models are "pre-trained" and, with the same shape, "random weights"; normalise names the
    pixel mean and std that they were trained with.
    """
    kinds = "pretraining", "classification", "segmentation"
    state = published.load_pretrained(checkpoint, *kinds, normalise=normalise)
    torch.manual_seed(seed)
    trained, fresh = (Beit(BeitConfig(**state["config"])).eval() for _ in range(2))
    load_backbone(trained, state["model"])
    return {"pre-trained": trained, "random weights": fresh}, state["normalise"]


def main(argv=None):
    parser = command_line.Parser(__doc__)
    parser.add_argument("checkpoint", help="checkpoint.pt of ours, or published BEiT weights")
    help_text = "image files, or numbers of images in --data"
    parser.add_argument("images", nargs="*", help=help_text)
    help_text = "reference patches as row,column; default: five across the image"
    parser.add_argument("--points", nargs="+", help=help_text)
    parser.add_argument("--out", help="PNG file to write")
    help_text = "score N images of --data and write no picture"
    parser.add_argument("--measure", type=int, default=0, metavar="N", help=help_text)
    help_text = "data set for numbers and for --measure: a name or a path"
    parser.add_argument("--data", default="shapes", help=help_text)
    parser.add_argument("--data-dir", help="folder of the data set's own files")
    parser.add_argument("--split", default="val", choices=sources.SPLITS, help="split of --data")
    command_line.add_normalise_flag(parser)
    args = parser.parse_args(argv)
    picture = bool(args.images and args.out)
    nothing_else = not (args.images or args.out or args.points)
    if (args.measure > 0) == picture or (args.measure and not nothing_else):
        parser.error("give images and --out (and --points) for a picture, or --measure N")
    if args.out:
        outputs.check_new(args.out, args.data)
    models, normalise = load_models(args.checkpoint, normalise=args.normalise)
    config = models["pre-trained"].config
    if args.measure:
        source = sets.open_source(args.data, args.split, args.data_dir)
        for name, percent in separation(models, normalise, source, args.measure).items():
            print(f"{name:16s} average precision {percent:.1f}")
        return
    given = [parse_point(text, config.grid) for text in args.points or []]
    points, rows = given or default_points(config.grid), []
    for image in args.images:
        pixels = load_image(image, args.data, args.split, args.data_dir, config.image_size)
        x = batches.standardise(pixels, normalise)
        rows += [attention_row(model, x, pixels, points) for model in models.values()]
    pictures.picture(args.out, rows, place=outputs.new)


if __name__ == "__main__":
    with command_line.one_line_errors():
        main()
