"""Weights from elsewhere: golden values of other implementations, published files, DALL-E."""

import argparse
import re
import sys
import types

import pytest
import torch
from torch import nn

import beit
import dvae
import finetune_cls
import pretrain
from experiments import short_runs, verify
from plumbing import checkpoints, log, published, weights

# -------------------------------------------------------- golden values

# python -m experiments.verify --golden: outputs of timm 1.0.31 and DALL-E 0.1 for weights and
# images from a formula
GOLDEN = {
    "absolute": [-1.065916, 0.968003, -0.803153],
    "relative": [-0.570755, 0.222425, 0.304369],
    "shared": [0.884013, -0.636977, 0.210377],
}
GOLDEN_DALLE = [
    *(-0.282044, -0.282035, -0.282168, -0.282464),
    *(-0.300753, -0.300739, -0.300884, -0.301212),
]


def wave():
    """The image of the golden values: (1, 3, 16, 16) in [-1, 1]."""
    return torch.sin(torch.arange(3 * 16 * 16) * 0.3).view(1, 3, 16, 16)


@pytest.mark.parametrize("positions", GOLDEN)
def test_golden_logits_of_timm(positions):
    """A classifier's logits against timm's."""
    model = verify.formula(finetune_cls.BeitForClassification(verify.golden_config(positions), 3))
    assert torch.allclose(model(wave())[0], torch.tensor(GOLDEN[positions]), atol=2e-6)


def test_golden_logits_of_dalle():
    """The tokenizer's logits against DALL-E's."""
    model = dvae.DVAE(dvae.DVAEConfig(vocab_size=512, hidden=64, blocks_per_group=1))
    verify.formula(model.encoder)
    logits = model.encode((wave() + 1) / 2)[0, :, :, :2].permute(2, 0, 1)
    assert torch.allclose(logits.flatten(), torch.tensor(GOLDEN_DALLE), atol=2e-6)


# -------------------------------------------------------- published BEiT weights


def small_config(**changes):
    """A BeitConfig of two blocks whose heads are 64 wide, as published ones are."""
    sizes = dict(image_size=8, patch_size=2, dim=128, depth=2, heads=2, drop_path=0.0) | changes
    return beit.BeitConfig(**sizes)


def pretraining_model(positions, **changes):
    """A small pre-training model; no two of its parameters are equal."""
    torch.manual_seed(0)
    model = pretrain.BeitForMaskedImageModeling(small_config(positions=positions, **changes), 11)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def assert_same(found, expected):
    """Two state dicts have the same names and values."""
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "positions, changes",
    [
        ("absolute", {}),
        ("relative", {}),
        ("relative", {"heads": 4, "depth": 1}),
        ("shared", {"mlp_ratio": 2.0}),
    ],
    ids=["absolute", "relative", "narrow heads", "shared"],
)
def test_published_files_load_as_they_are(positions, changes, tmp_path):
    """Configuration and weights read from each published format against the model's own.

    A bare state dict, one under `model` or `module`, each with relative_position_index, and
    transformers' names.
    """
    model = pretraining_model(positions, **changes)
    state = model.state_dict()
    bare = state | {"blocks.0.attn.relative_position_index": torch.zeros(2, dtype=torch.int64)}
    files = {"bare": bare, "model": {"model": bare}, "module": {"module": bare}}
    files["transformers"] = published.to_transformers(state)
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        found = published.load_pretrained(tmp_path / f"{name}.pth", "pretraining")
        assert beit.BeitConfig(**found["config"]) == model.config
        assert_same(found["model"], state)


def of_both(theirs, ours, state):
    """{their name of a weight and a bias: our tensor} of a module."""
    return {f"{theirs}.{leaf}": state[f"{ours}.{leaf}"] for leaf in ("weight", "bias")}


