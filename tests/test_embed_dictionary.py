"""Dictionaries of the embedding, and tokens as its features."""

import functools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from circuitgraph.ablation.features import FeatureRun
from circuitgraph.ablation.selection import select
from circuitgraph.ablation.values import Mean, permute_rows
from circuitgraph.attribution.autodiff import freeze_readers
from circuitgraph.build.prompt import Prompt
from circuitgraph.community.search import find_communities
from circuitgraph.cut import cut_model, hash_dictionary, open_cut
from circuitgraph.data.task import Task
from circuitgraph.dictionary.interaction import train_interaction_bases
from circuitgraph.dictionary.measure import check_dictionary, measure_dictionaries
from circuitgraph.dictionary.places import neuron_basis, read_places, run_spliced, token_basis
from circuitgraph.dictionary.protocol import FunctionDictionary, reconstruct
from circuitgraph.dictionary.store import load_dictionaries, load_dictionary, save_dictionary
from circuitgraph.dictionary.train import collect_gradients, train_dictionaries
from circuitgraph.dictionary.trainer import TrainConfig
from circuitgraph.graph.graph import Graph
from circuitgraph.graph.select import select_edges
from circuitgraph.methods.direct_edges import list_circuit_parts
from circuitgraph.methods.patch_free import weigh_interactions
from circuitgraph.model.blocks import run_logits
from circuitgraph.model.loading import tiny_model
from circuitgraph.model.modules import embed_tokens
from circuitgraph.options import Run
from feature_oracles import by_hand, draw, every_edge, gap, mean_by_hand, thin, triples, writes_by_hand
from known_features import KNOWN_FEATURES, name_triples
from oracles import random_tokens
from short import build_graph, evaluate, run_ablated

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")

EXACT = 1e-10  # two derivations in float64
WHOLE = 1e-5  # the model's own code, whose norms are float32 in some architectures
MODELS = ("gpt2", "gpt-neox", "llama", "gemma3", "attention-only")  # gemma's embedding is scaled
KINDS = ("tokens", "half of the tokens", "linear")
tiny = functools.cache(tiny_model)
QUIET = Run(progress=False)


def embedding_dictionary(model, tokens, kind):
    if kind == "linear":
        return draw(model, "embed")
    return token_basis(model, tokens if kind == "tokens" else tokens[:1])


def some_dictionaries(model, tokens, kind):
    return {"embed": embedding_dictionary(model, tokens, kind), "a1": draw(model, "a1")}


def embedded(model, tokens):
    return embed_tokens(model, tokens)["embed"].detach()


# --- tokens as features


@pytest.mark.parametrize("name", MODELS)
def test_one_feature_is_active_where_its_token_stands(name):
    model, tokens = tiny(name), random_tokens(tiny(name), 3, 7)
    basis = token_basis(model, tokens)
    y = embedded(model, tokens)
    ids = torch.tensor(sorted(set(tokens.flatten().tolist())))
    assert basis.meta["tokens"] == ids.tolist() and basis.d_dict == len(ids)
    assert torch.equal(basis.encode(y), (tokens[..., None] == ids).to(y))
    assert torch.equal(basis.decode(basis.encode(y)), y)
    assert torch.equal(basis.W_dec, embedded(model, ids[None])[0])


def test_what_is_no_row_activates_nothing_and_is_the_error():
    model, tokens = tiny("llama"), random_tokens(tiny("llama"), 4, 7)
    basis = token_basis(model, tokens[:1])
    y = embedded(model, tokens)
    seen = torch.isin(tokens, tokens[:1])
    assert 0 < seen[1:].sum() < seen[1:].numel()
    assert torch.equal(basis.encode(y).sum(-1), seen.to(y))
    assert torch.equal(y - basis.decode(basis.encode(y)), y * ~seen[..., None])
    nearly = y[0] * (1 + 1e-15)
    assert not torch.equal(nearly, y[0])
    assert not basis.encode(nearly[(nearly != y[0]).any(1)]).any()


