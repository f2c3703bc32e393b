"""The backbone (section 2.2) and the mask embedding e_[M] (section 2.3): a vision Transformer.

    H_0 = [e_[S], E x^p_1, ..., E x^p_N] + E_pos        Beit.embed
    H^l = Transformer(H^(l-1)),  l = 1, ..., L          Block
    H^L = [h^L_[S], h^L_1, ..., h^L_N]                  Beit.forward

One class for every size. Parameter names are those of the released weights. The heads are next to
what they are for: pretrain.py (masked image modeling), finetune_cls.py, finetune_seg.py.

    python beit.py WEIGHTS                          # what is in a checkpoint of ours or in published weights
    python beit.py WEIGHTS NEW.pth                  # only the weights, under the released names, which are timm's
    python beit.py WEIGHTS NEW.safetensors --names transformers

Images are float tensors (B, 3, H, W), normalised. A mask is bool, True = masked.
"""

import functools
import math
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import training

RECOMPUTE = "less memory: keep only what goes into each block, and compute the block again in the backward pass"
STD = 0.02  # of the truncated normal that initialises every matrix (appendix)


@dataclass
class BeitConfig:
    """Shape of the backbone; the defaults are BEiT-base as released."""

    image_size: int = 224  # H = W, pixels
    patch_size: int = 16  # P, pixels
    dim: int = 768  # D
    depth: int = 12  # L
    heads: int = 12
    mlp_ratio: float = 4.0
    positions: str = "shared"  # "absolute": E_pos; "relative": one bias table per block; "shared": one for all
    layer_scale: float = 0.1  # start of gamma_1 and gamma_2; 0: none
    drop_path: float = 0.1  # stochastic depth of the last block, rising linearly from 0

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}")
        if self.dim % self.heads:
            raise ValueError(f"width {self.dim} is not a multiple of the number of heads {self.heads}")
        if self.positions not in ("absolute", "relative", "shared"):
            raise ValueError(f"positions {self.positions!r} is none of 'absolute', 'relative', 'shared'")

    @property
    def grid(self):
        """Patches along one side: h = w."""
        return self.image_size // self.patch_size


MODELS = {  # --model: the appendix's sizes, and two for images of 24 to 64 pixels on a laptop
    "mini": dict(patch_size=4, dim=64, depth=4, heads=2, positions="absolute", layer_scale=0.0),
    "tiny": dict(patch_size=4, dim=128, depth=4, heads=4, positions="absolute", layer_scale=0.0),
    "base": dict(patch_size=16, dim=768, depth=12, heads=12, positions="shared", layer_scale=0.1),
    "large": dict(patch_size=16, dim=1024, depth=24, heads=16, positions="shared", layer_scale=1e-5),
}


def model_config(name, **changes):
    """The BeitConfig of --model NAME, with changes. Raises ValueError on an unknown name."""
    if name not in MODELS:
        raise ValueError(f"model {name!r} is none of {', '.join(MODELS)}")
    return BeitConfig(**{**MODELS[name], **changes})


def finetuned_config(init, model, image_size, drop_path):
    """BeitConfig for fine-tuning: the checkpoint's (None: that of --model), at its own size and stochastic depth.

    A relative table that all blocks share in pre-training becomes one per block, free to differ.
    """
    config = model_config(model) if init is None else BeitConfig(**init["config"])
    positions = "relative" if config.positions == "shared" else config.positions
    return replace(config, image_size=image_size, drop_path=drop_path, positions=positions)


def init_weight(weight, cut=2.0):
    """Normal with std 0.02, cut off at ±`cut`.

    The authors cut at ±1 std (0.02) for pre-training, so that the real std is 0.0108, and at ±2.0 for
    fine-tuning, which cuts nothing.
    """
    nn.init.trunc_normal_(weight, std=STD, a=-cut, b=cut)


# ---------------------------------------------------------------- relative positions (released models)