def test_transformers_names_of_one_block():
    """An exported state dict against transformers' names, written out for one block."""
    state = pretraining_model("shared", depth=1).state_dict()
    theirs, ours = "beit.encoder.layer.0.", "blocks.0."
    attention, (query, key, value) = f"{theirs}attention.", state[f"{ours}attn.qkv.weight"].chunk(3)
    expected = {f"beit.embeddings.{name}_token": state[f"{name}_token"] for name in ("cls", "mask")}
    expected |= {f"{theirs}lambda_{i}": state[f"{ours}gamma_{i}"] for i in (1, 2)}
    expected |= {f"{attention}attention.query.weight": query}
    expected |= {f"{attention}attention.query.bias": state[f"{ours}attn.q_bias"]}
    expected |= {f"{attention}attention.key.weight": key}
    expected |= {f"{attention}attention.value.weight": value}
    expected |= {f"{attention}attention.value.bias": state[f"{ours}attn.v_bias"]}
    expected |= of_both(f"{attention}output.dense", f"{ours}attn.proj", state)
    expected |= of_both(f"{theirs}layernorm_before", f"{ours}norm1", state)
    expected |= of_both(f"{theirs}layernorm_after", f"{ours}norm2", state)
    expected |= of_both(f"{theirs}intermediate.dense", f"{ours}mlp.fc1", state)
    expected |= of_both(f"{theirs}output.dense", f"{ours}mlp.fc2", state)
    expected |= of_both("beit.embeddings.patch_embeddings.projection", "patch_embed.proj", state)
    expected |= of_both("layernorm", "norm", state) | of_both("lm_head", "lm_head", state)
    table = "relative_position_bias.relative_position_bias_table"
    expected |= {f"beit.encoder.{table}": state["rel_pos_bias.relative_position_bias_table"]}
    assert_same(published.to_transformers(state), expected)


def test_transformers_names_of_a_classifiers_head_and_of_positions():
    """The names that a pre-training model with a shared table does not have, one kind at a time."""
    model = finetune_cls.BeitForClassification(small_config(positions="absolute"), 3)
    state = model.state_dict()
    found = published.to_transformers(state)
    found = {name: value for name, value in found.items() if ".layer." not in name}
    expected = {"beit.embeddings.cls_token": state["cls_token"]}
    expected |= {"beit.embeddings.position_embeddings": state["pos_embed"]}
    expected |= of_both("beit.embeddings.patch_embeddings.projection", "patch_embed.proj", state)
    expected |= of_both("beit.pooler.layernorm", "fc_norm", state)
    assert_same(found, expected | of_both("classifier", "head", state))
    state = pretraining_model("relative").state_dict()
    found, table = published.to_transformers(state), "relative_position_bias_table"
    place = "beit.encoder.layer.1.attention.attention.relative_position_bias"
    assert torch.equal(found[f"{place}.{table}"], state[f"blocks.1.attn.{table}"])


def test_weights_from_elsewhere_are_strict(tmp_path):
    """A missing, an unknown or a strange entry is an error that names it."""
    state = pretraining_model("absolute").state_dict()
    theirs = published.to_transformers(state)
    key = "beit.encoder.layer.1.attention.attention.key.weight"
    cases = {
        "model has no blocks.1.norm2.bias": without(state, "1.norm2.bias"),
        "model has no blocks.1.attn.qkv.weight": without(theirs, key),
        "model has adapter, which is not known": state | {"adapter": torch.zeros(1)},
        "'epoch' is not a tensor": state | {"epoch": 3},
        "model is a int, not a state dict": {"model": 3},
        "holds a list, not a state dict": [1],
        "no patch_embed.proj.weight": without(state, "patch"),
        "model has lm_head.weight (), not": state | {"lm_head.weight": torch.tensor(1.0)},
        "model has no blocks.1.attn.qkv": theirs
        | {key: torch.tensor(1.0)}
        | {key.replace("key", name): torch.ones(3) for name in ("query", "value")},
    }
    for message, content in cases.items():
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=re.escape(message)):
            found = published.load_pretrained(tmp_path / "odd.pth", "pretraining")
            beit.load_backbone(beit.Beit(beit.BeitConfig(**found["config"])), found["model"])


@pytest.mark.parametrize("name, value", [("drop_path", 1.0), ("heads", 3)])
def test_what_the_tensors_do_not_tell_is_in_its_range(name, value, made, tmp_path):
    """Stochastic depth that drops every block; heads that do not divide the width."""
    state = torch.load(made / "cls" / "checkpoint.pt", weights_only=True)
    state["config"][name] = value
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="config: drop_path or heads are out of range"):
        published.load_pretrained(tmp_path / "odd.pt", "classification")


def test_an_export_says_what_it_does_not_hold(tmp_path, capsys):
    """Two heads of width 32, which nobody can tell from E_pos, are named; those of 64 are not.

    Relative tables have a column for each head.
    """
    told = ", that it has 2 heads"
    for dim, positions, lost in ((64, "absolute", told), (128, "absolute", ""), (64, "shared", "")):
        config = small_config(dim=dim, positions=positions, layer_scale=0.0)
        model = pretrain.BeitForMaskedImageModeling(config, 5)
        args = argparse.Namespace(seed=0)
        out = tmp_path / f"{positions}-{dim}"
        out.mkdir()
        optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu")
        more = {"normalise": "half", "predicts": "pixels"}
        checkpoints.save(out, "pretraining", args, 0, model, optimizer, scaler, more)
        published.main([str(out / "checkpoint.pt"), str(out / "new.pth")])
        said = capsys.readouterr().out
        assert f"released names; not recorded: pixel mean and std, class names{lost}\n" in said


