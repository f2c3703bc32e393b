"""Figure 2: the attention of the last layer, from each of a few reference patches to all patches.

    python -m experiments.attention runs/beit/checkpoint.pt photo.jpg --out attention.png \\
        --points 4,4 9,7
    python -m experiments.attention runs/beit/checkpoint.pt 3 7 --data shapes --out attention.png
    python -m experiments.attention runs/beit/checkpoint.pt --data PHOTOS --split test --out a.png
    python -m experiments.attention runs/beit/checkpoint.pt --data shapes --measure 500

The second command takes images 3 and 7 of the validation split, counted from 0; the third takes
four images spread evenly over the test split.

The picture has two rows for each image: the pre-trained model, and the same network with random
weights. A row shows the image with the reference patches framed. Then it shows, for each reference
patch, the mean over heads of softmax(q k^T / sqrt(D/heads)), with the relative bias if the model
has one: brightest = most attended. Points are row,column in patches, from 0 at the top left. By
default there are five across the image or, in a set with masks, two on its commonest class and
one on background.

The paper claims that attention separates objects. --measure tests this on images with masks: how
well does the attention from a patch on an object rank patches of the same class before all others
(average precision)? Class 0 counts as background. It prints the same for random weights, and for
both the mean over heads and the single head, counted from 0, that is best on the validation split.
Four rankings need no network: by distance in the image, by similarity of the pixels, by distance
from the image's centre whatever the reference patch (photographers put objects there), and chance.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from beit import Beit
from experiments import features
from images import batches, masked, patches, sets, sources, views
from plumbing import checkpoints, command_line, log, noise, outputs, pictures

SHOWN = 4  # images in a picture for which none are named
BATCH = 64  # most images at once
BACKGROUND = 0  # its class number
WITHOUT_NETWORK = "nearness", "pixels", "centre", "chance"  # rankings of `separation`
WEIGHTS = 2**21  # most attention weights at once of a model, which bounds the memory

# -------------------------------------------------------- images and masks as the model sees them


def is_cropped(source, size):
    """Whether a set's images are seen in part: arrays with masks that are larger than `size`."""
    if source.masks is None or not isinstance(source, sources.Arrays):
        return False
    low, high = sorted(source.images.shape[1:3])
    return low >= size < high


def view_text(source, size):
    """A sentence that says what the model sees of a set's images."""
    part = "a random crop of" if is_cropped(source, size) else "the centred square, resized to"
    return f"{source.name}: of each image {part} {size}x{size} pixels"


class Seen:
    """A set's images and masks as the model sees them.

    seen[index]: pixels (3, size, size) in [0, 1] and class numbers (size, size), or None without
    masks. For arrays with masks, larger than the model's images, they are a random crop, whose
    place depends on the image's number only; otherwise the largest centred square, resized. Raises
    ValueError naming an image or a mask that cannot be used.
    """

    def __init__(self, source, size):
        self.source, self.size = source, size
        self.samples = None if source.masks is None else masked.checked(source)

    def __getitem__(self, index):
        if not self.samples:
            return self.square(self.source.read([index])), None
        image, mask = self.samples.read_pair([index])  # uint8 (1, H, W, 3) and (1, H, W)
        size = self.size
        if is_cropped(self.source, size):
            rng = noise.sample_rng(0, index)
            top, left = (rng.randint(0, side - size) for side in mask.shape[1:])
            image, mask = (a[:, top : top + size, left : left + size] for a in (image, mask))
        return self.square(image), torch.from_numpy(views.centre_square_mask(mask[0], size))

    def square(self, image):
        """The largest centred square of uint8 (1, H, W, 3), resized: (3, size, size) in [0, 1]."""
        return views.centre_square(image, self.size)[0].float() / 255