def test_labels_are_the_texts_of_tokens_on_one_line():
    class Words:
        def decode(self, ids):
            return {3: " the", 5: "\n", 9: "\x0c"}[ids[0]]

    model = replace(tiny("llama"), tokenizer=Words())
    tokens = torch.tensor([[9, 3, 3, 5]])
    cut = cut_model(model, {"embed": token_basis(model, tokens), "m1": draw(model, "m1")})
    named = cut.nodes.set_index("name")["label"]
    expected = {"embed/0": " the", "embed/1": "\\n", "embed/2": "\\x0c"}
    assert named[named != ""].to_dict() == expected
    without = token_basis(tiny("llama"), tokens)
    assert without.meta["labels"] == ["<3>", "<5>", "<9>"]
    assert "label" not in cut_model(model, {"m1": draw(model, "m1")}).nodes


def test_a_basis_is_saved_by_the_numbers_of_its_tokens(tmp_path):
    model, tokens = tiny("gpt2"), random_tokens(tiny("gpt2"), 8, 12)
    basis, linear = token_basis(model, tokens), draw(model, "embed")
    save_dictionary(basis, tmp_path / "tokens" / "embed", weights_hash=model.weights_hash)
    save_dictionary(draw(model, "a0"), tmp_path / "tokens" / "a0")
    loaded = load_dictionaries(tmp_path / "tokens", model)
    assert list(loaded) == ["embed", "a0"]
    assert hash_dictionary(loaded["embed"]) == hash_dictionary(basis)
    assert torch.equal(loaded["embed"].W_dec, basis.W_dec) and loaded["embed"].meta == basis.meta
    assert list(load_dictionaries(tmp_path / "tokens", model, modules=["embed"])) == ["embed"]
    with pytest.raises(ValueError, match="is the tokens of a model: give the model"):
        load_dictionary(tmp_path / "tokens" / "embed")
    save_dictionary(linear, tmp_path / "linear")
    assert hash_dictionary(load_dictionary(tmp_path / "linear")) == hash_dictionary(linear)


# --- nodes


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_nodes_of_the_embedding_only_write(name):
    model, tokens = tiny(name), random_tokens(tiny(name), 2, 6)
    graph = build_graph(model, tokens, some_dictionaries(model, tokens, "tokens"), keep=None, progress=False)
    nodes = graph.nodes
    own = nodes[nodes["module"] == "embed"]
    n = len(tokens.unique())
    assert own["name"].tolist() == [*(f"embed/{i}" for i in range(n)), "embed/err"]
    assert own["kind"].tolist() == ["feature"] * n + ["error"] and (own["layer"] == -1).all()
    assert "embed" not in set(nodes["name"])
    assert ("pos_embed" in set(nodes["name"])) == (name == "gpt2")
    assert not graph.edges["target"].astype(str).str.startswith("embed").any()
    late = tokens[:, 1:]
    share = [(late == token).float().mean().item() for token in tokens.unique()]
    assert np.allclose(own["frequency"][:-1], share) and np.allclose(own["mean_activation"][:-1], share)
    assert own["mean_activation"].iloc[-1] == 0


def test_an_unseen_token_has_its_edges_from_the_error():
    model, tokens = tiny("llama"), random_tokens(tiny("llama"), 4, 6)
    tokens = tokens[:, [0, 1, 2, 2, 2, 2]]
    dictionaries = {"embed": token_basis(model, tokens[:1]), "m1": draw(model, "m1")}
    graph = build_graph(model, tokens[1:], dictionaries, keep=None, progress=False)
    assert not torch.isin(tokens[1:], tokens[:1]).any()
    sources = graph.edges.loc[graph.edges["weight"] != 0, "source"].astype(str)
    assert set(sources[sources.str.startswith("embed")]) == {"embed/err"}


# --- edges


def whole_embedding(edges):
    """Weights out of the embedding by reader and port; of a decoder's bias, with `const`."""
    source = edges["source"].astype(str)
    out = edges[source.str.startswith("embed") | (source == "const")]
    return out.groupby([out["target"].astype(str), out["port"].astype(str)])["weight"].sum()


