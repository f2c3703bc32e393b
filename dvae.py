"""Visual tokens (section 2.1): the discrete VAE whose encoder is BEiT's image tokenizer.

    x in (0,1)^(3 x H x W)  --q_phi(z|x)-->  z in V^(h x w)  --p_psi(x|z)-->  x again

The networks are DALL-E's (Ramesh et al. 2021, appendix A): convolutional residual networks that
downsample by 2 between groups, so `groups` 2, 3 or 4 give an h x w grid 2, 4 or 8 times coarser
than the image. Two ways through the discrete bottleneck:

    quantizer="gumbel"  Gumbel-softmax relaxation, temperature tau, KL to the uniform prior.
    quantizer="vq"      VQ-VAE (van den Oord et al. 2017): nearest code, straight-through gradient.

Images are float tensors (B, 3, H, W) in [0, 1]; tokens are int64 (B, h, w) in [0, |V|).
Train it with train_tokenizer.py.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import training

EPSILON = 0.1  # map_pixels keeps pixels this far (as a share) from 0 and 1, where logit(x) is infinite


@dataclass
class DVAEConfig:
    """Shape of the dVAE; the defaults are DALL-E's published tokenizer."""

    vocab_size: int = 8192  # |V|
    hidden: int = 256  # width of the first group; group g is 2**(g-1) times as wide
    groups: int = 4  # downsampling factor 2**(groups-1)
    blocks_per_group: int = 2
    code_dim: int = 128  # width of the decoder's embedding of a code (and of VQ-VAE's codebook)
    quantizer: str = "gumbel"  # or "vq"
    likelihood: str = "logit-laplace"  # or "mse"
    normalise_logits: bool = False  # Gumbel-softmax at small scale only: see DVAE

    def __post_init__(self):
        if self.quantizer not in ("gumbel", "vq"):
            raise ValueError(f"quantizer {self.quantizer!r} is neither 'gumbel' nor 'vq'")
        if self.likelihood not in ("logit-laplace", "mse"):
            raise ValueError(f"likelihood {self.likelihood!r} is neither 'logit-laplace' nor 'mse'")
        if not 2 <= self.groups <= 4:
            raise ValueError(f"groups {self.groups} must be 2, 3 or 4 (downsampling by 2, 4 or 8)")
        if self.hidden % 4:
            raise ValueError(f"hidden {self.hidden} must be a multiple of 4: the bottleneck is a quarter")

    @property
    def downsampling(self):
        """Image pixels per token along each side."""
        return 2 ** (self.groups - 1)


# ---------------------------------------------------------------- pixels and their likelihood


def map_pixels(x):
    """[0, 1] -> [eps, 1 - eps], the range on which the logit-Laplace density is well behaved."""
    return (1 - 2 * EPSILON) * x + EPSILON


