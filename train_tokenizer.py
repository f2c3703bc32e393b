"""Stage 1 (section 2.1, eq. 3 left): train the discrete VAE that turns images into visual tokens.

    python train_tokenizer.py --out runs/tokenizer                  # synthetic shapes, on a CPU
    python train_tokenizer.py --eval --init runs/tokenizer/checkpoint.pt --out runs/look
    torchrun --nproc_per_node=8 train_tokenizer.py --recipe base --data IMAGENET --workers 8 \\
        --out runs/tokenizer                                        # one node of GPUs
    torchrun --nnodes=2 --node_rank=R --master_addr=HOST --nproc_per_node=8 train_tokenizer.py ...

--batch-size is the global batch: processes x accumulation passes x images per pass.
OUT: checkpoint.pt, metrics.jsonl, loss.svg, reconstructions.png (originals above).
"""

import functools
import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dvae import DVAEConfig, build, load_tokenizer
from images import batches, sets, views
from plumbing import advice, checkpoints, command_line, log, memory, noise, pictures
from plumbing import processes, schedules
from plumbing.run import Run, evaluate_only

RECIPES = {
    # name: (demo, fashion, photos, base, large, range, help). base, large: mostly DALL-E's.
    "data": ("shapes", "fashion-mnist", "imagenette", None, None, "", "a data set (docs/data.md)"),
    "image_size": (24, 28, 112, 256, 256, "[1, 65536]", "pixels; a trained model takes others too"),
    "min_crop": (1.0, 1.0, 0.4, 0.4, 0.4, "(0, 1]", "least share of area in a crop; 1: a square"),
    "flip": (True, True, True, True, True, "", "mirror half of the images"),
    # the networks
    "vocab_size": (256, 512, 1024, 8192, 8192, "[1, 1e6]", "|V|, number of visual tokens"),
    "hidden": (32, 48, 32, 256, 256, "[4, 65536]", "width of the first group of residual blocks"),
    "groups": (3, 3, 4, 4, 4, "[2, 4]", "groups of blocks; they downsample by 2, 4 or 8"),
    "blocks_per_group": (1, 1, 1, 2, 2, "[1, 1000]", "residual blocks in each group"),
    "code_dim": (64, 64, 64, 128, 128, "[1, 65536]", "width of a code in the decoder"),
    "quantizer": (*("gumbel",) * 5, "gumbel|vq", "Gumbel-softmax, or VQ-VAE"),
    "likelihood": ("mse", "mse", "mse", *("logit-laplace",) * 2, "logit-laplace|mse", "of p(x|z)"),
    "normalise_logits": (True, True, True, False, False, "", "standardise logits; not the paper's"),
    # relaxation: temperature 1 -> 1/16, weight of the KL 0 -> beta
    "tau": (*(1 / 16,) * 5, "[1e-4, 1e4]", "final temperature of Gumbel-softmax; cosine from 1"),
    "tau_steps": (300, 350, 500, 150_000, 150_000, "[0, 1e9]", "steps until the final temperature"),
    "beta": (1e-2, 1e-2, 1e-2, 6.6, 6.6, "[0, 1e6]", "final weight of the KL, summed over tokens"),
    "beta_steps": (0, 0, 0, 5000, 5000, "[0, 1e9]", "steps until the final KL weight"),
    # optimisation
    "steps": (600, 700, 1000, 3_000_000, 3_000_000, "[1, 1e9]", "optimisation steps"),
    "batch_size": (64, 64, 32, 512, 512, "[1, 1e6]", "global batch; scale lr with it"),
    "lr": (4e-3, 4e-3, 4e-3, 1e-4, 1e-4, "[0, 100]", "peak learning rate; cosine to min_lr"),
    "min_lr": (1e-4, 1e-4, 1e-4, 1.25e-6, 1.25e-6, "[0, 100]", "final learning rate"),
    "warmup_steps": (50, 50, 50, 5000, 5000, "[0, 1e9]", "steps of linear warm-up"),
    "weight_decay": (1e-4, 1e-4, 1e-4, 1e-4, 1e-4, "[0, 100]", "AdamW weight decay"),
    "ema": (0.0, 0.0, 0.0, 0.999, 0.999, "[0, 1)", "decay of the EMA, which is saved; 0: none"),
    "eval_images": (1000, 5000, 4000, 5000, 5000, "[1, 1e9]", "limit on evaluation images"),
    "save_every": (1000, 1000, 1000, 5000, 5000, "[1, 1e9]", "steps between evaluations, saves"),
}  # fmt: skip
KIND = "tokenizer"  # of its checkpoints


