"""Graphs of one prompt: against the graph of a text and automatic differentiation; influence, files."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch

from circuitgraph.attribution.method import Attribution
from circuitgraph.build.build import build_graph as build_prompt
from circuitgraph.build.prompt import Prompt
from circuitgraph.dictionary.places import identity_dictionary
from circuitgraph.cut import list_parts, part_ports
from circuitgraph.graph.graph import Graph
from circuitgraph.model.blocks import norm_scale, run_logits
from circuitgraph.model.loading import TINY_MODELS, tiny_model
from circuitgraph.model.modules import embed_tokens
from circuitgraph.graph.influence import add_influence
from circuitgraph.graph.prompt_view import join_view, prune_by_influence, save_attribution_graph, score_prompt
from circuitgraph.options import Pruning, Run
from oracles import random_tokens
from short import build_graph
from test_feature_edges import all_dictionaries, draw, module_values

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")


def build(model, tokens, dictionaries, **options):
    return build_graph(
        model,
        tokens,
        dictionaries,
        positions="keep",
        progress=False,
        **{"n_steps": 3, "keep": None} | options,
    )


def bare(names):
    return names.astype(str).str.split("@").str[0]


def inner_sums(graph):
    """Sums of weights, absolute and squared, by edge without positions; without those into output tokens.

    They are taken over the reader's positions, after the writer's were summed."""
    edges = graph.edges
    edges = edges[~edges["target"].astype(str).str.startswith("logits")]
    at = (
        edges.assign(
            source=bare(edges["source"]),
            place=edges["target"].astype(str),
            target=bare(edges["target"]),
            port=edges["port"].astype(str),
        )
        .groupby(["source", "target", "place", "port"])["weight"]
        .sum()
        .reset_index()
    )
    return (
        at.assign(size=at["weight"].abs(), square=at["weight"] ** 2)
        .groupby(["source", "target", "port"])[["weight", "size", "square"]]
        .sum()
    )


def text_sums(graph, n):
    edges = graph.edges[graph.edges["target"] != "logits"]
    return (
        edges.astype({"source": str, "target": str, "port": str})
        .set_index(["source", "target", "port"])
        .assign(
            weight=lambda e: e["weight"] * n,
            size=lambda e: e["abs_weight"] * n,
            square=lambda e: e["rms_weight"] ** 2 * n,
        )[["weight", "size", "square"]]
    )


def assert_sums_agree(model, dictionaries, n_pos=6, **options):
    tokens = random_tokens(model, 1, n_pos)
    kept = inner_sums(build(model, tokens, dictionaries, **options))
    summed = text_sums(
        build_graph(
            model,
            tokens,
            dictionaries,
            progress=False,
            **{"n_steps": 3, "keep": None, "skip_first": 0} | options,
        ),
        n_pos - options.get("skip_first", 0),
    )
    kept, summed = kept.align(summed, fill_value=0)
    assert len(summed) > 150 and np.allclose(kept, summed, rtol=1e-9, atol=1e-9 * float(summed["size"].max()))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_summed_over_positions_it_is_the_graph_of_the_text(name):
    model = tiny_model(name, dtype=torch.float64)
    assert_sums_agree(model, all_dictionaries(model))


@pytest.mark.parametrize(
    "options",
    [{"ports": "merged"}, {"pattern": "frozen"}, {"attribution": "gradient"}, {"skip_first": 2}],
    ids=str,
)
@pytest.mark.parametrize("reads", ["output", "normed", "stream"])
def test_rules_and_places(options, reads):
    model = tiny_model("qwen2", dtype=torch.float64)
    assert_sums_agree(model, all_dictionaries(model, reads=reads), **options)


@pytest.mark.parametrize("gate", ["relu", "none"])
def test_gates_and_modules_without_dictionary(gate):
    model = tiny_model("llama", dtype=torch.float64)
    dictionaries = all_dictionaries(model, gate=gate)
    assert_sums_agree(model, {name: dictionaries[name] for name in ("m0", "a1")})


@pytest.mark.parametrize("name", ["qwen2", "gpt-neox", "gemma2"])
def test_heads(name, tmp_path):
    model, tokens = tiny_model(name, dtype=torch.float64), random_tokens(tiny_model(name), 1, 6)
    dictionaries = {module: draw(model, module) for module in ("a0.h1", "m0", "a1")}
    assert_sums_agree(model, dictionaries, others="head")
    graph = build(model, tokens, dictionaries)
    assert {"a0.h0@2", "a0.h1/err@2"} < set(graph.nodes["name"]) and graph.nodes["kind"].eq("head").any()
    nodes = [
        node["node_id"]
        for node in json.loads(
            save_attribution_graph(graph, model, tmp_path / "graph.json", slug="heads").read_text(
                encoding="utf-8"
            )
        )["nodes"]
    ]
    assert len(nodes) == len(set(nodes)) and {"0_ah0_2", "0_error-ah1_2"} <= set(nodes)


def writers_of(model, tokens, dictionaries):
    """What every node writes `[pos d_model]`, module by module, and what each part and the output read."""
    written, bias, reads = (
        {name: y[0] for name, y in embed_tokens(model, tokens).items()},
        torch.zeros(model.d_model, dtype=model.dtype),
        {},
    )
    x = sum(written.values())
    for part in list_parts(model, dictionaries)[0]:
        layer = model.layers[part.layer]
        if part.kind == "attn":
            before = x, bias, dict(written)
        read = before if layer.parallel else (x, bias, dict(written))
        reads[part.module] = part, read[0], {**read[2], "const": read[1].expand(len(x), -1)}
        y, d = module_values(model, part, read[0])[0], part.dictionary
        acts = d.encode(y)
        written |= {f"{part.module}/{i}": acts[:, i : i + 1] * d.W_dec[i] for i in range(d.d_dict)} | {
            f"{part.module}/err": y - d.decode(acts)
        }
        bias, x = bias + d.b_dec, x + y
    return {
        name: (part, read.detach(), {k: y.detach() for k, y in before.items()})
        for name, (part, read, before) in reads.items()
    }, (x.detach(), {**{k: y.detach() for k, y in written.items()}, "const": bias.expand(len(x), -1)})


def differentiate(value, read, writers, ports, rule):
    """Weights `{(source, port): weight}` of one reader by autograd, and the change of its value."""
    names = {"q": 0, "k": 1, "v": 2, "mlp": 0, "logits": 0, "in": 3}
    grads = [torch.zeros_like(read) for _ in range(4)]
    for alpha, weight in rule.steps:
        with torch.enable_grad():
            xs = [(alpha * read).requires_grad_() for _ in range(4)]
            found = torch.autograd.grad(value(xs), xs, allow_unused=True)
        for total, grad in zip(grads, found, strict=True):
            total += weight * (0 if grad is None else grad)
    weights = {}
    for port in ports:
        for source, y in writers.items():
            for p, w in enumerate((grads[names[port]] * y).sum(1).tolist()):
                key = (source if source == "const" else f"{source}@{p}", port)
                weights[key] = weights.get(key, 0) + w
    return weights, float(value([read] * 4) - value([torch.zeros_like(read)] * 4))


def assert_into(graph, reader, wanted, change, tolerance):
    edges = graph.edges[graph.edges["target"] == reader]
    got = dict(
        zip(
            zip(edges["source"].astype(str), edges["port"].astype(str), strict=True),
            edges["weight"],
            strict=True,
        )
    )
    wanted = {key: w for key, w in wanted.items() if w != 0}
    assert len(wanted) > 1 and all(
        np.isclose(
            wanted.get(key, 0), got.get(key, 0), rtol=1e-7, atol=1e-10 * max(map(abs, wanted.values()))
        )
        for key in wanted.keys() | got.keys()
    )
    assert abs(sum(got.values()) - change) < tolerance * max(sum(map(abs, got.values())), 1)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_edges_are_the_gradients_of_single_readers_and_sum_to_their_values(name):
    model, rule, last = tiny_model(name, dtype=torch.float64), Attribution(n_steps=16, skip_first=0), 4
    tokens, dictionaries = random_tokens(model, 1, last + 1), all_dictionaries(model)
    graph = build(model, tokens, dictionaries, n_steps=16, n_logits=3, logit_mass=1.0)
    reads, (x, writers) = writers_of(model, tokens, dictionaries)
    tolerance, seen = 2e-2 if "relu" in name else 1e-4, 0  # a kink converges slowly
    for module in list(reads)[-2:]:
        part, read, before = reads[module]
        for reader, values in module_values(model, part, read)[1].items():
            for p in (0, last):
                if values[p] is None:
                    continue
                assert_into(
                    graph,
                    f"{reader}@{p}",
                    *differentiate(values[p], read, before, part_ports(part, rule), rule),
                    tolerance,
                )
                seen += 1
    assert seen >= 10
    scale = norm_scale(model.ln_final, x)

    def margin(xs, token):
        logits = run_logits(model, xs[0][None], scale=scale[None])[0, last]
        return logits[token] - logits.mean()

    probability = run_logits(model, x[None])[0, last].detach().softmax(0)
    outputs = graph.nodes[graph.nodes["kind"] == "logits"]
    assert outputs["token"].tolist() == probability.topk(3).indices.tolist() and np.allclose(
        outputs["probability"], probability.topk(3).values
    )
    for token, value in zip(outputs["token"], outputs["activation"], strict=True):
        pick = partial(margin, token=token)
        assert np.isclose(value, float(pick([x])))
        assert_into(
            graph, f"logits/{token}@{last}", *differentiate(pick, x, writers, ("logits",), rule), tolerance
        )


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # without and with a soft cap
def test_targets_are_explained_as_asked(name):
    model = tiny_model(name, dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 1, 4), all_dictionaries(model)

    def explain(targets):
        quiet, every = Run(progress=False), Pruning(None, 0.0)
        return build_prompt(model, Prompt(tokens, targets=targets), dictionaries, pruning=every, run=quiet)

    def into(graph, output):
        edges = graph.edges[graph.edges["target"] == output]
        return edges.set_index(["source", "port"])["weight"]

    graph = explain([7, 3, (7, 3)])
    outputs = graph.nodes[graph.nodes["kind"] == "logits"].set_index("name")
    assert outputs.index.tolist() == ["logits/7@3", "logits/3@3", "logits/7-3@3"]
    assert graph.meta["targets"] == [7, 3, [7, 3]]
    logits = model(tokens)[0, -1]
    assert outputs.activation["logits/7-3@3"] == pytest.approx((logits[7] - logits[3]).item(), abs=1e-5)
    assert outputs.activation["logits/7@3"] == pytest.approx((logits[7] - logits.mean()).item(), abs=1e-5)
    assert outputs.probability["logits/3@3"] == pytest.approx(logits.softmax(0)[3].item(), abs=1e-5)
    one, other, contrast = (into(graph, name) for name in outputs.index)
    assert len(contrast) > 10 and np.allclose(contrast, one.sub(other, fill_value=0)[contrast.index])
    for words, targets in {
        "targets must be a list": [],
        r"targets must lie in \[0, 50\)": [50],
        "must differ, but token 7 stands twice": [7, 7],
        "a contrast must be a pair": [(1, 2, 3)],
        "must be texts of one token each, but ' a' is": [" a"],
    }.items():
        with pytest.raises(ValueError, match=words):
            explain(targets)


@pytest.fixture(scope="module")
def small():
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 1, 6), all_dictionaries(model)
    return model, tokens, dictionaries, build(model, tokens, dictionaries)


def test_nodes(small):
    model, tokens, _, graph = small
    nodes = graph.nodes.set_index("name")
    assert list(nodes.index[:7]) == [*(f"embed@{p}" for p in range(6)), "const"] and nodes.loc[
        "embed@3", "token"
    ] == int(tokens[0, 3])
    assert (nodes.loc[nodes["kind"] == "feature", "activation"] != 0).all() and (
        nodes["module"] == "m0"
    ).sum() == 6 * 5
    assert (
        (graph.edges["count"] == 1).all()
        and np.array_equal(graph.edges["abs_weight"], graph.edges["weight"].abs())
        and np.array_equal(graph.edges["abs_weight"], graph.edges["rms_weight"])
    )
    assert graph.meta["positions"] == "keep" and graph.meta["skip_first"] == 0
    position = nodes["position"].to_numpy()
    source, target = (graph.edges[end].cat.codes.to_numpy() for end in ("source", "target"))
    assert (position[source] <= position[target]).all() and (
        (position[source] == position[target])
        | ~graph.edges["port"].isin(["q", "mlp", "logits"])
        | (position[source] < 0)
    ).all()
    assert abs(nodes["probability"].sum() - 1) < 1 and (nodes["kind"] == "logits").sum() == 10


def test_few_output_tokens_where_they_hold_the_mass(small):
    model, tokens, dictionaries, graph = small
    probability = graph.nodes["probability"].dropna().to_numpy()
    few = build(model, tokens, dictionaries, logit_mass=float(probability[:2].sum() + 1e-9))
    assert (few.nodes["kind"] == "logits").sum() == 3 and (
        build(model, tokens, dictionaries, logit_mass=float(probability[0] / 2)).nodes["kind"] == "logits"
    ).sum() == 1


def test_kept_is_the_share_that_pruning_leaves(small):
    model, tokens, dictionaries, whole = small
    for options in ({"keep": 5}, {"keep": 5, "share": 0.1}, {"share": 0.1}, {"mass": 0.6}):
        few = build(model, tokens, dictionaries, **options)
        for name in ("m1/err@4", "a1/err@5", few.nodes["name"].iloc[-1]):

            def into(graph, name=name):
                return graph.edges[graph.edges["target"] == name]["abs_weight"]

            every = into(whole).nlargest(options.get("keep", len(whole)))
            total = into(whole).sum()
            held_by_larger = every.cumsum() - every
            wanted = every[(every >= options.get("share", 0) * total)]
            wanted = wanted[held_by_larger[wanted.index] < options.get("mass", 1.01) * total]
            assert np.allclose(sorted(into(few)), sorted(wanted)) and np.isclose(
                few.nodes.set_index("name").loc[name, "kept"], wanted.sum() / into(whole).sum()
            )
        assert set(few.edge_names) < set(whole.edge_names)


def test_blocks_and_ports_change_nothing(small, tmp_path):
    model, tokens, dictionaries, whole = small
    blocks = build(model, tokens, dictionaries, memory=4e4)
    pd.testing.assert_frame_equal(blocks.nodes, whole.nodes)
    assert blocks.edge_names == whole.edge_names and np.allclose(
        blocks.edges["weight"], whole.edges["weight"], atol=1e-12
    )
    merged = build(model, tokens, dictionaries, ports="merged").edges
    into = merged.astype({"source": str, "target": str}).set_index(["source", "target"])["weight"]
    apart = whole.edges.astype({"source": str, "target": str}).groupby(["source", "target"])["weight"].sum()
    both = pd.concat([into, apart], axis=1).fillna(0).to_numpy()
    assert len(both) == len(merged) and np.allclose(both[:, 0], both[:, 1], atol=1e-12)
    whole.save(tmp_path / "graph")
    assert Graph.load(tmp_path / "graph") == whole


def test_an_exact_dictionary_has_errors_that_write_nothing():
    model = tiny_model("llama", dtype=torch.float64)
    graph = build(model, random_tokens(model, 1, 4), {"m0": identity_dictionary(model, "m0")})
    assert (
        graph.nodes.set_index("name").loc["m0/err@2", "activation"] < 1e-12
        and not (graph.edges[bare(graph.edges["source"]) == "m0/err"]["abs_weight"] > 1e-9).any()
    )


# Influence


def by_hand():
    """Two tokens, a feature at each, an error, two outputs; weights such that shares are round."""
    names = [
        "embed@0",
        "embed@1",
        "const",
        "m0/0@0",
        "m0/1@1",
        "m0/err@1",
        "m1/0@1",
        "logits/0@1",
        "logits/1@1",
    ]
    kinds = ["embed", "embed", "const", "feature", "feature", "error", "feature", "logits", "logits"]
    nodes = pd.DataFrame(
        {
            "name": names,
            "module": [n.split("/")[0].split("@")[0] for n in names],
            "kind": kinds,
            "layer": [-1, -1, -1, 0, 0, 0, 1, -1, -1],
            "index": [-1, -1, -1, 0, 1, -1, 0, 0, 1],
            "frequency": 1.0,
            "mean_activation": 1.0,
            "position": [0, 1, -1, 0, 1, 1, 1, 1, 1],
            "token": [7, 8, -1, 7, 8, 8, 8, 0, 1],
            "activation": 1.0,
            "probability": [np.nan] * 7 + [0.6, 0.2],
        }
    )
    rows = [
        ("embed@0", "m0/0@0", 2.0),
        ("embed@1", "m0/1@1", 3.0),
        ("const", "m0/1@1", -1.0),
        ("embed@1", "m0/err@1", 5.0),
        ("m0/0@0", "m1/0@1", 1.0),
        ("m0/err@1", "m1/0@1", -1.0),
        ("m1/0@1", "logits/0@1", 3.0),
        ("m0/1@1", "logits/0@1", 1.0),
        ("m0/1@1", "logits/1@1", -4.0),
    ]
    edges = pd.DataFrame(rows, columns=["source", "target", "weight"]).assign(
        port="in", abs_weight=lambda e: e["weight"].abs(), rms_weight=lambda e: e["weight"].abs(), count=1
    )
    return Graph(nodes, edges, {"positions": "keep"})


def test_influence_by_hand():
    graph = add_influence(by_hand())
    found = graph.nodes.set_index("name")["influence"]
    m1, m0 = 0.6 * 0.75, 0.6 * 0.25 + 0.2
    assert np.allclose(found, [m1 / 2, m0 * 0.75, m0 * 0.25, m1 / 2, m0, m1 / 2, m1, 0, 0])
    scores = score_prompt(graph)
    tokens, errors, const = m1 / 2 + m0 * 0.75, m1 / 2, m0 * 0.25
    assert np.allclose(
        scores[["replacement", "tokens", "errors", "const"]],
        [tokens / (tokens + errors), *(np.array([tokens, errors, const]) / (tokens + errors + const))],
    )
    reached = found.sum() + 0.8
    assert np.isclose(scores["completeness"], (reached - m1 / 2) / reached)


def test_influence_is_the_sum_of_powers(small):
    graph = small[3]
    nodes, n = graph.nodes, len(graph.nodes)
    weights = np.zeros((n, n))
    np.add.at(
        weights, (graph.edges["target"].cat.codes, graph.edges["source"].cat.codes), graph.edges["weight"]
    )
    size = np.abs(weights) * (nodes["kind"] != "error").to_numpy()[:, None]
    shares = size / np.maximum(size.sum(1, keepdims=True), 1e-300)
    start = nodes["probability"].fillna(0).to_numpy()
    wanted = start @ (np.linalg.inv(np.eye(n) - shares) - np.eye(n))
    assert np.allclose(add_influence(graph).nodes["influence"], wanted, atol=1e-12)


@pytest.mark.parametrize(("node_share", "edge_share"), [(0.8, 0.98), (0.3, 0.9), (0.0, 0.5), (1.0, 1.0)])
def test_pruned_nodes_hold_the_share_and_are_connected(small, node_share, edge_share):
    graph = small[3]
    whole, pruned = (
        add_influence(graph).nodes.set_index("name"),
        prune_by_influence(graph, node_share, edge_share),
    )
    nodes = pruned.nodes.set_index("name")
    free = nodes[nodes["kind"].isin(["feature", "error"])]
    assert set(whole.index[whole["kind"].isin(["embed", "const", "logits"])]) <= set(
        nodes.index
    ) and np.array_equal(nodes["influence"], whole.loc[nodes.index, "influence"])
    edges = pruned.edges
    assert (
        set(free.index) <= set(edges["source"].astype(str))
        and set(free.index[free["kind"] == "feature"]) <= set(edges["target"].astype(str))
        and not edges["target"].isin(free.index[free["kind"] == "error"]).any()
    )
    cut = whole[whole["kind"].isin(["feature", "error"])].drop(free.index)["influence"]
    wanted = whole["influence"].sort_values(ascending=False)
    smallest = wanted.iloc[
        min(int(np.searchsorted(wanted.cumsum() / wanted.sum(), node_share)), len(wanted) - 1)
    ]
    assert (free["influence"] >= smallest - 1e-15).all() and (len(cut) > 0 or node_share == 1)
    split = graph.edges.astype({"source": str, "target": str, "port": str}).set_index(
        ["source", "target", "port"]
    )["weight"]
    mine = edges.astype({"source": str, "target": str, "port": str}).set_index(["source", "target", "port"])[
        "weight"
    ]
    assert mine.equals(split.loc[mine.index])


# The file


# What Neuronpedia publishes, and below it what we promise beyond it.
PUBLISHED = json.loads((Path(__file__).parent / "neuronpedia_schema.json").read_text(encoding="utf-8"))
NUMBER, TEXT = {"type": "number"}, {"type": "string"}
SCHEMA = {
    "type": "object",
    "required": ["metadata", "qParams", "nodes", "links"],
    "properties": {
        "metadata": {
            "type": "object",
            "required": ["slug", "scan", "prompt", "prompt_tokens", "transcoder_list"],
            "properties": {
                "slug": TEXT,
                "scan": TEXT,
                "prompt": TEXT,
                "prompt_tokens": {"type": "array", "items": TEXT, "minItems": 1},
                "transcoder_list": {"type": "array", "items": TEXT},
                "node_threshold": NUMBER,
                "feature_details": {"type": "object", "additionalProperties": TEXT},
                "pruning_settings": {"type": "object", "additionalProperties": NUMBER},
                "info": {
                    "type": "object",
                    "properties": {
                        "description": TEXT,
                        "create_time_ms": NUMBER,
                        "generator": {"type": "object", "additionalProperties": TEXT},
                    },
                },
                "generation_settings": {
                    "type": "object",
                    "properties": {"max_n_logits": {"type": "integer"}, "desired_logit_prob": NUMBER},
                },
            },
        },
        "qParams": {
            "type": "object",
            "required": ["pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"],
            "properties": {
                "pinnedIds": {"type": "array", "items": TEXT},
                "supernodes": {"type": "array"},
                "linkType": TEXT,
                "clickedId": TEXT,
                "sg_pos": TEXT,
            },
        },
        "nodes": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["node_id", "jsNodeId", "feature", "layer", "ctx_idx", "feature_type", "clerp"],
                "properties": {
                    "node_id": TEXT,
                    "jsNodeId": TEXT,
                    "clerp": TEXT,
                    "layer": TEXT,
                    "feature": {"type": "integer"},
                    "ctx_idx": {"type": "integer", "minimum": 0},
                    "token_prob": {"type": "number", "minimum": 0, "maximum": 1},
                    "is_target_logit": {"type": "boolean"},
                    "run_idx": {"type": "integer"},
                    "reverse_ctx_idx": {"type": "integer"},
                    "influence": {"type": ["number", "null"]},
                    "activation": {"type": ["number", "null"]},
                    "feature_type": {
                        "enum": [
                            "cross layer transcoder",
                            "lorsa",
                            "mlp reconstruction error",
                            "lorsa error",
                            "embedding",
                            "logit",
                            "unknown",
                        ]
                    },
                },
            },
        },
        "links": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["source", "target", "weight"],
                "properties": {"source": TEXT, "target": TEXT, "weight": NUMBER},
            },
        },
    },
}


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("pruned", [False, True])
def test_the_file_fits_both_viewers(name, pruned, tmp_path):
    model = tiny_model(name, dtype=torch.float64)
    every = all_dictionaries(model)
    dictionaries = {name: d for name, d in every.items() if name != "a0"}
    graph = build(model, random_tokens(model, 1, 6), dictionaries)
    graph = prune_by_influence(graph, 0.9) if pruned else graph
    file = save_attribution_graph(
        graph, model, tmp_path / "new" / "graph.json", slug="a-graph", source_set="mlps"
    )
    content = json.loads(file.read_text(encoding="utf-8"))
    jsonschema.validate(content, SCHEMA)
    jsonschema.validate(content, PUBLISHED)
    nodes, links = {node["node_id"]: node for node in content["nodes"]}, content["links"]
    assert (
        len(nodes) == len(content["nodes"]) == len({node["jsNodeId"] for node in content["nodes"]})
        and len(content["metadata"]["prompt_tokens"]) == 6
    )
    assert all(link["source"] in nodes and link["target"] in nodes for link in links) and len(
        {(link["source"], link["target"]) for link in links}
    ) == len(links)
    assert sum(node["is_target_logit"] for node in nodes.values()) == 1 and all(
        "(p=" in node["clerp"] for node in nodes.values() if node["feature_type"] == "logit"
    )
    kinds = {node["feature_type"] for node in nodes.values()}
    assert {"lorsa", "embedding", "logit"} <= kinds and (pruned or {"unknown", "lorsa error"} <= kinds)
    edges = graph.edges
    into = edges[edges["source"] != "const"].groupby("target", observed=True)["weight"].sum()
    told = pd.DataFrame(links).groupby("target")["weight"].sum()
    last, first = (
        graph.nodes[graph.nodes["kind"] == "logits"].iloc[0],
        graph.nodes[graph.nodes["kind"] == "feature"].iloc[-1],
    )
    assert np.isclose(told[f"{model.n_layers + 1}_{last['token']}_5"], into[last["name"]])
    assert np.isclose(
        told[
            f"{first['layer']}_{'a' if first['module'][0] == 'a' else ''}{first['index']}_{first['position']}"
        ],
        into[first["name"]],
    )
    assert np.isclose(told.sum(), into.sum())
    left = content["metadata"]["generation_settings"]["left_out"]["const"]
    pairs = (
        edges.assign(
            source=edges["source"].astype(str).str.replace("pos_embed", "embed"),
            target=edges["target"].astype(str),
        )
        .groupby(["source", "target"])["weight"]
        .sum()
        .abs()
    )
    assert np.isclose(left, pairs.loc["const"].sum() / pairs.sum())
    assert ("pruning_settings" in content["metadata"]) == pruned


def write_file(graph, model, folder):
    """The content of a graph's file, which must fit the published schema."""
    file = save_attribution_graph(graph, model, folder / "graph.json", slug="x")
    content = json.loads(file.read_text(encoding="utf-8"))
    jsonschema.validate(content, PUBLISHED)
    return content


