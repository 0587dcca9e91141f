"""In-degree curves against the definition: one module's features read some edges, all else is the model's."""

import pytest
import torch

from circuitgraph.ablation.parents import cut_code, in_degree_curve, run_as_model
from circuitgraph.ablation.selection import select
from circuitgraph.ablation.values import Zero
from circuitgraph.cut import open_cut
from circuitgraph.graph.graph import Graph
from circuitgraph.model.loading import tiny_model
from circuitgraph.options import Budgets, Judging, Run
from feature_oracles import all_dictionaries, every_edge, mean_by_hand, thin, triples, walk_features
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
