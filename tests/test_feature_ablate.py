"""Edge ablation between features: a reader-by-reader reference, refusals, known models."""

import functools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import circuitgraph.ablation.features
from circuitgraph.ablation import judge
from circuitgraph.ablation.features import FeatureRun
from circuitgraph.ablation.selection import FeatureSelection, select
from circuitgraph.ablation.values import permute_rows
from circuitgraph.cut import FeatureCut, FeatureTrace, open_cut
from circuitgraph.dictionary.protocol import FunctionDictionary, find_structure
from circuitgraph.graph.graph import Graph
from circuitgraph.model.blocks import run_logits
from circuitgraph.model.loading import TINY_MODELS, tiny_model
from circuitgraph.options import Run
from feature_oracles import (
    all_dictionaries,
    by_hand,
    draw,
    every_edge,
    gap,
    mean_by_hand,
    thin,
    triples,
    writes_by_hand,
)
from known_features import KNOWN_FEATURES, name_triples
from oracles import random_tokens, written_tokens
from short import ablation_curve, build_graph, compare_curves, evaluate, minimality, run_ablated

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")

EXACT, WHOLE = (
    1e-10,
    1e-5,
)  # two derivations in float64; the model's own code, whose norms are float32 in some architectures
tiny = functools.cache(tiny_model)


def run_features(cut, selections, tokens, ablated, exact=True, plain=False):
    """What `logits` reads, one selection after another; `plain` is the definition."""
    ablated = cut.trace(ablated) if isinstance(ablated, torch.Tensor) else ablated
    return map(FeatureRun(cut, tokens, ablated, exact=exact, plain=plain), selections)


def settings(model, dictionaries, tokens, others="layer"):
    """Every way to fill cut edges: options of the package, and the ablated values by the reference."""
    other, text, n_pos = (
        random_tokens(model, *tokens.shape, seed=2),
        random_tokens(model, 3, tokens.shape[1] + 2, seed=3),
        tokens.shape[1],
    )
    yield {"value": "zero"}, None
    yield {"value": "corrupted", "corrupted": other}, writes_by_hand(model, dictionaries, other, others)
    yield (
        {"value": "resample", "seed": 4},
        writes_by_hand(model, dictionaries, permute_rows(tokens, 4), others),
    )
    yield {"value": "mean"}, mean_by_hand(model, dictionaries, tokens, others=others)
    yield (
        {"value": "mean", "reference": text},
        mean_by_hand(model, dictionaries, text, others=others, length=n_pos),
    )
    yield {"value": "mean", "per_position": True}, mean_by_hand(model, dictionaries, tokens, n_pos, others)
    yield (
        {"value": "mean", "per_position": True, "reference": text},
        mean_by_hand(model, dictionaries, text, n_pos, others),
    )


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_MODELS)
def test_all_edges_kept_is_the_model_and_none_the_ablated_values(name):
    model, dictionaries = tiny(name), all_dictionaries(tiny(name))
    tokens = random_tokens(model, 3, 6)
    every = every_edge(model, tokens, dictionaries)
    for ours, ablated in settings(model, dictionaries, tokens):
        assert (
            gap(run_ablated(model, every, tokens, dictionaries=dictionaries, **ours), model(tokens)) < WHOLE
        )
        none = run_ablated(model, every.keep([]), tokens, dictionaries=dictionaries, **ours)
        total = (
            torch.zeros(model.d_model, dtype=model.dtype)
            if ablated is None
            else sum(ablated.values()) + sum(d.b_dec for d in dictionaries.values())
        )
        assert (
            gap(none, run_logits(model, total.expand(3, 6, -1))) < EXACT and gap(none, model(tokens)) > 0.01
        )
        if ours["value"] == "corrupted":
            assert gap(none, model(ours["corrupted"])) < WHOLE


@torch.no_grad()
def compare(model, dictionaries, tokens, options, shares, values=None, **build):
    every = every_edge(model, tokens, dictionaries, **build)
    merged, frozen, others = (
        build.get("ports") == "merged",
        build.get("pattern") == "frozen",
        build.get("others", "layer"),
    )
    found = []
    for n, (ours, ablated) in enumerate(settings(model, dictionaries, tokens, others)):
        if values is not None and n not in values:
            continue
        for share in shares:
            graph = thin(every, share, seed=n)
            wanted = by_hand(
                model,
                dictionaries,
                triples(graph),
                tokens,
                ablated,
                merged=merged,
                frozen=frozen,
                others=others,
            )
            found.append(
                gap(run_ablated(model, graph, tokens, dictionaries=dictionaries, **options, **ours), wanted)
            )
    assert max(found) < EXACT, found
    return every


