"""Edge ablation on one prompt: against the definition, the run without positions, and the model itself."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch

from circuitgraph.ablation.judge import evaluate
from circuitgraph.ablation.prompts import (
    AmongActive,
    PromptSelection,
    draw_among_places,
    fix_prompt_values,
    judge_prompt,
    open_prompt,
    prompt_curve,
    read_outputs,
    run_prompt,
    select_prompt,
)
from circuitgraph.ablation.values import Corrupted, Mean, Resample, Zero
from circuitgraph.build.build import build_graph as build_prompt
from circuitgraph.build.prompt import Outputs, Prompt
from circuitgraph.cut import FeatureCut
from circuitgraph.graph.graph import Graph
from circuitgraph.graph.select import select_edges
from circuitgraph.model.blocks import run_logits
from circuitgraph.model.loading import TINY_MODELS, tiny_model
from circuitgraph.options import Budgets, Judging, Pruning, Run
from feature_oracles import (
    all_dictionaries,
    every_edge,
    gap,
    mean_by_hand,
    read_all,
    thin,
    triples,
    walk_features,
    writes_by_hand,
)
from oracles import logits_by_hand, random_tokens
from short import build_graph, run_ablated

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")

EXACT, WHOLE = 1e-10, 1e-5  # two derivations in float64; the model's own code, which may hold float32 norms
QUIET = Judging(run=Run(progress=False))
tiny = functools.cache(tiny_model)


def build(model, tokens, dictionaries, **options):
    options = {"n_steps": 1, "keep": None, "n_logits": 3, "positions": "keep"} | options
    return build_graph(model, tokens, dictionaries, progress=False, **options)


def with_all_places(graph, cut):
    """A prompt's graph without edges, with a place for every node of the cut, active or not."""
    tokens = graph.nodes[graph.nodes["kind"] == "embed"].sort_values("position")["token"].tolist()
    tables = []
    part = cut.nodes["name"].str.split("/").str[0]
    for name, members in cut.nodes.groupby(part, sort=False):
        if name == "logits":
            continue
        at = [(-1, -1)] if name == "const" else list(enumerate(tokens))
        tables += [members.assign(position=p, token=token) for p, token in at]
    nodes = pd.concat(tables, ignore_index=True)
    named = nodes["name"] + "@" + nodes["position"].astype(str)
    nodes["name"] = named.where(nodes["position"] >= 0, nodes["name"])
    nodes = nodes.assign(frequency=1.0, mean_activation=0.0, activation=0.0, probability=np.nan)
    outputs = graph.nodes[graph.nodes["kind"] == "logits"]
    return Graph(pd.concat([nodes, outputs[nodes.columns]]), graph.edges.iloc[:0], graph.meta)


def place_triples(edges, model, n_pos, outputs, merged=False):
    """Edges without positions, at all pairs of positions that the architecture joins."""
    placed = []
    for source, target, port in edges:
        attends = port in ("k", "v") or (merged and target[0] == "a")
        causal = target[0] != "a" or model.layers[int(target[1])].attn.causal
        for p in range(n_pos):
            readers = [f"{target}@{p}"]
            if target == "logits":
                readers = outputs if p == n_pos - 1 else []
            reached = range(p + 1 if causal else n_pos) if attends else [p]
            writers = [f"{source}@{s}" for s in reached]
            if source == "const":
                writers = ["const"]
            placed += [(writer, reader, port) for writer in writers for reader in readers]
    return placed


def of_edges(graph, rows):
    edges = pd.DataFrame(rows, columns=["source", "target", "port"])
    edges = edges.assign(weight=1.0, abs_weight=1.0, rms_weight=1.0, count=1)
    return Graph(graph.nodes, edges, graph.meta)


def complete(model, tokens, dictionaries, share=1.0, seed=0, **options):
    """Some edges between features at all positions: the graph without positions, and the one with them."""
    bare = thin(every_edge(model, tokens, dictionaries, **options), share, seed)
    built = build(model, tokens, dictionaries, **options)
    empty = with_all_places(built, FeatureCut(model, dictionaries, options.get("others", "layer")))
    outputs = built.nodes.loc[built.nodes["kind"] == "logits", "name"].tolist()
    merged = options.get("ports") == "merged"
    rows = place_triples(sorted(triples(bare)), model, tokens.shape[1], outputs, merged)
    return bare, of_edges(empty, rows)


