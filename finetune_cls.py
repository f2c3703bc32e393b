"""Image classification (section 2.6): a linear classifier on the mean of the patch outputs.

    softmax(avg({h_i^L}, i = 1..N) W_c)

    python finetune_cls.py --init runs/beit/checkpoint.pt --out runs/cls
    python finetune_cls.py --init random --out runs/scratch                   # the baseline
    python finetune_cls.py --eval --init runs/cls/checkpoint.pt               # evaluate only
    torchrun --nproc_per_node=8 finetune_cls.py --recipe base --data IMAGENET --workers 8 \\
        --init runs/beit/checkpoint.pt --out runs/cls                         # one node of GPUs
    torchrun --nnodes=2 --node_rank=R --master_addr=HOST --nproc_per_node=8 finetune_cls.py ...

--batch-size is the global batch: processes x accumulation passes x images per pass. At 384 pixels
(our rates): --init runs/cls/checkpoint.pt --image-size 384 --lr 4e-4 --epochs 10 --warmup-epochs 0
OUT: checkpoint.pt, metrics.jsonl, loss.svg.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from beit import Beit, BeitConfig, finetuned_config, init_weight, load_backbone, parameter_groups
from images import batches, labelled
from plumbing import command_line, memory, noise, processes, published, schedules
from plumbing.run import Run, evaluate_only

RECIPES = {
    # name: (demo, fashion, photos, base, large, range, help). base, large: the paper's or released.
    "data": ("shapes", "fashion-mnist", "imagenette", None, None, "", "a data set (docs/data.md)"),
    "image_size": (24, 28, 112, 224, 224, "[1, 65536]", "pixels; default: those of --init"),
    "labels_per_class": (100, 100, 100, 0, 0, "[0, 1e9]", "images per class, by the seed; 0: all"),
    "model": ("tiny", "tiny", "tiny8", "base", "large", "", "size for --init random: see MODELS"),
    "drop_path": (0.0, 0.0, 0.0, 0.1, 0.2, "[0, 1)", "stochastic depth"),
    # augmentation
    "min_crop": (1.0, 1.0, 0.35, 0.08, 0.08, "(0, 1]", "least share of the area in a crop"),
    "flip": (True, False, True, True, True, "", "mirror half of the images"),
    "randaugment": (0.0, 0.0, 0.0, 9.0, 9.0, "[0, 10]", "magnitude of two operations; 0: none"),
    "erasing": (0.0, 0.0, 0.0, 0.25, 0.25, "[0, 1]", "probability of random erasing"),
    "mixup": (0.0, 0.0, 0.0, 0.8, 0.8, "[0, 1000]", "alpha of mixup; 0: none"),
    "cutmix": (0.0, 0.0, 0.0, 1.0, 1.0, "[0, 1000]", "alpha; 0: none; with mixup, half the steps"),
    "smoothing": (0.1, 0.1, 0.1, 0.1, 0.1, "[0, 1]", "label smoothing"),
    "eval_crop": (*(1.0,) * 3, *(224 / 256,) * 2, "[0.1, 1]", "share of the short side, below 384"),
    # optimisation
    "epochs": (15.0, 10.0, 20.0, 100.0, 50.0, "(0, 1e6]", "passes over the labelled images"),
    "warmup_epochs": (1.5, 1.0, 2.0, 20.0, 5.0, "[0, 1e6]", "epochs of linear warm-up"),
    "batch_size": (40, 50, 50, 1024, 1024, "[1, 1e6]", "global batch; scale lr with it"),
    "lr": (1e-3, 1e-3, 2e-3, 4e-3, 1e-3, "[0, 100]", "peak learning rate; cosine to min_lr"),
    "min_lr": (1e-6, 1e-6, 1e-6, 1e-6, 1e-6, "[0, 100]", "final learning rate"),
    "layer_decay": (0.75, 0.75, 0.75, 0.65, 0.75, "(0, 1]", "lr factor per layer below the head"),
    "beta2": (0.98, 0.98, 0.98, 0.999, 0.999, "[0, 1)", "AdamW's second beta; the first is 0.9"),
    "weight_decay": (0.05, 0.05, 0.05, 0.05, 0.05, "[0, 100]", "AdamW weight decay"),
    "clip": (3.0, 3.0, 3.0, 0.0, 0.0, "[0, 1e9]", "largest norm of the gradient; 0: no clipping"),
    "eval_images": (1000, 10_000, 10_000, 50_000, 50_000, "[1, 1e9]", "limit on evaluation images"),
    "save_every": (1000, 1000, 1000, 1000, 1000, "[1, 1e9]", "steps between evaluations, saves"),
}  # fmt: skip
KIND = "classification"  # of its checkpoints
SIZE_OF_INIT = command_line.COLUMNS  # recipes that take the image size of --init


class BeitForClassification(Beit):
    """Mean of the patch outputs, LayerNorm (as released), linear. W_c starts near 0 (x 0.001).

    layer: of the linear probe, which takes H^l in place of H^L; None: L.
    """

    def __init__(self, config, classes, layer=None):
        super().__init__(config)
        self.layer = layer
        self.fc_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, classes)  # W_c, and a bias (as released)
        init_weight(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.head.weight.data.mul_(0.001)

    def forward(self, x, u=None):
        """Logits, before section 2.6's softmax: (B, 3, H, W) -> (B, C). u: see Beit.forward."""
        H = super().forward(x, u=u) if self.layer is None else self.features(x, self.layer)
        return self.head(self.fc_norm(H[:, 1:].mean(dim=1)))  # LN(avg({h_i^L})) W_c + b


