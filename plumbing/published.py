"""Files that others published: BEiT weights of the authors, timm and transformers, and DALL-E's.

The command shows what is in a checkpoint of these scripts or in published BEiT weights, and exports
the weights under either set of names:

    python -m plumbing.published WEIGHTS
    python -m plumbing.published WEIGHTS NEW.pth
    python -m plumbing.published WEIGHTS NEW.safetensors --names transformers

This project's parameter names are the authors' ("released"), which timm uses too.
"""

import re
from pathlib import Path

import torch

from plumbing import backbone, checkpoints, command_line, entries, log, outputs, weights

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
    depth = backbone.block_count(state, "blocks.")
    renamed = rename(state, all_names(depth))
    for l in range(depth):
        parts = renamed.pop(f"blocks.{l}.attn.qkv.weight").chunk(3)
        for name, part in zip(query_key_value(l), parts):
            renamed[name] = part.clone()
    return renamed


def from_transformers(state):
    """Convert a state dict from the names of transformers' files to the released names."""
    depth = backbone.block_count(state, "beit.encoder.layer.")
    renamed = rename(state, {theirs: ours for ours, theirs in all_names(depth).items()})
    for l in range(depth):
        names = query_key_value(l)
        parts = [renamed[name] for name in names if name in renamed]
        whole = len(parts) == 3 and all(part.ndim for part in parts)
        if whole and len({part.shape[1:] for part in parts}) == 1:
            renamed[f"blocks.{l}.attn.qkv.weight"] = torch.cat(parts)
            for name in names:  # otherwise loading into a model reports them
                del renamed[name]
    return renamed


# -------------------------------------------------------- BEiT's files


