"""Numbers that the library gives, stored to be compared: `make_results.py OUT [--only NAME ...] [--list]`.

Each result is a file `OUT/<name>.npz` of plain arrays, made with the library that is importable and fixed
seeds. `compare_results.py` compares two folders. Names of the library are looked up by `lib` alone, and its
functions run by `call` alone, with options given flat: `GIVEN` and `group_options` put them into the objects
that functions take.
"""

import dataclasses
import importlib
import inspect
import itertools
import json
import pkgutil
import random
import sys
import tempfile
import time
import traceback
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

import circuitgraph

# The library: its names, and how its functions take options


@cache
def list_modules() -> list[ModuleType]:
    """The package and all its submodules."""
    found = [circuitgraph]
    for info in pkgutil.walk_packages(circuitgraph.__path__, "circuitgraph."):
        with suppress(ImportError):
            found.append(importlib.import_module(info.name))
    return found


@cache
def lib(name: str) -> Any:
    """What the library has under a name, wherever it is. Raises LookupError where it has nothing."""
    for module in list_modules():
        value = getattr(module, name, None)
        if value is not None and not isinstance(value, ModuleType):
            return value
    raise LookupError(f"the library has no {name!r}")


def pack(group: Any, options: dict[str, Any]) -> Any:
    """A group of options with those set that are its own or its parts'; they are taken out of `options`."""
    chosen = {}
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if field.name in options:
            chosen[field.name] = options.pop(field.name)
        elif dataclasses.is_dataclass(value):
            chosen[field.name] = pack(value, options)
    return dataclasses.replace(group, **chosen)


def group_options(function: Callable[..., Any], args: tuple, options: dict[str, Any]) -> dict[str, Any]:
    """Options that a function does not take itself go into groups that it takes and that have them."""
    signature = inspect.signature(function)
    known = signature.parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return options
    own = {name: value for name, value in options.items() if name in known}
    rest = {name: value for name, value in options.items() if name not in known}
    if "progress" in known:
        own.setdefault("progress", False)
    else:
        rest.setdefault("progress", False)
    given = {*signature.bind_partial(*args).arguments, *own}
    for name, parameter in known.items():
        if name not in given and dataclasses.is_dataclass(parameter.default):
            own[name] = pack(parameter.default, rest)
    if rest.get("progress") is False:  # nothing here shows a bar
        rest.pop("progress")
    return own | rest