def without(state, part):
    """A state dict without the entries whose name contains `part`."""
    return {key: value for key, value in state.items() if part not in key}


def test_safetensors_is_optional(tmp_path, monkeypatch):
    """Without the package one line says what to install; with it the same tensors come back."""
    state = pretraining_model("shared").state_dict()
    with monkeypatch.context() as absent:
        absent.setitem(sys.modules, "safetensors", None)
        absent.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(ValueError, match="pip install safetensors"):
            weights.write(tmp_path / "model.safetensors", state)
    pytest.importorskip("safetensors")
    transposed = state["lm_head.weight"].T.contiguous().T  # which the package itself refuses
    exported = published.to_transformers(state | {"lm_head.weight": transposed})
    weights.write(tmp_path / "model.safetensors", exported)
    found = published.load_pretrained(tmp_path / "model.safetensors", "pretraining")["model"]
    assert_same(found, state)


def test_published_weights_are_fine_tuned_and_evaluated(arrays, tmp_path):
    """Bare weights without class names: fine-tuned, exported, evaluated and fine-tuned again.

    --init takes pre-trained weights, --eval a classifier of as many classes as the data.
    """
    sizes = dict(image_size=16, patch_size=4, dim=64, depth=2, heads=1, drop_path=0.0)
    model = pretrain.BeitForMaskedImageModeling(beit.BeitConfig(**sizes), 11)
    torch.save(model.state_dict(), tmp_path / "beit.pth")
    flags = ["--data", arrays, "--amp", "off"]
    short = ["--image-size", "16", "--epochs", "2", "--warmup-epochs", "1", "--batch-size", "8"]
    short += ["--labels-per-class", "4"]
    init, out = ["--init", str(tmp_path / "beit.pth")], ["--out", str(tmp_path / "cls")]
    finetune_cls.main([*flags, *short, *init, *out])
    ours, exported = tmp_path / "cls" / "checkpoint.pt", tmp_path / "exported.pth"
    published.main([str(ours), str(exported), "--names", "transformers"])
    states = []
    for path in (ours, exported):
        finetune_cls.main([*flags, "--eval", "--init", str(path)])
        states.append(published.load_pretrained(path, "classification")["model"])
    assert_same(states[1], states[0])
    init, out = ["--init", str(exported)], ["--out", str(tmp_path / "again")]
    finetune_cls.main([*flags, *short, *init, *out, "--lr", "0", "--min-lr", "0"])
    again = published.load_pretrained(tmp_path / "again" / "checkpoint.pt", "classification")
    assert torch.equal(again["model"]["head.weight"], states[0]["head.weight"])  # kept its head
    three = {
        key: value[:3] if key.startswith("head.") else value for key, value in states[1].items()
    }
    torch.save(three, tmp_path / "three.pth")
    with pytest.raises(ValueError, match="was trained on 3 classes"):
        finetune_cls.main([*flags, "--eval", "--init", str(tmp_path / "three.pth")])


def test_an_exported_segmenter_is_a_backbone(made, tmp_path, capsys):
    """The file holds its decoder too, as the line says; what is read from it is the rest."""
    saved = torch.load(made / "seg" / "checkpoint.pt", weights_only=True)["model"]
    published.main([str(made / "seg" / "checkpoint.pt"), str(tmp_path / "seg.pth")])
    assert "these scripts take only its backbone" in capsys.readouterr().out
    assert_same(torch.load(tmp_path / "seg.pth", weights_only=True)["model"], saved)
    found = published.load_pretrained(tmp_path / "seg.pth", "pretraining")["model"]
    rest = {name: value for name, value in saved.items() if not name.startswith("decoder.")}
    assert_same(found, rest)


def test_a_probe_of_an_inner_layer_is_not_exported(made, tmp_path):
    """No other program knows that its head takes the outputs of block 2."""
    state = torch.load(made / "cls" / "checkpoint.pt", weights_only=True) | {"layer": 2}
    torch.save(state, tmp_path / "probe.pt")
    with pytest.raises(ValueError, match="only these scripts can classify layer 2's outputs"):
        published.main([str(tmp_path / "probe.pt"), str(tmp_path / "new.pth")])
    assert not (tmp_path / "new.pth").exists()


