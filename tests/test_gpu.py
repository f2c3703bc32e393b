"""What is different on a GPU: attention, TF32, fp16, --compile, nccl, resuming, memory.

    python -m pytest -m gpu -rs          # on a GPU machine, before days are spent on it
    python -m pytest -m gpu -s           # also prints memory and rates

Without a GPU, a CPU runs the same tests as far as it can; the rest is skipped.
"""

import copy
import functools
import gc
import math
import re
import shutil
import time

import pytest
import torch

import beit
import dvae
import pretrain
from experiments import benchmark_attention, costs, short_runs
from plumbing import checkpoints, clock, log, noise, processes, run

COMPILER = pytest.mark.skipif(
    not shutil.which(processes.compiler()),
    reason="torch.compile needs a C++ compiler",
)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", CUDA]
SLOW = [pytest.param("cpu", marks=[pytest.mark.slow, COMPILER]), CUDA]
FP16 = [("cpu", stage) for stage in ("tokenizer", "beit")]
FP16 += [pytest.param("cuda", stage, marks=pytest.mark.gpu) for stage in short_runs.SCRIPTS]
every_script = pytest.mark.parametrize("stage", short_runs.SCRIPTS)


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """Undo what a test changes in all of torch."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)


def flags_on(device, stage, arrays, made):
    """Flags of a short run of a script, in float32."""
    return [*short_runs.script_flags(stage, arrays, made), "--device", device]


def train(stage, flags, out):
    """Run a script in this process; the losses of its steps."""
    short_runs.MODULES[stage].main([*flags, "--out", str(out)])
    return [record["loss"] for record in log.read_metrics(out) if "loss" in record]


# -------------------------------------------------------- one step of pre-training's model


def mim_step(device, positions, drop_path=0.5):
    """(model, its inputs, z): blocks of `base` on a GPU, tiny ones on a CPU; random everything."""
    tiny = dict(image_size=8, patch_size=2, dim=16, heads=2) if device == "cpu" else {}
    config = beit.model_config("base", positions=positions, depth=2, drop_path=drop_path, **tiny)
    torch.manual_seed(0)
    model, N = pretrain.BeitForMaskedImageModeling(config, 11), config.grid**2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 1.0 if name.endswith("bias_table") else config.dim**-0.5
            parameter.add_(spread * torch.randn_like(parameter))
    x, u = torch.randn(4, 3, config.image_size, config.image_size), torch.rand(4, 2, 2)
    mask, z = torch.rand(4, N) < 0.4, torch.randint(11, (4, N))
    chosen = mask.nonzero(as_tuple=True)
    inputs = [x.to(device), mask.to(device), [i.to(device) for i in chosen], u.to(device)]
    return model.to(device), inputs, z[chosen].to(device)


def numbers(model, inputs, z, autocast=torch.autocast("cpu", enabled=False), call=None):
    """{name: tensor} of a step: the logits and the gradient of each parameter, in float64."""
    model.zero_grad()
    with autocast:
        logits = (model if call is None else call)(*inputs)
    (8 * pretrain.recovery_loss(logits, z)).sum().backward()  # not too small for fp16
    found = {name: p.grad.double() for name, p in model.named_parameters()}
    return {"logits": logits.detach().double()} | found


def exact_numbers(model, inputs, z):
    """The same step computed in float64."""
    x, mask, chosen, u = inputs
    return numbers(copy.deepcopy(model).double(), [x.double(), mask, chosen, u.double()], z)


def errors(found, exact):
    """{name: relative error}."""
    return {
        name: ((value - exact[name]).norm() / exact[name].norm()).item()
        for name, value in found.items()
    }


@pytest.mark.parametrize("positions", ["absolute", "relative", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_sdpa_is_as_exact_as_the_plain_products(device, dtype, positions, monkeypatch):
    """Logits and every gradient, the relative bias's too, by both ways against float64."""
    processes.setup(device, "off")
    step = mim_step(device, positions)
    autocast = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)
    monkeypatch.setattr(beit, "SDPA_ON", ())
    exact, plain = exact_numbers(*step), numbers(*step, autocast)
    monkeypatch.setattr(beit, "SDPA_ON", (device,))
    sdpa = numbers(*step, autocast)
    assert any(not torch.equal(sdpa[name], plain[name]) for name in exact)  # another way indeed
    plain, sdpa = errors(plain, exact), errors(sdpa, exact)
    for name in exact:
        allowed = 3 * plain[name] + max(torch.finfo(dtype).eps, 1e-5)
        assert sdpa[name] <= allowed, (name, sdpa[name], plain[name])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