def give_rule(args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of `build_graph`, with what belongs to the method, to one prompt or to the cut in objects."""
    model, data, nodes = (*args, "head")[:3]
    method, grain = options.pop("attribution", "ig"), nodes if isinstance(nodes, str) else "feature"
    kept = options.pop("positions", "sum") == "keep"
    if kept:
        names = [name for name in ("n_logits", "logit_mass") if name in options]
        data = lib("Prompt")(data, **{name: options.pop(name) for name in names})
    if "others" in options:
        nodes = lib("cut_model")(model, nodes, options.pop("others"))
    names = [field.name for field in dataclasses.fields(lib("Attribution")) if field.name in options]
    given = {name: option for name in names if (option := options.pop(name)) is not None}
    if given:
        start = lib("find_method")(method).default_baseline(options.get("target", "node"), grain)
        method = lib("Attribution")(method, **{"baseline": start, "skip_first": int(not kept)} | given)
    return (model, data, nodes), options | {"attribution": method}


def give_value(args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of functions that ablate, with the value that ablated edges carry in an object."""
    value, options = options.get("value", "mean"), dict(options)
    per_position, reference = options.pop("per_position", False), options.pop("reference", None)
    if per_position or reference is not None:
        assert value == "mean", "a reference and means of positions are of the mean"
        options["value"] = lib("Mean")(reference, per_position)
    elif value == "resample" and "seed" in options:
        options["value"] = lib("Resample")(options["seed"])
    return args, options


def give_budgets(args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of functions that draw curves: as `give_value`, and with budgets in an object."""
    args, options = give_value(args, options)
    chosen = {name: options.pop(name) for name in ("method", "by", "clip") if name in options}
    return ((*args[:3], lib("Budgets")(args[3], **chosen)) if chosen else args), options


def give_seedless(args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of `run_ablated`: as `give_value`, whose object has the seed."""
    args, options = give_value(args, options)
    options.pop("seed", None)
    return args, options


def give_matching(args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of `compare_groupings`, which takes the options of `match_behaviours`."""
    return args, group_options(lib("match_behaviours"), args, options)


# How a function takes its arguments, by its name
GIVEN: dict[str, Callable[[tuple, dict[str, Any]], tuple[tuple, dict[str, Any]]]] = {
    "build_graph": give_rule,
    "run_ablated": give_seedless,
    "evaluate": give_value,
    "minimality": give_value,
    "ablation_curve": give_budgets,
    "compare_curves": give_budgets,
    "compare_groupings": give_matching,
}


def call(name: str, *args: Any, **options: Any) -> Any:
    """Run a function of the library with options given flat, or make an object of one of its classes."""
    if name in GIVEN:
        args, options = GIVEN[name](args, options)
    return lib(name)(*args, **group_options(lib(name), args, options))


def attempt(name: str, *args: Any, **options: Any) -> Any:
    """`call`; "refused" where the library says that it has no meaning."""
    try:
        return call(name, *args, **options)
    except ValueError:
        return "refused"


# Storing: everything becomes plain arrays


def store_table(table: pd.DataFrame | pd.Series, key: str, out: dict[str, np.ndarray]) -> None:
    """A table, column by column."""
    table = table.to_frame("values") if isinstance(table, pd.Series) else table
    if not isinstance(table.index, pd.RangeIndex):
        out[f"{key}.index"] = np.array([str(label) for label in table.index], dtype=str)
    for column in table.columns:
        values = table[column]
        if isinstance(values.dtype, pd.CategoricalDtype):
            out[f"{key}.{column}.names"] = np.array([str(name) for name in values.cat.categories], dtype=str)
            values = values.cat.codes
        store(values.to_numpy(), f"{key}.{column}", out)


def store_graph(graph: Any, key: str, out: dict[str, np.ndarray]) -> None:
    """Nodes and edges of a graph in their order, and what its text and dictionaries hash to."""
    store_table(graph.nodes, f"{key}.nodes", out)
    store_table(graph.edges, f"{key}.edges", out)
    hashes = [graph.meta.get("model", {}).get("weights_hash"), graph.meta.get("dictionaries")]
    hashes += [text.get("sha256") for text in graph.meta.get("corpus", [])]
    out[f"{key}.hashes"] = np.array(json.dumps(hashes))


def store_figure(figure: go.Figure, key: str, out: dict[str, np.ndarray]) -> None:
    """What the traces of a figure show."""
    out[f"{key}.kinds"] = np.array([trace.type for trace in figure.data], dtype=str)
    for i, trace in enumerate(figure.data):
        shown = {name: getattr(trace, name, None) for name in ("x", "y", "z", "values", "labels")}
        if trace.type == "sankey":
            shown |= {name: getattr(trace.link, name) for name in ("source", "target", "value")}
        for name, values in shown.items():
            if values is not None:
                store(to_plain(values), f"{key}.{i}.{name}", out)


def to_plain(values: Any) -> np.ndarray:
    """Numbers, None as NaN; or else text."""
    array = np.asarray(values, dtype=object)
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError):
        return array.astype(str)


def store_object(value: Any, key: str, out: dict[str, np.ndarray]) -> None:
    """The fields of a dataclass."""
    for field in dataclasses.fields(value):
        if field.name not in ("meta", "model", "bridge", "tokenizer"):
            store(getattr(value, field.name), f"{key}.{field.name}", out)


def store_sparse(table: Any, key: str, out: dict[str, np.ndarray]) -> None:
    """The arrays of a sparse table, row by row."""
    table = sp.csr_array(table)
    for name in ("data", "indices", "indptr"):
        store(getattr(table, name), f"{key}.{name}", out)
    store(np.array(table.shape), f"{key}.shape", out)


def store_array(array: Tensor | np.ndarray, key: str, out: dict[str, np.ndarray]) -> None:
    """An array; what holds objects becomes numbers or text."""
    assert key not in out, f"{key} stands twice"
    array = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    out[key] = to_plain(array) if array.dtype == object else array


def store_plain(value: Any, key: str, out: dict[str, np.ndarray]) -> None:
    """A number, a text or nothing."""
    store(np.array("none" if value is None else value), key, out)


def store_mapping(parts: Mapping[Any, Any], key: str, out: dict[str, np.ndarray]) -> None:
    """Parts by their names."""
    for name, part in parts.items():
        store(part, f"{key}/{name}", out)


def store(value: Any, key: str, out: dict[str, np.ndarray]) -> None:
    """Anything that the library returns, as arrays under names that begin with `key`."""
    stores = {
        Tensor | np.ndarray: store_array,
        str | bool | int | float | np.generic | None: store_plain,
        pd.DataFrame | pd.Series: store_table,
        lib("Graph"): store_graph,
        go.Figure: store_figure,
        Mapping: store_mapping,
    }
    for kind, store_kind in stores.items():
        if isinstance(value, kind):
            return store_kind(value, key, out)
    if sp.issparse(value):
        return store_sparse(value, key, out)
    if dataclasses.is_dataclass(value):
        return store_object(value, key, out)
    return store_list(list(value), key, out) if isinstance(value, Iterable) else None


def store_list(values: list[Any], key: str, out: dict[str, np.ndarray]) -> None:
    """Numbers or texts as one array, other things one by one."""
    if all(isinstance(value, str | bool | int | float | np.generic) for value in values):
        store(np.array(values, dtype=None if values else np.float64), key, out)
        return
    for i, value in enumerate(values):
        store(value, f"{key}/{i}", out)


RESULTS: dict[str, Callable[[], Any]] = {}


def result(name: str, *over: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function under a name; under several, `name_<value>`, where it takes one of some values."""

    def register(make: Callable[..., Any]) -> Callable[..., Any]:
        RESULTS.update({f"{name}_{value}": partial(make, value) for value in over} if over else {name: make})
        return make

    return register


# Models, texts, tasks, dictionaries

MODELS = ("gpt2", "gpt-neox", "llama", "qwen2", "gemma2", "attention-only", "no-norm", "no-norm-relu")
MODELS = (*MODELS, "bidirectional", "odd-heads")
SOME = ("gpt2", "llama", "gemma2")
GRAINS = ("block", "layer", "head")
ATTRIBUTIONS = ("ig", "gradient", "guided-ig", "guided-backprop", "gradcam", "guided-gradcam")
ATTRIBUTIONS = (*ATTRIBUTIONS, "lrp", "relp", "occlusion")
OF_METRIC = (*ATTRIBUTIONS, "eap", "eap-ig", "eap-ig-activations")
WHOLE = ("a0", "m0", "a1", "m1")
GATES = ("none", "relu", "topk", "abstopk", "jumprelu", "gated")


@cache
def tiny(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model, by default in double precision."""
    return call("tiny_model", name, dtype=dtype)


@cache
def smollm() -> Any:
    """The embedded model."""
    return call("load_model", "smollm2-135m")


def random_tokens(model: Any, n: int = 3, length: int = 8, seed: int = 0) -> Tensor:
    """Random token ids `[seq pos]`."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(model.d_vocab, (n, length), generator=draw)


@cache
def short_text(n: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    """A few short sequences of the embedded text."""
    return call("load_corpus", "default", smollm(), n_tokens=n * length, seq_len=length, seed=seed)[:n]


def random_task(model: Any, n: int = 3, length: int = 6, padded: bool = False) -> Any:
    """Random prompts in pairs with random answers, some of them shorter and padded at the end."""
    clean, corrupted = (random_tokens(model, n, length, seed) for seed in (0, 7))
    lengths = torch.tensor([length - i % 2 for i in range(n)]) if padded else None
    answers = torch.arange(n)[:, None]
    return call("Task", clean, corrupted, answers=answers + 3, wrong=answers + 13, lengths=lengths)


@cache
def real_task(name: str = "agreement", n: int = 3) -> Any:
    """A few prompts of a task for the embedded model."""
    return call("load_task", name, smollm(), n=n, check=False)


def has_module(model: Any, module: str) -> bool:
    """Whether a model has an MLP where one is named."""
    return module[0] != "m" or model.layers[int(module[1:])].mlp is not None


def drawer(name: str, seed: int = 0) -> Callable[..., Tensor]:
    """Random tensors that follow a name and a seed."""
    draw = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    return lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)


def make_gate(kind: str, normal: Callable[..., Tensor], n: int, like: Tensor) -> Any:
    """A gate of a kind with random parameters."""
    if kind in ("topk", "abstopk"):
        return call("Gate", kind, k=min(4, n))
    if kind == "jumprelu":
        return call("Gate", kind, threshold=(normal(n).abs() / 2).to(like))
    if kind == "gated":
        biases = {"b_gate": normal(n) / 9, "r_mag": normal(n) / 3, "b_mag": normal(n) / 9}
        return call("Gate", kind, **{name: bias.to(like) for name, bias in biases.items()})
    return call("Gate", kind)


def affine(
    model: Any, module: str, gate: str = "topk", reads: str = "output", n: int = 11, skip: bool = False
) -> Any:
    """A random dictionary with affine encoder and decoder."""
    normal, like = drawer(module), model.W_U
    d_in, d = model.n_heads * model.d_head if reads == "z" else model.d_model, model.d_model
    encoder, decoder = normal(d_in, n) / d_in**0.5, normal(n, d) / 5
    biases = (normal(n) / 9, normal(d) / 9)
    parts = [part.to(like) for part in (encoder, decoder, *biases)]
    more = {"W_skip": (normal(d, d_in) / 9).to(like)} if skip else {}
    gated = make_gate(gate, normal, n, like)
    return call("LinearDictionary", module, reads, *parts, gated, (normal(d_in) / 9).to(like), **more)


def curved(model: Any, module: str, reads: str = "output", straight: bool = False, n: int = 9) -> Any:
    """A dictionary of two functions, two layers each; or one whose decoder is affine."""
    normal, d = drawer(module), model.d_model
    shapes = ((d, 20), (20, n), (n, 20), (20, d), (n, d), (d,))
    A, B, C, D, W, b = ((normal(*shape) / shape[0] ** 0.5).to(model.W_U) for shape in shapes)

    def encode(x: Tensor) -> Tensor:
        """Activations of the features."""
        return torch.tanh(torch.tanh(x @ A) @ B + 0.3)

    def decode(acts: Tensor) -> Tensor:
        """What the features write together."""
        return F.silu(acts.to(C) @ C + 0.2) @ D + 0.1

    if straight:
        return call("FunctionDictionary", module, reads, n, encode, lambda acts: acts @ W + b, W, b)
    return call("FunctionDictionary", module, reads, n, encode, decode)


def pursuit(model: Any, module: str, n: int = 14) -> Any:
    """A random dictionary of matching pursuit."""
    normal = drawer(module)
    parts = F.normalize(normal(n, model.d_model), dim=1), normal(model.d_model) / 9
    return call("PursuitDictionary", module, "output", *(part.to(model.W_U) for part in parts), 0.05, 6)


def components(model: Any, module: str, n: int = 6) -> Any:
    """Principal components of random activations."""
    return call("principal_components", drawer(module)(40, model.d_model).to(model.W_U), n, module)


def affine_sets(model: Any) -> dict[str, dict[str, Any]]:
    """Sets of affine dictionaries, by module: every gate, and everything that an encoder can read."""
    modules = [module for module in WHOLE if has_module(model, module)]
    sets = {gate: {name: affine(model, name, gate) for name in modules} for gate in GATES}
    for reads in ("input", "normed", "scaled", "stream"):
        sets[reads] = {name: affine(model, name, "relu", reads) for name in modules}
    sets["skip"] = {
        name: affine(model, name, "relu", "normed", skip=True) for name in modules if name[0] == "m"
    }
    sets["z"] = {name: affine(model, name, "topk", "z") for name in ("a0", "a1")}
    sets["heads"] = {name: affine(model, name, n=5) for name in ("a0.h0", "a1.h0", "a1.h1")}
    return sets


def dictionary_sets(model: Any) -> dict[str, dict[str, Any]]:
    """Sets of dictionaries of every kind, by module."""
    mlps = [module for module in ("m0", "m1") if has_module(model, module)]
    modules = [*mlps, "a1"]
    sets = affine_sets(model)
    sets["pursuit"] = {name: pursuit(model, name) for name in modules}
    sets["components"] = {name: components(model, name) for name in modules}
    sets["whole"] = {name: call("identity_dictionary", model, name) for name in modules}
    sets["functions"] = {name: curved(model, name) for name in modules}
    sets["functions of inputs"] = {name: curved(model, name, "normed") for name in modules}
    sets["straight"] = {name: curved(model, name, straight=True) for name in modules}
    if mlps and model.name != "gemma2":  # where a norm stands behind neurons, they have no shares
        sets["neurons"] = {name: call("neuron_basis", model, name) for name in mlps}
        sets["mixed"] = {"a0.h1": curved(model, "a0.h1"), "m0": affine(model, "m0", "gated")}
        sets["mixed"] |= {"m1": call("neuron_basis", model, "m1"), "a1": pursuit(model, "a1")}
        sets["mixed, affine"] = sets["mixed"] | {"a0.h1": affine(model, "a0.h1", "jumprelu")}
    return sets


def some_dictionaries(model: Any, gate: str = "topk", reads: str = "output") -> dict[str, Any]:
    """An affine dictionary for each whole module."""
    return {name: affine(model, name, gate, reads) for name in WHOLE if has_module(model, name)}


@cache
def real_dictionaries() -> dict[str, Any]:
    """Dictionaries of several kinds on a few modules of the embedded model."""
    model = smollm()
    found = {"m3": affine(model, "m3", n=64), "a12": affine(model, "a12", "relu", n=48)}
    found |= {"m12": call("neuron_basis", model, "m12"), "a20.h4": affine(model, "a20.h4", "jumprelu", n=24)}
    return found | {"m21": curved(model, "m21", n=16), "m28": affine(model, "m28", "gated", "normed", 32)}


# Calls of the library


def build(model: Any, data: Any, nodes: Any = "head", **options: Any) -> Any:
    """A graph; or "refused"."""
    return attempt("build_graph", model, data, nodes, **options)


def ablate(model: Any, graph: Any, tokens: Tensor, value: str = "mean", **options: Any) -> Any:
    """Logits with all edges ablated but those of the graph; or "refused", like the graph."""
    if isinstance(graph, str):
        return graph
    with torch.no_grad():
        if options.pop("exact", True):
            return attempt("run_ablated", model, graph, tokens, value=value, **options)
        with suppress(ValueError):
            return run_steps(model, graph, tokens, value=value, exact=False, **options)[0]
    return "refused"


def run_steps(
    model: Any,
    graph: Any,
    tokens: Tensor,
    *,
    masks: Tensor | None = None,
    exact: bool = True,
    ablation: str = "edge",
    **options: Any,
) -> Tensor:
    """What `run_ablated` does, step by step: for masks between zero and one, and for linearised runs."""
    (_, options), given = give_value((), options), options.get("corrupted")
    cut = call("open_cut", model, graph, options.get("dictionaries"))
    fixed = call("read_value", options["value"]).fix(cut, call("AblatedText", tokens, given))
    if masks is None:
        kept = [call("select", cut, graph, ablation)]
    else:
        kept = [call("ModuleSelection", call("mask_edges", cut, graph, m), len(graph)) for m in masks]
    return call("run_logits", model, call("run_in_batches", cut, kept, tokens, fixed, exact))


def some_edges(graph: Any, share: float = 0.4) -> Any:
    """The largest edges of a graph, where there is one."""
    if isinstance(graph, str):
        return graph
    return call("top_edges", graph, int(share * len(graph)))


def fillings(model: Any, tokens: Tensor) -> dict[str, dict[str, Any]]:
    """Every way to fill ablated edges."""
    n, length = tokens.shape
    other, text = random_tokens(model, n, length, 2), random_tokens(model, 4, length + 2, 3)
    return {
        "zero": {"value": "zero"},
        "mean": {"value": "mean"},
        "reference": {"value": "mean", "reference": text},
        "position": {"value": "mean", "per_position": True},
        "position, reference": {"value": "mean", "per_position": True, "reference": text},
        "resample": {"value": "resample", "seed": 4},
        "corrupted": {"value": "corrupted", "corrupted": other},
    }


# Models


@result("model", *MODELS)
def run_tiny(name: str) -> dict[str, Any]:
    """Logits, reads and writes of a tiny model at each grain."""
    model, found = tiny(name), {"hash": tiny(name).weights_hash}
    tokens = random_tokens(model)
    with torch.no_grad():
        found["logits"] = model(tokens)
        for grain in GRAINS:
            trace = call("trace_modules", model, tokens, grain)
            found[grain] = {
                "nodes": call("list_nodes", model, grain),
                "writes": trace.writes,
                "reads": trace.reads,
            }
    return found


@result("model_smollm2")
def run_smollm() -> dict[str, Any]:
    """Logits and writes of the embedded model."""
    model, tokens = smollm(), short_text()
    with torch.no_grad():
        writes = {grain: call("trace_modules", model, tokens, grain).writes.sum(1) for grain in GRAINS}
        logits = model(tokens)
    return {
        "hash": model.weights_hash,
        "logits": logits,
        "writes": writes,
        "nodes": call("list_nodes", model),
    }


# Graphs of modules


@result("module", *MODELS)
def build_modules(name: str) -> dict[str, Any]:
    """Graphs of modules by every attribution and option, of some models at every grain."""
    model, found = tiny(name), {}
    tokens, other = random_tokens(model, 2, 7), random_tokens(model, 2, 7, 5)
    bases, ways = ("zero", "mean", "corrupted"), ("live", "frozen")
    grains = GRAINS if name in SOME else ("head",)
    for key in itertools.product(grains, ATTRIBUTIONS, bases, ways, ways, ("split", "merged")):
        grain, attribution, baseline, norm, pattern, ports = key
        corrupted = other if baseline == "corrupted" else None
        options = {"attribution": attribution, "baseline": baseline, "norm": norm, "pattern": pattern}
        graph = build(model, tokens, grain, **options, ports=ports, corrupted=corrupted, n_steps=3)
        if not isinstance(graph, str):
            graph = (
                graph.edges if baseline == "zero" and pattern == ports == "live" else graph.edges["weight"]
            )
        found[" ".join(key)] = graph
    return found


@result("module_plain", *MODELS)
def build_plain(name: str) -> dict[str, Any]:
    """Graphs of modules with all columns: batches, positions left out, checkpoints, steps."""
    model, found = tiny(name), {}
    tokens = random_tokens(model, 5, 8)
    for grain in GRAINS:
        found[grain] = build(model, tokens, grain)
        found[f"{grain} batches"] = build(model, tokens, grain, batch_size=2, skip_first=0, n_steps=5)
        found[f"{grain} complete"] = call("complete_graph", model, grain)
        with tempfile.TemporaryDirectory() as folder:
            options = {"checkpoint": folder, "batch_size": 2, "baseline": "mean", "norm": "live"}
            first = build(model, tokens, grain, **options)
            found[f"{grain} checkpoint"], found[f"{grain} again"] = (
                first,
                build(model, tokens, grain, **options),
            )
    found["merged"] = call("complete_graph", model, "head", ports="merged")
    return found


@result("module_metric", *MODELS)
def build_metrics(name: str) -> dict[str, Any]:
    """Graphs of modules for a task's metric by every method."""
    model, found = tiny(name), {}
    bases = (None, "zero", "mean") if name in SOME else (None,)
    for attribution, grain, baseline in itertools.product(OF_METRIC, GRAINS, bases):
        for padded in (False, True) if name in SOME else (True,):
            options = {"attribution": attribution, "baseline": baseline, "target": "metric", "n_steps": 3}
            graph = build(model, random_task(model, padded=padded), grain, batch_size=2, **options)
            found[f"{attribution} {grain} {baseline} {padded}"] = graph
    task = dataclasses.replace(random_task(model), metric="prob_diff")
    found["prob_diff"] = build(model, task, target="metric", attribution="eap-ig")
    text = call("text_task", random_tokens(model))
    found["text"] = build(model, text, target="metric", attribution="eap", baseline="mean")
    return found


@result("module_smollm2", *ATTRIBUTIONS)
def build_smollm(attribution: str) -> dict[str, Any]:
    """Graphs of the embedded model's modules by one attribution."""
    model, slow = smollm(), attribution in ("occlusion", "guided-ig")
    tokens = short_text(*((1, 8) if attribution == "occlusion" else (2, 16)))
    grains = ("layer",) if slow else GRAINS
    return {grain: build(model, tokens, grain, attribution=attribution, n_steps=2) for grain in grains}


@result("module_smollm2_options")
def build_smollm_options() -> dict[str, Any]:
    """Graphs of the embedded model's modules with other baselines and options."""
    model, tokens, other = smollm(), short_text(), short_text(seed=1)
    return {
        "mean": build(model, tokens, "layer", baseline="mean", norm="live", n_steps=3),
        "corrupted": build(model, tokens, baseline="corrupted", corrupted=other, n_steps=2),
        "frozen": build(model, tokens, pattern="frozen"),
        "merged": build(model, tokens, ports="merged", n_steps=2),
        "mean gradient": build(model, tokens, "block", baseline="mean", attribution="gradient"),
    }


@result("module_smollm2_metric", "eap", "eap-ig", "guided-backprop", "gradcam", "lrp", "relp")
def build_smollm_metric(attribution: str) -> dict[str, Any]:
    """Graphs of the embedded model's modules for a task by one method."""
    options = {"attribution": attribution, "target": "metric", "n_steps": 2}
    return {grain: build(smollm(), real_task(), grain, **options) for grain in ("layer", "head")}


# Graphs of features


@result("feature_kinds", *SOME)
def build_kinds(name: str) -> dict[str, Any]:
    """Graphs of features for every kind of dictionary: on a text, for a metric, pruned, of one prompt."""
    model, found = tiny(name), {}
    tokens, task = random_tokens(model, 2, 6), random_task(model, 2, 5)
    for kind, dictionaries in dictionary_sets(model).items():
        make = partial(build, nodes=dictionaries, n_steps=3)
        found[kind] = make(model, tokens, n_edges=None)
        found[f"{kind} pruned"] = make(model, tokens, n_edges=4, share=0.02, batch_size=1)
        found[f"{kind} heads"] = make(model, tokens, others="head", ports="merged", skip_first=0)
        found[f"{kind} metric"] = make(model, task, target="metric", n_edges=None)
        found[f"{kind} prompt"] = make(model, tokens[:1], positions="keep", n_edges=20)
    return found


@result("feature_attributions", *ATTRIBUTIONS)
def build_attributions(attribution: str) -> dict[str, Any]:
    """Graphs of features by one attribution, with every option that it allows."""
    found = {}
    for name, kind in itertools.product(("gpt2", "llama"), ("topk", "functions", "heads", "mixed")):
        model = tiny(name)
        tokens, task, nodes = random_tokens(model, 2, 6), random_task(model), dictionary_sets(model)[kind]
        for pattern, ports in itertools.product(("live", "frozen"), ("split", "merged")):
            options = {"attribution": attribution, "pattern": pattern, "ports": ports, "n_steps": 2}
            key = f"{name} {kind} {pattern} {ports}"
            found[key] = build(model, tokens, nodes, **options, n_edges=None)
            found[f"{key} metric"] = build(model, task, nodes, **options, target="metric", n_edges=None)
            if kind == "topk":
                found[f"{key} prompt"] = build(model, tokens[:1], nodes, **options, positions="keep")
        for baseline, norm in (("mean", "frozen"), ("mean", "live"), ("zero", "live")):
            options = {"attribution": attribution, "baseline": baseline, "norm": norm}
            found[f"{name} {kind} {baseline} {norm}"] = build(model, tokens, nodes, **options)
    return found


@result("feature", *MODELS)
def build_features(name: str) -> dict[str, Any]:
    """Graphs of features of every architecture, with and without a checkpoint, whole and in groups."""
    model, found = tiny(name), {}
    tokens = random_tokens(model, 3, 8)
    for reads in ("output", "normed"):
        nodes = some_dictionaries(model, "topk", reads)
        make = partial(build, model, tokens, nodes, n_steps=3)
        found[reads], found[f"{reads} groups"] = make(n_edges=None), make(memory=2e5, batch_size=1)
        found[f"{reads} share"] = make(n_edges=None, share=0.05)
        with tempfile.TemporaryDirectory() as folder:
            found[f"{reads} checkpoint"] = make(n_edges=6, checkpoint=folder)
            found[f"{reads} again"] = make(n_edges=6, checkpoint=folder)
    return found


@result("feature_smollm2", "ig", "lrp", "metric")
def build_smollm_features(attribution: str) -> Any:
    """A graph of features of the embedded model."""
    model, metric = smollm(), attribution == "metric"
    data = real_task(n=2) if metric else short_text(1, 12)
    options = {"target": "metric"} if metric else {"attribution": attribution}
    return build(model, data, real_dictionaries(), n_steps=2, n_edges=20, others="layer", **options)


# Graphs of one prompt


def read_prompt_graph(model: Any, graph: Any) -> dict[str, Any]:
    """A graph with positions, its influence, scores and pruned graphs, and the file for viewers."""
    found = {"graph": graph, "influence": call("add_influence", graph), "score": call("score_prompt", graph)}
    for shares in ((0.8, 0.98), (0.5, 0.7)):
        found[f"pruned {shares}"] = pruned = call("prune_by_influence", graph, *shares)
    with tempfile.TemporaryDirectory() as folder:
        path = call("save_attribution_graph", pruned, model, Path(folder) / "graph.json", slug="graph")
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    content["metadata"].pop("info")  # the version and the time
    for part in ("metadata", "qParams"):
        found[f"file {part}"] = json.dumps(content[part], sort_keys=True)
    for part in ("nodes", "links"):
        found[f"file {part}"] = pd.DataFrame(content[part])
    return found


@result("prompt", *SOME)
def build_prompts(name: str) -> dict[str, Any]:
    """Graphs of one prompt on a tiny model."""
    model, found = tiny(name), {}
    for gate, reads in (("topk", "output"), ("relu", "normed")):
        nodes, tokens = some_dictionaries(model, gate, reads), random_tokens(model, 1, 7)
        for keep in (None, 10):
            options = {"positions": "keep", "n_logits": 4, "logit_mass": 0.9, "n_steps": 3, "n_edges": keep}
            graph = build(model, tokens, nodes, **options)
            found[f"{gate} {reads} {keep}"] = read_prompt_graph(model, graph)
    return found


@result("prompt_smollm2")
def build_smollm_prompt() -> dict[str, Any]:
    """The graph of one prompt of the embedded model."""
    nodes = {name: d for name, d in real_dictionaries().items() if name in ("m3", "a12", "m28")}
    options = {"positions": "keep", "n_steps": 2, "n_edges": 15, "n_logits": 3}
    return read_prompt_graph(smollm(), build(smollm(), short_text(1, 8), nodes, **options))


# Ablation


@result("ablate_modules", *MODELS)
def ablate_modules(name: str) -> dict[str, Any]:
    """Logits of a tiny model with edges between modules ablated, in every way to fill them."""
    model, found = tiny(name), {}
    tokens = random_tokens(model, 4, 7)
    for grain in GRAINS:
        graph = build(model, tokens, grain, n_steps=2)
        for (key, filling), ablation in itertools.product(fillings(model, tokens).items(), ("edge", "node")):
            logits = ablate(model, some_edges(graph), tokens, ablation=ablation, **filling)
            found[f"{grain} {key} {ablation}"] = logits
    for options in ({"ports": "merged"}, {"pattern": "frozen"}):
        graph = some_edges(build(model, tokens, n_steps=2, **options))
        found[f"{options}"] = ablate(model, graph, tokens)
    return found


@result("ablate_masks", *SOME)
def ablate_masks(name: str) -> dict[str, Any]:
    """Logits for masks between zero and one, and the gradients of masks."""
    model, found = tiny(name), {}
    tokens, every = random_tokens(model, 3, 6), call("complete_graph", tiny(name))
    masks = torch.rand(2, len(every), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for value in ("zero", "mean", "resample"):
        masks = masks.detach().requires_grad_()
        logits = run_steps(model, every, tokens, value=value, masks=masks)
        loss = logits.log_softmax(-1)[..., 3].sum()
        found[value] = {"logits": logits, "grad": torch.autograd.grad(loss, masks)[0]}
    return found


@result("ablate_features", *MODELS)
def ablate_features(name: str) -> dict[str, Any]:
    """Logits of a tiny model with edges between features ablated, in every way to fill them."""
    model, found = tiny(name), {}
    tokens, nodes = random_tokens(model, 3, 6), some_dictionaries(tiny(name))
    for options in ({}, {"ports": "merged"}, {"pattern": "frozen"}, {"others": "head"}):
        graph = some_edges(build(model, tokens, nodes, n_steps=2, **options))
        for key, filling in fillings(model, tokens).items() if not options else ():
            for ablation, exact in (("edge", True), ("edge", False), ("node", True)):
                more = {"ablation": ablation, "exact": exact, "dictionaries": nodes} | filling
                found[f"{key} {ablation} {exact}"] = ablate(model, graph, tokens, **more)
        found[f"{options}"] = ablate(model, graph, tokens, dictionaries=nodes)
        found[f"{options} linear"] = ablate(model, graph, tokens, dictionaries=nodes, exact=False)
    return found


@result("ablate_kinds", *SOME)
def ablate_kinds(name: str) -> dict[str, Any]:
    """Logits with edges between features ablated, for every kind of dictionary."""
    model, found = tiny(name), {}
    tokens = random_tokens(model, 2, 6)
    for kind, nodes in dictionary_sets(model).items():
        graph = build(model, tokens, nodes, n_steps=2)
        for share, exact in itertools.product((0.05, 0.4), (True, False)):
            options = {"dictionaries": nodes, "exact": exact}
            found[f"{kind} {share} {exact}"] = ablate(model, some_edges(graph, share), tokens, **options)
        found[f"{kind} zero"] = ablate(model, some_edges(graph), tokens, "zero", dictionaries=nodes)
    return found


@result("ablate_smollm2")
def ablate_smollm() -> dict[str, Any]:
    """Logits of the embedded model with edges ablated, between modules and between features."""
    model, tokens = smollm(), short_text(2, 12)
    nodes = {name: d for name, d in real_dictionaries().items() if name != "m21"}  # its decoder is not affine
    found, graph = {}, some_edges(build(smollm(), short_text(2, 12), n_steps=2), 0.1)
    few = tokens[:1, :8]
    features = some_edges(build(model, few, nodes, attribution="gradient", n_edges=5))
    for value in ("zero", "mean", "resample"):
        found[value] = ablate(model, graph, tokens, value)
        found[f"{value} node"] = ablate(model, graph, tokens, value, ablation="node")
        found[f"{value} features"] = ablate(model, features, few, value, dictionaries=nodes)
    found["linear"] = ablate(model, features, few, dictionaries=nodes, exact=False)
    return found


# Evaluation


def judge_all(model: Any, graph: Any, data: Any, value: str, **options: Any) -> dict[str, Any]:
    """Everything that judges a graph on one kind of data."""
    options = {"value": value, "n_boot": 20} | options
    part, budgets = some_edges(graph), [len(graph) // 10, len(graph) // 3]
    found = {
        f"evaluate {a}": attempt("evaluate", model, part, data, ablation=a, **options)
        for a in ("edge", "node")
    }
    found["curve"] = attempt("ablation_curve", model, graph, data, budgets, **options)
    found["greedy"] = attempt("ablation_curve", model, graph, data, budgets, method="greedy", **options)
    graphs = {"whole": graph, "part": part}
    curves = attempt("compare_curves", model, graphs, data, budgets, clip=True, by="abs_weight", **options)
    found |= {"curves": curves, "minimality": attempt("minimality", model, part, data, 5, **options)}
    return found


@result("evaluate", *SOME)
def evaluate_graphs(name: str) -> dict[str, Any]:
    """Graphs of modules and of features judged on text and on prompts."""
    model, found = tiny(name), {}
    tokens, nodes = random_tokens(model, 4, 7), some_dictionaries(tiny(name))
    task, padded = random_task(model, 4), random_task(model, 4, padded=True)
    graphs = {grain: build(model, tokens, grain, n_steps=2) for grain in ("layer", "head")}
    for (grain, graph), value in itertools.product(graphs.items(), ("mean", "zero", "resample")):
        found[f"{grain} {value}"] = judge_all(model, graph, tokens, value)
        found[f"{grain} {value} task"] = judge_all(model, graph, padded, value, metric="ce")
    found["corrupted"] = judge_all(model, graphs["head"], task, "corrupted")
    found["position"] = judge_all(model, graphs["head"], task, "mean", per_position=True, metric="prob_diff")
    found["reference"] = judge_all(model, graphs["head"], tokens, "mean", reference=tokens[:2], metric="kl")
    features = build(model, tokens, nodes, n_steps=2, n_edges=10)
    for value, exact in (("mean", True), ("mean", False), ("zero", True), ("resample", True)):
        options = {"dictionaries": nodes, "exact": exact}
        found[f"features {value} {exact}"] = judge_all(model, features, tokens, value, **options)
    found["features corrupted"] = judge_all(model, features, task, "corrupted", dictionaries=nodes)
    return found


@result("evaluate_smollm2")
def evaluate_smollm() -> dict[str, Any]:
    """Graphs of the embedded model judged on text and on a task."""
    model, tokens, task = smollm(), short_text(2, 12), real_task(n=2)
    graph = build(model, tokens, "layer", attribution="gradient")
    part, budgets = some_edges(graph), [len(graph) // 20, len(graph) // 4]
    return {
        "text": call("evaluate", model, part, tokens, n_boot=20),
        "task": call("evaluate", model, part, task, "node", "corrupted", n_boot=20),
        "curve": call("ablation_curve", model, graph, tokens, budgets, n_boot=20),
        "minimality": call("minimality", model, part, task, 3, value="corrupted", n_boot=20),
    }


# Other methods


@result("methods", *SOME)
def run_methods(name: str) -> dict[str, Any]:
    """Every method that draws a graph of modules, on prompts and on text."""
    model, found = tiny(name), {}
    task, tokens = random_task(model, 2, 5), random_tokens(model, 2, 6)
    for value, data in (("corrupted", task), ("mean", task), ("mean", tokens)):
        for method, make in call("list_methods", "layer", value).items():
            kind = "task" if data is task else "text"
            with suppress(ValueError):
                found[f"{method} {value} {kind}"] = make(model, data, nodes="layer", progress=False)
    return found


@result("baseline", *SOME)
def run_baselines(name: str) -> dict[str, Any]:
    """The functions behind the methods with other options."""
    model = tiny(name)
    task, padded, tokens = (
        random_task(model),
        random_task(model, 3, 6, padded=True),
        random_tokens(model, 3, 6),
    )
    found = {}
    for value in ("zero", "mean", "resample"):
        found[f"exact {value}"] = call("patch_edges", model, tokens, "layer", value=value)
        found[f"greedy {value}"] = call("prune_greedily", model, tokens, "block", 0.001, value=value)
        found[f"masks {value}"] = call("learn_masks", model, tokens, value=value, n_steps=6, seed=1)
        for path in ("line", "drawn"):
            options = {"value": value, "path": path, "n_steps": 3, "seed": 2}
            found[f"{path} {value}"] = call("integrate_masks", model, tokens, **options)
    for softmax, drop, value in itertools.product((True, False), (True, False), ("corrupted", "mean")):
        options = {"exact_softmax": softmax, "grad_drop": drop, "value": value, "batch_size": 2}
        found[f"nodes {softmax} {drop} {value}"] = call("patch_nodes", model, padded, **options)
    for grain, proximity, checkpoints in itertools.product(GRAINS, ("l1", "inner"), (True, False)):
        near = call("Proximity", proximity)
        options = {"proximity": near, "checkpoints": checkpoints, "skip_first": 0}
        found[f"flow {grain} {proximity} {checkpoints}"] = call("trace_flow", model, tokens, grain, **options)
    found["read off"] = call("logit_lens", model, padded, batch_size=2)
    found["random"] = call("random_graph", model, "head", 3)
    exact, eap = (call("patch_edges", model, task, "layer"), build(model, task, "layer", target="metric"))
    truth = some_edges(exact, 0.1).edge_names
    found["ranks"] = call("score_ranks", some_edges(eap, 0.8), len(exact), truth, exact)
    return found


@result("compare_methods")
def compare_all() -> dict[str, Any]:
    """The table of methods, on modules and on features."""
    model, found = tiny("llama"), {}
    task, nodes, methods = (
        random_task(model),
        some_dictionaries(model, "relu"),
        call("list_methods", "head", "corrupted"),
    )
    some = {name: methods[name] for name in ("EAP", "EAP-IG", "AtP*", "ACDC", "flow", "random")}
    options = {"n_boot": 20, "progress": False}
    tables = {"modules": call("compare_methods", model, task, task, some, [4, 20], nodes="layer", **options)}
    tables["seeds"] = call(
        "compare_methods", model, task, task, some, [30], value="corrupted", seeds=(0, 1), **options
    )
    feature = call("list_methods", "feature")
    tables["features"] = call("compare_methods", model, task, task, feature, [40], nodes=nodes, **options)
    for name, table in tables.items():
        found[name] = table.drop(columns=["seconds", "memory"])
    return found


@result("feature_methods", *SOME)
def run_feature_methods(name: str) -> dict[str, Any]:
    """Every method that draws a graph of features, and the functions behind them."""
    model, found = tiny(name), {}
    task, nodes = random_task(model), some_dictionaries(model, "relu")
    for method, make in call("list_methods", "feature").items():
        found[method] = make(model, task, nodes, progress=False)
    streams = nodes | {f"b{i}": affine(model, f"b{i}", "relu", "stream") for i in range(2)}
    for kind, some in (("modules", nodes), ("streams", streams)):
        for baseline, errors in itertools.product(("corrupted", "zero"), (True, False)):
            options = {
                "baseline": baseline,
                "error_edges": errors,
                "threshold": 0.01,
                "n_steps": 3,
                "batch_size": 2,
            }
            graph = call("find_feature_circuit", model, task, some, **options)
            found[f"circuit {kind} {baseline} {errors}"] = graph
        for value, errors in itertools.product(("mean", "zero"), ("default", "keep", "remove")):
            options = {"thresholds": (0.0, 0.01, 0.1), "value": value, "errors": errors}
            table = call("ablate_circuit_nodes", model, graph, task, some, **options)
            found[f"circuit nodes {kind} {value} {errors}"] = table
    normed = some_dictionaries(model, "relu", "normed") | {"a0": nodes["a0"], "a1": nodes["a1"]}
    found["contributions"] = call("trace_contributions", model, task, normed, threshold=0.02, batch_size=2)
    found["random"] = call("random_features", model, task, nodes, n_edges=4, seed=2)
    return found


@result("interactions", "llama", "gpt2")
def run_interactions(name: str) -> dict[str, Any]:
    """Interaction bases of chains of layers, and what passes between them."""
    model, found = tiny(name), {}
    tokens = random_tokens(model, 6, 8)
    for chain, samples in itertools.product((("b0", "b1"), ("a0", "m0", "a1")), (1, None)):
        options = {"d_dict": 5, "n_samples": samples, "seed": 3}
        bases = call("train_interaction_bases", model, tokens, list(chain), **options)
        found[f"{chain} {samples}"] = bases
        found[f"{chain} {samples} graph"] = call("weigh_interactions", model, tokens, bases, n_steps=3)
    return found


# Communities and behaviours


@cache
def feature_graph(seed: int = 0) -> Any:
    """All edges between features of a tiny model on some text."""
    model = tiny("gpt2")
    nodes = some_dictionaries(model, "relu")
    return call("build_graph", model, random_tokens(model, 6, 12, seed), nodes, n_steps=2, n_edges=None)


@cache
def head_graph() -> Any:
    """The strongest edges between heads of the embedded model."""
    graph = call("build_graph", smollm(), short_text(2, 12), attribution="gradient")
    return call("top_edges", graph, 6000)


@cache
def head_patterns() -> Any:
    """How active heads and MLPs of the embedded model are on some text."""
    return call("read_patterns", smollm(), head_graph(), short_text(4, 16))


def number_communities(graph: Any) -> np.ndarray:
    """The community of each node."""
    return graph.nodes["community"].to_numpy()


@result("communities", "features", "heads")
def find_all(kind: str) -> dict[str, Any]:
    """Communities by every method, and what is said of them."""
    graph = feature_graph() if kind == "features" else head_graph()
    bare, found = call("leave_out", graph, ["embed", "logits"]), {}
    for method in ("leiden", "layered", "infomap", "signed"):
        for weight, resolution, n_seeds in (("share", 1.0, 1), ("abs_weight", 0.5, 1), ("share", 2.0, 3)):
            options = {"weight": weight, "resolution": resolution, "n_seeds": n_seeds, "seed": 1}
            communities = call("find_communities", bare, method, **options)
            key = f"{method} {weight} {resolution} {n_seeds}"
            found[key] = number_communities(communities)
            for null in ("layered", "configuration"):
                found[f"{key} {null}"] = call("quality", communities, null, weight=weight)
    found["cpm"] = number_communities(call("find_communities", bare, "cpm", resolution=0.01))
    found["nested"] = call("nest_communities", bare, resolutions=(0.5, 1.0)).nodes
    found["profile"] = call("profile_resolutions", bare, resolutions=(0.5, 1.0, 2.0), n_seeds=2)
    shares = {by: call("share_weights", graph, by) for by in ("weight", "abs_weight", "rms_weight")}
    found |= {"shares": shares, "left out": bare.nodes["kept"], "levels": call("node_levels", graph.nodes)}
    found["between"] = call("expected_between", bare, number_communities(communities).clip(0))
    return found


@result("communities_tests")
def judge_all_communities() -> dict[str, Any]:
    """Communities held against chance."""
    graph, other, found = feature_graph(), feature_graph(1), {}
    for by in ("abs_weight", "share", "weight"):
        found[f"rewired {by}"] = call("rewire", graph, 3, 20, by=by)
    for method, null in (("layered", "layered"), ("leiden", "configuration"), ("infomap", None)):
        options = {"null": null, "n_null": 3, "seed": 2}
        found[f"judged {method}"] = call("judge_communities", graph, method, n_seeds=2, **options)
        found[f"confirmed {method}"] = call("confirm_communities", graph, other, method, **options)
    table = np.random.default_rng(0).integers(4, size=(5, 30))
    found["consensus"] = call("consensus", table, 1)
    return found


@result("patterns", "features", "heads")
def read_all_patterns(kind: str) -> dict[str, Any]:
    """When nodes are active, which are active together, and groups by that."""
    model, heads, found = (smollm() if kind == "heads" else tiny("gpt2")), kind == "heads", {}
    graph = head_graph() if heads else feature_graph()
    nodes = None if heads else some_dictionaries(model, "relu")
    tokens = short_text(4, 16) if heads else random_tokens(model, 6, 12, 4)
    found["activity"] = activity = call("read_patterns", model, graph, tokens, nodes)
    for measure in ("phi", "jaccard", "npmi", "cosine", "correlation"):
        options = {"n_neighbours": 5, "least": 0.05, "n_active": 3}
        found[measure] = likeness = attempt("compare_patterns", activity, measure, **options)
        for method in ("activation", "joint"):
            communities = attempt("find_communities", graph, method, similarity=likeness)
            member = communities if isinstance(communities, str) else number_communities(communities)
            found[f"{measure} {method}"] = member
    found["judged"] = call("judge_patterns", activity, "cosine", n_null=3, n_seeds=2, least=0.05)
    found["shuffled"] = call("shuffle_patterns", activity, 2)
    for method in ("nmf", "cocluster"):
        found[method] = attempt("cluster_patterns", activity, 4, method, seed=1)
    found["directions"] = call("read_directions", model, graph, tokens, nodes)
    for excess in (True, False):
        found[f"tokens {excess}"] = call("count_tokens", activity, tokens, excess=excess)
    communities = call("find_communities", graph, "layered")
    options = {"resolutions": (0.5, 1.0, 2.0), "least": 0.05}
    others = call("other_groupings", model, communities, tokens, nodes, **options)
    return found | {f"other {name}": number_communities(other) for name, other in others.items()}


@result("behaviours_smollm2")
def find_smollm_behaviours() -> dict[str, Any]:
    """Behaviours of the embedded model."""
    tokens, tasks = short_text(4, 16), {name: real_task(name) for name in ("agreement", "capitals")}
    prompts, behaviours = call("task_behaviours", tasks)
    losses = call("loss_behaviours", smollm(), tokens[:2], 2)
    return {
        "tasks": {"prompts": getattr(prompts, "tokens", prompts), "where": behaviours},
        "classes": call("class_behaviours", smollm(), tokens),
        "losses": losses,
    }


@result("behaviours", "features", "heads")
def match_all(kind: str) -> dict[str, Any]:
    """What ablating communities costs, by behaviour."""
    model = tiny("gpt2")
    tokens, nodes = (
        random_tokens(model, 6, 12),
        some_dictionaries(model, "relu") if kind == "features" else None,
    )
    graph = feature_graph() if nodes else build(model, tokens, "head")
    found, graph = {}, call("find_communities", call("leave_out", graph, ["embed"]), "leiden")
    losses = {name: call(f"{name}_behaviours", model, tokens, 3, seed=1) for name in ("loss", "gradient")}
    behaviours = losses["loss"] | losses["gradient"]
    found |= losses | {"gradients": call("loss_gradients", model, tokens, batch_size=2)}
    options = {"dictionaries": nodes, "n_controls": 3, "n_permutations": 9, "progress": False}
    for value, edges in (("mean", "inside"), ("zero", "touching"), ("resample", "inside")):
        more = {"value": value, "edges": edges, "skip_first": 1} | options
        table = call("match_behaviours", model, graph, tokens, behaviours, **more)
        key = f"{value} {edges}"
        found[key], found[f"{key} summary"] = table, call("summarise_matches", table, p=0.3)
    found["controls"] = call("draw_controls", graph, 0, 4)
    cuts = call("community_edges", graph)
    found |= {
        "cuts": cuts,
        "losses": call("ablation_losses", model, graph, tokens, cuts[:2], dictionaries=nodes),
    }
    others = call("other_groupings", model, graph, tokens, nodes, least=0.01)
    compared = call("compare_groupings", model, {"own": graph} | others, tokens, behaviours, **options)
    needs = {}
    for name, mask in losses["loss"].items():
        task = call("behaviour_task", tokens, mask, name)
        needs[name] = some_edges(
            build(model, task, nodes or "head", target="metric", attribution="gradient"), 0.1
        )
    return found | {"compared": compared, "needs": needs, "located": call("locate_behaviours", graph, needs)}


# Dictionaries and their training


def run_dictionary(d: Any, x: Tensor) -> dict[str, Any]:
    """What a dictionary makes of something."""
    acts = d.encode(x)
    found = {"acts": acts, "decoded": d.decode(acts), "whole": call("reconstruct", d, x)}
    structure = call("find_structure", d)
    return found | {"structure": structure, "hash": call("hash_dictionary", d)}


@result("dictionaries", "llama", "gpt2")
def run_dictionaries(name: str) -> dict[str, Any]:
    """Codes and reconstructions of every kind, before and after they are saved."""
    model, found = tiny(name), {}
    for kind, dictionaries in dictionary_sets(model).items():
        for module, d in dictionaries.items():
            width = model.n_heads * model.d_head if d.reads == "z" else model.d_model
            x = drawer("x")(2, 5, width)
            found[f"{kind} {module}"] = run_dictionary(d, x)
            if kind in ("functions", "functions of inputs", "straight", "mixed"):
                continue
            with tempfile.TemporaryDirectory() as folder:
                call("save_dictionary", d, Path(folder) / "d", d_in=width, weights_hash=model.weights_hash)
                again = call("load_dictionary", Path(folder) / "d", model)
            found[f"{kind} {module} loaded"] = run_dictionary(again, x)
    mixed = call(
        "LinearDictionary", "a1", "z", *(drawer("z")(*shape) for shape in ((16, 7), (7, 16), (7,), (16,)))
    )
    found["moved"] = run_dictionary(call("move_to_stream", model, mixed), drawer("x")(3, 16))
    return found


@result("spliced", *SOME)
def run_all_spliced(name: str) -> dict[str, Any]:
    """Logits with modules replaced by their reconstruction, and what that costs."""
    model, found = tiny(name), {}
    tokens = random_tokens(model, 4, 8)
    for kind, nodes in dictionary_sets(model).items():
        if (name, kind) == ("gemma2", "z"):  # behind a norm, what is mixed has no place in the stream
            continue
        with torch.no_grad():
            for error, skip in ((False, 0), (True, 1)):
                logits = attempt("run_spliced", model, tokens, nodes, error=error, skip_first=skip)
                found[f"{kind} {error} {skip}"] = logits
        found[f"{kind} measured"] = attempt("measure_dictionaries", model, nodes, tokens, n_spliced=3)
    return found


@result("spliced_smollm2")
def measure_smollm() -> dict[str, Any]:
    """Dictionaries on the embedded model: what they miss, and their features."""
    model, tokens, nodes = smollm(), short_text(3, 12), real_dictionaries()
    with torch.no_grad():
        logits = call("run_spliced", model, tokens, nodes)
    acts = call("read_features", model, nodes["m3"], tokens)
    top = call("top_activations", acts, tokens, range(10), 3)
    measured = call("measure_dictionaries", model, nodes, tokens, n_spliced=1)
    return {"logits": logits, "measured": measured, "acts": acts, "top": top}


KINDS = ("topk", "batchtopk", "matryoshka", "gated", "jumprelu", "mlp", "gradient")


@result("train", *KINDS)
def train_kind(kind: str) -> dict[str, Any]:
    """Dictionaries of a kind after twenty steps: several at once, and one that goes on from a checkpoint."""
    model = tiny("llama", torch.float32)
    tokens, options = random_tokens(model, 12, 20, 3), {"d_dict": 24, "k": 4, "n_steps": 20, "batch_size": 32}
    found = {
        "made": call("train_dictionaries", model, tokens, ["m1", "a0"], kind=kind, n_workers=1, **options)
    }
    acts = call("collect_activations", model, tokens, ["m1"])["m1"][0].float()
    grads = call("collect_gradients", model, tokens, ["m1"])["m1"][0].float() if kind == "gradient" else None
    recipe = call("TrainConfig", 24, kind, k=4, sparsity=0.5, n_steps=20, batch_size=32, seed=2)
    with tempfile.TemporaryDirectory() as folder:
        more = {"gradients": grads, "checkpoint": Path(folder) / "state", "checkpoint_every": 7}
        found["one"] = call("train_dictionary", acts, "m1", recipe, **more)
    return found


@result("collect", "llama", "gpt2", "smollm2")
def collect_all(name: str) -> dict[str, Any]:
    """Activations and gradients at modules of every kind."""
    model = smollm() if name == "smollm2" else tiny(name)
    tokens = short_text() if name == "smollm2" else random_tokens(model, 4, 10)
    found = {
        "activations": call("collect_activations", model, tokens, ["a1", "m1", "a1.h0", "b1"], batch_size=3)
    }
    found["gradients"] = call("collect_gradients", model, tokens, ["a1", "m0"], skip_first=2, batch_size=1)
    places = [("a1", place) for place in ("output", "stream", "input", "scaled", "normed", "z")]
    with torch.no_grad():
        read = call("read_places", model, tokens, places)
    found |= {"places": {place: read["a1", place] for _, place in places}}
    found["components"] = call("principal_components", found["activations"]["a1"][0].float(), 5, "a1")
    names = {kind: ",".join(call("list_modules", model, kind)) for kind in ("attn", "mlp", "all")}
    return found | {"modules": names, "settings": json.dumps(call("choose_settings", model, "cpu", k=7))}


# Texts and tasks


@result("data")
def read_texts() -> dict[str, Any]:
    """Tokens of the embedded text, register by register, and of texts of other kinds."""
    model, found = smollm(), {}
    for seed, length in ((0, 64), (3, 128)):
        corpus = call("read_corpus", "default", model, 4096, seq_len=length, seed=seed)
        found[f"corpus {seed}"] = {
            "tokens": corpus.tokens,
            "of": corpus.document,
            "documents": corpus.documents,
        }
        for register in sorted(corpus.documents["register"].unique()):
            found[f"register {register} {seed}"] = corpus.tokens[call("register_mask", corpus, register)]
    texts = ["The quick brown fox jumps over the lazy dog. " * 4, "def f(x):\n    return x + 1\n" * 6]
    found["strings"] = call("load_corpus", texts, model, 48, seq_len=12)
    found["bos"] = call("load_corpus", texts, model, 48, seq_len=12, prepend_bos=True, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        for i, text in enumerate(texts):
            (Path(folder) / f"{i}.txt").write_text(text)
        found["folder"] = call("load_corpus", folder, model, 48, seq_len=12)
    return found | {"hash": call("hash_tokens", found["strings"])}


TASKS = ("ioi", "ioi-argument", "greater-than", "agreement", "agreement-attractor", "agreement-relative")
TASKS = (*TASKS, "pronoun", "docstring", "induction", "capitals", "successor")


@result("tasks")
def load_tasks() -> dict[str, Any]:
    """Prompts of every task, and how the model does."""
    return {name: call("load_task", name, smollm(), n=3, seed=1, check=False) for name in TASKS}


@result("task_scores")
def score_tasks() -> dict[str, Any]:
    """Prompts of one's own, and every metric."""
    found, model = {}, smollm()
    rows = [
        ("The cat sat on the", "The dog ran to the", " mat", " park"),
        ("He ate the", "He saw the", " cake", " sun"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.csv"
        pd.DataFrame(rows, columns=["clean", "corrupted", "answers", "wrong"]).to_csv(path, index=False)
        found["own"] = task = call("load_task", path, model, check=False)
    with torch.no_grad():
        last = model(task.clean)[torch.arange(len(task)), task.last]
    for metric in ("logit_diff", "prob_diff", "accuracy", "ce"):
        found[metric] = call("score_answers", last, task.answers, task.wrong, metric)
    return found


# Graphs as they are, and figures


@result("graphs", "modules", "features")
def use_graph(kind: str) -> dict[str, Any]:
    """Parts of a graph, what is counted in it, and what other libraries get."""
    graph = build(tiny("gpt2"), random_tokens(tiny("gpt2"), 4, 8)) if kind == "modules" else feature_graph()
    found, n = {}, len(graph)
    for by, method in itertools.product(("weight", "abs_weight", "rms_weight"), ("top", "greedy")):
        found[f"{by} {method}"] = call("select_edges", graph, n // 5, method, by=by)
    for by in ("weight", "rms_weight"):
        largest = float(graph.edges[by].abs().max())
        found[f"threshold {by}"] = part = call("threshold", graph, 0.1 * largest, by)
        found[f"density {by}"] = call("density", graph, by)
        found[f"strength {by}"] = {end: call("strength", graph, end, by) for end in ("source", "target")}
    found |= {
        "pruned": call("prune_dangling", part),
        "modules": call("subgraph", graph, ["a0", "m1", "logits"]),
    }
    found |= {"layer": call("subgraph", graph, layers=[1]), "names": part.edge_names}
    rest = call("keep_edges", graph, ~np.isin(graph.edge_names, part.edge_names))
    found["merged"] = call("merge_graphs", part, rest)
    with tempfile.TemporaryDirectory() as folder:
        found["loaded"] = lib("Graph").load(part.save(Path(folder) / "g"))
    network, made = call("to_networkx", part), call("to_igraph", part)
    found["networkx"] = [data["weight"] for *_, data in network.edges(data=True)]
    return found | {"igraph": made.es["weight"], "ends": np.array(made.get_edgelist())}


@result("figures", "modules", "features")
def draw_graphs(kind: str) -> dict[str, Any]:
    """What the figures of a graph and of its communities show."""
    model = tiny("gpt2")
    tokens = random_tokens(model, 6, 12)
    graph = build(model, tokens) if kind == "modules" else feature_graph()
    found = {"layers": call("plot_layers", graph, 60, levels=(10, 60)), "matrix": call("plot_matrix", graph)}
    found |= {name: call(f"plot_{name}", graph) for name in ("weights", "strength")}
    found["node"] = call("plot_layers", graph, 20, by="rms_weight", node="logits", levels=())
    parted = call("find_communities", call("leave_out", graph, ["embed"]), "leiden")
    for name in ("communities", "flow", "community_layers"):
        found[name] = call(f"plot_{name}", parted)
    found["members"], found["between"] = call("list_members", parted, 0), call("flow_between", parted)
    with tempfile.TemporaryDirectory() as folder:
        page = call("write_report", graph, Path(folder) / "page.html", n_edges=30)
        found["page"] = len(Path(page).read_text(encoding="utf-8"))
    return found


@result("figures_tables")
def draw_tables() -> dict[str, Any]:
    """What the figures of curves, dictionaries and behaviours show."""
    model, found = tiny("gpt2"), {}
    tokens, nodes = random_tokens(model, 6, 12), some_dictionaries(model, "relu")
    graph = build(model, tokens)
    curve = call("ablation_curve", model, graph, tokens, [10, 30, 60], n_boot=20)
    found["curve"] = call("plot_curve", curve, 30)
    found["quality"] = call("plot_quality", call("measure_dictionaries", model, nodes, tokens))
    acts = call("read_features", model, nodes["m1"], tokens)
    found["activations"] = call("plot_activations", acts, [0, 2])
    found["text"] = len(call("show_top", model, tokens, acts, 1).data)
    graph = call("find_communities", call("leave_out", graph, ["embed"]), "leiden")
    behaviours = call("loss_behaviours", model, tokens, 3)
    options = {"n_controls": 3, "n_permutations": 9, "progress": False}
    table = call("match_behaviours", model, graph, tokens, behaviours, **options)
    for column in ("effect", "selectivity"):
        found[column] = call("plot_behaviours", table, column)
    return found


# Running


def run_results(names: list[str], out: Path) -> int:
    """Make and store results; how many failed."""
    out.mkdir(parents=True, exist_ok=True)
    failed, start = 0, time.process_time()
    for name in names:
        before, arrays = time.process_time(), {}
        torch.manual_seed(0)
        random.seed(0)
        try:
            store(RESULTS[name](), "", arrays)
        except Exception as error:  # one result that fails leaves the others
            failed += 1
            print(f"{name:<40} FAILED: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc()
            continue
        np.savez(out / f"{name}.npz", **{key.lstrip("/") or "value": array for key, array in arrays.items()})
        print(f"{name:<40} {time.process_time() - before:7.1f} s  {len(arrays):>6} arrays", flush=True)
    print(f"{len(names) - failed} results, {failed} failed, {time.process_time() - start:.0f} CPU seconds")
    return failed


def main() -> int:
    """Make what the command line asks for."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", help="folder for the results")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names, like 'feature_*'")
    parser.add_argument("--list", action="store_true", help="say what there is, and make nothing")
    args = parser.parse_args()
    names = [name for name in RESULTS if any(fnmatch(name, pattern) for pattern in args.only)]
    if args.list:
        print("\n".join(names))
        return 0
    if args.out is None:
        parser.error("OUT is needed")
    print(f"the library: {circuitgraph.__file__}", flush=True)
    warnings.simplefilter("ignore")
    return int(not names or run_results(names, args.out) > 0)


if __name__ == "__main__":
    sys.exit(main())