def relative_position_index(grid):
    """(N+1, N+1) rows of the bias table, for e_[S] and the N = grid**2 patches.

    Offset (dy, dx) between two patches has row (dy + grid-1) * (2 grid-1) + dx + grid-1. The last three
    rows are e_[S] -> patch, patch -> e_[S] and e_[S] -> e_[S].
    """
    side = 2 * grid - 1
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    place = (y * side + x).flatten()  # the row of a difference is the difference of rows, plus a constant
    index = torch.empty(grid**2 + 1, grid**2 + 1, dtype=torch.int64)
    index[1:, 1:] = place[:, None] - place[None, :] + (grid - 1) * (side + 1)
    index[0, 1:], index[1:, 0], index[0, 0] = side**2, side**2 + 1, side**2 + 2
    return index


def relative_table(config):
    """A bias table, zero at the start: ((2h-1)(2w-1) + 3, heads)."""
    return nn.Parameter(torch.zeros((2 * config.grid - 1) ** 2 + 3, config.heads))


def relative_bias(table, index):
    """Look up the bias of every pair: (rows, heads), (N+1, N+1) -> (heads, N+1, N+1).

    Laid out as the scores it is added to: table[index] has the heads last in memory, and adding that is slow on CPUs.
    """
    return table.T.index_select(1, index.flatten()).view(-1, *index.shape)


class SharedRelativePosition(nn.Module):
    """The one table that all blocks share in pre-training."""

    def __init__(self, config):
        super().__init__()
        self.relative_position_bias_table = relative_table(config)


# ---------------------------------------------------------------- Transformer block


class Attention(nn.Module):
    """Multi-head self-attention. q and v have a bias, k has none: softmax is blind to it."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.dim))
        self.v_bias = nn.Parameter(torch.zeros(config.dim))
        self.proj = nn.Linear(config.dim, config.dim)
        if config.positions == "relative":
            self.relative_position_bias_table = relative_table(config)

    def project(self, x):
        """(B, N+1, D) -> q, k, v, each (B, heads, N+1, D/heads)."""
        B, tokens, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(B, tokens, 3, self.heads, D // self.heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def weights(self, q, k, bias):
        """softmax(q k^T / sqrt(D/heads) + bias): (B, heads, N+1, N+1)."""
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(dim=-1)

    def forward(self, x, bias, where=None):
        """x (B, N+1, D), bias (heads, N+1, N+1) or None -> (B, N+1, D), or its rows x[where] alone: (n, D)."""
        q, k, v = self.project(x)
        if bias is not None:
            bias = bias.to(q.dtype)
        if x.is_cuda:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:  # on CPUs the plain products are faster in bf16: SDPA's backward is slow there
            out = self.weights(q, k, bias) @ v
        out = out.transpose(1, 2).flatten(2)  # (B, N+1, D)
        return self.proj(out if where is None else out[where])


class MLP(nn.Module):
    """fc2(GELU(fc1(x)))."""

    def __init__(self, config):
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.dim, hidden)
        self.fc2 = nn.Linear(hidden, config.dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def drop_path(u, probability):
    """Stochastic depth, as a factor for a sample's residual branch; u: uniform numbers, one for each branch.

    0, which drops the branch, where u < probability, and 1 / (1 - probability) for those that stay.
    """
    return (u >= probability) / (1 - probability)


class Block(nn.Module):
    """Pre-LN Transformer block: x + gamma_1 Attention(LN(x)), then x + gamma_2 MLP(LN(x))."""

    def __init__(self, config, drop_path_rate):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = MLP(config)
        self.drop_path_rate = drop_path_rate
        self.gamma_1 = self.gamma_2 = None  # LayerScale
        if config.layer_scale > 0:
            self.gamma_1 = nn.Parameter(torch.full((config.dim,), config.layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((config.dim,), config.layer_scale))

    def residual(self, x, branch, gamma, keep):
        """x plus the branch, times LayerScale's gamma (D,) and stochastic depth's factor (B, 1, 1); None: without."""
        scale = keep if gamma is None else gamma if keep is None else keep * gamma  # one pass over the branch, not two
        return x + (branch if scale is None else branch * scale)

    def forward(self, x, bias, u=None, where=None):
        """x (B, N+1, D), bias as in Attention -> (B, N+1, D).

        u: uniform numbers (B, 2), one for each branch, for stochastic depth; None: nothing is dropped. where: indices
        (images, tokens), each (n,): only these rows are made, (n, D), which after attention need no others.
        """
        keep = None, None
        if u is not None and self.drop_path_rate > 0:
            keep = drop_path(u, self.drop_path_rate)[:, None].split(1, dim=-1)  # twice (B, 1, 1)
        branch = self.attn(self.norm1(x), bias, where)
        if where is not None:
            x, keep = x[where], [None if k is None else k[where[0], 0] for k in keep]
        x = self.residual(x, branch, self.gamma_1, keep[0])
        return self.residual(x, self.mlp(self.norm2(x)), self.gamma_2, keep[1])


# ---------------------------------------------------------------- the backbone


class PatchEmbed(nn.Module):
    """E: a convolution whose stride is its kernel is a linear map of each flattened patch x^p_i."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(3, config.dim, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, N, D)