def centred(logits):
    return logits - logits.mean(-1, keepdim=True)


@torch.no_grad()
def run_places(model, graph, dictionaries, value, corrupted=None):
    """Logits of each output token's own input, and of all other tokens'."""
    prompt = open_prompt(model, graph, dictionaries)
    values = fix_prompt_values(prompt, value, corrupted)
    (streams,) = run_prompt(prompt, [select_prompt(prompt, graph)], values)
    return run_logits(model, streams[None])[0]


def values_and_oracles(model, dictionaries, tokens, others="layer"):
    """Ablated values: objects of the package, corrupted tokens, and what the reference ablates with."""
    other = random_tokens(model, 1, tokens.shape[1], seed=2)
    text = random_tokens(model, 3, tokens.shape[1] + 2, seed=3)
    yield Zero(), None, None
    yield Corrupted(), other, writes_by_hand(model, dictionaries, other, others)
    n_pos = tokens.shape[1]
    by_hand = mean_by_hand(model, dictionaries, text, others=others, length=n_pos)
    yield Mean(text), None, by_hand
    by_hand = mean_by_hand(model, dictionaries, text, n_pos, others)
    yield Mean(text, per_position=True), None, by_hand


# Against the model, and the ablated values


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_MODELS)
def test_all_edges_kept_is_the_model_and_none_the_ablated_values(name):
    model, dictionaries = tiny(name), all_dictionaries(tiny(name))
    tokens = random_tokens(model, 1, 4)
    _, every = complete(model, tokens, dictionaries)
    own = model(tokens)[0, -1]
    for value, corrupted, ablated in values_and_oracles(model, dictionaries, tokens):
        whole = run_places(model, every, dictionaries, value, corrupted)
        assert gap(whole, own.expand_as(whole)) < WHOLE
        none = run_places(model, every.keep([]), dictionaries, value, corrupted)
        total = torch.zeros(1, 4, model.d_model, dtype=model.dtype)
        if ablated is not None:
            total = total + sum(ablated.values()) + sum(d.b_dec for d in dictionaries.values())
        wanted = run_logits(model, total)[0, -1]
        assert gap(none, wanted.expand_as(none)) < EXACT and gap(centred(none[0]), centred(own)) > 0.01


# Against the run without positions


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_MODELS)
def test_edges_at_all_positions_are_the_run_without_positions(name):
    model, dictionaries = tiny(name), all_dictionaries(tiny(name))
    tokens = random_tokens(model, 1, 5)
    compare_with_text(model, dictionaries, tokens, (0, 2))


@torch.no_grad()
@pytest.mark.parametrize("options", [{"ports": "merged"}, {"pattern": "frozen"}, {"others": "head"}], ids=str)
@pytest.mark.parametrize("reads", ["output", "stream", "normed"])
def test_rules_and_places_without_positions(options, reads):
    model = tiny("qwen2")
    every = all_dictionaries(model, reads=reads, gate="relu")
    dictionaries = {name: d for name, d in every.items() if name != "a0"}
    compare_with_text(model, dictionaries, random_tokens(model, 1, 4), (1, 3), **options)


def compare_with_text(model, dictionaries, tokens, cases, **options):
    values = list(values_and_oracles(model, dictionaries, tokens))
    for seed in cases:
        value, corrupted, _ = values[seed]
        bare, placed = complete(model, tokens, dictionaries, 0.4, seed, **options)
        ours = run_places(model, placed, dictionaries, value, corrupted)
        wanted = run_ablated(model, bare, tokens, corrupted, value, dictionaries=dictionaries)[0, -1]
        assert gap(ours, wanted.expand_as(ours)) < EXACT
        assert gap(wanted, model(tokens)[0, -1]) > 0.01


# Against the definition


