"""Figure 2: where a reference patch looks. Attention of the last layer, from each reference patch to all patches.

    python visualize_attention.py runs/beit/checkpoint.pt photo.jpg --out attention.png --points 4,4 9,7
    python visualize_attention.py runs/beit/checkpoint.pt 3 7 --data shapes --out attention.png  # 4th and 8th of val
    python visualize_attention.py runs/beit/checkpoint.pt --data shapes --measure 500            # the claim as a number

The picture has two rows for each image, the second with random weights in the same network: the image with the
reference patches framed, then for each of them the mean over heads of softmax(q k^T / sqrt(D/heads)) (with the
relative bias, where the model has one), the reference patch framed, brightest = most attended. Points are
row,column in patches, from 0 at the top left.

The paper's claim is that attention separates objects. --measure asks, on images with masks, how well the attention
from a patch on an object ranks the patches of the same class before all others (average precision), beside the same
for random weights and for two rankings that need no network: nearness, and likeness of the pixels.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

import data
import training
from beit import Beit, BeitConfig, load_backbone, load_pretrained


def load_image(image, source, split, data_dir, size):
    """An image file, or the number of an image in a data set: (1, 3, size, size) in [0, 1], centre-cropped."""
    if image.isdigit():
        source = data.open_source(source, split, data_dir)
        if int(image) >= len(source):
            raise ValueError(f"image {image}: {source.name} has {len(source)} images, counted from 0")
    elif Path(image).is_file():
        source = data.Files(image, [Path(image)])
        image = "0"
    else:
        raise ValueError(f"image {image}: no such file, and not a number")
    return data.centre_square(source.read([int(image)]), size) / 255


def parse_point(text, grid):
    """'row,column' -> (row, column). Raises ValueError if it is not inside the grid."""
    try:
        row, column = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"point {text!r} is not of the form row,column") from None
    if not (0 <= row < grid and 0 <= column < grid):
        raise ValueError(f"point {text} is outside the {grid}x{grid} patches")
    return row, column


def frame(picture, point, patch):
    """The picture (3, H, W) with a red frame around one patch."""
    row, column = (p * patch for p in point)
    framed = picture.clone()
    inside = picture[:, row + 1 : row + patch - 1, column + 1 : column + patch - 1]
    framed[:, row : row + patch, column : column + patch] = torch.tensor([1.0, 0.1, 0.1]).view(3, 1, 1)
    framed[:, row + 1 : row + patch - 1, column + 1 : column + patch - 1] = inside
    return framed


def attention_row(model, x, pixels, points):
    """The row of pictures for one image: x normalised (1, 3, H, W), pixels in [0, 1] -> (1 + points, 3, H, W)."""
    grid, patch = model.config.grid, model.config.patch_size
    attention = model.last_attention(x)[0].mean(0)[1:, 1:]  # (N, N): mean over heads, without e_[S]
    marked = pixels[0]
    pictures = []
    for row, column in points:
        marked = frame(marked, (row, column), patch)
        seen = attention[row * grid + column].view(1, 1, grid, grid)
        seen = F.interpolate(seen / seen.max(), scale_factor=patch, mode="nearest")
        pictures.append(frame(seen[0].expand(3, -1, -1), (row, column), patch))
    return torch.stack([marked, *pictures])


def average_precision(scores, relevant):
    """Of ranking by scores, highest first, what is relevant: both (..., n) -> (...), NaN where nothing is.

    The mean, over the relevant ones, of the share of relevant ones among those ranked no lower. Equal scores rank in
    the order of a fixed permutation.
    """
    order = torch.randperm(scores.shape[-1], generator=torch.Generator().manual_seed(0))
    scores, relevant = scores[..., order], relevant[..., order]
    hits = relevant.gather(-1, scores.argsort(dim=-1, descending=True, stable=True)).float()
    precision = hits.cumsum(-1) / torch.arange(1, hits.shape[-1] + 1)
    return (precision * hits).sum(-1) / hits.sum(-1)


def patch_classes(mask, patch):
    """The class that most pixels of each patch have: (H, W) -> (N,)."""
    rows = mask.unfold(0, patch, patch).unfold(1, patch, patch).flatten(2).flatten(0, 1)  # (N, P²)
    return rows.mode(-1).values


@torch.no_grad()
def separation(models, statistics, source, count):
    """How well each model's attention separates objects, on the first `count` images of a source with masks.

    models: {name: Beit}. For every patch on an object: average precision, in percent, of ranking all other patches
    by the attention that it pays them, the patches of its own class being the relevant ones; the mean over patches.
    Larger images are cropped at a place drawn by their number. Returns {name: percent}, with nearness, pixels and
    chance (the share of relevant patches). Raises ValueError if there are no masks or no objects in them.
    """
    if source.masks is None:
        raise ValueError(f"{source.name} has no masks to tell objects by; shapes and fashion-scenes have them")
    config = next(iter(models.values())).config
    size, grid, patch = config.image_size, config.grid, config.patch_size
    cells = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float()
    found = {name: [] for name in (*models, "nearness", "pixels", "chance")}
    others = ~torch.eye(grid**2, dtype=torch.bool)
    for i in range(min(count, len(source))):
        image, mask = torch.from_numpy(source.read([i])), torch.from_numpy(source.read_masks([i]))  # (1, H, W, 3)
        if min(mask.shape[1:]) < size:
            raise ValueError(f"{source.name} {i} is smaller than the model's {size} pixels: {tuple(mask.shape[1:])}")
        rng = data.sample_rng(0, i)
        top, left = (rng.randint(0, side - size) for side in mask.shape[1:])
        image, mask = (part[:, top : top + size, left : left + size] for part in (image, mask))
        pixels = image.permute(0, 3, 1, 2).float() / 255
        classes = patch_classes(mask[0], patch)
        same = classes[:, None] == classes  # (N, N)
        queries = (classes != 0) & (classes != data.IGNORE) & ((same & others).sum(1) > 0)
        patches = F.pixel_unshuffle(pixels, patch)[0].flatten(1).T  # (N, 3P²)
        x = data.normalise(pixels, statistics)
        scores = {name: model.last_attention(x)[0].mean(0)[1:, 1:] for name, model in models.items()}
        scores |= {"nearness": -torch.cdist(cells, cells), "pixels": -torch.cdist(patches, patches)}
        relevant = same[others].view(grid**2, -1)[queries]  # (queries, N - 1)
        for name, score in scores.items():
            found[name].append(average_precision(score[others].view(grid**2, -1)[queries], relevant))
        found["chance"].append(relevant.float().mean(1))
    if not sum(map(len, found["chance"])):
        raise ValueError(f"{source.name}: no object in its first {count} images is larger than a patch")
    return {name: 100 * torch.cat(values).mean().item() for name, values in found.items()}


def load_models(checkpoint, seed=0):
    """({"pre-trained": the backbone of a checkpoint, "random weights": the same network without}, pixel statistics)."""
    state = load_pretrained(checkpoint, "pretraining", "classification", "segmentation")
    torch.manual_seed(seed)
    trained, fresh = (Beit(BeitConfig(**state["config"])).eval() for _ in range(2))
    load_backbone(trained, state["model"])
    return {"pre-trained": trained, "random weights": fresh}, state["normalise"]


def main(argv=None):
    parser = training.Parser(__doc__)
    parser.add_argument("checkpoint", help="checkpoint.pt of ours, or published BEiT weights")
    parser.add_argument("images", nargs="*", help="image files, or the numbers of images in --data")
    parser.add_argument("--points", nargs="+", help="reference patches as row,column; default: five across the image")
    parser.add_argument("--out", help="PNG file to write")
    parser.add_argument("--measure", type=int, default=0, metavar="N", help="score N images of --data instead")
    parser.add_argument("--data", default="shapes", help="data set that a number counts in, see data.py")
    parser.add_argument("--data-dir", help="where the data set's own files are")
    parser.add_argument("--split", default="val", choices=data.SPLITS, help="part of --data")
    args = parser.parse_args(argv)
    picture = bool(args.images and args.out)
    if (args.measure > 0) == picture or (args.measure and (args.images or args.out or args.points)):
        parser.error("give images and --out (and --points) for a picture, or --measure N for a number")
    models, statistics = load_models(args.checkpoint)
    config = models["pre-trained"].config
    if args.measure:
        source = data.open_source(args.data, args.split, args.data_dir)
        for name, percent in separation(models, statistics, source, args.measure).items():
            print(f"{name:16s} average precision {percent:.1f}")
        return
    near, far = config.grid // 4, config.grid - 1 - config.grid // 4
    default = [(near, near), (near, far), (config.grid // 2, config.grid // 2), (far, near), (far, far)]
    points = [parse_point(text, config.grid) for text in args.points] if args.points else default
    rows = []
    for image in args.images:
        pixels = load_image(image, args.data, args.split, args.data_dir, config.image_size)
        x = data.normalise(pixels, statistics)
        rows += [attention_row(model, x, pixels, points) for model in models.values()]
    training.picture(args.out, rows)


if __name__ == "__main__":
    with training.one_line_errors():
        main()