@torch.no_grad()
def evaluate(model, held_out, args, normalise, process):
    """top1 and top5 accuracy in percent on held-out images."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=process.device)  # top 1, top 5, images
    for images, labels in batches.eval_batches(held_out, args, process):
        x = batches.standardise(batches.to_float(images, process.device), normalise)
        with process.autocast():
            logits = model(x)
        best = logits.float().topk(min(5, logits.shape[1])).indices  # (B, 5)
        hits = best == labels.to(process.device)[:, None]
        sums += torch.tensor([hits[:, 0].sum(), hits.sum(), len(x)], device=process.device)
    model.train()
    top1, top5, count = processes.all_sum(sums).tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count}


# -------------------------------------------------------- set-up and the loop


def prepare(args):
    """(model, training set, held-out set, normalise, class names). ValueError on a bad --layer."""
    init, normalise = published.load_init(args, "pretraining", KIND)
    args.image_size = args.image_size or init["config"]["image_size"]
    train_set, held_out, classes = labelled.open_sets(args, normalise)
    config = finetuned_config(init, args.model, args.image_size, args.drop_path)
    memory.check(args, config)
    if args.layer is not None and not 1 <= args.layer <= config.depth:
        raise ValueError(f"--layer {args.layer} is not between 1 and the {config.depth} blocks")
    args.layer = None if args.layer == config.depth else args.layer  # H^L, as without the flag
    torch.manual_seed(args.seed)
    model = BeitForClassification(config, len(classes), args.layer)
    if init:  # from a classifier also the norm, and the linear layer if its classes are the same
        known = len(init["model"].get("head.weight", ()))
        same_classes = init.get("classes") in (classes, None) and known == len(classes)
        keep = ("fc_norm.", "head.") if same_classes else ("fc_norm.",)
        same_layer = init["kind"] == KIND and init.get("layer") == args.layer
        load_backbone(model, init["model"], keep if same_layer else ())
    if args.linear_probe:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(("fc_norm.", "head.")))
    return model, train_set, held_out, normalise, classes


def prepare_evaluation(args):
    """(model, held-out set, normalise) to --eval; raises ValueError if --data has other classes."""
    init, normalise = published.load_init(args, KIND)
    config, count = BeitConfig(**init["config"]), len(init["model"]["head.weight"])
    model = BeitForClassification(config, count, init.get("layer"))
    load_backbone(model, init["model"], ("fc_norm.", "head."))
    args.image_size = model.config.image_size
    return model, labelled.open_held_out(args, normalise, init["classes"], count), normalise


def main(argv=None):
    parser = command_line.recipe_parser(__doc__, RECIPES)
    command_line.add_init_flags(parser)
    frozen = "train only the norm and the head; crops and flips are the only augmentation"
    parser.add_argument("--linear-probe", action="store_true", help=frozen)
    layer = "layer that --linear-probe takes features from; default: L, the last"
    command_line.add_number(parser, "--layer", int, "[1, 1000]", layer)
    args = command_line.parse_recipe(parser, RECIPES, argv, SIZE_OF_INIT)
    if args.linear_probe:  # no stochastic depth: the backbone computes as in evaluation mode
        args.randaugment = args.erasing = args.mixup = args.cutmix = args.drop_path = 0.0
    process = processes.setup(args.device, args.amp, args.compile)
    if args.eval:
        model, held_out, normalise = prepare_evaluation(args)
    else:
        model, train_set, held_out, normalise, classes = prepare(args)
    model.to(process.device).recompute = args.recompute
    measure = functools.partial(evaluate, model, held_out, args, normalise, process)
    if args.eval:
        return evaluate_only(args, process, held_out, measure)
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True)
    per_epoch = batches.steps_per_epoch(len(train_set), args.batch_size)
    steps, warmup = schedules.step_counts(args, per_epoch)
    extra = {"normalise": normalise, "classes": classes, "layer": args.layer}
    run = Run(args, KIND, process, model, optimizer, steps, extra, train_set, held_out)
    run.clock.watch(run.model, optimizer)
    scaler, device = process.scaler, process.device
    loader = batches.train_batches(train_set, run)
    for step, (images, labels) in run.steps(loader, measure):
        lr = schedules.warmup_cosine(step, steps, warmup, args.lr, args.min_lr)
        schedules.set_lr(optimizer, lr)
        x = batches.standardise(batches.to_float(images, device), normalise)
        targets = F.one_hot(labels.to(device), len(classes)).float()  # (B, C)
        rng = noise.sample_rng(args.seed, step, "mix")
        x, targets = labelled.mix(x, targets, args.mixup, args.cutmix, rng)
        u = noise.depth_noise(model.config, len(x), args.seed, step, process)
        total = 0.0
        for x, targets, u in run.passes(x, targets, u):
            with process.autocast():
                logits = run.model(x, u).float()  # (B, C)
            loss = F.cross_entropy(logits, targets, label_smoothing=args.smoothing)
            scaler.scale(loss / args.accumulate).backward()
            total += loss.detach() / args.accumulate
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        if run.allows(step, norm, lr):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.report(total, lr=lr, gradient_norm=norm)
    run.finish(measure)


if __name__ == "__main__":
    with command_line.one_line_errors(stoppable=True):
        main()
