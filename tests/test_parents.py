"""In-degree curves against the definition: one module's features read some edges, all else is the model's."""

import pytest
import torch

from circuitgraph.ablation.parents import FIGURES, _draw_parents, _sum_sequences, _take_figures
from circuitgraph.ablation.parents import cut_code, in_degree_curve, run_as_model
from circuitgraph.ablation.selection import select
from circuitgraph.ablation.values import Zero
from circuitgraph.attribution.method import Attribution
from circuitgraph.build.build import build_feature_graph
from circuitgraph.cut import cut_model, open_cut
from circuitgraph.graph.graph import Graph
from circuitgraph.model.loading import tiny_model
from circuitgraph.options import Budgets, Judging, Pruning, Run
from feature_oracles import D_DICT, all_dictionaries, every_edge, mean_by_hand, thin, triples, walk_features
from oracles import random_tokens

QUIET = Run(progress=False)


def into(graph, module, n_features):
    names = [f"{module}/{j}" for j in range(n_features)]
    rows = graph.edges["target"].isin(names)
    return Graph(graph.nodes, graph.edges[rows].reset_index(drop=True), graph.meta)


def code_by_hand(model, dictionaries, module, kept, tokens, ablated):
    "The code of a module whose features read the edges of `kept`, and of other writers what `ablated` holds."
    d = dictionaries[module]
    features = {f"{module}/{j}" for j in range(d.d_dict)}

    def read(reader, port, writes, bias):
        x = torch.zeros_like(next(iter(writes.values())))
        for writer, y in writes.items():
            is_cut = reader in features and (writer, reader, port) not in kept
            x = x + (y if not is_cut else 0 if ablated is None else ablated[writer])
        has_bias = ablated is not None or reader not in features or ("const", reader, port) in kept
        return x + float(has_bias) * bias

    writes = walk_features(model, dictionaries, tokens, read)[1]
    # each feature writes its activation times its direction
    written = [(writes[f"{module}/{j}"], d.W_dec[j]) for j in range(d.d_dict)]
    return torch.stack([y @ w / (w @ w) for y, w in written], -1)


@pytest.mark.parametrize("module", ["a1", "m1", "m0"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("value", ["mean", "zero"])
@torch.no_grad()
def test_a_cut_code_is_the_definition(name, module, value):
    model = tiny_model(name, dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 2, 6), all_dictionaries(model)
    graph = thin(into(every_edge(model, tokens, dictionaries), module, dictionaries[module].d_dict), 0.3)
    cut = open_cut(model, graph, dictionaries)
    part = next(part for part in cut.parts if part.module == module)
    mean = cut.mean(tokens, n_pos=6, n_apart=1) if value == "mean" else None
    run, clean = run_as_model(cut, tokens, mean)
    code = cut_code(run, part, select(cut, graph))
    ablated = mean_by_hand(model, dictionaries, tokens) if value == "mean" else None
    expected = code_by_hand(model, dictionaries, module, triples(graph), tokens, ablated)
    assert torch.allclose(code, expected, atol=1e-9)
    assert not torch.allclose(code, clean.acts[module], atol=1e-3)


def test_with_every_edge_the_code_is_the_models():
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 3, 6), all_dictionaries(model)
    graph = every_edge(model, tokens, dictionaries)
    options = {"dictionaries": dictionaries, "judging": Judging(skip_first=0, run=QUIET)}
    for value in ("mean", Zero()):
        curve = in_degree_curve(model, graph, "m1", tokens, (), value=value, **options)
        none, whole = curve.iloc[0], curve.iloc[1]
        assert none["worth"] == 0 and none["per_feature"] == 0 and none["moved"] > 1e-3
        assert abs(whole["worth"] - 1) < 1e-9 and whole["moved"] < 1e-18
        assert whole["recall"] == whole["precision"] == 1
        assert (
            whole["per_feature"] == into(graph, "m1", 6).edges.groupby("target", observed=True).size().max()
        )


def test_the_largest_edges_are_kept():
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 3, 6), all_dictionaries(model)
    graph = every_edge(model, tokens, dictionaries)
    one = graph.edges["source"] == "m0/err"
    edges = graph.edges.assign(abs_weight=one.astype(float))
    options = {"dictionaries": dictionaries, "judging": Judging(run=QUIET)}
    ranked = Graph(graph.nodes, edges, graph.meta)
    first = in_degree_curve(model, ranked, "m1", tokens, (1,), **options).set_index("n_edges")
    only = Graph(graph.nodes, graph.edges[one].reset_index(drop=True), graph.meta)
    alone = in_degree_curve(model, only, "m1", tokens, (), **options).set_index("n_edges")
    assert first.loc[1].equals(alone.loc[1]) and first["per_feature"][1] == 1


def test_requests_that_can_not_be_met_are_refused():
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 3, 6), {"m1": all_dictionaries(model)["m1"]}
    graph = every_edge(model, tokens, dictionaries)
    for module in ("m0", "m7", "logits"):
        with pytest.raises(ValueError, match="module must be one with a dictionary"):
            in_degree_curve(
                model, graph, module, tokens, dictionaries=dictionaries, judging=Judging(run=QUIET)
            )
    with pytest.raises(ValueError, match="n_edges must hold"):
        in_degree_curve(
            model, graph, "m1", tokens, (-1,), dictionaries=dictionaries, judging=Judging(run=QUIET)
        )
    for budgets, words in (
        (Budgets([1], by="size"), "by must be"),
        (Budgets([1], "greedy"), "method must be"),
    ):
        with pytest.raises(ValueError, match=words):
            in_degree_curve(
                model, graph, "m1", tokens, budgets, dictionaries=dictionaries, judging=Judging(run=QUIET)
            )