@torch.no_grad()
def by_places(model, dictionaries, kept, tokens, outputs, ablated, *, merged=False, frozen=False):
    """Logits of each output token's own input, position by position, each input summed writer by writer."""
    n_pos, last = tokens.shape[1], {}
    patterns = walk_features(model, dictionaries, tokens, read_all)[2] if frozen else None
    done = {}

    def read(reader, port, writes, bias, p):
        port = "in" if merged and not reader.startswith("logits") else port
        x = torch.zeros(1, n_pos, model.d_model, dtype=model.dtype)
        for writer, now in writes.items():
            for s in range(p + 1):
                written = now.expand_as(x)[:, s] if s == p else done[writer, s]
                is_kept = (f"{writer}@{s}", reader, port) in kept
                nothing = 0 if ablated is None else ablated[writer].expand_as(x)[:, s]
                x[:, s] += written if is_kept else nothing
        return x + (1.0 if ablated is not None or ("const", reader, port) in kept else 0.0) * bias

    for p in range(n_pos):

        def read_at(reader, port, writes, bias, p=p):
            if reader == "logits":
                last.update(writes=dict(writes), bias=bias)
                return torch.zeros(1, n_pos, model.d_model, dtype=model.dtype)
            return read(f"{reader}@{p}", port, writes, bias, p)

        writes = walk_features(model, dictionaries, tokens, read_at, patterns)[1]
        for writer, y in writes.items():
            done[writer, p] = y.expand(1, n_pos, -1)[:, p]
    streams = [read(name, "logits", last["writes"], last["bias"], n_pos - 1) for name in outputs]
    return torch.stack([logits_by_hand(model, x)[0, -1] for x in streams])


def compare_with_definition(model, dictionaries, tokens, share, cases, **options):
    _, every = complete(model, tokens, dictionaries, **options)
    outputs = every.nodes.loc[every.nodes["kind"] == "logits", "name"].tolist()
    rule = {"merged": options.get("ports") == "merged", "frozen": options.get("pattern") == "frozen"}
    values = list(values_and_oracles(model, dictionaries, tokens))
    for seed in cases:
        value, corrupted, ablated = values[seed]
        graph = thin(every, share, seed)
        ours = run_places(model, graph, dictionaries, value, corrupted)
        wanted = by_places(model, dictionaries, triples(graph), tokens, outputs, ablated, **rule)
        assert gap(ours[:-1], wanted) < EXACT
        assert gap(wanted[0], wanted[1]) > 1e-3 and gap(wanted[0], model(tokens)[0, -1]) > 0.01


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "qwen2", "gemma3", "odd-heads"])
def test_random_edges_are_the_definition(name):
    model = tiny(name)
    compare_with_definition(model, all_dictionaries(model), random_tokens(model, 1, 4), 0.3, (0, 2))


@pytest.mark.parametrize("options", [{"ports": "merged"}, {"pattern": "frozen"}], ids=str)
@pytest.mark.parametrize("reads", ["stream", "normed", "z"])
def test_rules_and_places_are_the_definition(options, reads):
    model = tiny("llama")
    dictionaries = {"a0": all_dictionaries(model, reads=reads, gate="jumprelu")["a0"]}
    reads = "output" if reads == "z" else reads
    dictionaries["m1"] = all_dictionaries(model, reads=reads)["m1"]
    compare_with_definition(model, dictionaries, random_tokens(model, 1, 3), 0.4, (0, 1), **options)


def test_few_edges_are_the_definition():
    model = tiny("gpt2")
    compare_with_definition(model, all_dictionaries(model), random_tokens(model, 1, 4), 0.05, (1, 3))


# The graph as it is drawn


@pytest.fixture(scope="module")
def drawn():
    model = tiny("llama")
    tokens, dictionaries = random_tokens(model, 1, 6), all_dictionaries(model)
    return model, tokens, dictionaries, build(model, tokens, dictionaries)


def test_all_drawn_edges_are_the_model_if_inactive_features_stay_silent(drawn):
    model, tokens, dictionaries, graph = drawn
    text, other = random_tokens(model, 4, 8, seed=7), random_tokens(model, 1, 6, seed=8)
    options = {"n_random": 0, "judging": QUIET}
    for value, corrupted in ((Mean(text), None), (Corrupted(), other)):
        table = judge_prompt(
            model, graph, dictionaries, value=AmongActive(value), corrupted=corrupted, **options
        )
        assert np.allclose(table["faithfulness"], 1, atol=1e-5)
        table = judge_prompt(model, graph, dictionaries, value=value, corrupted=corrupted, **options)
        assert (abs(table["faithfulness"] - 1) > 1e-3).all()
    table = judge_prompt(model, graph, dictionaries, value="zero", **options)
    assert np.allclose(table["faithfulness"], 1, atol=1e-5)