def load_init(args, *kinds):
    """(the weights of --init, see load_pretrained, or None if random; the name of --normalise)."""
    if args.init == "random":
        return None, "half" if args.normalise == "auto" else args.normalise
    init = load_pretrained(checkpoints.start_of(args), *kinds, normalise=args.normalise)
    if not args.eval:  # which takes the weights' own size
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
    released names), normalise (pixel mean and std, "half" or "imagenet") and, unless from a
    checkpoint, classes (their names). The argument normalise replaces the file's own pixel mean and
    std unless it is "auto".

    Published files hold a state dict, bare or under the key `model` or `module`. Their config is
    inferred from the tensors and classes is None. They do not say their normalise: "auto" takes
    "half", right for those pre-trained on ImageNet-22k, and says so. Raises ValueError if the file
    is anything else.
    """
    content = weights.read(path)
    if isinstance(content, dict) and "kind" in content:
        found = entries.check(path, content, *kinds)
        backbone.check(path, found)
        return found if normalise == "auto" else found | {"normalise": normalise}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    state = content.get("model", content.get("module", content))
    weights.check_state(path, state)
    if any(key.startswith("beit.") for key in state):
        state = from_transformers(state)
    state = {
        key: value
        for key, value in state.items()
        if not key.endswith("relative_position_index")  # a constant
        and not key.startswith("decoder.")  # a segmenter's own head
    }
    try:
        config = backbone.inferred_config(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    found = {
        "kind": "classification" if "head.weight" in state else "pretraining",
        "config": config,
        "model": state,
        "normalise": "half" if normalise == "auto" else normalise,
        "classes": None,
    }
    if found["kind"] not in kinds:
        needed = ", ".join(kinds)
        raise ValueError(f"{path} is a {found['kind']} checkpoint; this needs one of: {needed}")
    backbone.check(path, found)
    if config["positions"] == "absolute":
        log.note(
            f"{path} does not record its heads: assuming {config['heads']} for its width; if it "
            "has another number, results are wrong: take its checkpoint.pt"
        )
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


DEEPEST = 8  # no module of DALL-E's lies deeper inside others


def parameters_of(path, record, prefix=""):
    """{name: float32 tensor} of a Record; DALL-E's `w` and `b` become `weight` and `bias`.

    Raises ValueError if it is not a Record with parameters and modules, or nested too deeply.
    """
    content = vars(record) if isinstance(record, Record) else {}
    parameters, modules = content.get("_parameters"), content.get("_modules")
    right = isinstance(parameters, dict) and isinstance(modules, dict)
    if not right or prefix.count(".") > DEEPEST:
        raise ValueError(f"{path} is refused: not a file of DALL-E's tokenizer ({prefix[:80]})")
    own = {name: value for name, value in parameters.items() if value is not None}
    weights.check_state(path, own, prefix or "it")
    names = {"w": "weight", "b": "bias"}
    found = {prefix + names.get(name, name): value.detach().float() for name, value in own.items()}
    for name, child in modules.items():
        found |= parameters_of(path, child, f"{prefix}{entries.shown(name)[1:-1]}.")
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
    with torch.serialization.safe_globals([(Record, name) for name in DALLE_CLASSES]):
        return parameters_of(path, weights.read(path))


def read_dalle(folder):
    """Read DALL-E's published tokenizer from FOLDER/encoder.pkl and FOLDER/decoder.pkl.

    Returns (sizes, state dict of encoder.* and decoder.*); sizes is a dict inferred from the
    tensors: vocab_size, hidden, groups, blocks_per_group, code_dim. Raises ValueError if a file is
    missing, damaged, not DALL-E's, or asks to run code.
    """
    encoder = read_pickled_module(Path(folder) / "encoder.pkl")
    decoder = read_pickled_module(Path(folder) / "decoder.pkl")
    last, first = "blocks.output.conv.weight", "blocks.input.weight"
    ends = {f"encoder {last}": encoder.get(last), f"encoder {first}": encoder.get(first)}
    ends[f"decoder {first}"] = decoder.get(first)
    for name, value in ends.items():
        if value is None or value.ndim != 4:
            raise ValueError(
                f"{folder}: encoder.pkl and decoder.pkl are not DALL-E's: they have no {name}"
            )
    groups = [key.split(".")[1:3] for key in encoder if re.match(r"blocks\.group_\d+\.\w", key)]
    vocab_size, hidden, code_dim = map(len, ends.values())
    sizes = {"vocab_size": vocab_size, "hidden": hidden, "code_dim": code_dim}
    sizes["groups"] = len({group for group, _ in groups})
    sizes["blocks_per_group"] = len({block for group, block in groups if group == "group_1"})
    if not all(sizes.values()):
        raise ValueError(f"{folder}: not DALL-E's tokenizer: one of its sizes is 0: {sizes}")
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
    if args.names != "released" and not args.destination:
        parser.error("--names is for the new file: name one")
    if args.destination:
        outputs.check_new(args.destination, suffixes=(".pth", ".pt", ".safetensors"))
    found = load_pretrained(args.weights, *entries.TRAINED)
    state = found["model"]
    print(f"{found['kind']}, {sum(value.numel() for value in state.values()):,} parameters")
    print("  ".join(f"{name} {value}" for name, value in found["config"].items()))
    print(f"normalise {found['normalise']}")
    if classes := found.get("classes"):
        print(f"{len(classes)} classes: {log.first_of(classes, 5)}")
    if args.destination is None:
        return
    if layer := found.get("layer"):
        raise ValueError(f"{args.weights}: only these scripts can classify layer {layer}'s outputs")
    if args.names == "transformers":
        if found["kind"] == "segmentation":
            raise ValueError(
                "transformers has no model with this deconvolution head: export with "
                "--names released"
            )
        state = to_transformers(state)
    weights.write(args.destination, state)
    heads, assumed = found["config"]["heads"], backbone.assumed_heads(found["config"]["dim"])
    lost = ["pixel mean and std", "class names"]
    if found["config"]["positions"] == "absolute" and heads != assumed:
        lost.append(f"that it has {heads} heads")
    print(f"wrote {args.destination} under {args.names} names; not recorded: {', '.join(lost)}")
    if found["kind"] == "segmentation":
        print("these scripts take only its backbone: keep the checkpoint.pt for the decoder")


if __name__ == "__main__":
    with command_line.one_line_errors():
        main()