@pytest.mark.parametrize(
    "options", [{}, {"ports": "merged"}, {"pattern": "frozen"}, {"attribution": "gradient"}]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_edges_of_the_features_sum_to_those_of_the_whole_embedding(name, kind, options):
    model, tokens = tiny(name), random_tokens(tiny(name), 2, 6)
    dictionaries = {"m0": draw(model, "m0", gate="relu"), "a1": draw(model, "a1")}
    given = {"keep": None, "progress": False, "skip_first": 0, **options}
    if kind != "tokens":
        given["batch_size"] = 1
    whole = build_graph(model, tokens, dictionaries, **given)
    more = {"embed": embedding_dictionary(model, tokens, kind)}
    fine = build_graph(model, tokens, dictionaries | more, **given)
    a, b = (whole_embedding(graph.edges) for graph in (whole, fine))
    a, b = a.align(b, fill_value=0)
    assert len(a) > 10 and (a - b).abs().max() < EXACT * max(1, a.abs().max())


def test_edges_sum_to_those_of_the_whole_embedding_where_the_decoder_is_bent():
    model, tokens = tiny("gpt2"), random_tokens(tiny("gpt2"), 2, 6)
    linear = draw(model, "embed", gate="relu")

    def bend(acts):
        return torch.tanh(linear.decode(acts.double()))

    bent = FunctionDictionary("embed", "output", linear.d_dict, linear.encode, bend)
    given = {"keep": None, "progress": False}
    a1 = {"a1": draw(model, "a1")}
    whole = whole_embedding(build_graph(model, tokens, a1, **given).edges)
    fine = build_graph(model, tokens, {"embed": bent} | a1, **given)
    difference = (whole - whole_embedding(fine.edges)).abs().max()
    assert difference < EXACT and fine.edges["source"].astype(str).str.match(r"embed/\d").sum() > 10
    with pytest.raises(ValueError, match="must have an affine decoder"):
        run_ablated(model, fine, tokens, value="zero", dictionaries={"embed": bent} | a1)


def make_task(model, tokens):
    return Task(
        tokens, tokens.flip(0), answers=random_tokens(model, 2, 1, 5), wrong=random_tokens(model, 2, 1, 6)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_effects_on_a_metric_sum_to_those_of_the_whole_embedding(kind):
    model, tokens = tiny("gpt2"), random_tokens(tiny("gpt2"), 2, 6)
    task, a1 = make_task(model, tokens), {"a1": draw(model, "a1")}
    given = {"target": "metric", "keep": None, "progress": False}
    whole = whole_embedding(build_graph(model, task, a1, **given).edges)
    fine = build_graph(model, task, {"embed": embedding_dictionary(model, tokens, kind)} | a1, **given)
    assert (whole - whole_embedding(fine.edges)).abs().max() < EXACT * whole.abs().max()


@pytest.mark.parametrize("name", KNOWN_FEATURES)
def test_the_edge_comes_from_the_right_token(name):
    known = KNOWN_FEATURES[name]()
    model, tokens = known.model, known.tokens
    basis = token_basis(model, tokens)
    dictionaries = {"embed": basis, **known.dictionaries}
    graph = build_graph(model, tokens, dictionaries, skip_first=known.skip_first, progress=False)
    acts = known.dictionaries["m0"].encode(read_places(model, tokens, [("m0", "output")])["m0", "output"])
    looked_up = {
        (f"embed/{basis.meta['tokens'].index(int(tokens[seq, pos]))}", f"m0/{feature}", "mlp")
        for seq, pos, feature in acts.nonzero().tolist()
    }
    rest = {edge for edge in known.edges if edge[0] != "embed"}
    assert len(looked_up) >= model.d_vocab and len(rest) < len(known.edges)
    true = known.find(graph)
    assert name_triples(true) == looked_up | rest
    logits = run_ablated(model, true, tokens, value="zero", dictionaries=dictionaries)
    following = tokens[:, known.skip_first + 1 :]
    assert torch.equal(logits[:, known.skip_first : -1].argmax(-1), following)
    without = true.keep([not name.startswith("embed/0->") for name in true.edge_names])
    logits = run_ablated(model, without, tokens, value="zero", dictionaries=dictionaries)
    logits = logits[:, known.skip_first : -1]
    right = logits.gather(-1, following[..., None])[..., 0] - logits.mean(-1) > 1
    read = tokens[:, : tokens.shape[1] - 1 - known.skip_first]  # the token that each next one rests on
    assert torch.equal(right, read != basis.meta["tokens"][0])


# --- edge ablation


def ablated_values(model, dictionaries, tokens):
    """Options of `run_ablated`, and what a cut edge then carries, by the reference."""
    other, n_pos = random_tokens(model, *tokens.shape, seed=2), tokens.shape[1]
    yield {"value": "zero"}, None
    yield {"value": "corrupted", "corrupted": other}, writes_by_hand(model, dictionaries, other)
    permuted = permute_rows(tokens, 4)
    yield {"value": "resample", "seed": 4}, writes_by_hand(model, dictionaries, permuted)
    yield {"value": "mean"}, mean_by_hand(model, dictionaries, tokens)
    per_position = {"value": "mean", "per_position": True, "reference": other}
    yield per_position, mean_by_hand(model, dictionaries, other, n_pos)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "gemma3", "attention-only"])