def test_export_refuses_to_overwrite(made, tmp_path):
    """An existing file, no folder, another suffix, names without a file, a segmenter."""
    (tmp_path / "there.pth").write_text("keep me")
    pretrained, segmenter = (str(made / stage / "checkpoint.pt") for stage in ("beit", "seg"))
    with pytest.raises(ValueError, match="exists already"):
        published.main([pretrained, str(tmp_path / "there.pth")])
    with pytest.raises(SystemExit, match="2"):
        published.main([pretrained, "--names", "transformers"])
    with pytest.raises(ValueError, match="name a new file that ends in .pth or .pt or .safetens"):
        published.main([pretrained, str(tmp_path / "new.bin")])
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        published.main([pretrained, str(tmp_path / "nowhere" / "new.pth")])
    with pytest.raises(ValueError, match="no model with this deconvolution head"):
        published.main([segmenter, str(tmp_path / "seg.pth"), "--names", "transformers"])
    assert (tmp_path / "there.pth").read_text() == "keep me"


# -------------------------------------------------------- DALL-E's tokenizer


def disguise(module, classes):
    """Our encoder or decoder as DALL-E's modules: convolutions with `w` and `b`, other names."""
    if isinstance(module, nn.Conv2d):
        new = classes["Conv2d"]()
        new.w, new.b = module.weight, module.bias
        return new
    if not list(module.children()):
        return module
    kinds = {dvae.Encoder: "Encoder", dvae.Decoder: "Decoder", dvae.ResidualBlock: "Block"}
    kind = kinds.get(type(module))
    new = classes[kind]() if kind else nn.Sequential()
    for name, child in module.named_children():
        if name == "resize":
            name = "pool" if isinstance(child, nn.MaxPool2d) else "upsample"
        new.add_module(name, disguise(child, classes))
    return new


@pytest.fixture
def dalle(tmp_path, monkeypatch):
    """(a tokenizer of ours, a folder with it as DALL-E's encoder.pkl and decoder.pkl).

    They are pickles of whole modules of a package that is gone when they are read.
    """
    torch.manual_seed(0)
    model = dvae.DVAE(dvae.DVAEConfig(vocab_size=16, hidden=8, groups=3, code_dim=8)).eval()
    for part in ("encoder", "decoder"):
        package = {name: types.ModuleType(f"dall_e.{name}") for name in (part, "utils")}
        homes = {"Conv2d": "utils", part.capitalize(): part, "Block": part}
        classes = {}
        for name, home in homes.items():
            real = f"{part.capitalize()}Block" if name == "Block" else name
            classes[name] = type(real, (nn.Module,), {"__module__": f"dall_e.{home}"})
            setattr(package[home], real, classes[name])
        with monkeypatch.context() as installed:
            installed.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
            for home, content in package.items():
                installed.setitem(sys.modules, f"dall_e.{home}", content)
            torch.save(disguise(getattr(model, part), classes), tmp_path / f"{part}.pkl")
    return model, tmp_path


def test_dalle_pickles_are_read_without_their_package(dalle):
    """Tokens and reconstructions of the tokenizer that was read against the one written."""
    model, folder = dalle
    read = dvae.load_tokenizer(f"dalle:{folder}")
    assert read.config == model.config
    x = torch.rand(3, 3, 16, 16)
    assert torch.equal(read.tokens(x), model.tokens(x))
    assert torch.equal(read.decode(read.tokens(x)), model.decode(model.tokens(x)))


def test_pretraining_on_a_dalle_tokenizer(dalle, arrays, made, tmp_path):
    """pretrain.py runs to its end with --tokenizer dalle:FOLDER."""
    _, folder = dalle
    flags = [*short_runs.script_flags("beit", arrays, made), "--tokenizer", f"dalle:{folder}"]
    pretrain.main([*flags, "--out", str(tmp_path / "beit")])
    assert log.read_metrics(tmp_path / "beit")[-1]["final"]


def test_hostile_pickles_run_nothing(dalle, hostile):
    """A pickle that asks to run a command is refused in one line, as DALL-E's or BEiT's file."""
    _, folder = dalle
    with pytest.raises(ValueError, match="there is no .*encoder.pkl"):
        dvae.load_tokenizer("dalle:nowhere")
    for name in ("encoder.pkl", "weights.pth"):
        torch.save(hostile(folder / "ran"), folder / name)
    with pytest.raises(ValueError, match="is refused: it asks for posix.mkdir") as tokenizer:
        dvae.load_tokenizer(f"dalle:{folder}")
    with pytest.raises(ValueError, match="is refused: it asks for posix.mkdir") as backbone:
        published.load_pretrained(folder / "weights.pth", "pretraining")
    assert not (folder / "ran").exists()
    assert all("\n" not in str(error.value) for error in (tokenizer, backbone))