@torch.no_grad()
def evaluate(model, held_out, args, process):
    """Reconstruction from hard tokens on up to --eval-images held-out images.

    reconstruction_mse (pixels in 0..1), codebook_perplexity (exp of the entropy of the codes'
    shares) and codebook_used (codes that occur at all).
    """
    model.eval()
    device = process.device
    counts = torch.zeros(model.config.vocab_size, dtype=torch.float64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # squared error, pixel values
    for (images,) in batches.eval_batches(held_out, args, process):
        x = batches.to_float(images, device)
        with process.autocast():
            z = model.tokens(x)
            reconstruction = model.decode(z)
        counts += torch.bincount(z.flatten(), minlength=len(counts))
        sums += torch.tensor([(reconstruction - x).pow(2).sum().item(), x.numel()], device=device)
    model.train()
    counts, sums = processes.all_sum(counts), processes.all_sum(sums)
    share = counts / counts.sum()
    return {
        "reconstruction_mse": (sums[0] / sums[1]).item(),
        "codebook_perplexity": torch.exp(-torch.xlogy(share, share).sum()).item(),
        "codebook_used": int((counts > 0).sum()),
    }


@torch.no_grad()
def draw_pictures(model, held_out, out):
    """reconstructions.png: twelve originals over their reconstructions from hard tokens."""
    x = batches.to_float(held_out.pictures(12)[0], model.pixel_variance.device)
    model.eval()
    pictures.picture(out / "reconstructions.png", [x, model.decode(model.tokens(x))])
    model.train()


def dataset(args, split, train):
    """One view of a split's images, with random crops and flips in training only."""
    source = sets.open_source(args.data, split, args.data_dir)
    view = [(args.image_size, "bicubic")]
    return views.Crops(source, view, train, args.seed, args.min_crop, args.flip)


def revive_codes(model, x, step, args, process):
    """VQ-VAE: every 50 steps move codes no longer in use to encoder outputs of this batch."""
    if args.quantizer == "vq" and step % 50 == 0:
        seed = noise.seed_for(args.seed, step)
        model.revive_codes(x.chunk(args.accumulate), process.rank, process.world, seed)


def build_model(args):
    """The dVAE of the recipe, or that of --init, whose configuration replaces the recipe's.

    Raises ValueError if the image size does not divide into tokens, or the memory is too small.
    """
    names = DVAEConfig.__dataclass_fields__
    if model := args.init and load_tokenizer(checkpoints.start_of(args)):
        model.requires_grad_(True).train()
        log.note(f"--init {args.init}: its weights and its configuration, not the recipe's")
        vars(args).update({name: getattr(model.config, name) for name in names})
    config = DVAEConfig(**{name: getattr(args, name) for name in names})
    memory.check(args, config)
    factor = config.downsampling
    if args.image_size % factor:
        raise ValueError(f"image size {args.image_size} is not a multiple of {factor} (--groups)")
    return model or build(config)


def main(argv=None):
    parser = command_line.recipe_parser(__doc__, RECIPES)
    command_line.add_look_flags(parser, "a checkpoint.pt of this script, or dalle:FOLDER")
    args = command_line.parse_recipe(parser, RECIPES, argv)
    process = processes.setup(args.device, args.amp, args.compile)
    torch.manual_seed(args.seed)
    model = evaluated = build_model(args).to(process.device)
    held_out = dataset(args, args.eval_split, False)
    if args.eval:
        measure = functools.partial(evaluate, model, held_out, args, process)
        draw = functools.partial(draw_pictures, model, held_out)
        return evaluate_only(args, process, held_out, measure, draw)
    train_set = dataset(args, "train", True)
    batches.steps_per_epoch(len(train_set), args.batch_size)  # refuses too large a batch
    settings = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    if args.ema:
        average_of = get_ema_multi_avg_fn(args.ema)
        average = AveragedModel(model, multi_avg_fn=average_of, use_buffers=True)
        evaluated = average.module
    extra = {"average": evaluated} if args.ema else {}
    run = Run(args, KIND, process, model, optimizer, args.steps, extra, train_set, held_out)
    if args.ema:
        # At 0 an update copies the weights. A resumed run, whose optimizer has a state, averages.
        average.n_averaged.fill_(len(optimizer.state))
    run.clock.watch(run.model, optimizer)
    scaler, device = process.scaler, process.device
    measure = functools.partial(evaluate, evaluated, held_out, args, process)
    draw = functools.partial(draw_pictures, evaluated, held_out)
    loader = batches.train_batches(train_set, run)
    for step, (images,) in run.steps(loader, measure, draw, advice.codebook):
        lr = schedules.warmup_cosine(step, args.steps, args.warmup_steps, args.lr, args.min_lr)
        schedules.set_lr(optimizer, lr)
        tau = schedules.cosine(step, args.tau_steps, 1.0, args.tau)
        beta = schedules.ramp(step, args.beta_steps, args.beta)
        x = batches.to_float(images, device)
        revive_codes(model, x, step, args, process)  # VQ-VAE only
        passes, statistics = [], []
        for number, (x,) in enumerate(run.passes(x), start=process.rank * args.accumulate):
            e = noise.code_noise(model.config, x, args.seed, step, number)
            with process.autocast():
                loss, terms, of_pass = run.model(x, tau, beta, e)
            scaler.scale(loss / args.accumulate).backward()
            passes.append({"loss": loss.detach(), **terms})
            statistics.append(of_pass)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)  # measured, not clipped
        if run.allows(step, norm, lr):
            scaler.step(optimizer)
            model.track(step, *zip(*statistics))
            if args.ema:
                average.update_parameters(model)
        scaler.update()
        optimizer.zero_grad()
        run.report(**log.means(passes), tau=tau, beta=beta, lr=lr)
    run.finish(measure, draw)


if __name__ == "__main__":
    with command_line.one_line_errors(stoppable=True):
        main()