class Beit(nn.Module):
    """The backbone. A subclass adds a head.

    mask_embedding=True adds e_[M] and the initialisation for pre-training; fine-tuning sees whole
    images, and DistributedDataParallel refuses a parameter without a gradient.
    """

    def __init__(self, config, mask_embedding=False):
        super().__init__()
        self.config = config
        self.recompute = False  # see RECOMPUTE; for large models and images
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))  # e_[S]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim)) if mask_embedding else None  # e_[M]
        self.pos_embed = None
        if config.positions == "absolute":
            self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + 1, config.dim))  # E_pos, e_[S] first
        else:
            self.register_buffer("relative_position_index", relative_position_index(config.grid), persistent=False)
        self.rel_pos_bias = SharedRelativePosition(config) if config.positions == "shared" else None
        rates = [config.drop_path * l / max(config.depth - 1, 1) for l in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.init_weights(cut=STD if mask_embedding else 2.0)

    @torch.no_grad()
    def init_weights(self, cut):
        """Truncated normal matrices and embeddings, zero biases, depth-scaled output projections."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                init_weight(module.weight, cut)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedding in (self.cls_token, self.mask_token, self.pos_embed):
            if embedding is not None:
                init_weight(embedding, cut)
        for l, block in enumerate(self.blocks, start=1):
            block.attn.proj.weight.div_(math.sqrt(2 * l))
            block.mlp.fc2.weight.div_(math.sqrt(2 * l))

    def embed(self, x, mask=None):
        """H_0 of the corrupted image x^M: (B, 3, H, W), mask (B, N) or None -> (B, N+1, D).

        e_[M] takes the place of a masked patch's projection before E_pos is added; e_[S] is never masked.
        Raises ValueError if the image is not of the configured size.
        """
        size = self.config.image_size
        if x.shape[-2:] != (size, size):
            raise ValueError(f"images are {x.shape[-2]}x{x.shape[-1]} pixels, the model was built for {size}x{size}")
        H = self.patch_embed(x)
        if mask is not None:
            H = torch.where(mask[:, :, None], self.mask_token.to(H.dtype), H)
        H = torch.cat([self.cls_token.expand(len(H), -1, -1), H], dim=1)  # (B, N+1, D)
        return H if self.pos_embed is None else H + self.pos_embed

    def biases(self):
        """Yield each block's attention bias, (heads, N+1, N+1) or None; a shared one is looked up once."""
        if self.rel_pos_bias is not None:
            bias = relative_bias(self.rel_pos_bias.relative_position_bias_table, self.relative_position_index)
        for block in self.blocks:
            if self.config.positions == "relative":
                bias = relative_bias(block.attn.relative_position_bias_table, self.relative_position_index)
            yield None if self.config.positions == "absolute" else bias

    def forward(self, x, mask=None, u=None, where=None):
        """H^L, before the head's norm: (B, 3, H, W), mask (B, N) bool or None -> (B, N+1, D).

        u: uniform numbers (B, L, 2) that decide which branches stochastic depth drops; None: nothing is dropped.
        where: indices (images, tokens), each (n,): only h^L of these is wanted, (n, D), and block L spares the rest.
        """
        H = self.embed(x, mask)
        for l, (block, bias) in enumerate(zip(self.blocks, self.biases()), start=1):
            run = functools.partial(checkpoint, block, use_reentrant=False) if self.recompute else block
            H = run(H, bias, None if u is None else u[:, l - 1], where if l == len(self.blocks) else None)
        return H

    @torch.no_grad()
    def last_attention(self, x):
        """Attention weights of block L (figure 2): (B, 3, H, W) -> (B, heads, N+1, N+1)."""
        H = self.embed(x)
        *biases, last_bias = self.biases()
        for block, bias in zip(self.blocks, biases):
            H = block(H, bias)
        last = self.blocks[-1]
        q, k, _ = last.attn.project(last.norm1(H))
        return last.attn.weights(q, k, last_bias)


# ---------------------------------------------------------------- other resolutions


def resize_pos_embed(pos_embed, grid):
    """E_pos for another grid, bicubic: (1, 1 + n*n, D) -> (1, 1 + grid*grid, D)."""
    old = math.isqrt(pos_embed.shape[1] - 1)
    if old == grid:
        return pos_embed
    patches = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (old, old)).float()  # (1, D, old, old)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def geometric_offsets(old, new):
    """Where the released code puts a table's 2*old-1 offsets on the new grid's scale: ±1, ±(1+q), ±(1+q+q²), ...

    q is found by bisection so that the last one reaches new-1: near offsets keep their meaning, far
    ones stretch. 14 -> 24 patches gives q 1.0903, 14 -> 32 gives 1.1349.
    """
    low, high = 0.0, float(max(new - 1, 2))
    while high - low > 1e-9:
        q = (low + high) / 2
        low, high = (low, q) if np.sum(q ** np.arange(old - 1)) > new - 1 else (q, high)
    positive = np.cumsum(q ** np.arange(old - 1))
    return np.concatenate([-positive[::-1], [0.0], positive])