@torch.no_grad()
@pytest.mark.parametrize("value", ["zero", "corrupted"])
@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "llama", "gemma2"])
def test_a_backbone_is_its_edges_listed_one_by_one(name, value):
    model, dictionaries = tiny(name), all_dictionaries(tiny(name))
    del dictionaries["a1"]  # a whole module is part of the backbone
    tokens = random_tokens(model, 2, 5)
    ablated = None if value == "zero" else random_tokens(model, 2, 5, seed=2)
    every = every_edge(model, tokens, dictionaries)
    kind = every.nodes.set_index("name")["kind"].astype(str)
    ends = [(every.edges[end].astype(str).map(kind) == "feature").to_numpy() for end in ("source", "target")]
    fine = ends[0] & ends[1]
    kept = np.random.default_rng(0).random(len(every)) < 0.2
    cut = open_cut(model, every, dictionaries)
    listed = select(cut, every.keep(~fine | kept))
    short = replace(select(cut, every.keep(kept)), backbone=True)
    wanted, found, least = run_features(cut, [listed, short, short.none()], tokens, ablated)
    assert gap(found, wanted) < EXACT < gap(found, least)
    with pytest.raises(ValueError, match="no complement"):
        _ = ~short


@pytest.mark.parametrize("name", TINY_MODELS)
def test_random_graphs_are_brute_force(name):
    model = tiny(name)
    compare(model, all_dictionaries(model), random_tokens(model, 2, 5), {}, (0.3,))


@pytest.mark.parametrize("gate", ["topk", "abstopk", "relu", "jumprelu", "gated", "none"])
@pytest.mark.parametrize("reads", ["output", "stream", "input", "scaled", "normed"])
def test_gates_and_places(gate, reads):
    model = tiny("qwen2")
    compare(
        model,
        all_dictionaries(model, gate=gate, reads=reads),
        random_tokens(model, 2, 5),
        {},
        (0.05, 0.4),
        values=(0, 3),
    )


def test_encoders_of_z():
    model = tiny("llama")
    compare(
        model,
        {name: draw(model, name, reads="z" if name[0] == "a" else "output") for name in ("a0", "m0", "a1")},
        random_tokens(model, 2, 5),
        {},
        (0.05, 0.4),
        values=(0, 1, 3),
    )


@pytest.mark.parametrize(
    "build", [{"ports": "merged"}, {"pattern": "frozen"}, {"ports": "merged", "pattern": "frozen"}], ids=str
)
@pytest.mark.parametrize("reads", ["output", "normed", "stream"])
def test_merged_ports_and_frozen_patterns(build, reads):
    model = tiny("llama")
    compare(
        model,
        all_dictionaries(model, reads=reads),
        random_tokens(model, 2, 5),
        {},
        (0.1, 0.5),
        values=(0, 1, 3),
        **build,
    )


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "gemma2", "attention-only"])
@pytest.mark.parametrize("modules", [("a0",), ("m0", "a1"), ("a1", "m1")], ids=str)
def test_modules_without_dictionary(name, modules):
    model = tiny(name)
    dictionaries = {m: d for m, d in all_dictionaries(model, gate="relu").items() if m in modules}
    compare(model, dictionaries, random_tokens(model, 2, 5), {}, (0.05, 0.5), values=(0, 2, 3))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt-neox", "gemma2"])
@pytest.mark.parametrize("modules", [("m0",), ("a0.h1", "m0", "a1")], ids=str)
@pytest.mark.parametrize("build", [{}, {"ports": "merged"}, {"pattern": "frozen"}], ids=str)
def test_heads(name, modules, build):
    model = tiny(name)
    graph = compare(
        model,
        {m: draw(model, m, gate="relu") for m in modules},
        random_tokens(model, 2, 5),
        {},
        (0.05, 0.5),
        values=(0, 1, 3),
        others="head",
        **build,
    )
    assert {"a0.h0", "a0.h1/err" if "a0.h1" in modules else "a0.h1"} < set(graph.nodes["name"])


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("reads", ["output", "normed"])
def test_fast_is_plain_and_the_complement_is_the_rest(name, reads):
    model, tokens = tiny(name), random_tokens(tiny(name), 2, 6)
    dictionaries = all_dictionaries(model, reads=reads)
    every = every_edge(model, tokens, dictionaries)
    cut, other = open_cut(model, every, dictionaries), random_tokens(model, 2, 6, seed=5)
    for share in (0.03, 0.5):
        graph = thin(every, share)
        rest = every.keep(
            ~np.isin(
                np.arange(len(every)), np.flatnonzero(np.random.default_rng(0).random(len(every)) < share)
            )
        )
        assert len(rest) + len(graph) == len(every)
        choices = [
            select(cut, graph),
            ~select(cut, graph),
            select(cut, rest),
            select(cut, graph, "node"),
            ~select(cut, graph, "node"),
        ]
        for ablated in (None, other):
            fast, plain = (
                list(run_features(cut, choices, tokens, ablated, plain=way)) for way in (False, True)
            )
            assert max(gap(a, b) for a, b in zip(fast, plain, strict=True)) < EXACT
            assert gap(fast[1], fast[2]) < EXACT < gap(fast[0], fast[1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "gemma2", "llama"])