def test_all_edges_kept_is_the_model_and_none_the_ablated_values(name, kind):
    model, tokens = tiny(name), random_tokens(tiny(name), 3, 6)
    dictionaries = some_dictionaries(model, tokens, kind)
    every = every_edge(model, tokens, dictionaries)
    for options, ablated in ablated_values(model, dictionaries, tokens):
        whole = run_ablated(model, every, tokens, dictionaries=dictionaries, **options)
        assert gap(whole, model(tokens)) < WHOLE
        none = run_ablated(model, every.keep([]), tokens, dictionaries=dictionaries, **options)
        if ablated is None:
            total = torch.zeros(model.d_model, dtype=model.dtype)
        else:
            writes = sum(ablated.values())
            total = writes + open_cut(model, every, dictionaries).biases[-1]
        assert gap(none, run_logits(model, total.expand(*tokens.shape, -1))) < EXACT
        assert gap(none, whole) > 0.01


@torch.no_grad()
@pytest.mark.parametrize(
    "name, kind, options",
    [
        *((name, kind, {}) for name in ("gpt2", "gpt-neox", "gemma3") for kind in KINDS),
        *(("gpt2", "linear", options) for options in ({"ports": "merged"}, {"pattern": "frozen"})),
        ("gpt2", "half of the tokens", {"others": "head"}),
    ],
)
def test_random_graphs_are_brute_force(name, kind, options):
    model, tokens = tiny(name), random_tokens(tiny(name), 2, 5)
    dictionaries = some_dictionaries(model, tokens, kind)
    every = every_edge(model, tokens, dictionaries, **options)
    others = options.get("others", "layer")
    for value, ablated in ablated_values(model, dictionaries, tokens):
        if others == "head" and ablated is not None:
            continue
        graph = thin(every, 0.4)
        merged, frozen = options.get("ports") == "merged", options.get("pattern") == "frozen"
        rule = {"merged": merged, "frozen": frozen, "others": others}
        expected = by_hand(model, dictionaries, triples(graph), tokens, ablated, **rule)
        found = run_ablated(model, graph, tokens, dictionaries=dictionaries, **value)
        assert gap(found, expected) < EXACT
        assert gap(found, model(tokens)) > 0.01