def cubic_spline_matrix(x, x_new):
    """(len(x_new), len(x)) matrix that evaluates the cubic spline through values at x, not-a-knot ends.

    Built in the truncated-power basis 1, t, t², t³, (t - knot)³+ with knots at all but the two outermost
    points of each end, which is what 'not a knot' means.
    """

    def basis(t):
        powers = (t[:, None] / x[-1]) ** np.arange(4)
        return np.hstack([powers, np.maximum(t[:, None] - x[None, 2:-2], 0) ** 3 / x[-1] ** 3])

    return basis(x_new) @ np.linalg.inv(basis(x))


def resize_relative_table(table, grid):
    """A relative table for another grid: ((2n-1)² + 3, heads) -> ((2 grid - 1)² + 3, heads).

    Cubic interpolation from geometric_offsets to unit spacing in both directions; the last three rows stay.
    Raises ValueError for a grid of fewer than 3 patches, too few for a cubic.
    """
    side = math.isqrt(table.shape[0] - 3)
    old = (side + 1) // 2
    if old == grid:
        return table
    if old < 3:
        raise ValueError(f"a relative table of {old}x{old} patches is too small to resize to {grid}x{grid}")
    S = cubic_spline_matrix(geometric_offsets(old, grid), np.arange(-(grid - 1), grid, dtype=np.float64))
    S = torch.from_numpy(S)
    square = table[:-3].double().T.unflatten(1, (side, side))  # (heads, side, side)
    square = (S @ square @ S.T).flatten(1).T
    return torch.cat([square.to(table.dtype), table[-3:]])


