"""Edge ablation of graphs of features by its definition, and random dictionaries and graphs to compare with.

Every reader is computed by itself, each of its inputs put together writer by writer."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from circuitgraph.dictionary.protocol import Gate, LinearDictionary
from circuitgraph.cut import node_ports, open_cut
from circuitgraph.graph.graph import Graph
from circuitgraph.model.blocks import Norm
from short import build_graph
from oracles import embed_by_hand, head_by_hand, logits_by_hand, mlp_by_hand, norm_by_hand

D_DICT = 6


@dataclass(frozen=True)
class Hidden:
    """A dictionary of which nothing is known but what it does: it is not even tried whether it is affine."""

    of: Any

    module = property(lambda self: self.of.module)
    reads = property(lambda self: self.of.reads)
    d_dict = property(lambda self: self.of.d_dict)
    meta = property(lambda self: self.of.meta)

    def encode(self, x):
        return self.of.encode(x)

    def decode(self, acts):
        return self.of.decode(acts.to(self.of.W_dec))


def draw(model, module, reads="output", gate="topk", d_dict=D_DICT, k=2, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(map(ord, module)))

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(model.dtype)

    gates = {
        "topk": lambda: Gate("topk", k=k),
        "abstopk": lambda: Gate("abstopk", k=k),
        "relu": lambda: Gate("relu"),
        "none": lambda: Gate("none"),
        "jumprelu": lambda: Gate("jumprelu", threshold=random(d_dict).abs() / 2),
        "gated": lambda: Gate(
            "gated", b_gate=random(d_dict) / 9, r_mag=random(d_dict) / 3, b_mag=random(d_dict) / 9
        ),
    }
    d_in = model.n_heads * model.d_head if reads == "z" else model.d_model
    skip = random(model.d_model, d_in) / 9 if reads in ("input", "normed", "scaled") else None
    return LinearDictionary(
        module,
        reads,
        random(d_in, d_dict) / d_in**0.5,
        random(d_dict, model.d_model) / 3,
        random(d_dict) / 9,
        random(model.d_model) / 9,
        gates[gate](),
        random(d_in) / 9,
        skip,
    )


def all_dictionaries(model, **options):
    return {
        f"{kind}{i}": draw(model, f"{kind}{i}", **options)
        for i, layer in enumerate(model.layers)
        for kind in "am"
        if kind == "a" or layer.mlp is not None
    }


def module_by_hand(model, kind, layer, xs, pattern=None, head=-1):
    """Of inputs by port: what a module writes (one head without its layer's bias), z, and the patterns."""
    block = model.layers[layer]
    if kind == "m":
        return (
            mlp_by_hand(model, layer, xs["mlp"]) + (0 if block.mlp.b_out is None else block.mlp.b_out),
            None,
            None,
        )
    heads, patterns, zs = [], {}, []
    for h in range(model.n_heads):
        y, patterns[h] = head_by_hand(
            model, layer, h, xs["q"], xs["k"], xs["v"], None if pattern is None else pattern[h]
        )
        shared = h // (model.n_heads // model.n_kv_heads)
        v = norm_by_hand(block.ln1, xs["v"]) @ block.attn.W_V[shared].T + (
            0 if block.attn.b_V is None else block.attn.b_V[shared]
        )
        heads, zs = [*heads, y], [*zs, patterns[h] @ v]
    if head >= 0:
        return norm_by_hand(block.ln1_post, heads[head], sum(heads)), None, patterns
    return (
        norm_by_hand(block.ln1_post, sum(heads)) + (0 if block.attn.b_O is None else block.attn.b_O),
        torch.cat(zs, -1),
        patterns,
    )


def cut_by_hand(model, layer, dictionaries, others):
    """The modules of a layer, (name, kind, head): heads where these have dictionaries, or others="head"."""
    heads = [(f"a{layer}.h{h}", "a", h) for h in range(model.n_heads)]
    if f"a{layer}" in dictionaries or not (
        others == "head" or any(name in dictionaries for name, *_ in heads)
    ):
        heads = [(f"a{layer}", "a", -1)]
    return heads if model.layers[layer].mlp is None else [*heads, (f"m{layer}", "m", -1)]


def walk_features(model, dictionaries, tokens, read, patterns=None, others="layer"):
    """Logits, what every node wrote, and the patterns, where `read(reader, port, writes, bias)` is an input.

    A port is q, k, v, mlp, logits, or in for what an encoder reads before its module."""
    writes, bias, seen = embed_by_hand(model, tokens), torch.zeros(model.d_model, dtype=model.dtype), {}
    if "embed" in dictionaries:
        d, y = dictionaries["embed"], writes.pop("embed")
        acts, bias = d.encode(y), bias + d.b_dec
        writes |= {f"embed/{j}": acts[..., j : j + 1] * d.W_dec[j] for j in range(d.d_dict)}
        writes["embed/err"] = y - acts @ d.W_dec - d.b_dec
    for i, layer in enumerate(model.layers):
        before, bias_before = dict(writes), bias
        for name, kind, head in cut_by_hand(model, i, dictionaries, others):
            d = dictionaries.get(name)
            there, b = (before, bias_before) if layer.parallel or kind == "a" else (dict(writes), bias)
            norm, own = (layer.ln1, layer.attn.b_O) if kind == "a" else (layer.ln2, layer.mlp.b_out)
            for node in [name] if d is None else [*(f"{name}/{j}" for j in range(d.d_dict)), f"{name}/err"]:
                xs = {
                    port: read(node, port, there, b) for port in (*("qkv" if kind == "a" else ("mlp",)), "in")
                }
                y, z, found = module_by_hand(
                    model, kind, i, xs, None if patterns is None or kind == "m" else patterns[i], head
                )
                if kind == "a":
                    seen[i] = found
                if d is None:
                    writes[node] = y - (0 if own is None or head >= 0 else own)
                    continue
                x = xs["in"]
                acts = d.encode(
                    {
                        "output": y,
                        "z": z,
                        "stream": x + y,
                        "input": x,
                        "normed": norm_by_hand(norm, x),
                        "scaled": norm_by_hand(Norm(norm.kind, None, None, norm.eps), x),
                    }[d.reads]
                )
                if node.endswith("err"):
                    writes[node] = y - acts @ d.W_dec - d.b_dec
                else:
                    j = int(node.split("/")[1])
                    writes[node] = acts[..., j : j + 1] * d.W_dec[j]
            bias = (
                bias
                + (0 if d is None else d.b_dec)
                + (0 if own is None or head > 0 or head < 0 and d is not None else own)
            )
    return logits_by_hand(model, read("logits", "logits", writes, bias)), writes, seen


def read_all(_reader, _port, writes, bias):
    return sum(writes.values()) + bias


@torch.no_grad()
def by_hand(model, dictionaries, kept, tokens, ablated=None, *, merged=False, frozen=False, others="layer"):
    """Logits with all edges cut but those of `kept`, a set of (source, target, port)."""

    def read(reader, port, writes, bias):
        port, x = (
            "in" if merged and reader != "logits" else port,
            torch.zeros_like(next(iter(writes.values()))),
        )
        for writer, y in writes.items():
            x = x + (y if (writer, reader, port) in kept else 0 if ablated is None else ablated[writer])
        return x + (1.0 if ablated is not None or ("const", reader, port) in kept else 0.0) * bias

    patterns = walk_features(model, dictionaries, tokens, read_all, others=others)[2] if frozen else None
    return walk_features(model, dictionaries, tokens, read, patterns, others)[0]


@torch.no_grad()
def writes_by_hand(model, dictionaries, tokens, others="layer"):
    return walk_features(model, dictionaries, tokens, read_all, others=others)[1]


def mean_by_hand(model, dictionaries, text, n_pos=None, others="layer", length=None):
    """Means of writes: one for the first position and one for all others, or one for each of `n_pos`.

    The rest is repeated up to `length`, by default that of the text."""
    writes = writes_by_hand(model, dictionaries, text, others)
    if n_pos is not None:
        return {name: y.mean(0)[:n_pos] for name, y in writes.items()}
    n_rest = (length or text.shape[1]) - 1
    return {
        name: torch.stack([y[:, 0].mean(0)] + [y[:, 1:].mean((0, 1))] * n_rest) for name, y in writes.items()
    }


def every_edge(model, tokens, dictionaries, **options):
    """The graph of each edge that the architecture allows between features."""
    built = build_graph(model, tokens, dictionaries, n_steps=1, progress=False, **options)
    cut, rows = open_cut(model, built, dictionaries), []
    for part in cut.parts:
        for node in range(part.n_nodes):
            rows += [
                (cut.names[source], cut.names[part.first + node], port)
                for port in node_ports(part, node, cut.rule)
                for source in range(part.n_before)
            ]
    edges = pd.DataFrame(rows, columns=["source", "target", "port"]).assign(
        weight=1.0, abs_weight=1.0, rms_weight=1.0, count=1
    )
    return Graph(built.nodes, edges, built.meta)


def triples(graph):
    return set(zip(*(graph.edges[c].astype(str) for c in ("source", "target", "port")), strict=True))


def thin(graph, share, seed=0):
    return graph.keep(np.random.default_rng(seed).random(len(graph)) < share)


def gap(a, b):
    return (a - b).abs().max().item()