def test_the_published_schema_refuses_what_is_wrong(small, tmp_path):
    model, _, _, graph = small
    content = write_file(graph, model, tmp_path)
    for part, key in (("nodes", "clerp"), ("nodes", "feature_type"), ("links", "weight")):
        broken = json.loads(json.dumps(content))
        del broken[part][0][key]
        with pytest.raises(jsonschema.ValidationError, match=key):
            jsonschema.validate(broken, PUBLISHED)


def test_communities_become_supernodes(small, tmp_path):
    model, _, _, graph = small
    assert write_file(graph, model, tmp_path)["qParams"]["supernodes"] == []
    nodes = graph.nodes
    is_feature = nodes["kind"] == "feature"
    community = np.where(is_feature, np.arange(len(nodes)) % 3, -1)
    grouped = Graph(nodes.assign(community=community), graph.edges, graph.meta)
    content = write_file(grouped, model, tmp_path)
    view, shown = content["qParams"], {node["node_id"] for node in content["nodes"]}
    assert {name for name, *_ in view["supernodes"]} <= {f"community {c}" for c in range(3)}
    members = [one for _, *some in view["supernodes"] for one in some]
    assert members and len(set(members)) == len(members) and set(members) <= set(view["pinnedIds"]) <= shown
    assert len(view["pinnedIds"]) == min(40, int(is_feature.sum()))
    influence = add_influence(graph).nodes["influence"][is_feature]
    weakest = influence.nlargest(len(view["pinnedIds"])).iloc[-1]
    number = dict(zip((node["node_id"] for node in content["nodes"]), content["nodes"], strict=True))
    assert all(number[one]["feature_type"] in ("cross layer transcoder", "lorsa") for one in members)
    assert weakest >= 0