@torch.no_grad()
def test_complements_nodes_and_gradients_at_the_own_run():
    model, tokens = tiny("gpt2"), random_tokens(tiny("gpt2"), 2, 5)
    dictionaries = some_dictionaries(model, tokens, "half of the tokens")
    every = every_edge(model, tokens, dictionaries)
    cut, graph = open_cut(model, every, dictionaries), thin(every, 0.4)
    ablated = cut.trace(tokens.flip(0))
    kept = select(cut, graph)
    rest = every.keep([edge not in set(graph.edge_names) for edge in every.edge_names])
    run, plain = FeatureRun(cut, tokens, ablated), FeatureRun(cut, tokens, ablated, plain=True)
    assert gap(run(~kept), plain(select(cut, rest))) < EXACT
    assert gap(run(~kept), run(kept)) > 0.01
    own = FeatureRun(cut, tokens, ablated, exact=False)
    assert gap(own(select(cut, every)), cut.trace(tokens).reads["logits"]) < EXACT
    only = every.keep(["embed/0->logits", "pos_embed->logits", "const->logits"])
    nodes = run(select(cut, only, "node"))
    where = dictionaries["embed"].encode(embedded(model, tokens))[..., :1]
    change = where - dictionaries["embed"].encode(embedded(model, tokens.flip(0)))[..., :1]
    moved = embedded(model, tokens.flip(0)) + change * dictionaries["embed"].W_dec[0]
    assert change.abs().sum() > 0
    trace = cut.trace(tokens.flip(0))
    expected = trace.reads["logits"] - embedded(model, tokens.flip(0)) + moved
    assert gap(nodes, expected) < EXACT


def test_means_are_the_frequencies_of_tokens():
    model, tokens = tiny("llama"), random_tokens(tiny("llama"), 4, 6)
    cut = cut_model(model, {"embed": token_basis(model, tokens)})
    mean = cut.mean(tokens, run=QUIET)
    counts = torch.bincount(tokens.flatten(), minlength=50)
    assert torch.allclose(mean.acts["embed"][0, 0], (counts[counts > 0] / tokens.numel()).to(model.dtype))
    assert not mean.dense["embed/err"].any() and "embed" not in mean.dense


# --- what comes after


@pytest.fixture(scope="module")
def judged():
    model, tokens = tiny("llama"), random_tokens(tiny("llama"), 4, 8)
    dictionaries = some_dictionaries(model, tokens, "tokens")
    return model, tokens, dictionaries, build_graph(model, tokens, dictionaries, keep=None, progress=False)


def test_the_complete_graph_is_judged_to_be_the_model(judged):
    model, tokens, dictionaries, _ = judged
    every = every_edge(model, tokens, dictionaries)
    result = evaluate(model, every, tokens, metric="kl", dictionaries=dictionaries, progress=False)
    assert abs(result.faithfulness - 1) < 1e-9 and result.n_edges == len(every)


def test_selected_edges_lie_on_paths_from_tokens(judged):
    *_, graph = judged
    top = triples(graph.top_edges(60))
    into = {name: {source for source, target, _ in top if target == name} for name in graph.nodes["name"]}
    leads, waiting = set(), ["logits"]
    while waiting:
        node = waiting.pop()
        waiting += into[node] - leads
        leads |= into[node]
    reached = {name for name in leads if name.startswith("embed/") or name == "const"}
    for name in graph.nodes["name"]:  # in the order of computation
        if into[name] & reached:
            reached.add(name)
    stays = {edge for edge in top if edge[0] in reached and edge[1] in leads | {"logits"}}
    assert triples(select_edges(graph, 60, "top")) == stays
    assert any(name.startswith("embed/") for name, _, _ in stays)


def test_tokens_are_in_communities(judged):
    *_, graph = judged
    nodes = find_communities(graph).nodes
    of_tokens = nodes.loc[nodes["module"] == "embed", "community"].to_numpy()
    sources = set(graph.edges["source"].astype(str))
    names = nodes.loc[nodes["module"] == "embed", "name"]
    assert np.array_equal(of_tokens >= 0, names.isin(sources)) and (of_tokens >= 0).sum() > 10