@pytest.mark.parametrize("device", DEVICES)
def test_ways_to_compute_attention_agree(device, capsys):
    """experiments.benchmark --attention: errors of values and gradients against float64.

    On a CPU nothing is compiled, and torch's FlexAttention may have no backward there.
    """
    size = dict(image_size=64, dim=32, heads=2) if device == "cpu" else {}
    config = beit.model_config("base", depth=2, **size)
    with torch.compiler.set_stance("force_eager" if device == "cpu" else "default"):
        benchmark_attention.compare(config, 2, torch.device(device), repeats=1)
    printed = capsys.readouterr().out
    rows = re.findall(r"^  (\w.*?)   .* ms.*?((?:  +[\d.]+e[+-]\d+)+)$", printed, re.MULTILINE)
    found = {name: [float(cell) for cell in cells.split()] for name, cells in rows}
    refusal = re.compile(r"^  (\w.*?): (left out|forward only), torch says: .", re.MULTILINE)
    refused = refusal.findall(printed)
    assert all(name == "FlexAttention, compiled" for name, _ in refused), printed
    assert len(found) == 4 - sum(how == "left out" for _, how in refused), printed
    assert max(max(errors) for errors in found.values()) < 0.05, printed
    plain, sdpa, _, *flex = found.values()
    assert len(plain) == 3 and plain != sdpa  # another way indeed
    assert all(len(errors) == 3 for errors in flex) or refused


@pytest.mark.parametrize("device", DEVICES)
def test_float32_is_not_tf32(device):
    """processes.setup turns TF32 off, cuDNN's default; a tokenizer's exact logits are float32's.

    TF32 rounds to 11 bits, float32 to 24.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    processes.setup(device, "off")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    torch.manual_seed(0)
    model = dvae.build(dvae.DVAEConfig(vocab_size=32, hidden=16, groups=3)).to(device)
    x = torch.rand(4, 3, 32, 32, device=device)
    with torch.no_grad():
        exact = copy.deepcopy(model).double().encode(x.double(), exact=True).double()
        found = model.encode(x, exact=True).double()
    assert (found - exact).norm() / exact.norm() < 3e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
@pytest.mark.parametrize("device", SLOW)
def test_compiled_model_is_the_eager_one(device):
    """--compile: logits and gradients of a step in float32, with a shared relative bias."""
    processes.setup(device, "off")
    model, inputs, z = mim_step(device, "shared")
    call = processes.wrap(model, processes.Process(torch.device(device)), True)
    exact = exact_numbers(model, inputs, z)
    found = errors(numbers(model, inputs, z, call=call), exact)
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("device", [CUDA])
def test_recompute_keeps_the_gradients_and_less_memory(device):
    """--recompute, in bf16, keeps less than half the activations.

    Beside them autocast keeps bf16 copies of the weights, either way. On a CPU test_beit.py
    checks the gradients.
    """
    model, inputs, z = mim_step(device, "shared")
    autocast, found, kept = torch.autocast(device, dtype=torch.bfloat16), [], []

    def watched(*inputs):
        before = torch.cuda.memory_allocated()
        logits = model(*inputs)
        kept.append(torch.cuda.memory_allocated() - before)  # for the backward pass
        return logits

    numbers(model, inputs, z, autocast)  # what torch allocates only once
    for model.recompute in (False, True):
        found.append(numbers(model, inputs, z, autocast, watched))
    assert max(errors(*found).values()) < 1e-2
    copies = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert kept[1] - copies < (kept[0] - copies) / 2


def hash_32(x):
    """noise.scramble of one number, as Python computes it: 0 <= x < 2^32."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ x >> shift) * factor % 2**32
    return x


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_the_same_on_every_device(device):
    """Uniform noise to the bit, and exponential noise, against whole numbers in Python."""
    shape, places = (3, 100_000), [0, 1, 2**17 - 1, 2**17, 2**18, 299_999]  # a CPU's blocks: 2^17
    draw = [
        noise.sample_noise(kind, shape, 2, 5, 7, 3, torch.device(device)).cpu().flatten(1)
        for kind in ("uniform", "exponential")
    ]
    for row, key in enumerate([noise.seed_for(5, 7, 6), noise.seed_for(5, 7, 7)]):
        for place in places:
            x = hash_32((hash_32(place) * (key % 2**32 | 1) + (key >> 32)) % 2**32)
            u = ((x + 2**31) % 2**32 // 2**9 + 0.5) / 2**23
            assert draw[0][row, place].item() == u
            assert draw[1][row, place].item() == pytest.approx(-math.log(u), rel=1e-6)


# -------------------------------------------------------- the scripts


@pytest.mark.parametrize("device, stage", FP16)
def test_fp16_skips_a_step_that_overflows(device, stage, arrays, made, tmp_path, monkeypatch):
    """--amp fp16, with a loss scale that is too large at the second step.

    That step changes no weight and halves the scale; the others change weights, and the log counts
    one skipped step.
    """
    seen, report = [], run.Run.report

    def watch(self, loss, **values):
        scaler = self.process.scaler
        seen.append((scaler.get_scale(), copy.deepcopy(list(self.saved[0].parameters()))))
        if len(seen) < 3:
            scaler.update(2.0 ** (40 if len(seen) == 1 else 10))
        report(self, loss, **values)

    monkeypatch.setattr(run.Run, "report", watch)
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**10)  # no overflow yet
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    train(stage, [*flags_on(device, stage, arrays, made), "--amp", "fp16"], tmp_path / "run")
    (_, first), (scale, second), (_, third), _ = seen
    assert scale == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    *_, last_step, _ = log.read_metrics(tmp_path / "run")
    assert last_step["skipped_steps"] == 1


