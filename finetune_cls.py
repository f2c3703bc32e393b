"""Image classification (section 2.6): fine-tune BEiT with a linear classifier on the mean of the patch outputs.

    softmax(avg({h_i^L}, i = 1..N) W_c)

    python finetune_cls.py --init runs/beit/checkpoint.pt --out runs/cls                 # drawn shapes, on a CPU
    python finetune_cls.py --init random --out runs/scratch                              # the baseline
    python finetune_cls.py --eval --init runs/cls/checkpoint.pt                          # evaluate only
    torchrun --nproc_per_node=8 finetune_cls.py --recipe base --data IMAGENET --init runs/beit/checkpoint.pt \\
        --out runs/cls --workers 8                                                       # one node of GPUs
    torchrun --nnodes=2 --node_rank=R --master_addr=HOST --nproc_per_node=8 finetune_cls.py ...    # on each node

--batch-size is the global batch: processes x accumulation passes x images per pass. At 384 pixels:
--init runs/cls/checkpoint.pt --image-size 384; positions are interpolated.
OUT: checkpoint.pt, metrics.jsonl, loss.png.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import data
import training
from beit import (
    RECOMPUTE,
    Beit,
    BeitConfig,
    finetuned_config,
    init_weight,
    load_backbone,
    load_pretrained,
    parameter_groups,
)

RECIPES = {
    # name: (demo, fashion, base, large, help). base and large are the paper's appendix, for ImageNet-1K.
    "data": ("shapes", "fashion-mnist", None, None, "data set: a name or a path, see data.py"),
    "image_size": (24, 28, 224, 224, "pixels; other than in pre-training, positions are interpolated"),
    "labels_per_class": (100, 100, 0, 0, "train on a balanced subset, drawn by the seed; 0: all"),
    "model": ("tiny", "tiny", "base", "large", "size with --init random; a checkpoint brings its own"),
    "drop_path": (0.0, 0.0, 0.1, 0.2, "stochastic depth"),
    # augmentation
    "min_crop": (1.0, 1.0, 0.08, 0.08, "smallest share of the area that a random crop keeps; 1: no crop"),
    "flip": (True, False, True, True, "mirror half of the images"),
    "randaugment": (0.0, 0.0, 9.0, 9.0, "magnitude (0 to 10, std 0.5) of two random operations; 0: none"),
    "erasing": (0.0, 0.0, 0.25, 0.25, "probability of random erasing"),
    "mixup": (0.0, 0.0, 0.8, 0.8, "alpha of mixup; 0: none"),
    "cutmix": (0.0, 0.0, 1.0, 1.0, "alpha of cutmix; 0: none; with both, each on half of the batches"),
    "smoothing": (0.1, 0.1, 0.1, 0.1, "label smoothing"),
    "eval_crop": (1.0, 1.0, 224 / 256, 224 / 256, "share of the short side to evaluate on; all from 384 pixels on"),
    # optimisation
    "epochs": (15.0, 10.0, 100.0, 50.0, "passes over the labelled images"),
    "warmup_epochs": (1.5, 1.0, 20.0, 5.0, "of linear warm-up"),
    "batch_size": (40, 50, 1024, 1024, "images per step, all processes together; scale lr with it"),
    "lr": (1e-3, 1e-3, 4e-3, 1e-3, "peak learning rate of the head; cosine to min_lr"),
    "min_lr": (1e-6, 1e-6, 1e-6, 1e-6, "final learning rate"),
    "layer_decay": (0.75, 0.75, 0.65, 0.75, "learning rate of a layer relative to the next; 1 suits random weights"),
    "beta2": (0.98, 0.98, 0.999, 0.999, "AdamW's second beta; the first is 0.9"),
    "weight_decay": (0.05, 0.05, 0.05, 0.05, "AdamW weight decay"),
    "clip": (3.0, 3.0, 0.0, 0.0, "largest norm of the gradient; 0: no clipping"),
    "eval_images": (1000, 10_000, 50_000, 50_000, "held-out images to evaluate on, at most"),
    "save_every": (1000, 1000, 1000, 1000, "steps between evaluations and checkpoints"),
}
KIND = "classification"  # of its checkpoints


class BeitForClassification(Beit):
    """Mean of the patch outputs, norm, linear. The head starts near zero (x 0.001)."""

    def __init__(self, config, classes):
        super().__init__(config)
        self.fc_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, classes)  # W_c
        init_weight(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.head.weight.data.mul_(0.001)

    def forward(self, x, u=None):
        """Logits, before the softmax of section 2.6: (B, 3, H, W) -> (B, C). u: see Beit.forward."""
        h = super().forward(x, u=u)[:, 1:].mean(dim=1)  # avg of h_i^L: (B, D)
        return self.head(self.fc_norm(h))


# ---------------------------------------------------------------- RandAugment


def warp(image, matrix):
    """Affine map of (3, H, W) about its centre, bilinear; outside is grey. matrix: 2x3 rows, output -> input."""
    theta = torch.tensor(matrix, dtype=torch.float32)[None]
    grid = F.affine_grid(theta, [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None] - 0.5, grid, align_corners=False)[0] + 0.5


def blend(image, other, factor):
    """other + factor (image - other): factor 1 leaves the image, 0 gives the other."""
    return (other + factor * (image - other)).clamp(0, 1)


def smooth(image):
    """3x3 average that weighs the centre 5 to 1; the border stays."""
    kernel = torch.ones(3, 1, 3, 3) / 13
    kernel[:, :, 1, 1] = 5 / 13
    blurred = image.clone()
    blurred[:, 1:-1, 1:-1] = F.conv2d(image[None], kernel, groups=3)[0]
    return blurred


def equalise(image):
    """Each channel's values spread evenly over 0..1, by their cumulative histogram."""
    levels = (image * 255).round().long().flatten(1)  # (3, HW)
    histogram = torch.zeros(3, 256).scatter_add_(1, levels, torch.ones(levels.shape))
    below = histogram.cumsum(1) - histogram / 2
    return (below / below.new_tensor(levels.shape[1])).gather(1, levels).view_as(image)