def test_a_graph_is_saved_with_its_labels_and_run_with_its_own_dictionary(judged, tmp_path):
    model, tokens, dictionaries, graph = judged
    graph.save(tmp_path / "graph")
    loaded = Graph.load(tmp_path / "graph")
    pd.testing.assert_frame_equal(loaded.nodes, graph.nodes)
    label = loaded.nodes.set_index("name")["label"]
    assert label["embed/1"] == f"<{tokens.unique()[1]}>"  # the small model has a text for token 0 alone
    options = {"value": "zero", "dictionaries": dictionaries}
    logits = (run_ablated(model, kept, tokens, **options) for kept in (loaded, graph))
    assert torch.equal(*logits)
    other = some_dictionaries(model, tokens[:1], "tokens")
    with pytest.raises(ValueError, match="the dictionary of embed must be the one that the graph was built"):
        run_ablated(model, graph, tokens, value="zero", dictionaries=other)


@torch.no_grad()
def test_reconstructions_of_the_embedding_are_spliced_in():
    model, tokens = tiny("gpt2"), random_tokens(tiny("gpt2"), 4, 6)
    basis, half = token_basis(model, tokens), token_basis(model, tokens[:1])

    def loss(y):
        start = y + embed_tokens(model, tokens)["pos_embed"]
        x = start
        for layer in range(model.n_layers):
            x = model.bridge.blocks[layer](x)
            x = x[0] if isinstance(x, tuple) else x
        log_p = run_logits(model, x)[:, :-1].log_softmax(-1)
        return -log_p.gather(-1, tokens[:, 1:, None]).mean().item()

    y = embedded(model, tokens)
    seen = torch.isin(tokens, tokens[:1])
    seen[:, 0] = True  # the first position is left as it is
    nothing = torch.zeros_like(seen)
    nothing[:, 0] = True
    found = check_dictionary(model, half, tokens)
    expected = [loss(y), loss(y * seen[..., None]), loss(y * nothing[..., None])]
    assert np.allclose([found.ce, found.ce_spliced, found.ce_ablated], expected, atol=1e-6)
    found = check_dictionary(model, basis, tokens)
    assert found.fvu == 0 and found.l0 == 1 and not found.problems
    assert abs(found.recovered - 1) < 1e-12
    report = measure_dictionaries(model, {"embed": half, "m1": draw(model, "m1")}, tokens, run=QUIET)
    assert np.allclose(report.loc["embed", "ce_lost"], expected[1] - expected[0], atol=1e-6)
    both = {"embed": half, "m1": draw(model, "m1")}
    assert gap(run_spliced(model, tokens, both, error=True), model(tokens)) < WHOLE
    at_start = read_places(model, tokens, [("embed", "output"), ("a0", "input")])
    assert torch.equal(at_start["embed", "output"], y)
    assert gap(at_start["a0", "input"] - embed_tokens(model, tokens)["pos_embed"], y) < EXACT


@pytest.mark.parametrize("kind", ["topk", "gradient"])
def test_a_dictionary_of_the_embedding_is_trained(kind, tmp_path):
    model, tokens = tiny("gpt2"), random_tokens(tiny("gpt2"), 8, 12)
    config = TrainConfig(d_dict=32, k=4, kind=kind, n_steps=200, batch_size=32, lr=5e-3, sparsity=0.01)
    trained = train_dictionaries(model, tokens, "embed,m1", config, out=tmp_path / "out", run=QUIET)
    assert list(trained) == ["embed", "m1"]
    y = embedded(model, tokens)
    missed = (y - reconstruct(trained["embed"], y.to(trained["embed"].W_dec))).square().sum()
    assert missed < 0.5 * (y - y.mean((0, 1))).square().sum()
    dictionaries = load_dictionaries(tmp_path / "out", model)
    assert list(dictionaries) == ["embed", "m1"]
    graph = build_graph(model, tokens, dictionaries, progress=False)
    assert graph.edges["source"].astype(str).str.match(r"embed/\d").any()


def test_gradients_at_the_embedding_are_those_of_the_loss():
    model, tokens = tiny("gpt2"), random_tokens(tiny("gpt2"), 3, 6)
    found, scale = collect_gradients(model, tokens, ["embed"], skip_first=0, run=QUIET)["embed"]
    embedding = model.bridge.embed.original_component.weight
    with torch.enable_grad():
        log_p = model(tokens)[:, :-1].log_softmax(-1)
        (by_row,) = torch.autograd.grad(-log_p.gather(-1, tokens[:, 1:, None]).sum(), embedding)
    summed = torch.zeros_like(by_row).index_add(0, tokens.flatten(), found.double() * scale)
    assert torch.allclose(summed, by_row, atol=2e-3 * float(by_row.abs().max()))