def load_backbone(model, state, with_head=False):
    """Copy a pre-trained or fine-tuned state dict into `model`, whatever its head and resolution.

    What may differ is named here: the head is the new model's own unless with_head; e_[M] is left out, and
    the final norm where only one side has it; a shared relative table is copied into every block if the model
    has one per block; positions are interpolated. Anything else that is missing, left over or of another shape
    raises ValueError with its name.
    """
    own = model.state_dict()
    heads = ("mask_token",) if with_head else ("mask_token", "lm_head.", "head.", "decoder.", "fc_norm.")
    if ("norm.weight" in own) != ("norm.weight" in state):
        heads += ("norm.",)
    state = {k: v for k, v in state.items() if not k.startswith(heads)}
    shared = state.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None and model.config.positions == "relative":
        for l in range(model.config.depth):
            state[f"blocks.{l}.attn.relative_position_bias_table"] = shared.clone()
    elif shared is not None:
        state["rel_pos_bias.relative_position_bias_table"] = shared
    for key in state:
        if key == "pos_embed":
            state[key] = resize_pos_embed(state[key], model.config.grid)
        elif key.endswith("relative_position_bias_table"):
            state[key] = resize_relative_table(state[key], model.config.grid)
    wanted = {k for k in own if not k.startswith(heads)}
    problems = [f"missing {k}" for k in sorted(wanted - state.keys())]
    problems += [f"unknown {k}" for k in sorted(state.keys() - wanted)]
    problems += [
        f"{k} is {tuple(state[k].shape)}, the model's is {tuple(own[k].shape)}"
        for k in sorted(wanted & state.keys())
        if state[k].shape != own[k].shape
    ]
    if problems:
        raise ValueError(f"these weights do not fit the model: {'; '.join(problems[:8])}")
    model.load_state_dict(state, strict=False)


# ---------------------------------------------------------------- weights that others have published

# Module or parameter: the released name, which is ours and timm's, and that of transformers' files.
NAMES = {
    "cls_token": "beit.embeddings.cls_token",
    "mask_token": "beit.embeddings.mask_token",
    "pos_embed": "beit.embeddings.position_embeddings",
    "patch_embed.proj": "beit.embeddings.patch_embeddings.projection",
    "rel_pos_bias": "beit.encoder.relative_position_bias",
    "norm": "layernorm",
    "lm_head": "lm_head",
    "fc_norm": "beit.pooler.layernorm",
    "head": "classifier",
}
BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
    "attn.proj": "attention.output.dense",
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    "attn.relative_position_bias_table": "attention.attention.relative_position_bias.relative_position_bias_table",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def rename(state, names):
    """State dict under new names, of whole parameters or of the modules they are in; others keep theirs."""
    renamed = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        renamed[names.get(key) or (f"{names[module]}.{leaf}" if module in names else key)] = value
    return renamed


def block_count(state, prefix):
    """Number of blocks, from parameter names PREFIX.N.more."""
    found = {int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)}
    return max(found, default=-1) + 1


def all_names(depth):
    """NAMES, and BLOCK_NAMES of every block."""
    blocks = ((f"blocks.{l}.", f"beit.encoder.layer.{l}.") for l in range(depth))
    return NAMES | {ours + a: theirs + b for ours, theirs in blocks for a, b in BLOCK_NAMES.items()}


def to_transformers(state):
    """A state dict under transformers' names; q, k and v are one matrix here and three there."""
    depth = block_count(state, "blocks.")
    renamed = rename(state, all_names(depth))
    for l in range(depth):
        parts = renamed.pop(f"blocks.{l}.attn.qkv.weight").chunk(3)
        for name, part in zip(("query", "key", "value"), parts):
            renamed[f"beit.encoder.layer.{l}.attention.attention.{name}.weight"] = part.clone()
    return renamed


def from_transformers(state):
    """The inverse of to_transformers."""
    depth = block_count(state, "beit.encoder.layer.")
    renamed = rename(state, {theirs: ours for ours, theirs in all_names(depth).items()})
    for l in range(depth):
        keys = [f"beit.encoder.layer.{l}.attention.attention.{name}.weight" for name in ("query", "key", "value")]
        if all(key in renamed for key in keys):  # one that is missing is named when the model is filled
            renamed[f"blocks.{l}.attn.qkv.weight"] = torch.cat([renamed.pop(key) for key in keys])
    return renamed