def test_node_ablation_is_all_edges_out_of_the_nodes(name):
    model, tokens = tiny(name), random_tokens(tiny(name), 2, 5)
    dictionaries = all_dictionaries(model)
    every = every_edge(model, tokens, dictionaries)
    graph = thin(every, 0.01)
    touched = set(graph.edges["source"].astype(str)) | set(graph.edges["target"].astype(str))
    assert 3 < len(touched) < len(every.nodes) - 3
    among = every.keep(every.edges["source"].astype(str).isin(touched).to_numpy())
    for ours, _ in settings(model, dictionaries, tokens):
        options = {"dictionaries": dictionaries, **ours}
        assert (
            gap(
                run_ablated(model, graph, tokens, ablation="node", **options),
                run_ablated(model, among, tokens, **options),
            )
            < EXACT
        )
    cut = open_cut(model, graph, dictionaries)
    assert select(cut, graph, "node").n_edges == among.edges["target"].astype(str).isin(touched).sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_small_change_is_linear(name):
    model, tokens = tiny(name), random_tokens(tiny(name), 2, 6)
    dictionaries = all_dictionaries(model)
    every = every_edge(model, tokens, dictionaries)
    cut, graph = open_cut(model, every, dictionaries), thin(every, 0.5)
    own, other = cut.trace(tokens), cut.trace(random_tokens(model, 2, 6, seed=5))
    near = FeatureTrace(
        *(
            {name: x + 1e-5 * (getattr(other, kind)[name] - x) for name, x in getattr(own, kind).items()}
            for kind in ("acts", "dense")
        ),
        {},
    )
    exact, linear = (
        next(run_features(cut, [select(cut, graph)], tokens, near, exact=way)) for way in (True, False)
    )
    assert gap(exact, linear) < 1e-3 * gap(exact, own.reads["logits"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in TINY_MODELS),
        *(
            (name, options)
            for name in ("gpt2", "llama")
            for options in (
                {"gate": "gated"},
                {"gate": "relu", "reads": "normed"},
                {"gate": "jumprelu", "reads": "stream"},
            )
        ),
    ],
    ids=str,
)
def test_linearised_features_move_by_their_gradients(name, options):
    model, tokens = tiny(name), random_tokens(tiny(name), 2, 6)
    dictionaries = all_dictionaries(model, **options)
    every = every_edge(model, tokens, dictionaries)
    cut, graph, other = (
        open_cut(model, every, dictionaries),
        thin(every, 0.1),
        random_tokens(model, 2, 6, seed=5),
    )
    choices = [select(cut, graph), ~select(cut, graph), select(cut, graph, "node")]
    for ablated in (None, other):
        fast, plain = (
            list(run_features(cut, choices, tokens, ablated, exact=False, plain=way)) for way in (False, True)
        )
        assert max(gap(a, b) for a, b in zip(fast, plain, strict=True)) < EXACT
    assert (
        gap(
            run_ablated(model, every, tokens, value="zero", dictionaries=dictionaries, exact=False),
            model(tokens),
        )
        < WHOLE
    )


@pytest.fixture(scope="module")
def case():
    model = tiny("llama")
    dictionaries, text = all_dictionaries(model), written_tokens(model, 5, 8)
    return (
        model,
        dictionaries,
        text,
        build_graph(model, text, dictionaries, n_steps=3, keep=None, progress=False),
    )