def unmap_pixels(x):
    """Inverse of map_pixels, clipped to [0, 1]."""
    return ((x - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)


def logit_laplace_nll(x, mu, ln_b):
    """-log f(x | mu, b) per pixel value, f = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)), x in (0, 1)."""
    return (torch.logit(x) - mu).abs() * torch.exp(-ln_b) + ln_b + math.log(2) + torch.log(x * (1 - x))


# ---------------------------------------------------------------- the two networks


def conv(n_in, n_out, kernel):
    """A same-size convolution, initialised as DALL-E's: N(0, 1/fan_in), bias 0."""
    layer = nn.Conv2d(n_in, n_out, kernel, padding=(kernel - 1) // 2)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(n_in * kernel**2))
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """x + 1/layers**2 * bottleneck(x), a ReLU before each of four convolutions.

    The encoder's kernels are (3, 3, 3, 1), the decoder's mirror them: (1, 3, 3, 3).
    """

    def __init__(self, n_in, n_out, kernels, layers):
        super().__init__()
        n_hidden = n_out // 4
        widths = [n_in, n_hidden, n_hidden, n_hidden, n_out]
        self.id_path = nn.Identity() if n_in == n_out else conv(n_in, n_out, 1)
        parts = OrderedDict()
        for i, kernel in enumerate(kernels, start=1):
            parts[f"relu_{i}"] = nn.ReLU()
            parts[f"conv_{i}"] = conv(widths[i - 1], widths[i], kernel)
        self.res_path = nn.Sequential(parts)
        self.post_gain = 1 / layers**2

    def forward(self, x):
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.post_gain)


def residual_groups(widths, kernels, blocks, resize):
    """The groups between a network's first and last convolution, `resize` between two groups."""
    groups = OrderedDict()
    for g, (n_in, n_out) in enumerate(zip(widths, widths[1:]), start=1):
        parts = OrderedDict()
        for b in range(1, blocks + 1):
            layers = (len(widths) - 1) * blocks
            parts[f"block_{b}"] = ResidualBlock(n_in if b == 1 else n_out, n_out, kernels, layers)
        if g < len(widths) - 1:
            parts["resize"] = resize
        groups[f"group_{g}"] = nn.Sequential(parts)
    return groups


class Encoder(nn.Module):
    """q_phi(z|x): (B, 3, H, W) mapped pixels -> (B, n_out, h, w); n_out = |V| logits, or VQ's code_dim."""

    def __init__(self, config, n_out):
        super().__init__()
        widths = [config.hidden] + [config.hidden * 2**g for g in range(config.groups)]
        groups = residual_groups(widths, (3, 3, 3, 1), config.blocks_per_group, nn.MaxPool2d(2))
        output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=conv(widths[-1], n_out, 1)))
        self.blocks = nn.Sequential(OrderedDict(input=conv(3, widths[0], 7), **groups, output=output))

    def forward(self, x):
        return self.blocks(x)


class Decoder(nn.Module):
    """p_psi(x|z): (B, n_in, h, w) codes, one-hot or relaxed -> (B, 6, H, W): mu and ln b for R, G, B."""

    def __init__(self, config, n_in):
        super().__init__()
        widths = [config.code_dim] + [config.hidden * 2**g for g in reversed(range(config.groups))]
        groups = residual_groups(widths, (1, 3, 3, 3), config.blocks_per_group, nn.Upsample(scale_factor=2))
        output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=conv(widths[-1], 6, 1)))
        # Its weight column k is the embedding of code k: on a one-hot input it is a table look-up.
        self.blocks = nn.Sequential(OrderedDict(input=conv(n_in, widths[0], 1), **groups, output=output))

    def forward(self, z):
        return self.blocks(z)


# ---------------------------------------------------------------- Gumbel-softmax


def gumbel_softmax(logits, tau, e):
    """A relaxed sample of z ~ softmax(logits) over the last dimension: softmax((logits + g) / tau).

    g = -log(e), with e ~ Exp(1) of the logits' shape, is Gumbel noise: argmax(logits + g) is an exact sample, and the
    softmax tends to its one-hot vector as tau falls to 0.
    """
    return torch.softmax((logits - e.clamp_min(1e-30).log()) / tau, dim=-1)


def kl_to_uniform(logits):
    """KL(q || uniform) = log|V| - entropy(q), in nats, of q = softmax(logits) over the last dimension; >= 0."""
    log_q = torch.log_softmax(logits, dim=-1)
    return math.log(logits.shape[-1]) + (log_q.exp() * log_q).sum(-1)