def inferred_config(state):
    """The BeitConfig of a state dict under released names. Raises ValueError if it is not of a BEiT.

    The number of heads is the width of a relative table; with E_pos it is not in the tensors, and heads are 64 wide as
    in every published model. LayerScale's start is not in them either: any number above 0 stands for "there is one".
    """
    tables = [value for key, value in state.items() if key.endswith("relative_position_bias_table")]
    missing = {"patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} - state.keys()
    if missing or ("pos_embed" in state) == bool(tables):
        wrong = f"no {', '.join(sorted(missing))}" if missing else "wanted E_pos or relative tables, one of the two"
        raise ValueError(f"these are not the weights of a BEiT: {wrong}; they begin {', '.join(list(state)[:3])}")
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    if tables:
        grid, heads = (math.isqrt(len(tables[0]) - 3) + 1) // 2, tables[0].shape[1]
        positions = "shared" if "rel_pos_bias.relative_position_bias_table" in state else "relative"
    else:
        grid, heads, positions = math.isqrt(state["pos_embed"].shape[1] - 1), max(1, dim // 64), "absolute"
    return BeitConfig(
        image_size=grid * patch,
        patch_size=patch,
        dim=dim,
        depth=block_count(state, "blocks."),
        heads=heads,
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / dim,
        positions=positions,
        layer_scale=0.1 if "blocks.0.gamma_1" in state else 0.0,
        drop_path=0.0,
    )


def load_pretrained(path, *kinds):
    """A checkpoint of ours, or weights as the authors, timm or transformers publish them, under the released names.

    Returns a dict: kind (one of `kinds`), config (BeitConfig's fields), model (state dict), normalise, classes (their
    names; None in weights from elsewhere). Published files are a state dict, bare or under the key `model` or
    `module`; their configuration is inferred from the tensors, their pixels had mean and std 0.5. Raises ValueError
    on anything else.
    """
    content = training.read_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    if "kind" in content:
        return training.check_kind(path, content, *kinds)
    state = content.get("model", content.get("module", content))
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__} as its model, not a state dict")
    strange = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise ValueError(f"{path} is not a state dict: {strange[0]!r} is not a tensor")
    if any(key.startswith("beit.") for key in state):
        state = from_transformers(state)
    state = {key: value for key, value in state.items() if not key.endswith("relative_position_index")}
    kind = "classification" if "head.weight" in state else "pretraining"
    config = asdict(inferred_config(state))
    found = {"kind": kind, "config": config, "model": state, "normalise": "half", "classes": None}
    return training.check_kind(path, found, *kinds)


# ---------------------------------------------------------------- layer-wise learning-rate decay (appendix)


def layer_of(name, depth):
    """Which layer a parameter belongs to: 0 embeddings, l for block l (from 1), depth + 1 for the rest."""
    if name.startswith(("patch_embed.", "cls_token", "mask_token", "pos_embed")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1  # head, final norm, shared relative table


def parameter_groups(model, weight_decay, layer_decay=1.0):
    """AdamW groups with `lr_scale` = d^(L+1-l) for layer l, and no decay for vectors, E_pos and e_[S].

    e_[M] and the relative tables are decayed, as in the released code.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        layer = layer_of(name, model.config.depth)
        decayed = parameter.ndim > 1 and name not in ("pos_embed", "cls_token")
        scale = layer_decay ** (model.config.depth + 1 - layer)
        new = {"params": [], "lr_scale": scale, "weight_decay": weight_decay if decayed else 0.0}
        groups.setdefault((layer, decayed), new)["params"].append(parameter)
    return list(groups.values())


# ---------------------------------------------------------------- python beit.py: look into weights, export them


def main(argv=None):
    parser = training.Parser(__doc__)
    parser.add_argument("weights", help="checkpoint.pt, or published BEiT weights")
    parser.add_argument("destination", nargs="?", help="new .pth or .safetensors file to export to")
    parser.add_argument("--names", default="released", choices=("released", "transformers"), help="of the parameters")
    args = parser.parse_args(argv)
    found = load_pretrained(args.weights, "pretraining", "classification", "segmentation")
    state = found["model"]
    print(f"{found['kind']}, {sum(value.numel() for value in state.values()):,} parameters")
    print("  ".join(f"{name} {value}" for name, value in found["config"].items()))
    if args.destination is None:
        return
    if args.names == "transformers":
        if found["kind"] == "segmentation":
            raise ValueError("transformers has no model with this deconvolution head: export with --names released")
        state = to_transformers(state)
    training.write_file(args.destination, state)


if __name__ == "__main__":
    with training.one_line_errors():
        main()