def test_random_parents_are_as_many_and_drawn_among_writers():
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 3, 6), all_dictionaries(model)
    graph = every_edge(model, tokens, dictionaries)
    cut = open_cut(model, graph, dictionaries)
    frequency = graph.nodes.set_index("name")["frequency"]
    for module, ports in (("m1", {"mlp"}), ("a1", {"q", "k", "v"})):
        part = next(part for part in cut.parts if part.module == module)
        few, many = _draw_parents(cut, graph, part, (3, 10_000), seed=0)
        drawn = list(zip(few.target.tolist(), few.source.tolist(), few.port.tolist(), strict=True))
        assert len(set(drawn)) == len(drawn) == 3 * D_DICT and set(few.port) <= ports
        assert set(few.target) == set(range(part.first, part.first + D_DICT))
        writers = {name for name in cut.names[: part.n_before] if frequency[name] > 0 and name != "const"}
        assert {cut.names[i] for i in many.source} == writers
        assert len(many.source) == D_DICT * len(writers) * len(ports)
        other = _draw_parents(cut, graph, part, (3,), seed=1)[0]
        assert other.source.tolist() != few.source.tolist()
    options = {"dictionaries": dictionaries, "judging": Judging(run=QUIET)}
    curve = in_degree_curve(model, graph, "m1", tokens, Budgets([2], "random"), **options)
    assert curve["n_edges"].tolist() == [0, 2] and curve["per_feature"].tolist() == [0, 2]


def test_edges_are_ranked_by_how_far_they_spread():
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 3, 6), all_dictionaries(model)
    graph = every_edge(model, tokens, dictionaries)
    constant, varied = graph.edges["source"] == "embed", graph.edges["source"] == "m0/err"
    weights = {"weight": 5.0 * constant, "abs_weight": 5.0 * constant + 2.0 * varied}
    weights["rms_weight"] = 5.0 * constant + 2.0 * varied  # of one weight that is 2 or -2
    ranked = Graph(graph.nodes, graph.edges.assign(**weights), graph.meta)
    options = {"dictionaries": dictionaries, "judging": Judging(run=QUIET)}
    for by, mask in (("abs_weight", constant), ("spread", varied)):
        first = in_degree_curve(model, ranked, "m1", tokens, Budgets([1], by=by), **options).loc[1]
        only = Graph(graph.nodes, graph.edges[mask].reset_index(drop=True), graph.meta)
        alone = in_degree_curve(model, only, "m1", tokens, (), **options).loc[1]
        assert first.equals(alone)


def test_figures_are_sums_over_sequences():
    generator = torch.Generator().manual_seed(0)
    code, own = (torch.rand(4, 5, 7, generator=generator) for _ in range(2))
    code, own = code * (code > 0.5), own * (own > 0.4)
    W_dec, output = (torch.randn(*shape, generator=generator) for shape in ((7, 3), (4, 5, 3)))
    losses = torch.tensor([[2.0, 1, 3, 2], [1, 1, 1, 1], [3, 3, 3, 5]])
    found = dict(zip(FIGURES, _take_figures(_sum_sequences(code, own, output, W_dec), losses), strict=True))
    mean, missed, moved, spread, hits, fired, due = output.mean((0, 1)), 0.0, 0.0, 0.0, 0, 0, 0
    for b in range(4):
        for p in range(5):
            missed += float((output[b, p] - code[b, p] @ W_dec).square().sum())
            moved += float(((code[b, p] - own[b, p]) @ W_dec).square().sum())
            spread += float((output[b, p] - mean).square().sum())
            for j in range(7):
                fired, due = fired + int(code[b, p, j] != 0), due + int(own[b, p, j] != 0)
                hits += int(code[b, p, j] != 0 and own[b, p, j] != 0)
    expected = {"unexplained": missed / spread, "moved": moved / spread, "recall": hits / due}
    expected |= {"precision": hits / fired, "worth": (3.5 - 2) / (3.5 - 1)}
    for name, value in expected.items():
        assert abs(float(found[name]) - value) < 1e-5


def test_every_figure_has_an_interval_over_sequences():
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 5, 6), all_dictionaries(model)
    graph = every_edge(model, tokens, dictionaries)
    options = {"dictionaries": dictionaries, "judging": Judging(run=QUIET, n_boot=50)}
    curve = in_degree_curve(model, graph, "m1", tokens, (3,), **options)
    for name in FIGURES:
        assert (curve[f"{name}_low"] <= curve[name]).all() and (curve[name] <= curve[f"{name}_high"]).all()
    assert curve["moved_low"][1] < curve["moved_high"][1]
    one = in_degree_curve(model, graph, "m1", tokens[:1], (3,), **options)
    assert one[[f"{name}_low" for name in FIGURES]].isna().all(axis=None)


@torch.no_grad()
def test_edges_into_some_modules_are_those_of_the_whole_graph():
    model = tiny_model("llama", dtype=torch.float64)
    dictionaries = all_dictionaries(model)
    cut, tokens = cut_model(model, dictionaries), random_tokens(model, 3, 6)
    rule, quiet = Attribution(n_steps=2), Run(progress=False)
    whole = build_feature_graph(cut, tokens, rule, Pruning(None), quiet)
    some = build_feature_graph(cut, tokens, rule, Pruning(None), quiet, into=("m1", "a0"))
    is_wanted = whole.edges["target"].astype(str).str.startswith(("m1/", "a0/")).to_numpy()
    assert 0 < is_wanted.sum() < len(whole)
    assert some.edges.equals(whole.keep(is_wanted).edges) and some.nodes["name"].equals(whole.nodes["name"])
    for wrong in (["m9"], ["embed"], []):
        with pytest.raises(ValueError, match="into must name parts of the cut model"):
            build_feature_graph(cut, tokens, rule, Pruning(None), quiet, into=wrong)