# ---------------------------------------------------------------- the tokenizer


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, for use in a loss: its gradient too is the sum of theirs."""

    @staticmethod
    def forward(context, values):
        return training.all_sum(values.clone())

    @staticmethod
    def backward(context, gradient):
        return training.all_sum(gradient.clone())


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch normalisation without scale and shift whose statistics are of the batches of all processes together.

    torch's SyncBatchNorm does this on GPUs only.
    """

    def __init__(self, channels):
        super().__init__(channels, affine=False)

    def forward(self, x):
        """(B, C, h, w) -> the same, each channel with mean 0 and variance 1 over the global batch (or as tracked)."""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)

        def mean_over_all(values):
            return SumOverProcesses.apply(values.mean((0, 2, 3))) / dist.get_world_size()

        mean = mean_over_all(x)
        centred = x - mean[:, None, None]
        variance = mean_over_all(centred.square())
        with torch.no_grad():
            n = x.numel() / x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        return centred * (variance + self.eps).rsqrt()[:, None, None]


class DVAE(nn.Module):
    """Encoder q_phi, discrete bottleneck, decoder p_psi. `loss` trains it, `tokens` is BEiT's tokenizer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        vq = config.quantizer == "vq"
        self.logit_norm = None
        self.encoder = Encoder(config, config.code_dim if vq else config.vocab_size)
        self.decoder = Decoder(config, config.code_dim if vq else config.vocab_size)
        if vq:
            self.codebook = nn.Parameter(torch.randn(config.vocab_size, config.code_dim))
            self.register_buffer("usage", torch.zeros(config.vocab_size))
        elif config.normalise_logits:
            # Not in the paper. At small scale a few codes soon win everywhere, because the logits' offset per
            # code outweighs what differs between places. Standardising each code's logit over the batch
            # removes that offset; the learned scale then decides how sharp q is.
            self.logit_norm = GlobalBatchNorm(config.vocab_size)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(3.0)))
        # Variance of the Gaussian that mean squared error stands for: running mean of the training error.
        self.register_buffer("pixel_variance", torch.tensor(1.0))
        self.to(memory_format=torch.channels_last)  # what convolutions are fastest in, here and on GPUs

    def encode(self, x):
        """Images (B, 3, H, W) in [0, 1] -> logits (B, h, w, |V|) of q_phi(z|x); VQ: z_e(x), (B, h, w, code_dim).

        The convolutions follow autocast; softmax and argmax over thousands of codes get float32.
        """
        y = self.encoder(map_pixels(x).contiguous(memory_format=torch.channels_last)).float()
        if self.logit_norm is not None:
            y = self.logit_norm(y) * self.logit_scale.exp()
        return y.permute(0, 2, 3, 1)

    def code_distance(self, z_e):
        """Squared Euclidean distance of (..., code_dim) to every code, up to |z_e|²: (..., |V|)."""
        with torch.autocast(z_e.device.type, enabled=False):  # near codes differ by less than bf16 resolves
            return self.codebook.pow(2).sum(1) - 2 * z_e @ self.codebook.T

    @torch.no_grad()
    def tokens(self, x):
        """z: the likeliest code of every place, without noise; VQ: the nearest. (B, 3, H, W) -> int64 (B, h, w)."""
        y = self.encode(x)
        return self.code_distance(y).argmin(-1) if self.config.quantizer == "vq" else y.argmax(-1)

    def decode_codes(self, codes):
        """Codes, channels last (B, h, w, n) -> mu and ln b, each (B, 3, H, W)."""
        return self.decoder(codes.permute(0, 3, 1, 2)).float().chunk(2, dim=1)

    def decode_parameters(self, z):
        """p_psi(x|z) of hard tokens int64 (B, h, w): mu and ln b, each (B, 3, H, W)."""
        if self.config.quantizer == "vq":
            return self.decode_codes(self.codebook[z])
        first = self.decoder.blocks.input  # a 1x1 convolution of one-hot codes is a table look-up
        codes = F.embedding(z, first.weight.flatten(1).T) + first.bias  # (B, h, w, code_dim)
        return self.decoder.blocks[1:](codes.permute(0, 3, 1, 2)).float().chunk(2, dim=1)

    def decode(self, z):
        """Reconstruction from hard tokens: int64 (B, h, w) -> images (B, 3, H, W) in [0, 1]."""
        mu, _ = self.decode_parameters(z)
        return unmap_pixels(torch.sigmoid(mu))

    def negative_log_likelihood(self, x, mu, ln_b):
        """-log p_psi(x|z) of images in [0, 1], in nats per image: (B,). A density over [0, 1]^(3HW)."""
        if self.config.likelihood == "mse":
            squared = (x - self.mean(mu)).pow(2)
            nll = squared / (2 * self.pixel_variance) + (2 * math.pi * self.pixel_variance).log() / 2
        else:  # change of variables from map_pixels(x) back to x
            nll = logit_laplace_nll(map_pixels(x), mu, ln_b) - math.log(1 - 2 * EPSILON)
        return nll.flatten(1).sum(1)

    def mean(self, mu):
        """Predicted pixels before clipping: the inverse of map_pixels on sigmoid(mu)."""
        return (torch.sigmoid(mu) - EPSILON) / (1 - 2 * EPSILON)

    def loss(self, x, tau, beta, e=None):
        """Stage 1's objective on images (B, 3, H, W) in [0, 1]: (loss, its terms, what `track` wants to know).

        The bound of the VAE with the KL weighted by beta, in sums over one image that are both divided by
        the number of its pixel values 3HW: averaging one of them over something else makes the codebook
        collapse or blur. Terms: `reconstruction` (nats or squared error per pixel value) and, for Gumbel-softmax,
        `kl` (nats per token). VQ has no KL: its `codebook` term is a mean squared distance of its own.
        e: Exp(1) noise for the Gumbel-softmax, (B, h, w, |V|).
        """
        values = x[0].numel()  # 3HW
        y = self.encode(x)
        if self.config.quantizer == "vq":
            codes, z_q, z = self.straight_through(y)
            # Codes move to the encoder's outputs, and with a quarter of that pull outputs commit to codes.
            gap = (z_q - y.detach()).pow(2).mean() + 0.25 * (z_q.detach() - y).pow(2).mean()
            extra, terms = gap, {"codebook": gap.detach()}
        else:
            codes = gumbel_softmax(y, tau, e)
            kl = kl_to_uniform(y)  # of q itself, not of the noisy sample: (B, h, w)
            extra, terms = beta * kl.sum((1, 2)).mean() / values, {"kl": kl.detach().mean()}
        mu, ln_b = self.decode_codes(codes)
        squared_error = (x - self.mean(mu)).pow(2).mean()
        if self.config.likelihood == "mse":
            reconstruction = squared_error
        else:
            reconstruction = self.negative_log_likelihood(x, mu, ln_b).mean() / values
        seen = [squared_error.detach()]
        if self.config.quantizer == "vq":
            seen.append(torch.bincount(z.flatten(), minlength=self.config.vocab_size).float())
        return reconstruction + extra, {"reconstruction": reconstruction.detach(), **terms}, seen

    def forward(self, x, tau, beta, e=None):
        """The loss, under the name that DistributedDataParallel and torch.compile call."""
        return self.loss(x, tau, beta, e)

    def track(self, squared_error, counts=None):
        """Running statistics, once a step, of the global batch: its mean squared error and, VQ, each code's count."""
        self.pixel_variance.lerp_(squared_error, 0.02)
        if counts is not None:
            self.usage.mul_(0.99).add_(counts)

    # VQ-VAE only

    def straight_through(self, z_e):
        """(codes for the decoder: value of z_q, gradient to z_e; z_q), both (B, h, w, code_dim), and z (B, h, w)."""
        z = self.code_distance(z_e.detach()).argmin(-1)
        z_q = self.codebook[z]
        return z_e + (z_q - z_e).detach(), z_q, z

    @torch.no_grad()
    def revive_codes(self, parts, rank, world, seed):
        """Put codes that nothing uses on random encoder outputs of the global batch: VQ's cure for index collapse.

        parts: this process's images in pieces that fit its memory. At the first call no code has been used, so it is
        also the data-driven initialisation.
        """
        z_e = torch.cat([self.encode(part) for part in parts]).flatten(0, 2)  # (places of this process, code_dim)
        generator = torch.Generator().manual_seed(seed)
        place = torch.randint(len(z_e) * world, self.usage.shape, generator=generator).to(z_e.device)
        mine = place // len(z_e) == rank
        fresh = torch.zeros_like(self.codebook)
        fresh[mine] = z_e[place[mine] % len(z_e)]
        training.all_sum(fresh)  # each code's row comes from the one process that has its place
        dead = self.usage < 0.1
        self.codebook[dead] = fresh[dead]
        self.usage[dead] = 1.0