def test_groups_of_the_explorer_become_supernodes(small, tmp_path):
    model, _, _, graph = small
    features = graph.nodes.loc[graph.nodes["kind"] == "feature", "name"].tolist()
    saved = {"format": "circuitgraph-view", "version": 1, "pinned": features[:4]}
    saved["groups"] = [{"name": "the three", "members": features[:3], "note": ""}]
    path = tmp_path / "view.json"
    path.write_text(json.dumps(saved), encoding="utf-8")
    view = write_file(join_view(graph, path), model, tmp_path)["qParams"]
    ((name, *members),) = view["supernodes"]
    assert name == "the three" and len(members) == 3 and set(members) < set(view["pinnedIds"])
    assert len(view["pinnedIds"]) == 4
    path.write_text(json.dumps(saved | {"pinned": ["nobody"], "groups": []}), encoding="utf-8")
    with pytest.raises(ValueError, match="must pin nodes of this graph"):
        join_view(graph, path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="must be a file that the explorer saved"):
        join_view(graph, path)


def test_short_names_come_before_labels_and_an_empty_text_is_none(small, tmp_path):
    model, _, _, graph = small
    nodes = graph.nodes
    named = nodes.assign(label="max(0, 2 m0/1)", short_name=np.where(nodes["index"] % 2 == 0, '"the"', ""))
    content = write_file(Graph(named, graph.edges, graph.meta), model, tmp_path)
    texts = {node["clerp"] for node in content["nodes"] if "transcoder" in node["feature_type"]}
    assert texts == {'"the"', "max(0, 2 m0/1)"}
    blank = write_file(Graph(nodes.assign(label=""), graph.edges, graph.meta), model, tmp_path)
    assert all(node["clerp"] for node in blank["nodes"])


