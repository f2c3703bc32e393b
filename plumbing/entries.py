"""What a checkpoint holds: each entry is checked against what these scripts write.

A file may be whole and still come from anywhere. `check` takes one as weights.read returns it and
refuses it by the name of the first entry that no script of ours has written. What depends on a
model (names and shapes of the weights, the optimiser's state) is checked against that model.
"""

import argparse
import math
import re

import torch

from plumbing import weights

KINDS = "tokenizer", "pretraining", "classification", "segmentation"
LARGEST = 2**24  # no size of a model is larger, and no product of them overflows
LAYERS, MOST_LAYERS = ("depth", "groups", "blocks_per_group"), 1000
LONGEST = 2**53  # no run has more steps
# Steps in a row without a finite gradient that end a run, see run.FiniteSteps. fp16's loss scale
# may need a few at the start, and one now and then.
SKIPPED = 10


def shown(value):
    """A value from a file as text for a message; for anything that is not plain, only its type."""
    if value is None or type(value) in (bool, float) or type(value) is int and abs(value) < 2**64:
        return repr(value)
    return repr(value[:60]) if type(value) is str else f"a {type(value).__name__}"


# -------------------------------------------------------- single values


def is_count(value, least=0, most=LONGEST):
    """Is it an int, not a bool, in this range?"""
    return type(value) is int and least <= value <= most


def is_number(value):
    """Is it a finite float, or an int that fits into one, not a bool?"""
    return type(value) is float and math.isfinite(value) or is_count(value, -(2**63), 2**63)


def is_one(value, *names):
    """Is it one of these strings?"""
    return type(value) is str and value in names


def is_plain(value):
    """Is it what a flag can hold: a string, a finite number, a bool or None?"""
    return value is None or type(value) in (bool, str) or is_number(value)


def is_names(value):
    """Is it a list of strings?"""
    return type(value) is list and all(type(name) is str for name in value)


def is_plain_dict(value):
    """Is it a dict from strings to plain values?"""
    return type(value) is dict and all(type(k) is str and is_plain(v) for k, v in value.items())


def is_digest(value):
    """Is it a digest of sixteen hexadecimal digits?"""
    return type(value) is str and bool(re.fullmatch("[0-9a-f]{16}", value))


def is_fingerprint(value):
    """Is it what images.sources.fingerprint returns: a number, names and digests?"""
    known = {"number of images": is_count, "class names": is_names}
    return type(value) is dict and all(
        type(name) is str and (name in known or name.endswith(" (digest)"))
        and known.get(name, is_digest)(part) for name, part in value.items()
    )  # fmt: skip


def has_keys(value, *names):
    """Is it a dict with exactly these keys?"""
    return type(value) is dict and value.keys() == {*names}


def is_scaler(value):
    """Is it the state of a loss scale, or empty without one?"""
    names = "scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"
    right = value == {} or has_keys(value, *names)
    return right and all(is_number(part) and part >= 0 for part in value.values())


# -------------------------------------------------------- the entries

TRAINED = KINDS[1:]  # kinds that have the backbone
ENTRIES = {
    # name: (kinds that have it, what it must be, a function that says whether it is that). An entry
    # of kinds in brackets may be missing.
    "kind": (KINDS, "a kind", lambda value: is_one(value, *KINDS)),
    "config": (KINDS, "a dict of numbers and names", is_plain_dict),
    "model": (KINDS, "a state dict", lambda value: isinstance(value, dict)),
    "average": ([KINDS[0]], "a state dict", lambda value: isinstance(value, dict)),
    "step": (KINDS, "a number of steps", is_count),
    "optimizer": (
        KINDS, "an optimiser's state", lambda value: has_keys(value, "state", "param_groups")
    ),
    "scaler": (KINDS, "a loss scaler's state", is_scaler),
    "arguments": (KINDS, "a dict of flags", is_plain_dict),
    "torch": (
        KINDS, "torch's version",
        lambda value: type(value) is str and bool(re.match(r"\d+\.\d+", value)),
    ),
    "data": ([*KINDS], "the training data's fingerprint", is_fingerprint),
    "init": ([*KINDS], "a digest", is_digest),
    "normalise": (TRAINED, "half or imagenet", lambda value: is_one(value, "half", "imagenet")),
    "predicts": (
        ["pretraining"], "a digest or pixels",
        lambda value: is_digest(value) or is_one(value, "pixels", "normalised-pixels"),
    ),
    "classes": (("classification", "segmentation"), "a list of names", is_names),
    "layer": (
        ["classification"], "None or a layer's number",
        lambda value: value is None or is_count(value, 1, LARGEST),
    ),
    "decoder_dim": (("segmentation",), "a width", lambda value: is_count(value, 1, LARGEST)),
}  # fmt: skip