# ---------------------------------------------------------------- loading


class Record:
    """What a pickled module becomes here: its attributes, without its code."""


# The classes in DALL-E's encoder.pkl and decoder.pkl, which are whole modules. Each is read as a Record; any other name
# in a pickle, such as a function to call, is refused by torch's restricted unpickler.
DALLE_CLASSES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
)


def parameters_of(record, prefix=""):
    """{name: tensor} of a module that was read as a Record; DALL-E's `w` and `b` become `weight` and `bias`."""
    found = {
        prefix + {"w": "weight", "b": "bias"}.get(name, name): tensor.detach().float()
        for name, tensor in record._parameters.items()
        if tensor is not None
    }
    for name, child in record._modules.items():
        found |= parameters_of(child, f"{prefix}{name}.")
    return found


def read_pickled_module(path):
    """{name: tensor} of one of DALL-E's files. Raises ValueError if it is not one, or wants to run code."""
    if not path.is_file():
        raise ValueError(f"there is no {path}: dalle:FOLDER names a folder with DALL-E's encoder.pkl and decoder.pkl")
    try:
        with torch.serialization.safe_globals([(Record, name) for name in DALLE_CLASSES]):
            return parameters_of(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # damaged, foreign or hostile: half a dozen kinds
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        refused = next((line.strip() for line in str(error).splitlines() if "nsupported" in line), reason[0])
        raise ValueError(f"{path} is refused: not a file of DALL-E's tokenizer ({refused})") from error


def load_dalle(folder):
    """DALL-E's published tokenizer from FOLDER/encoder.pkl and decoder.pkl, its sizes inferred from the tensors."""
    encoder, decoder = (read_pickled_module(Path(folder) / f"{part}.pkl") for part in ("encoder", "decoder"))
    try:
        vocab_size, code_dim = encoder["blocks.output.conv.weight"].shape[0], decoder["blocks.input.weight"].shape[0]
        hidden = encoder["blocks.input.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"{folder}: encoder.pkl and decoder.pkl are not DALL-E's: they have no {error}") from error
    groups = len({key.split(".")[1] for key in encoder if ".group_" in key})
    blocks = len({key.split(".")[2] for key in encoder if ".group_1." in key})
    config = DVAEConfig(vocab_size, hidden, groups, blocks, code_dim)
    model = DVAE(config)
    for part, state in ((model.encoder, encoder), (model.decoder, decoder)):
        try:
            part.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder}: these tensors are not those of DALL-E's networks: {reason}") from error
    return model


def load_tokenizer(name):
    """The frozen tokenizer of --tokenizer: a checkpoint.pt of train_tokenizer.py, or dalle:FOLDER.

    Averaged weights where a checkpoint has them. Raises ValueError if it cannot be read.
    """
    if str(name).startswith("dalle:"):
        model = load_dalle(str(name).removeprefix("dalle:"))
    else:
        state = training.load_checkpoint(name, "tokenizer")
        model = DVAE(DVAEConfig(**state["config"]))
        model.load_state_dict(state.get("average", state["model"]))
    return model.requires_grad_(False).eval()