@every_script
@pytest.mark.parametrize("device", [CUDA])
def test_losses_are_those_of_a_cpu(device, stage, arrays, made, tmp_path):
    """Four steps in float32 with the same masks, crops, depth noise and Gumbel noise."""
    flags = [*flags_on(device, stage, arrays, made), *short_runs.NOISE[stage], "--lr", "1e-4"]
    here = train(stage, flags, tmp_path / "here")
    there = train(stage, [*flags, "--device", "cpu"], tmp_path / "there")
    assert here == pytest.approx(there, rel=1e-3)


@every_script
@pytest.mark.parametrize("device", [CUDA])
def test_resumed_run_is_the_same_run(device, stage, arrays, made, tmp_path, monkeypatch):
    """Four steps, against the same run continued from step 0, with deterministic algorithms."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    flags = [*flags_on(device, stage, arrays, made), *short_runs.NOISE[stage], "--amp", "auto"]
    out = tmp_path / "run"
    losses, whole = train(stage, flags, out), short_runs.weights(out)
    (out / "previous.pt").replace(out / "checkpoint.pt")  # as if it had stopped before step 1
    checkpoints.LOCKS.clear()
    again = train(stage, ["--resume"], out)
    assert again[-len(losses) :] == pytest.approx(losses, rel=1e-3)
    resumed = short_runs.weights(out)
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]


@every_script
@pytest.mark.parametrize("device", [CUDA])
def test_all_gpus_equal_one(device, stage, arrays, made, tmp_path):
    """nccl on the GPUs of this machine (8, 4, 2 or 1 of them) against one without torchrun."""
    count = max(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count())
    flags = [*flags_on(device, stage, arrays, made), *short_runs.NOISE[stage], "--lr", "1e-4"]
    flags += ["--no-normalise-logits"] if stage == "tokenizer" else []
    losses = train(stage, flags, tmp_path / "one")
    out, script = tmp_path / "all", short_runs.SCRIPTS[stage][0]
    done = short_runs.torchrun(script, *flags, "--out", str(out), processes=count)
    assert done.returncode == 0, done.stderr
    found = [record["loss"] for record in log.read_metrics(out) if "loss" in record]
    assert found == pytest.approx(losses, rel=1e-4)
    one, all_of_them = short_runs.weights(tmp_path / "one"), short_runs.weights(out)
    assert max((one[name] - all_of_them[name]).abs().mean() for name in one) < 1e-6


# -------------------------------------------------------- memory and speed


def base_step(images, device):
    """A function that makes a step of `base` in bf16, without the tokenizer; and its peak bytes."""
    model = costs.build("pretraining", "base").to(device)
    optimizer = torch.optim.AdamW(beit.parameter_groups(model, 0.05), fused=True)

    def step():
        with torch.device(device):
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = costs.loss_of("pretraining", "base", model, images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, held_by(model, images)


def held_by(model, images):
    """Peak bytes of such a step by experiments.costs."""
    held = costs.fixed("pretraining", "base", model)
    held["weights"] = held["gradients"]  # without the frozen tokenizer
    return costs.peak(held, images, costs.activations("pretraining", "base")["plain"], False)


@pytest.mark.parametrize("images", [64, 128])
@pytest.mark.parametrize("device", [CUDA])
def test_memory_of_base_is_the_computed_one(device, images, capsys):
    """Peak memory of a step against docs/scale.md's way to compute it; prints it and the rate."""
    step, expected = base_step(images, device)
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < 1.2 * expected:
        pytest.skip(f"needs {1.2 * expected / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    for number in range(13):
        if number == 3:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
        step()
    torch.cuda.synchronize()
    rate, peak = 10 * images / (time.perf_counter() - start), torch.cuda.max_memory_allocated()
    cost = costs.cost("pretraining", "base")
    flop = rate * (cost["flop"] - cost["tokenizer"])
    matrix = clock.matmul_rate(torch.device(device), lambda: torch.autocast(device, torch.bfloat16))
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, base, bf16, {images} images: {rate:.0f} images/s")
        print(f"  {flop / 1e12:.0f} TFLOP/s, {flop / matrix:.0%} of large matrix products' rate")
        print(f"  peak memory {peak / 1e9:.1f} GB, computed {expected / 1e9:.1f} GB")
    assert 0.8 * expected < peak < 1.2 * expected