def test_an_evaluation_is_made_of_three_runs(case):
    model, dictionaries, text, graph = case
    small, cut = graph.top_edges(60), open_cut(model, graph, dictionaries)
    mean = cut.mean(text, n_pos=text.shape[1], n_apart=1, run=Run(progress=False))
    for ruler in ("edge", "node"):
        found = evaluate(model, small, text, ruler, dictionaries=dictionaries, progress=False, n_boot=20)
        choice = select(cut, small, ruler)
        ours = run_ablated(model, small, text, ablation=ruler, dictionaries=dictionaries)
        rest, none = (
            run_logits(model, next(run_features(cut, [c], text, mean)))
            for c in (~choice, FeatureSelection.nothing(cut))
        )
        ce, of_rest, of_none, own = (
            float(torch.nn.functional.cross_entropy(logits[:, 1:-1].flatten(0, 1), text[:, 2:].flatten()))
            for logits in (ours, rest, none, model(text))
        )
        assert abs(found.ce - ce) < 1e-9 and found.n_edges == 60 and found.ablation == ruler
        assert np.allclose(
            [found.faithfulness, found.completeness],
            [(of_none - ce) / (of_none - own), (of_none - of_rest) / (of_none - own)],
            atol=1e-5,
        )
    assert (
        "linearised"
        in evaluate(
            model, small, text, dictionaries=dictionaries, exact=False, progress=False, n_boot=20
        ).ablation
    )


def test_curves_go_to_the_model(case):
    model, dictionaries, text, graph = case
    every = every_edge(model, text, dictionaries)
    budgets = [1, 100, len(graph)]
    options = {"dictionaries": dictionaries, "method": "top", "progress": False, "n_boot": 20}
    areas, curves = compare_curves(model, {"all": every, "drawn": graph}, text, budgets, **options)
    assert len(areas) == 4 and len(curves) == 12 and curves.attrs["exact"]
    alone = ablation_curve(model, graph, text, budgets, **options)
    assert np.allclose(alone["faithfulness"], curves["faithfulness"][curves["graph"] == "drawn"])
    whole = ablation_curve(
        model, every, text, [len(every)], dictionaries=dictionaries, progress=False, n_boot=20
    )
    assert np.allclose(whole["faithfulness"], 1) and (whole["kl"].abs() < 1e-9).all()
    assert not ablation_curve(
        model,
        graph,
        text,
        [50],
        ablation="edge",
        dictionaries=dictionaries,
        exact=False,
        progress=False,
        n_boot=20,
    ).attrs["exact"]
    loss = minimality(
        model, graph.top_edges(30), text, 4, dictionaries=dictionaries, progress=False, n_boot=20
    )
    edge = loss["edge"][0]
    cut, kept = (
        evaluate(model, g, text, dictionaries=dictionaries, progress=False, n_boot=20).faithfulness
        for g in (
            graph.top_edges(30).keep([e for e in graph.top_edges(30).edge_names if e != edge]),
            graph.top_edges(30),
        )
    )
    assert np.isclose(loss["loss"][0], kept - cut)


def test_several_graphs_are_run_together(case):
    model, dictionaries, text, graph = case
    kept = torch.rand(3, len(graph), generator=torch.Generator().manual_seed(0)) < 0.3
    graphs = [graph.keep(row.numpy()) for row in kept]
    together = judge.run_ablated(model, graphs, text, dictionaries=dictionaries)
    for small, logits in zip(graphs, together, strict=True):
        alone = run_ablated(model, small, text, dictionaries=dictionaries, batch_size=2, reference=text)
        assert gap(logits, alone) < EXACT


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: None, "dictionaries must be those .* got none"),
        (lambda d: {"m0": d["m0"]}, "dictionaries must be those"),
        (
            lambda d: d | {"m0": draw(tiny("llama"), "m0", seed=1)},
            "the dictionary of m0 must be the one .* another",
        ),
        (lambda d: d | {"m2": d["m1"]}, "dictionaries must be those"),
    ],
)
def test_other_dictionaries_are_refused(case, change, words):
    model, dictionaries, text, graph = case
    for run in (
        run_ablated,
        lambda *a, **k: evaluate(*a, progress=False, **k),
        lambda *a, **k: ablation_curve(*a, progress=False, **k),
        lambda *a, **k: minimality(*a, progress=False, **k),
    ):
        with pytest.raises(ValueError, match=words):
            run(model, graph, text, dictionaries=change(dictionaries))