def see_images(images, source, size):
    """The images of a picture as the model sees them, a list: see Seen.

    images: image files, or numbers of images in the source, which may be None if there are none.
    Raises ValueError if there is no such image.
    """
    numbered, found = source and Seen(source, size), []
    for image in images:
        if image.isdigit() and int(image) >= len(source):
            raise ValueError(f"image {image}: {source.name} has only images 0 to {len(source) - 1}")
        if image.isdigit():
            found.append(numbered[int(image)])
        elif Path(image).is_file():
            found.append(Seen(sources.Files(image, [Path(image)]), size)[0])
        else:
            raise ValueError(f"image {image}: no such file, and not a number")
    return found


# -------------------------------------------------------- the picture


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


def filled_patches(shown, patch):
    """(row, column) of the patches that bool (H, W) fills best, in reading order: (n, 2)."""
    share = F.avg_pool2d(shown.float()[None], patch)[0]  # (h, w)
    return (share >= 0.75 * share.max()).nonzero()


def mask_points(mask, patch):
    """Three reference patches for an image with a mask (H, W): [(row, column)].

    Two lie on the commonest class, which may be that of several objects, in reading order at a
    quarter and at three quarters of its patches, and one on background, as far away as possible.
    """
    objects = mask[(mask != BACKGROUND) & (mask != sources.IGNORE)]
    commonest = objects.mode().values if len(objects) else BACKGROUND
    inside, outside = (filled_patches(mask == c, patch) for c in (commonest, BACKGROUND))
    farthest = torch.cdist(outside.float(), inside.float()).amin(1).argmax()
    chosen = inside[len(inside) // 4], inside[3 * len(inside) // 4], outside[farthest]
    return [tuple(point.tolist()) for point in chosen]


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
    """Block L's attention between patches: (B, 3, H, W) -> (B, heads, N, N), without e_[S]."""
    return model.last_attention(x)[..., 1:, 1:]


def attention_row(model, x, pixels, points):
    """One row of the picture: (1 + points, 3, H, W) in [0, 1].

    x: the image as the model sees it, (1, 3, H, W); pixels: the same in [0, 1], (3, H, W).
    """
    grid, patch = model.config.grid, model.config.patch_size
    attention = patch_attention(model, x)[0].mean(0)  # (N, N)
    marked, maps = pixels, []
    for row, column in points:
        marked = frame(marked, (row, column), patch)
        seen = attention[row * grid + column].view(1, 1, grid, grid)
        seen = F.interpolate(seen / seen.max(), scale_factor=patch, mode="nearest")
        maps.append(frame(seen[0].expand(3, -1, -1), (row, column), patch))
    return torch.stack([marked, *maps])


# -------------------------------------------------------- the measure


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


def expected_precision(relevant, n):
    """The mean average precision of all orders of n items. relevant: how many are, a tensor.

    An item in place k is relevant with probability relevant / n, and each of the k - 1 before it
    then with (relevant - 1) / (n - 1). Above relevant / n, because the item itself counts.
    """
    harmonic = (1 / torch.arange(1, n + 1)).sum()  # the sum of 1 / k over the places
    return (harmonic + (n - harmonic) * (relevant - 1) / max(n - 1, 1)) / n


def patch_classes(masks, patch):
    """The commonest class in each patch of `patch` pixels: (B, H, W) -> (B, N)."""
    return patches.to_patches(masks[:, None], patch).mode(-1).values


def references(pixels, config):
    """Three rankings that need no network, as attention: {name: (B, 1, N, N)}.

    pixels: (B, 3, H, W). By nearness to the reference patch in the image, by its likeness in pixel
    values, and by nearness to the image's centre, which is the same for all reference patches.
    """
    grid = config.grid
    cells = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float()  # (N, 2)
    to_centre = torch.cdist(torch.full((1, 2), (grid - 1) / 2), cells)  # (1, N)
    x = patches.to_patches(pixels, config.patch_size)
    distances = {
        "nearness": torch.cdist(cells, cells),
        "pixels": torch.cdist(x, x),
        "centre": to_centre,
    }
    shape = len(pixels), 1, grid**2, grid**2
    return {name: -d.view(-1, 1, *d.shape[-2:]).expand(shape) for name, d in distances.items()}


def rank_patches(scores, classes):
    """How well patches are ranked for each reference patch on an object, n in all.

    scores: (B, R, N, N), the rows for reference patches; classes: (B, N). All other patches are
    ranked, and those of the same class are relevant. Returns the average precision of each of the R
    rankings and, last, of a random one: (n, R + 1).
    """
    same = classes[:, :, None] == classes[:, None]  # (B, N, N)
    on_object = (classes != BACKGROUND) & (classes != sources.IGNORE)
    image, i = (on_object & (same.sum(2) > 1)).nonzero(as_tuple=True)
    others = torch.arange(classes.shape[1] - 1).expand(len(i), -1)
    others = others + (others >= i[:, None])  # (n, N-1), all but i
    relevant = same[image, i].gather(1, others)  # (n, N-1)
    ranked = scores[image, :, i]  # (n, R, N)
    ranked = ranked.gather(2, others[:, None].expand(-1, ranked.shape[1], -1))
    precision = average_precision(ranked, relevant[:, None].expand_as(ranked))
    chance = expected_precision(relevant.sum(1, keepdim=True), relevant.shape[1])
    return torch.cat([precision, chance], dim=1)


@torch.no_grad()
def separation(models, normalise, source, count):
    """How well each model's attention separates objects in `count` images spread over a source.

    models: {name: Beit}, all of one shape; normalise: name of the pixel mean and std that they were
    trained with. For every patch on an object, all other patches are ranked by the attention they
    get from it; patches of the same class are relevant. Returns the mean average precision in
    percent: {name: (1 + heads,)} for the models, the mean over heads and then each head, and
    {name: (1,)} for `references` and for chance. Raises ValueError if the source has no masks or no
    object.
    """
    config = next(iter(models.values())).config
    seen = Seen(source, config.image_size)
    if not seen.samples:
        raise ValueError(
            f"{source.name} has no masks, which show where objects are; shapes and "
            "fashion-scenes have them"
        )
    batch = min(BATCH, max(1, WEIGHTS // (config.heads * config.grid**4)))
    indices, found = batches.spread(len(source), count), []
    for start in range(0, len(indices), batch):
        pixels, masks = zip(*(seen[index] for index in indices[start : start + batch]))
        pixels, classes = torch.stack(pixels), patch_classes(torch.stack(masks), config.patch_size)
        scores = {}  # {name: (B, rankings, N, N)}
        for name, model in models.items():
            heads = patch_attention(model, batches.standardise(pixels, normalise))
            scores[name] = torch.cat([heads.mean(1, keepdim=True), heads], dim=1)
        scores |= references(pixels, config)
        found.append(rank_patches(torch.cat(list(scores.values()), dim=1), classes))
    found = torch.cat(found)
    if not len(found):
        raise ValueError(f"{source.name}: no object in {len(indices)} images fills two patches")
    sizes = [values.shape[1] for values in scores.values()]
    return dict(zip([*scores, "chance"], (100 * found.mean(0)).split([*sizes, 1])))


def measure(models, normalise, source, validation, count):
    """separation() as the rows of a table: [(ranking, average precision, note)].

    Each model has a row for the mean over heads and one for its best head, which is chosen on
    `count` images of the source `validation`. The note says which it is and its score there.
    """
    found = separation(models, normalise, source, count)
    is_same = validation is source
    chosen = found if is_same else separation(models, normalise, validation, count)
    rows = []
    for name, values in found.items():
        if name not in models:
            rows.append((name, values.item(), None))
            continue
        head = chosen[name][1:].argmax().item()
        score = chosen[name][1 + head].item()
        note = "chosen on these images" if is_same else f"{score:.1f} on validation images"
        rows.append((f"{name}, mean over heads", values[0].item(), None))
        rows.append((f"{name}, best head", values[1 + head].item(), f"head {head}, {note}"))
    return rows


def load_models(checkpoint, seed=0, normalise="auto"):
    """({name: Beit}, normalise) for a checkpoint of ours or for published weights.

    The models are "pre-trained" and, with the same shape, "random weights"; normalise names the
    pixel mean and std that they were trained with.
    """
    torch.manual_seed(seed)
    trained, _, normalise = features.load_model(checkpoint, normalise)
    return {"pre-trained": trained, "random weights": Beit(trained.config).eval()}, normalise


def print_measure(models, normalise, args):
    """Print the table of --measure."""
    source = sets.open_source(args.data, args.split, args.data_dir)
    validation = source
    if args.split != "val":
        validation = sets.open_source(args.data, "val", args.data_dir)
    log.note(view_text(source, models["pre-trained"].config.image_size))
    for name, percent, note in measure(models, normalise, source, validation, args.measure):
        print(f"{name:31s} average precision {percent:.1f}" + (f" ({note})" if note else ""))


def draw(models, normalise, args):
    """Draw the picture --out."""
    config, images, source = models["pre-trained"].config, args.images, None
    given = [parse_point(text, config.grid) for text in args.points or []]
    if not images or any(image.isdigit() for image in images):
        source = sets.open_source(args.data, args.split, args.data_dir)
        images = images or [str(index) for index in batches.spread(len(source), SHOWN)]
    seen = see_images(images, source, config.image_size)
    has_masks = all(mask is not None for _, mask in seen)  # every row needs as many points
    rows = []
    for pixels, mask in seen:
        points = mask_points(mask, config.patch_size) if has_masks else default_points(config.grid)
        x = batches.standardise(pixels[None], normalise)
        rows += [attention_row(model, x, pixels, given or points) for model in models.values()]
    pictures.picture(args.out, rows, place=outputs.new)


def main(argv=None):
    parser = command_line.Parser(__doc__)
    parser.add_argument("checkpoint", help="checkpoint.pt of ours, or published BEiT weights")
    help_text = "image files, or numbers of images in --data; default: four spread over it"
    parser.add_argument("images", nargs="*", help=help_text)
    help_text = "reference patches as row,column; default: by the mask, or five across the image"
    parser.add_argument("--points", nargs="+", help=help_text)
    parser.add_argument("--out", help="PNG file to write")
    help_text = "score this many images spread over --data and write no picture"
    command_line.add_number(parser, "--measure", int, "[0, 1e9]", help_text, default=0)
    help_text = "data set for numbers and for --measure; default: that of the checkpoint"
    parser.add_argument("--data", help=help_text)
    parser.add_argument("--data-dir", help="folder of the data set's own files")
    parser.add_argument("--split", default="val", choices=sources.SPLITS, help="split of --data")
    command_line.add_normalise_flag(parser)
    args = parser.parse_args(argv)
    if (args.measure > 0) == bool(args.out) or (args.measure and (args.images or args.points)):
        parser.error("give --out (and images, --points) for a picture, or --measure N")
    if args.data is None:
        saved = checkpoints.arguments_of(args.checkpoint, parser, {"data", "data_dir"})
        args.data, args.data_dir = saved.get("data"), args.data_dir or saved.get("data_dir")
        if any(image.isdigit() for image in args.images or ["0"]):  # not files only
            if args.data is None:
                features.load_model(args.checkpoint, args.normalise)  # raises if it is none
                parser.error(f"--data is needed: {args.checkpoint} does not name its own")
            log.note(f"images of {args.data}, the checkpoint's data: --data takes others")
    if args.out:
        outputs.check_new(args.out, args.data, (".png",))
    models, normalise = load_models(args.checkpoint, normalise=args.normalise)
    if args.measure:
        print_measure(models, normalise, args)
    else:
        draw(models, normalise, args)


if __name__ == "__main__":
    with command_line.one_line_errors():
        main()
