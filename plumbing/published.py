"""Files that others published: BEiT weights of the authors, timm and transformers, and DALL-E's.

The command shows what is in a checkpoint of these scripts or in published BEiT weights, and exports
the weights under either set of names:

    python -m plumbing.published WEIGHTS
    python -m plumbing.published WEIGHTS NEW.pth
    python -m plumbing.published WEIGHTS NEW.safetensors --names transformers

This project's parameter names are the authors' ("released"), which timm uses too.
"""

import math
from pathlib import Path

import torch

from plumbing import checkpoints, command_line, log, outputs, weights

# -------------------------------------------------------- parameter names of transformers

# Released name of a module or parameter: its name in transformers' files.
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

# The same inside a block: "blocks.N." here, "beit.encoder.layer.N." there.
BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
    "attn.proj": "attention.output.dense",
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    "attn.relative_position_bias_table": (
        "attention.attention.relative_position_bias.relative_position_bias_table"
    ),
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def block_count(state, prefix):
    """The number of blocks in a state dict whose blocks are named PREFIX0., PREFIX1., and so on."""
    found = {int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)}
    return max(found, default=-1) + 1


def all_names(depth):
    """NAMES, and BLOCK_NAMES for each of `depth` blocks."""
    names = dict(NAMES)
    for l in range(depth):
        for ours, theirs in BLOCK_NAMES.items():
            names[f"blocks.{l}.{ours}"] = f"beit.encoder.layer.{l}.{theirs}"
    return names


def rename(state, names):
    """A state dict under new names. `names` maps parameters or their modules; the rest is kept."""
    renamed = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        renamed[names.get(key) or (f"{names[module]}.{leaf}" if module in names else key)] = value
    return renamed


def query_key_value(l):
    """Names of block l's matrices in transformers' files; here they are one matrix, attn.qkv."""
    prefix = f"beit.encoder.layer.{l}.attention.attention"
    return [f"{prefix}.{name}.weight" for name in ("query", "key", "value")]


def to_transformers(state):
    """Convert a state dict from the released names to those of transformers' files."""
    depth = block_count(state, "blocks.")
    renamed = rename(state, all_names(depth))
    for l in range(depth):
        parts = renamed.pop(f"blocks.{l}.attn.qkv.weight").chunk(3)
        for name, part in zip(query_key_value(l), parts):
            renamed[name] = part.clone()
    return renamed


def from_transformers(state):
    """Convert a state dict from the names of transformers' files to the released names."""
    depth = block_count(state, "beit.encoder.layer.")
    renamed = rename(state, {theirs: ours for ours, theirs in all_names(depth).items()})
    for l in range(depth):
        names = query_key_value(l)
        if all(name in renamed for name in names):  # loading into a model reports a missing one
            parts = [renamed.pop(name) for name in names]
            renamed[f"blocks.{l}.attn.qkv.weight"] = torch.cat(parts)
    return renamed


# -------------------------------------------------------- BEiT's files


def inferred_config(state):
    """Infer the fields of BeitConfig, as a dict, from a state dict under the released names.

    A relative table has one column per head. With E_pos the tensors do not tell the number of
    heads; it follows from a width of 64 per head, as in every published model. Nor do they tell
    LayerScale's initial value: any number above 0 says that the model has LayerScale.
    Raises ValueError if these are not the weights of a BEiT.
    """
    not_beit = "these are not the weights of a BEiT"
    first = ", ".join(list(state)[:3])
    tables = [value for key, value in state.items() if key.endswith("relative_position_bias_table")]
    missing = {"patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} - state.keys()
    if missing:
        raise ValueError(f"{not_beit}: no {', '.join(sorted(missing))}; they begin {first}")
    if ("pos_embed" in state) == bool(tables):
        raise ValueError(
            f"{not_beit}: either E_pos or relative tables are needed; they begin {first}"
        )
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    if tables:
        grid = (math.isqrt(len(tables[0]) - 3) + 1) // 2  # (2 grid - 1)**2 + 3 rows
        heads = tables[0].shape[1]
        shared = "rel_pos_bias.relative_position_bias_table" in state
        positions = "shared" if shared else "relative"
    else:
        grid = math.isqrt(state["pos_embed"].shape[1] - 1)
        heads = max(1, dim // 64)
        positions = "absolute"
    if dim % heads:
        raise ValueError(f"{not_beit}: width {dim} is not a multiple of {heads} heads")
    return {
        "image_size": grid * patch,
        "patch_size": patch,
        "dim": dim,
        "depth": block_count(state, "blocks."),
        "heads": heads,
        "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / dim,
        "positions": positions,
        "layer_scale": 0.1 if "blocks.0.gamma_1" in state else 0.0,
        "drop_path": 0.0,
    }


def load_init(args, *kinds):
    """(the weights of --init, see load_pretrained, or None if random; the name of --normalise)."""
    if args.init == "random":
        return None, "half" if args.normalise == "auto" else args.normalise
    init = load_pretrained(args.init, *kinds, normalise=args.normalise)
    note_size(init, args.image_size)
    return init, init["normalise"]


def note_size(init, image_size):
    """Say that positions will be interpolated, if the weights are for another image size."""
    old = init["config"]["image_size"]
    if image_size not in (None, old):
        log.note(f"positions are interpolated: the weights are for {old} pixels, not {image_size}")


def load_pretrained(path, *kinds, normalise="auto"):
    """Load a checkpoint of these scripts, or BEiT weights of the authors, timm or transformers.

    Returns a dict: kind (one of `kinds`), config (BeitConfig's fields), model (state dict under the
    released names), normalise (pixel mean and std, "half" or "imagenet") and classes (their names).
    The argument normalise replaces the file's own pixel mean and std unless it is "auto".

    Published files hold a state dict, bare or under the key `model` or `module`. Their config is
    inferred from the tensors and classes is None. They do not say their normalise: "auto" takes
    "half", right for those pre-trained on ImageNet-22k, and says so. Raises ValueError if the file
    is anything else.
    """
    content = weights.read(path)
    if isinstance(content, dict) and "kind" in content:
        found = checkpoints.check_kind(path, content, *kinds)
        return found if normalise == "auto" else found | {"normalise": normalise}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    state = content.get("model", content.get("module", content))
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__} as its model, not a state dict")
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} is not a state dict: {key!r} is not a tensor")
    if any(key.startswith("beit.") for key in state):
        state = from_transformers(state)
    state = {
        key: value for key, value in state.items() if not key.endswith("relative_position_index")
    }
    found = {
        "kind": "classification" if "head.weight" in state else "pretraining",
        "config": inferred_config(state),
        "model": state,
        "normalise": "half" if normalise == "auto" else normalise,
        "classes": None,
    }
    checkpoints.check_kind(path, found, *kinds)
    if normalise == "auto":
        log.note(
            f"{path} does not record pixel mean and std: assuming 0.5, right for files pre-trained "
            "on ImageNet-22k. For those of ImageNet-1k give the scripts --normalise imagenet"
        )
    return found