def autocontrast(image):
    """Each channel stretched to 0..1."""
    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    return torch.where(high > low, (image - low) / (high - low).clamp_min(1e-6), image)


# Each operation takes an image (3, H, W) in [0, 1], a strength m in 0..1 and a sign s; a larger m changes more.
OPERATIONS = [
    lambda x, m, s: autocontrast(x),
    lambda x, m, s: equalise(x),
    lambda x, m, s: 1 - x,
    lambda x, m, s: warp(x, rotation(math.radians(30 * m * s))),
    lambda x, m, s: (x * 255).byte().bitwise_and(256 - 2 ** (4 + int(4 * m))) / 255 if m < 1 else x * 0,  # posterise
    lambda x, m, s: torch.where(x < 1 - m, x, 1 - x),  # solarise
    lambda x, m, s: torch.where(x < 0.5, (x + m * 110 / 255).clamp(max=1), x),  # solarise, adding
    lambda x, m, s: blend(x, data.grey(x), 1 + 0.9 * m * s),  # colour
    lambda x, m, s: blend(x, data.grey(x).mean(), 1 + 0.9 * m * s),  # contrast
    lambda x, m, s: blend(x, x * 0, 1 + 0.9 * m * s),  # brightness
    lambda x, m, s: blend(x, smooth(x), 1 + 0.9 * m * s),  # sharpness
    lambda x, m, s: warp(x, [[1, 0.3 * m * s, 0], [0, 1, 0]]),  # shear
    lambda x, m, s: warp(x, [[1, 0, 0], [0.3 * m * s, 1, 0]]),
    lambda x, m, s: warp(x, [[1, 0, 0.9 * m * s], [0, 1, 0]]),  # shift by at most 0.45 of the width (2 units)
    lambda x, m, s: warp(x, [[1, 0, 0], [0, 1, 0.9 * m * s]]),
]


def rotation(angle):
    """2x3 matrix of a rotation, for warp."""
    return [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]


def randaugment(image, magnitude, rng):
    """RandAugment "9/0.5": two operations, each applied with probability 1/2, strength N(magnitude, 0.5) / 10.

    uint8 (3, H, W) -> uint8 (3, H, W).
    """
    x = image / 255
    for operation in rng.choices(OPERATIONS, k=2):
        strength = min(max(rng.gauss(magnitude, 0.5) / 10, 0), 1)
        sign = rng.choice((-1, 1))
        if rng.random() < 0.5:
            x = operation(x, strength, sign)
    return (x * 255).round().clamp(0, 255).byte()


def erase(image, rng):
    """Random erasing, in place: noise over a rectangle of 2 % to 1/3 of the area, aspect 0.3 to 1/0.3."""
    _, H, W = image.shape
    for _ in range(10):
        area, aspect = H * W * rng.uniform(0.02, 1 / 3), math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < H and 0 < w < W:
            top, left = rng.randint(0, H - h), rng.randint(0, W - w)
            noise = torch.frombuffer(bytearray(rng.randbytes(3 * h * w)), dtype=torch.uint8)
            image[:, top : top + h, left : left + w] = noise.view(3, h, w)
            return