@torch.no_grad()
def test_numbers_of_a_table(drawn):
    """The three metrics, from logits that the reference computes."""
    model, tokens, dictionaries, graph = drawn
    small = select_edges(graph, 200)
    outputs = graph.nodes[graph.nodes["kind"] == "logits"]
    chosen, probability = outputs["token"].tolist(), outputs["probability"].to_numpy()
    own = model(tokens)[0, -1].double()

    def metrics(of_output, of_rest):
        values = [row[t] - row.mean() for row, t in zip(of_output, chosen, strict=True)]
        logits = of_rest - of_rest.mean()
        for value, t in zip(values, chosen, strict=True):
            logits[t] = value
        p, q = own.softmax(0), logits.softmax(0)
        weighted = float(np.average(np.array(values), weights=probability))
        return [float((p * (p / q).log()).sum()), weighted, float(q[chosen].sum())]

    kept = triples(small)
    names = outputs["name"].tolist()
    into = {(source, "rest", port) for source, target, port in kept if target in names}
    of_graph = by_places(model, dictionaries, kept | into, tokens, [*names, "rest"], None)
    nothing = run_logits(model, torch.zeros(1, 1, model.d_model, dtype=model.dtype))[0]
    wanted = {
        "model": metrics([own] * len(chosen), own.clone()),
        "none": metrics([nothing[0]] * len(chosen), nothing[0].clone()),
        "graph": metrics(of_graph[:-1], of_graph[-1].clone()),
    }
    table = judge_prompt(model, small, dictionaries, value="zero", judging=QUIET)
    assert table.index.tolist() == ["kl", "logit", "probability"]
    for column, numbers in wanted.items():
        assert np.allclose(table[column], numbers, atol=1e-6), column
    reached = (table["graph"] - table["none"]) / (table["model"] - table["none"])
    assert np.allclose(table["faithfulness"], reached, atol=1e-6)


def test_contrasts_are_read_from_their_own_input():
    outputs = Outputs(torch.tensor([0, 1]), torch.tensor([-1, 2]), torch.ones(2), torch.ones(2))
    logits = torch.tensor([[5.0, 0, 1, 2], [3.0, 7, 1, 1], [1.0, 2, 3, 6]])
    values, distribution = read_outputs(outputs, logits)
    assert values.tolist() == [3, 6]
    assert distribution.tolist() == [3, -1, 0, 3]


def test_a_contrast_is_judged(drawn):
    model, tokens, dictionaries, _ = drawn
    graph = build_prompt(
        model,
        Prompt(tokens, targets=[(3, 5), 7]),
        dictionaries,
        pruning=Pruning(None),
        run=Run(progress=False),
    )
    table = judge_prompt(model, graph, dictionaries, value="zero", n_random=0, judging=QUIET)
    own = model(tokens)[0, -1].double()
    weights = own.softmax(0)[[3, 7]]
    wanted = (weights @ torch.stack([own[3] - own[5], own[7] - own.mean()])) / weights.sum()
    assert np.isclose(table.loc["logit", "model"], float(wanted), atol=1e-6)
    assert np.allclose(table["faithfulness"], 1, atol=1e-5)


# Random edges, curves


def test_random_edges_are_allowed_edges_among_the_same_places(drawn):
    model, tokens, dictionaries, graph = drawn
    small = select_edges(graph, 60)
    prompt = open_prompt(model, small, dictionaries)
    kept = select_prompt(prompt, small)
    touched = set(small.edges["source"].astype(str)) | set(small.edges["target"].astype(str))
    outputs = graph.nodes.loc[graph.nodes["kind"] == "logits", "name"].tolist()
    bare = sorted(triples(every_edge(model, tokens, dictionaries)))
    allowed = {
        edge for edge in place_triples(bare, model, 6, outputs) if edge[0] in touched and edge[1] in touched
    }
    count, n_draws = dict.fromkeys(allowed, 0), 300
    names = np.array(prompt.names)
    for seed in range(n_draws):
        drawn_edges = draw_among_places(prompt, kept, seed)
        found = list(zip(names[drawn_edges.source], names[drawn_edges.target], drawn_edges.port, strict=True))
        assert len(found) == len(set(found)) == len(small)
        for edge in found:
            count[edge] += 1  # a KeyError for one that is not allowed
    share = len(small) / len(allowed)
    spread = (share * (1 - share) / n_draws) ** 0.5
    assert len(allowed) > 2 * len(small)
    assert (np.abs(np.array(list(count.values())) / n_draws - share) < 5 * spread).all()