def test_labels_and_numbers_of_features(small, tmp_path):
    model, _, _, graph = small
    labelled = Graph(
        graph.nodes.assign(label=np.where(graph.nodes["index"] % 2 == 0, "even", None)),
        graph.edges,
        graph.meta,
    )
    content = json.loads(
        save_attribution_graph(labelled, model, tmp_path / "graph.json", slug="x", prompt="text").read_text()
    )
    features = [row for row in content["nodes"] if row["feature_type"] == "cross layer transcoder"]
    for row in features:
        layer, index, _ = map(int, row["node_id"].split("_"))
        assert (
            row["clerp"] == (f"m{layer}/{index}" if index % 2 else "even")
            and row["feature"] == (layer + index) * (layer + index + 1) // 2 + index
        )
    assert (
        len(features)
        == int(((graph.nodes["kind"] == "feature") & (graph.nodes["module"].str[0] == "m")).sum())
        > 40
        and content["metadata"]["prompt"] == "text"
    )


# Refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep": 0}, "n_edges must be at least 1"),
        ({"share": 1.0}, "share must lie"),
        ({"n_logits": 0}, "n_logits must be at least 1"),
        ({"logit_mass": 0.0}, "logit_mass must lie"),
        ({"baseline": "mean"}, "zero baseline"),
        ({"checkpoint": "somewhere"}, "checkpoint goes with"),
        ({"memory": 100}, "memory must hold"),
        ({"others": "neuron"}, "others must be"),
    ],
)
def test_refusals(small, change, words):
    model, tokens, dictionaries, _ = small
    with pytest.raises(ValueError, match=words):
        build_graph(model, tokens, dictionaries, progress=False, **{"positions": "keep"} | change)


def test_more_is_refused(small, tmp_path):
    model, tokens, dictionaries, graph = small
    with pytest.raises(ValueError, match="one sequence"):
        build(model, random_tokens(model, 2, 6), dictionaries)
    with pytest.raises(ValueError, match="'layer', 'head' or dictionaries"):
        build(model, tokens, "block")
    summed = build_graph(model, tokens, dictionaries, progress=False)
    for function in (score_prompt, prune_by_influence):
        pytest.raises(ValueError, function, summed).match("keeps positions")
    with pytest.raises(ValueError, match="keeps positions"):
        save_attribution_graph(summed, model, tmp_path / "x.json", slug="x")
    with pytest.raises(ValueError, match="node_share must lie"):
        prune_by_influence(graph, 1.2)
    with pytest.raises(ValueError, match="slug must"):
        save_attribution_graph(graph, model, tmp_path / "x.json", slug="a b")
    with pytest.raises(ValueError, match="other weights"):
        save_attribution_graph(graph, replace(model, weights_hash="0"), tmp_path / "x.json", slug="x")
    with pytest.raises(ValueError, match="don't merge"):
        graph.merge(build(model, random_tokens(model, 1, 6, seed=5), dictionaries))