def check(path, state, *kinds):
    """Return `state`, the content of the file `path`.

    Raises ValueError unless it is a checkpoint of one of `kinds` with the entries that it must
    have, each of them what these scripts write, and no others.
    """
    missing = {"kind", "config", "model"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise ValueError(
            f"{path} is not a checkpoint of these scripts: it has no {', '.join(sorted(missing))}"
        )
    kind = state["kind"]
    if not is_one(kind, *kinds):
        kind = f"a {kind} checkpoint" if is_one(kind, *KINDS) else f"of kind {shown(kind)}"
        raise ValueError(f"{path} is {kind}; this needs one of: {', '.join(kinds)}")
    for name in state:
        if name not in ENTRIES or kind not in ENTRIES[name][0]:
            raise ValueError(
                f"{path}: these scripts write no entry {shown(name)} in a {kind} checkpoint"
            )
    for name, (owners, wanted, is_right) in ENTRIES.items():
        if name not in state and kind in owners and isinstance(owners, tuple):
            raise ValueError(f"{path} is not a checkpoint of these scripts: it has no {name}")
        if name in state and not is_right(state[name]):
            raise ValueError(f"{path}: {name}{fault(state[name])}, not {wanted}")
    for name in {"model", "average"} & state.keys():
        weights.check_state(path, state[name], name)
    return state


def fault(value):
    """' is VALUE', or of a dict its first part that is not plain: ': NAME is VALUE'."""
    parts = value.items() if type(value) is dict else ()
    odd = (f": {shown(k)} is {shown(v)}" for k, v in parts if not is_plain_dict({k: v}))
    return next(odd, f" is {shown(value)}")


def check_config(path, config, types):
    """Check a configuration {field: value} from the file `path`. types: {field: type}.

    Raises ValueError naming a field that is missing, unknown or not of its type: an int from 1 to
    LARGEST, a float from 0 to LARGEST, a bool or a string.
    """
    for name in [*types, *config]:
        if name not in types or name not in config:
            fault = "is missing" if name in types else "is unknown"
            raise ValueError(f"{path}: config: the field {shown(name)} {fault}")
    for name, kind in types.items():
        value, right = config[name], type(config[name]) is kind
        if kind is int:
            right = is_count(value, 1, MOST_LAYERS if name in LAYERS else LARGEST)
        elif kind is float:
            right = is_number(value) and 0 <= value <= LARGEST
        if not right:
            raise ValueError(f"{path}: config: {name} cannot be {shown(value)}")


def check_flags(path, saved, parser):
    """Check the values of flags in the file `path`, {name: value}, against a parser's flags.

    A value is what the flag makes of its text. Flags of other scripts are left to the caller.
    Raises ValueError naming the flag.
    """
    for action in parser._actions:
        if action.dest in saved and not is_value(action, saved[action.dest]):
            value = shown(saved[action.dest])
            raise ValueError(f"{path}: arguments: {action.dest} cannot be {value}")


def is_value(action, value):
    """Could the flag of this argparse action have this value?"""
    if action.nargs == 0:
        return type(value) is bool
    convert = action.type or str
    if value is None:  # the default, or what the default's text stands for, as of --workers
        return action.default is None or action.type not in (None, int, float)
    try:
        same = convert(str(value)) == value
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return False
    return same and (action.choices is None or value in action.choices)


# -------------------------------------------------------- against a model and its optimiser


def check_optimizer(path, saved, optimizer, steps):
    """Check an optimiser, an AdamW, saved after `steps` steps against that of the model.

    The groups have the same entries and parameters; a parameter has its moments, of its own
    shape and finite, and a count of steps, or nothing before the first step.
    """
    own = optimizer.state_dict()
    right = type(saved["state"]) is dict and type(saved["param_groups"]) is list
    if not right or len(saved["param_groups"]) != len(own["param_groups"]):
        raise ValueError(f"{path} does not fit: optimizer is not that of this model")
    for group, wanted in zip(saved["param_groups"], own["param_groups"]):
        if type(group) is not dict or group.keys() != wanted.keys():
            raise ValueError(f"{path} does not fit: optimizer: param_groups has other entries")
        for name, value in wanted.items():
            if not is_group_value(name, group[name], value):
                raise ValueError(f"{path}: optimizer: {name} is {shown(group[name])}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trained = {index for index, p in enumerate(parameters) if p.requires_grad}
    if saved["state"].keys() != trained and (saved["state"] or steps >= SKIPPED):
        raise ValueError(f"{path} does not fit: optimizer: state is not that of each parameter")
    for index, moments in saved["state"].items():
        check_moments(path, moments, parameters[index], steps)


def is_group_value(name, value, wanted):
    """Is a value of a parameter group what this model's has? The learning rate may differ."""
    if name == "lr":
        return is_number(value) and value >= 0
    return type(value) is type(wanted) and is_same(value, wanted)


def is_same(value, wanted):
    """Equality of plain values, and of lists and tuples of them, that no other type can upset."""
    if type(value) in (list, tuple):
        return len(value) == len(wanted) and all(map(is_same, value, wanted))
    return type(value) is type(wanted) and is_plain(value) and value == wanted


def check_moments(path, moments, parameter, steps):
    """Check AdamW's state of one parameter: step, exp_avg and exp_avg_sq."""
    shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    weights.check_state(path, moments, "optimizer")
    weights.check_shapes(path, moments, shapes, "optimizer")
    for name, value in moments.items():
        if value.dtype != torch.float32 or name != "exp_avg" and value.numel() and value.min() < 0:
            raise ValueError(f"{path}: optimizer: {name} has impossible values")
    if moments["step"] > steps:
        raise ValueError(f"{path}: step is {steps}, but its optimizer made {moments['step']:g}")


def check_scaler(path, saved, scaler):
    """Check the saved state of fp16's loss scale against that of this run: the same entries."""
    if saved.keys() != scaler.state_dict().keys():
        raise ValueError(f"{path} does not fit: scaler is not that of this run's --amp")