# --- refusals


def test_what_makes_no_sense_is_refused():
    model, tokens = tiny("gpt2"), random_tokens(tiny("gpt2"), 2, 6)
    basis, m1 = token_basis(model, tokens), draw(model, "m1")

    def cut(dictionaries):
        return cut_model(model, dictionaries).nodes

    duplicates = tiny_model("llama")
    weight = duplicates.bridge.embed.original_component.weight
    weight.data[9] = weight.data[4]
    prompt = Prompt(tokens[:1])
    refused = {
        "reads of 'embed' must be one of output, got 'normed'": lambda: cut(
            {"embed": replace(basis, reads="normed")}
        ),
        "but 'embed' stands under 'm1'": lambda: cut({"m1": replace(basis, reads="output")}),
        "but 'm1' stands under 'embed'": lambda: cut({"embed": m1}),
        "module must be named like .* got 'embed.h1'": lambda: cut({"embed.h1": basis}),
        "module must be named like .* got 'pos_embed'": lambda: cut({"pos_embed": basis}),
        "the embedding has a node for each of them.*leave out FunctionDictionary.embed": lambda: build_graph(
            model, prompt, {"embed": basis, "m1": m1}
        ),
        "here the embedding is one node, leave it out": lambda: list_circuit_parts(model, {"embed": basis}),
        "modules must be a chain of whole modules of layers": lambda: train_interaction_bases(
            model, tokens, ["embed", "a0"]
        ),
        "dictionaries must be those of at least two layers": lambda: weigh_interactions(
            model, tokens, {"embed": basis, "m1": m1}
        ),
        "must be an attention layer, a head or an MLP, got 'embed', which reads nothing": lambda: (
            freeze_readers(model, "embed", None, tokens[0], tokens[0])
        ),
        "neurons are those of an MLP, like 'm3', got 'embed'": lambda: neuron_basis(model, "embed"),
        "but those of 4 and 9 are the same": lambda: token_basis(duplicates, torch.tensor([[4, 7, 9]])),
        "tokens must lie in": lambda: token_basis(model, torch.tensor([[999]])),
        "tokens must be an integer tensor": lambda: token_basis(model, tokens[0]),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert token_basis(duplicates, torch.tensor([[4, 7]])).d_dict == 2


def test_an_edge_into_the_embedding_is_refused():
    model, tokens = tiny("gpt2"), random_tokens(tiny("gpt2"), 2, 6)
    dictionaries = some_dictionaries(model, tokens, "tokens")
    graph = build_graph(model, tokens, dictionaries, progress=False)
    edge = graph.edges.iloc[[0]].astype({"source": str, "target": str})
    backward = Graph(graph.nodes, edge.assign(source="const", target="embed/0", port="in"), graph.meta)
    with pytest.raises(ValueError, match="embed/0 never reads what const writes"):
        run_ablated(model, backward, tokens, value="zero", dictionaries=dictionaries)


def test_mean_of_another_text_moves_unseen_tokens_to_the_error():
    model, tokens = tiny("llama"), random_tokens(tiny("llama"), 4, 6)
    other = random_tokens(tiny("llama"), 4, 6, seed=9)
    cut = cut_model(model, {"embed": token_basis(model, tokens)})
    mean = Mean(reference=other).fix(cut, type("Text", (), {"tokens": tokens, "lengths": None, "run": QUIET}))
    unseen = ~torch.isin(other, tokens)
    expected = embedded(model, other) * unseen[..., None]
    of_first, of_rest = mean.average.dense["embed/err"][0, :2]
    assert unseen.any() and gap(of_first, expected[:, 0].mean(0)) < EXACT
    assert gap(of_rest, expected[:, 1:].mean((0, 1))) < EXACT
