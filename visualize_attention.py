"""Figure 2: where a reference patch looks. Attention of the last layer, from each reference patch to all patches.

    python visualize_attention.py runs/beit/checkpoint.pt photo.jpg --out attention.png --points 4,4 9,7
    python visualize_attention.py runs/beit/checkpoint.pt 3 --data shapes --out attention.png    # 4th image of val

The picture is a row: the image with the reference patches framed, then for each of them the mean over heads of
softmax(q k^T / sqrt(D/heads)) (with the relative bias, where the model has one), the reference patch framed,
brightest = most attended. Points are row,column in patches, from 0 at the top left.
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


def load_model(checkpoint):
    """The backbone in any of our checkpoints or in published weights, and its pixel statistics."""
    state = load_pretrained(checkpoint, "pretraining", "classification", "segmentation")
    model = Beit(BeitConfig(**state["config"]))
    load_backbone(model, state["model"])
    return model.eval(), state["normalise"]


def main(argv=None):
    parser = training.Parser(__doc__)
    parser.add_argument("checkpoint", help="checkpoint.pt of ours, or published BEiT weights")
    parser.add_argument("image", help="an image file, or the number of an image in --data")
    parser.add_argument("--points", nargs="+", help="reference patches as row,column; default: five across the image")
    parser.add_argument("--out", required=True, help="PNG file to write")
    parser.add_argument("--data", default="shapes", help="data set that a number counts in, see data.py")
    parser.add_argument("--data-dir", help="where the data set's own files are")
    parser.add_argument("--split", default="val", choices=data.SPLITS, help="part of --data")
    args = parser.parse_args(argv)
    model, statistics = load_model(args.checkpoint)
    grid = model.config.grid
    near, far = grid // 4, grid - 1 - grid // 4
    default = [(near, near), (near, far), (grid // 2, grid // 2), (far, near), (far, far)]
    points = [parse_point(text, grid) for text in args.points] if args.points else default
    pixels = load_image(args.image, args.data, args.split, args.data_dir, model.config.image_size)
    row = attention_row(model, data.normalise(pixels, statistics), pixels, points)
    training.picture(args.out, [row], side=192)


if __name__ == "__main__":
    with training.one_line_errors():
        main()