class LabelledViews(data.Crops):
    """The view of data.Crops after RandAugment and erasing, and labels (B,)."""

    def __init__(self, args, source, classes, train):
        if source.labels is None:
            raise ValueError(f"{source.name}: it has no class labels")
        if source.labels.max() >= classes:
            raise ValueError(f"{source.name}: label {source.labels.max()} is out of range for {classes} classes")
        centre = 1.0 if args.image_size >= 384 else args.eval_crop
        view = [(args.image_size, "bicubic")]
        super().__init__(source, view, train, args.seed, args.min_crop, args.flip, centre=centre, labels=True)
        self.randaugment, self.erasing = args.randaugment, args.erasing

    def __getitems__(self, keys):
        images, labels = super().__getitems__(keys)
        if self.train and (self.randaugment or self.erasing):
            images = images.clone()
            for i, key in enumerate(keys):
                rng = data.sample_rng(self.seed, *key, "augment")
                if self.randaugment:
                    images[i] = randaugment(images[i], self.randaugment, rng)
                if rng.random() < self.erasing:
                    erase(images[i], rng)
        return [images, labels]


# ---------------------------------------------------------------- mixing images and labels


def mix(x, targets, mixup, cutmix, rng):
    """mixup or cutmix of each image with its neighbour in the batch: x (B, 3, H, W), targets (B, C) -> the same shapes.

    lambda ~ Beta(alpha, alpha), one for the step, is the share of the image itself: in every pixel (mixup), or as the
    area outside a pasted box (cutmix; recomputed after the box is cut off at the border). Neighbours (0 and 1, 2 and
    3, ...) stay together when a batch is dealt to processes in even parts.
    """
    if not mixup and not cutmix:
        return x, targets
    neighbour = (torch.arange(len(x), device=x.device) ^ 1).clamp_max(len(x) - 1)  # an odd last one keeps to itself
    if cutmix and (not mixup or rng.random() < 0.5):
        share = rng.betavariate(cutmix, cutmix)
        H, W = x.shape[-2:]
        h, w = H * math.sqrt(1 - share), W * math.sqrt(1 - share)
        cy, cx = rng.random() * H, rng.random() * W
        top, bottom = max(round(cy - h / 2), 0), min(round(cy + h / 2), H)
        left, right = max(round(cx - w / 2), 0), min(round(cx + w / 2), W)
        share = 1 - (bottom - top) * (right - left) / (H * W)
        pasted, x = x[neighbour, :, top:bottom, left:right], x.clone()
        x[:, :, top:bottom, left:right] = pasted
    else:
        share = rng.betavariate(mixup, mixup)
        x = share * x + (1 - share) * x[neighbour]
    return x, share * targets + (1 - share) * targets[neighbour]


# ---------------------------------------------------------------- training


@torch.no_grad()
def evaluate(model, held_out, args, statistics, device, rank, world, autocast):
    """top1 and top5 accuracy in percent on held-out images, shared by all processes."""
    model.eval()
    batch_size = max(1, args.batch_size // world // args.accumulate)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # right, right among five, images
    for images, labels in data.eval_batches(held_out, batch_size, args.eval_images, rank, world, args.workers):
        x, labels = data.normalise(data.to_float(images, device), statistics), labels.to(device)
        with autocast():
            logits = model(x)
        best = logits.float().topk(min(5, logits.shape[1])).indices  # (B, 5)
        hits = best == labels[:, None]
        sums += torch.tensor([hits[:, 0].sum(), hits.sum(), len(x)], device=device)
    model.train()
    top1, top5, images = training.all_sum(sums).tolist()
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images}


def prepare(args, device):
    """(model, training set or None with --eval, held-out set, pixel statistics, class names)."""
    init = None
    if args.init != "random":
        init = load_pretrained(args.init, *((KIND,) if args.eval else ("pretraining", KIND)))
    train_set = None
    if args.eval:
        model = BeitForClassification(BeitConfig(**init["config"]), len(init["model"]["head.weight"]))
        load_backbone(model, init["model"], with_head=True)
        args.image_size = model.config.image_size
    else:
        source = data.open_source(args.data, "train", args.data_dir)
        classes = source.classes
        train_set = LabelledViews(args, source, len(classes), True)
        if args.labels_per_class:
            train_set.source = data.balanced_subset(source, args.labels_per_class, args.seed)
        config = finetuned_config(init, args.model, args.image_size, args.drop_path)
        torch.manual_seed(args.seed)
        model = BeitForClassification(config, len(classes))
        if init:  # a classifier of the same classes, or of as many without names, goes on with its head, say at 384
            same = init["kind"] == KIND and init["classes"] in (classes, None)
            same = same and len(init["model"]["head.weight"]) == len(classes)
            load_backbone(model, init["model"], with_head=same)
        if args.linear_probe:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(("fc_norm.", "head.")))
    held_out = data.open_source(args.data, args.eval_split, args.data_dir)
    if args.eval:  # weights from elsewhere have no class names: those of as many classes as the data has fit
        known, classes = model.head.out_features, init["classes"] or held_out.classes
        if len(classes) != known or len(held_out.classes) > known:
            raise ValueError(f"{args.init} tells {known} classes apart, {args.data} has {len(held_out.classes)}")
    statistics = init["normalise"] if init else "half"
    held_out_set = LabelledViews(args, held_out, len(classes), False)
    data.check_names(held_out.classes, classes, held_out)
    return model.to(device), train_set, held_out_set, statistics, classes