def test_refusals(case):
    model, dictionaries, text, graph = case
    with pytest.raises(ValueError, match="load the model it was built on"):
        run_ablated(tiny("qwen2"), graph, text, dictionaries=dictionaries)
    module = build_graph(model, text, "layer", n_steps=1, progress=False)
    with pytest.raises(ValueError, match="dictionaries goes with a graph of features"):
        run_ablated(model, module, text, dictionaries=dictionaries)
    with pytest.raises(ValueError, match="exact=False goes with"):
        run_ablated(model, module, text, exact=False)
    with pytest.raises(ValueError, match="one grain"):
        compare_curves(model, {"a": graph, "b": module}, text, [3], dictionaries=dictionaries, progress=False)

    def redirect(graph, source, target, port):
        return Graph(
            pd.concat(
                [graph.nodes[graph.nodes["name"] == source], graph.nodes[graph.nodes["name"] != source]]
            ),
            graph.edges[-1:].assign(source=source, target=target, port=port),
            graph.meta,
        )

    for bad, words in (
        (redirect(graph, "m1/0", "m0/2", "mlp"), "m0/2 never reads what m1/0 writes"),
        (redirect(graph, "m0/1", "m1/2", "q"), "must be one of mlp"),
    ):
        with pytest.raises(ValueError, match=words):
            run_ablated(model, bad, text, dictionaries=dictionaries)
    parallel = tiny("gpt-neox")
    with pytest.raises(ValueError, match="parallel layer"):
        FeatureCut(parallel, {"m0": draw(parallel, "m0", reads="stream")})
    with pytest.raises(ValueError, match="at least 2 sequences"):
        run_ablated(model, graph, text[:1], value="resample", dictionaries=dictionaries)


@pytest.mark.parametrize("name", KNOWN_FEATURES)
def test_features_that_are_known(name):
    known = KNOWN_FEATURES[name]()
    model, dictionaries, tokens = known.model, known.dictionaries, known.tokens
    assert (
        float(
            torch.nn.functional.cross_entropy(
                model(tokens)[:, known.skip_first : -1].flatten(0, 1),
                tokens[:, known.skip_first + 1 :].flatten(),
            )
        )
        < 0.01
    )
    graph = build_graph(model, tokens, dictionaries, skip_first=known.skip_first, progress=False)
    true = known.find(graph)
    assert name_triples(true) == known.edges
    judge = functools.partial(
        evaluate,
        model,
        data=tokens,
        value="zero",
        skip_first=known.skip_first,
        dictionaries=dictionaries,
        progress=False,
        n_boot=20,
    )  # a feature that is not there is zero, and nothing here has biases
    found = judge(true)
    assert abs(found.faithfulness - 1) < 1e-6 and abs(found.kl) < 1e-6 and found.completeness < 0.05
    loss = minimality(
        model,
        true,
        tokens,
        None,
        value="zero",
        skip_first=known.skip_first,
        dictionaries=dictionaries,
        progress=False,
        n_boot=20,
    )
    assert len(loss) == len(known.edges) and loss["loss"].min() > 0.01, loss.tail()
    assert (
        abs(
            evaluate(
                model,
                true,
                tokens,
                value="mean",
                skip_first=known.skip_first,
                dictionaries=dictionaries,
                progress=False,
                n_boot=20,
            ).faithfulness
            - 1
        )
        < 1e-6
    )  # nor does what is cut bring anything else


@torch.no_grad()
@pytest.mark.parametrize("reads", ["output", "normed"])
def test_encoders_that_are_not_affine_take_the_plain_way(reads):
    model, tokens = tiny("llama"), random_tokens(tiny("llama"), 2, 6)
    dictionaries = all_dictionaries(model, reads=reads)
    every = every_edge(model, tokens, dictionaries)
    cut, hidden = (open_cut(model, every, dictionaries) for _ in range(2))
    for i, part in enumerate(hidden.parts):
        if (d := part.dictionary) is None:
            continue
        bare = FunctionDictionary(d.module, d.reads, d.d_dict, d.encode, d.decode, d.W_dec, d.b_dec)
        hidden.parts[i] = replace(part, dictionary=bare, structure=find_structure(bare))
    choice = select(cut, thin(every, 0.2))
    a, b = (next(run_features(c, [choice], tokens, None)) for c in (cut, hidden))
    assert gap(a, b) < EXACT and not hidden.cache and cut.cache


def test_a_batch_and_a_block_change_nothing(case, monkeypatch):
    model, dictionaries, text, graph = case
    small = graph.top_edges(80)
    whole = run_ablated(model, small, text, reference=text, dictionaries=dictionaries)
    assert (
        gap(whole, run_ablated(model, small, text, reference=text, dictionaries=dictionaries, batch_size=1))
        < EXACT
    )
    monkeypatch.setattr(
        "circuitgraph.ablation.features.fill_groups",
        functools.partial(circuitgraph.ablation.features.fill_groups, block=2),
    )
    assert gap(whole, run_ablated(model, small, text, reference=text, dictionaries=dictionaries)) < EXACT