def test_curves_are_single_judgements(drawn):
    model, tokens, dictionaries, graph = drawn
    value = AmongActive(Mean(random_tokens(model, 4, 8, seed=7)))
    budgets = Budgets([50, 400], "influence")
    curve = prompt_curve(model, graph, dictionaries, budgets, value=value, n_random=2, judging=QUIET)
    assert curve["n_edges"].tolist() == [50] * 3 + [400] * 3
    for n, rows in curve.groupby("n_edges"):
        small = select_edges(graph, n, "influence")
        alone = judge_prompt(model, small, dictionaries, value=value, n_random=2, judging=QUIET)
        columns = ["faithfulness", "random", "random_sd", "skill", "model", "none", "graph"]
        assert np.allclose(rows[columns], alone[columns]) and (rows["n_kept"] == len(small)).all()


def test_one_edge_too_few_is_seen(drawn):
    """Without the edge of largest weight into an output token, its logit moves, and only its own."""
    model, _, dictionaries, graph = drawn
    names = graph.nodes.loc[graph.nodes["kind"] == "logits", "name"].tolist()
    into = graph.edges["target"] == names[0]
    largest = graph.edges["abs_weight"].where(into).idxmax()
    lacking = graph.keep(np.arange(len(graph)) != largest)
    whole, less = (run_places(model, g, dictionaries, Zero()) for g in (graph, lacking))
    assert gap(whole[0], less[0]) > 1e-3 and gap(whole[1:], less[1:]) < EXACT


# Refusals


def test_refusals(drawn):
    model, tokens, dictionaries, graph = drawn
    other = random_tokens(model, 1, 6, seed=8)

    def judge(words, one=graph, given=dictionaries, **options):
        with pytest.raises(ValueError, match=words):
            judge_prompt(model, one, given, **{"value": "zero", "judging": QUIET} | options)

    judge("keeps positions", build_graph(model, tokens, dictionaries, progress=False))
    judge("dictionaries must be those", given={"m0": dictionaries["m0"]})
    judge("needs a text", value="mean")
    judge("needs a text", value=AmongActive(Mean()))
    judge("corrupted tokens go with", value="corrupted")
    judge("corrupted tokens go with", corrupted=other)
    judge("at least 2 sequences", value=Resample())
    judge("n_random must be", n_random=-1)
    judge("no metric and no exact", judging=Judging(exact=False))
    judge("no metric and no exact", judging=Judging(metric="kl"))
    judge("node at every position", graph.subgraph(modules=["embed", "logits"]).subgraph(modules=["logits"]))
    nodes = graph.nodes
    judge("output token", Graph(nodes[nodes["kind"] != "logits"], graph.edges.iloc[:0], graph.meta))
    with pytest.raises(ValueError, match="at least one budget"):
        prompt_curve(model, graph, dictionaries, [], value="zero")
    with pytest.raises(ValueError, match="judge_prompt"):
        evaluate(model, graph, tokens, dictionaries=dictionaries)


def test_edges_between_wrong_positions_are_refused(drawn):
    model, tokens, dictionaries, graph = drawn
    empty = with_all_places(graph, FeatureCut(model, dictionaries))
    for row, words in [
        (("embed@1", "m0/0@2", "mlp"), "port mlp of m0/0@2 must be entered"),
        (("embed@1", "a0/0@2", "q"), "port q of a0/0@2"),
        (("embed@3", "a0/0@2", "k"), "port k of a0/0@2"),
        (("embed@1", "a0/0@2", "mlp"), "must be one of q, k, v"),
    ]:
        placed = of_edges(empty, [row])
        with pytest.raises(ValueError, match=words):
            judge_prompt(model, placed, dictionaries, value="zero", judging=QUIET)


def test_a_selection_puts_edges_into_the_order_of_readers():
    kept = PromptSelection.sort(np.array([0, 1, 2]), np.array([9, 7, 9]), np.array(["q", "mlp", "k"]))
    assert kept.target.tolist() == [7, 9, 9] and kept.port.tolist() == ["mlp", "q", "k"]
    assert kept.into(slice(8, 10)).source.tolist() == [0, 2]