def main(argv=None):
    parser = training.recipe_parser(__doc__, RECIPES)
    parser.add_argument("--init", required=True, help="a checkpoint.pt, published BEiT weights, or random")
    parser.add_argument("--linear-probe", action="store_true", help="freeze the backbone, train norm and head only")
    parser.add_argument("--eval", action="store_true", help="evaluate --init on --eval-split and stop")
    parser.add_argument("--recompute", action="store_true", help=RECOMPUTE)
    args = training.parse_recipe(parser, RECIPES, argv)
    if args.eval and args.init == "random":
        parser.error("--eval needs --init CHECKPOINT: there is nothing to evaluate in random weights")
    device, rank, world = training.setup(args.device)
    autocast, scaler = training.precision(args.amp, device)
    model, train_set, held_out, statistics, classes = prepare(args, device)
    if args.eval:
        result = evaluate(model, held_out, args, statistics, device, rank, world, autocast)
        training.Log(None, rank, 0).final(**result)
        return
    model.recompute = args.recompute
    batch_size = training.rank_batch(args.batch_size, args.accumulate, world)
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True)
    out = training.open_output(args, rank)
    step = training.resume_checkpoint(out, KIND, args, model, optimizer, scaler)["step"] if args.resume else 0
    steps, warmup = training.duration(args, data.steps_per_epoch(len(train_set), args.batch_size))

    def save(step):
        if rank == 0:
            more = {"normalise": statistics, "classes": classes}
            training.save_checkpoint(out, KIND, args, step, model, optimizer, scaler, **more)

    if not args.resume:
        save(0)  # a folder that cannot be written to fails now
    train_model, finite = training.wrap(model, device, args.compile), training.FiniteSteps(out)
    clock = training.Clock(args.benchmark, device)
    log = training.Log(out, rank, steps, step)
    loader = data.train_batches(train_set, batch_size, rank, world, args.seed, step, steps, args.workers, device)
    for images, labels in clock.batches(loader):
        lr = training.warmup_cosine(step, steps, warmup, args.lr, args.min_lr)
        training.set_lr(optimizer, lr)
        x = data.normalise(data.to_float(images, device), statistics)
        targets = F.one_hot(labels.to(device), model.head.out_features).float()  # (B, C)
        x, targets = mix(x, targets, args.mixup, args.cutmix, data.sample_rng(args.seed, step, "mix"))
        u = training.depth_noise(model.config, len(x), args.seed, step, rank, device)
        clock.mark("data")
        total = 0.0
        parts = [t.chunk(args.accumulate) for t in (x, targets, u)]
        for i, (x_i, targets_i, u_i) in enumerate(zip(*parts), start=1):
            with training.sync_only_if(train_model, i == args.accumulate):
                with autocast():
                    logits = train_model(x_i, u_i)  # (B, C)
                loss = F.cross_entropy(logits.float(), targets_i, label_smoothing=args.smoothing) / args.accumulate
                clock.mark("forward")
                scaler.scale(loss).backward()
                clock.mark("backward")
            total += loss.detach()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf).item()
        if finite.allow(norm, step, lr):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        clock.mark("optimiser")
        step += 1
        if step % args.log_every == 0 or step == steps:
            loss = (training.all_sum(total) / world).item()
            trouble = train_set.trouble() | finite.trouble()
            log.step(step, args.batch_size, loss=loss, lr=lr, gradient_norm=norm, **trouble)
        training.save_or_stop(save, step, steps, args.save_every, device)
        if step % args.save_every == 0 and step < steps:
            log.write(step=step, **evaluate(model, held_out, args, statistics, device, rank, world, autocast))
    if args.benchmark:
        clock.report(args.batch_size, autocast, rank)
        return
    result = evaluate(model, held_out, args, statistics, device, rank, world, autocast)
    log.final(**result)
    if rank == 0:
        training.curve(out / "loss.png", [m["loss"] for m in training.read_metrics(out) if "loss" in m])


if __name__ == "__main__":
    with training.one_line_errors(stoppable=True):
        main()