# -------------------------------------------------------- DALL-E's tokenizer


class Record:
    """Stands in for a class in DALL-E's pickles: holds a module's attributes, without its code."""


# The classes in DALL-E's encoder.pkl and decoder.pkl, which are pickles of whole modules. Each is
# read as a Record. torch's restricted unpickler refuses any other name, such as a function to call.
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
    """{name: float32 tensor} of a Record; DALL-E's `w` and `b` become `weight` and `bias`."""
    found = {
        prefix + {"w": "weight", "b": "bias"}.get(name, name): tensor.detach().float()
        for name, tensor in record._parameters.items()
        if tensor is not None
    }
    for name, child in record._modules.items():
        found |= parameters_of(child, f"{prefix}{name}.")
    return found


def read_pickled_module(path):
    """Read {name: tensor} from one of DALL-E's files, without running any code in it.

    Raises ValueError if the file is missing, damaged, not DALL-E's, or asks to run code.
    """
    if not path.is_file():
        raise ValueError(
            f"there is no {path}: dalle:FOLDER names a folder with DALL-E's encoder.pkl "
            "and decoder.pkl"
        )
    try:
        with torch.serialization.safe_globals([(Record, name) for name in DALLE_CLASSES]):
            return parameters_of(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # damaged, foreign and hostile files raise many types
        lines = [line.strip() for line in str(error).strip().splitlines()]
        last = lines[-1] if lines else type(error).__name__
        # torch's message is long; its line "Unsupported ..." names what was refused
        reason = next((line for line in lines if "nsupported" in line), last)
        raise ValueError(
            f"{path} is refused: not a file of DALL-E's tokenizer ({reason})"
        ) from error


def read_dalle(folder):
    """Read DALL-E's published tokenizer from FOLDER/encoder.pkl and FOLDER/decoder.pkl.

    Returns (sizes, state dict of encoder.* and decoder.*); sizes is a dict inferred from the
    tensors: vocab_size, hidden, groups, blocks_per_group, code_dim. Raises ValueError if a file is
    missing, damaged, not DALL-E's, or asks to run code.
    """
    encoder = read_pickled_module(Path(folder) / "encoder.pkl")
    decoder = read_pickled_module(Path(folder) / "decoder.pkl")
    try:
        sizes = {
            "vocab_size": encoder["blocks.output.conv.weight"].shape[0],
            "hidden": encoder["blocks.input.weight"].shape[0],
            "groups": len({key.split(".")[1] for key in encoder if ".group_" in key}),
            "blocks_per_group": len({key.split(".")[2] for key in encoder if ".group_1." in key}),
            "code_dim": decoder["blocks.input.weight"].shape[0],
        }
    except KeyError as error:
        raise ValueError(
            f"{folder}: encoder.pkl and decoder.pkl are not DALL-E's: they have no {error}"
        ) from error
    state = {f"encoder.{name}": value for name, value in encoder.items()}
    return sizes, state | {f"decoder.{name}": value for name, value in decoder.items()}


# -------------------------------------------------------- the command


def main(argv=None):
    """Print what is in a file of BEiT weights; write them to a new file if one is named."""
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="a checkpoint.pt, or published BEiT weights"
    )
    parser.add_argument(
        "destination", metavar="NEW", nargs="?", help="new .pth or .safetensors file to write"
    )
    parser.add_argument(
        "--names",
        default="released",
        choices=("released", "transformers"),
        help="parameter names in the new file (default: released, which timm uses too)",
    )
    args = parser.parse_args(argv)
    if args.destination:
        outputs.check_new(args.destination)
    found = load_pretrained(args.weights, "pretraining", "classification", "segmentation")
    state = found["model"]
    print(f"{found['kind']}, {sum(value.numel() for value in state.values()):,} parameters")
    print("  ".join(f"{name} {value}" for name, value in found["config"].items()))
    print(f"normalise {found['normalise']}")
    if classes := found.get("classes"):
        print(f"{len(classes)} classes: {', '.join(classes[:5])}{', ...' * (len(classes) > 5)}")
    if args.destination is None:
        return
    if args.names == "transformers":
        if found["kind"] == "segmentation":
            raise ValueError(
                "transformers has no model with this deconvolution head: export with "
                "--names released"
            )
        state = to_transformers(state)
    weights.write(args.destination, state)


if __name__ == "__main__":
    with command_line.one_line_errors():
        main()
