"""Ablations against the model run by hand, two circuits told apart, controls, tests by definition."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from sklearn.metrics import adjusted_mutual_info_score

from circuitgraph.ablation.values import Mean, Resample
import circuitgraph.community.behaviour as behaviour
from circuitgraph.community.behaviour import Matching, behaviour_task, check_behaviours, permute_positions
from circuitgraph.community.behaviour import class_behaviours, community_edges, compare_groupings
from circuitgraph.community.behaviour import ablation_losses, draw_controls, gradient_behaviours
from circuitgraph.community.behaviour import locate_behaviours, loss_behaviours, loss_gradients
from circuitgraph.community.behaviour import match_behaviours, next_loss, summarise_matches, task_behaviours
from circuitgraph.build.build import complete_graph
from circuitgraph.community.figures import flow_between, list_members, plot_behaviours
from circuitgraph.community.figures import plot_community_layers, view_communities
from circuitgraph.community.groupings import other_groupings, profile_resolutions
from circuitgraph.community.links import leave_out, node_levels, share_weights
from circuitgraph.community.patterns import compare_patterns, read_patterns
from circuitgraph.community.search import find_communities
from circuitgraph.dictionary.places import visit_modules
from circuitgraph.graph.graph import Graph
from circuitgraph.model.blocks import run_logits
from circuitgraph.model.loading import load_model, tiny_model
from circuitgraph.data.task import Task
from circuitgraph.options import Run
from feature_oracles import all_dictionaries, every_edge
from known_features import two_circuits
from oracles import random_tokens
from short import build_graph, run_ablated

QUIET = Run(progress=False)


@pytest.fixture(scope="module")
def known():
    return two_circuits()


@pytest.fixture(scope="module")
def graph(known):
    return build_graph(
        known.model, known.tokens, known.dictionaries, keep=None, skip_first=0, progress=False
    ).threshold(1e-9, "abs_weight")


@pytest.fixture(scope="module")
def found(graph):
    return find_communities(leave_out(graph, ["embed", "logits", "error"]), "layered", resolution=0.15)


def score(known, graph):
    member = graph.nodes.set_index("name")["community"]
    circuits = pd.Series({feature: name for name, features in known.circuits.items() for feature in features})
    return adjusted_mutual_info_score(circuits, member[circuits.index])


# The model of two circuits


def test_the_model_does_what_it_is_built_for(known, graph):
    loss = next_loss(known.model(known.tokens).detach(), known.tokens)
    assert all(loss[mask].max() < 1e-3 for mask in known.behaviours.values())
    depth_one = ~known.behaviours["counting"] & (torch.arange(len(known.tokens)) >= 30)[:, None]
    either = loss[depth_one & loss.isfinite()]  # either bracket may follow: the model then says nothing
    assert len(either) > 10 and np.allclose(either, np.log(9))
    true = known.find(graph, 0.004)
    assert {
        tuple(map(str, row)) for row in true.edges[["source", "target", "port"]].itertuples(index=False)
    } == known.edges
    rest = next_loss(
        run_ablated(known.model, true, known.tokens, value="zero", dictionaries=known.dictionaries),
        known.tokens,
    )
    must_close = known.behaviours["counting"].clone()
    must_close[:, :-1] &= known.tokens[:, 1:] == 8
    assert (rest[known.behaviours["copying"]] < 1e-3).all() and (
        rest[known.behaviours["counting"] & ~must_close] < 1e-3
    ).all()
    assert np.allclose(rest[must_close], np.log(2), atol=1e-3)
    # the edge that keeps "must open" silent has no weight where that is active, and is not drawn: both
    # brackets are expected


def test_communities_are_the_circuits(known, graph, found):
    profile = profile_resolutions(
        leave_out(graph, ["embed", "logits", "error"]), "layered", (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0)
    )
    assert set(profile.loc[profile["plateau"], "communities"]) == {2.0} and score(known, found) == 1
    bare = leave_out(graph, ["embed", "logits", "error"])
    similarity = compare_patterns(
        read_patterns(known.model, bare, known.tokens, known.dictionaries, skip_first=0, run=QUIET)
    )
    for method in ("activation", "joint"):
        assert score(known, find_communities(bare, method, resolution=0.15, similarity=similarity)) == 1, (
            method
        )


def test_the_matrix_is_diagonal(known, found):
    table = match_behaviours(
        known.model,
        found,
        known.tokens,
        known.behaviours,
        value="zero",
        dictionaries=known.dictionaries,
        matching=Matching(n_controls=39, n_permutations=99),
        run=QUIET,
    )
    assert (
        np.allclose(table["effect"].unstack(), np.log(9) * np.eye(2), atol=1e-3)
        and np.allclose(table["sufficiency"].unstack(), np.eye(2), atol=1e-3)
        and np.allclose(table["necessity"].unstack(), np.eye(2), atol=1e-3)
    )
    assert table[table["best"]].index.tolist() == [(0, "copying"), (1, "counting")]
    assert np.allclose(table["selectivity"].unstack(), 2 * np.eye(2) - 1, atol=1e-3)
    assert ((table["p_corrected"] < 0.06) == table["best"]).all() and (
        table["z"].isna() | (table["z"] * np.where(table["best"], 1, -1) > 3)
    ).all()
    assert summarise_matches(table, p=0.06).tolist() == [1.0, 1.0, 4, 2, 1.0]


def test_mixed_communities_are_not_said_to_serve_one_behaviour(known, found):
    """Half of each circuit in each community: both hit both."""
    rows = {
        name: i % 2
        for features in known.circuits.values()
        for i, name in enumerate(sorted(features, key=lambda f: f[3:]))
    }
    mixed = Graph(
        found.nodes.assign(community=found.nodes["name"].map(rows).fillna(-1).astype(int)),
        found.edges,
        found.meta,
    )
    table = match_behaviours(
        known.model,
        mixed,
        known.tokens,
        known.behaviours,
        value="zero",
        dictionaries=known.dictionaries,
        matching=Matching("touching", n_controls=9, n_permutations=9),
        run=QUIET,
    )
    assert (
        (table["effect"] > 1).all()
        and table["selectivity"].abs().max() < 0.3
        and summarise_matches(table)["communities that serve one behaviour"] == 0
    )


def test_from_behaviour_to_community(known, found):
    needs = {}
    for name, mask in known.behaviours.items():
        weighed = build_graph(
            known.model,
            behaviour_task(known.tokens, mask, name),
            known.dictionaries,
            target="metric",
            keep=None,
            progress=False,
        )
        needs[name] = weighed.threshold(0.05 * weighed.edges["weight"].abs().max())
    table = locate_behaviours(found, needs)
    assert (table["nodes"].unstack().to_numpy() > 0).tolist() == [[True, False], [False, True]] and (
        (table["p_corrected"] < 0.05) == (table["nodes"] > 0)
    ).all()
    member = found.nodes["community"].to_numpy()
    row, used = table.loc["counting", 1], int(table.loc["counting", "nodes"].sum())
    assert np.isclose(
        row["p"],
        sum(
            scipy.stats.hypergeom.pmf(k, (member >= 0).sum(), (member == 1).sum(), used)
            for k in range(int(row["nodes"]), used + 1)
        ),
    )
    with pytest.raises(ValueError, match="touch none"):
        locate_behaviours(found, {"nothing": found.keep([])})


def test_sequences_without_effect_change_no_weight_of_a_metric(known):
    """Thirty sequences in which the behaviour does not occur, before those in which it does."""
    mask = known.behaviours["counting"]
    some, every = (
        build_graph(
            known.model,
            behaviour_task(tokens, where),
            known.dictionaries,
            target="metric",
            keep=None,
            progress=False,
        )
        for tokens, where in ((known.tokens[30:], mask[30:]), (known.tokens, mask))
    )
    one, two = (pd.Series(g.edges["weight"].to_numpy(), g.edge_names) for g in (some, every))
    one, two = one.align(two, fill_value=0)
    assert len(one) > 5 and one.abs().max() > 1e-4 and np.allclose(one, two, atol=1e-12)


# Ablations


@pytest.mark.parametrize("value", ["zero", "mean", "resample", Resample(3), "reference"])
def test_ablations_at_module_grain_are_those_of_run_ablated(value):
    model = tiny_model("llama")
    tokens, graph = random_tokens(model, 5, 9), complete_graph(model)
    value = Mean(random_tokens(model, 3, 6)) if value == "reference" else value
    ablated = np.random.default_rng(0).random((3, len(graph))) < 0.2
    rise = ablation_losses(model, graph, tokens, ablated, value=value, run=QUIET)
    own = next_loss(model(tokens), tokens)
    for gone, found in zip(ablated, rise, strict=True):
        expected = next_loss(run_ablated(model, graph.keep(~gone), tokens, value=value), tokens) - own
        assert (
            np.allclose(found, expected.detach().numpy(), atol=2e-5, equal_nan=True)
            and np.isnan(found[:, -1]).all()
            and np.abs(found[:, :-1]).max() > 1e-3
        )


def test_ablations_at_feature_grain_are_those_of_run_ablated():
    model = tiny_model("llama")
    tokens, dictionaries = random_tokens(model, 4, 8), all_dictionaries(model)
    graph, options = every_edge(model, tokens, dictionaries), {"value": "zero", "dictionaries": dictionaries}
    ablated = np.random.default_rng(0).random((2, len(graph))) < 0.3
    rise, own = (
        ablation_losses(model, graph, tokens, ablated, run=Run(batch_size=3, progress=False), **options),
        next_loss(model(tokens), tokens),
    )
    for gone, found in zip(ablated, rise, strict=True):
        expected = next_loss(run_ablated(model, graph.keep(~gone), tokens, **options), tokens) - own
        assert (
            np.allclose(found, expected.detach().numpy(), atol=2e-5, equal_nan=True)
            and np.abs(found[:, :-1]).max() > 1e-2
        )
    assert (
        np.nanmax(
            np.abs(
                ablation_losses(
                    model, graph, tokens, np.zeros((1, len(graph)), dtype=bool), run=QUIET, **options
                )
            )
        )
        == 0
    )


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    """Results of a checkpoint are read again and not computed; another value has files of its own."""
    model = tiny_model("llama")
    tokens, graph = random_tokens(model, 3, 7), complete_graph(model)
    ablated = np.random.default_rng(0).random((40, len(graph))) < 0.2
    run = Run(checkpoint=tmp_path, progress=False)
    whole = ablation_losses(model, graph, tokens, ablated, value="zero", run=QUIET)
    first = ablation_losses(model, graph, tokens, ablated[:35], value="zero", run=run)
    assert np.array_equal(first, whole[:35], equal_nan=True)
    measured = []
    measure = behaviour._measure_rise

    def count(ablator, tokens, ablated, *rest):
        measured.append(len(ablated))
        return measure(ablator, tokens, ablated, *rest)

    monkeypatch.setattr(behaviour, "_measure_rise", count)
    again = ablation_losses(model, graph, tokens, ablated, value="zero", run=run)
    assert np.array_equal(again, whole, equal_nan=True) and measured == [5]
    mean = ablation_losses(model, graph, tokens, ablated[:2], run=run)
    assert measured == [5, 2] and not np.allclose(mean, whole[:2], equal_nan=True)


# Controls


def test_controls_match_what_they_can():
    model = tiny_model("gpt2")
    tokens, dictionaries = random_tokens(model, 4, 8), all_dictionaries(model)
    graph = build_graph(model, tokens, dictionaries, progress=False)
    member = np.random.default_rng(0).integers(6, size=len(graph.nodes))
    graph = Graph(graph.nodes.assign(community=member), graph.edges, graph.meta)
    own, level, size = (
        community_edges(graph)[0],
        node_levels(graph.nodes),
        np.log(share_weights(graph) + 1e-12),
    )
    controls = draw_controls(graph, 0, 30)
    block = (
        pd.Series(level[graph.edges["source"].cat.codes]) * 1_000
        + level[graph.edges["target"].cat.codes] * 10
        + graph.edges["port"].cat.codes
    )
    assert (
        (controls == draw_controls(graph, 0, 30)).all()
        and len(np.unique(controls, axis=0)) > 25
        and not (controls & own).any()
    )
    wanted, room = block[own].value_counts(), block[~own].value_counts()
    for control in controls:
        assert (
            block[control].value_counts().reindex(wanted.index, fill_value=0)
            == np.minimum(wanted, room.reindex(wanted.index, fill_value=0))
        ).all() and set(block[control]) <= set(wanted.index)
    at_random = np.abs(size[~own].mean() - size[own].mean())
    assert np.mean([np.abs(size[control].mean() - size[own].mean()) for control in controls]) < max(
        0.5 * at_random, 0.3
    )
    near = np.mean(
        [
            np.sum(
                [(member[graph.edges[end].cat.codes[control]] == 0).mean() for end in ("source", "target")]
            )
            for control in controls
        ]
    )
    assert (
        near
        < np.mean([(member[graph.edges[end].cat.codes[~own]] == 0).mean() for end in ("source", "target")])
        * 2
        + 0.2
    )


def test_edges_of_communities_by_definition(found):
    member = found.nodes.set_index("name")["community"]
    source, target = (member[found.edges[end].astype(str)].to_numpy() for end in ("source", "target"))
    for c in (0, 1):
        assert (community_edges(found)[c] == ((source == c) & (target == c))).all() and (
            community_edges(found, "touching")[c] == ((source == c) | (target == c))
        ).all()


def test_a_control_is_no_worse_than_what_it_controls():
    """Random communities of a random model: p-values are about uniform, so that few are small."""
    model = tiny_model("llama")
    tokens, graph = (
        random_tokens(model, 6, 10),
        build_graph(tiny_model("llama"), random_tokens(model, 6, 10), "head", progress=False),
    )
    masks = {
        "even": torch.zeros_like(tokens, dtype=torch.bool),
        "odd": torch.zeros_like(tokens, dtype=torch.bool),
    }
    masks["even"][:, 2:-1:2], masks["odd"][:, 1:-1:2] = True, True
    p = []
    for seed in range(4):
        member = np.random.default_rng(seed).integers(3, size=len(graph.nodes))
        p.append(
            match_behaviours(
                model,
                Graph(graph.nodes.assign(community=member), graph.edges, graph.meta),
                tokens,
                masks,
                matching=Matching(n_controls=19, n_permutations=19, seed=seed),
                run=QUIET,
            )["p"]
        )
    assert (pd.concat(p) <= 0.05).mean() < 0.2 and pd.concat(p).between(0, 1).all()


# Behaviours


def test_tasks_become_one_text():
    one = Task(
        torch.tensor([[1, 2, 3], [4, 5, 6]]),
        torch.tensor([[1, 2, 3], [4, 5, 6]]),
        answers=torch.tensor([[7, 8], [9, -1]]),
        metric="ce",
        lengths=torch.tensor([2, 3]),
    )
    other = Task(
        torch.tensor([[1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 2]]), answers=torch.tensor([[3]]), metric="ce"
    )
    tokens, behaviours = task_behaviours({"one": one, "other": other})
    assert tokens.tokens.tolist() == [[1, 2, 7, 0, 0], [4, 5, 6, 9, 0], [1, 1, 1, 1, 3]]
    assert tokens.lengths.tolist() == [3, 4, 5] and tokens.documents.n_tokens.tolist() == [7, 5]
    assert tokens.real.sum() == 12 and len(tokens) == 3
    assert {name: mask.nonzero().tolist() for name, mask in behaviours.items()} == {
        "one": [[0, 1], [1, 2]],
        "other": [[2, 3]],
    }
    with pytest.raises(ValueError, match="must have answers"):
        task_behaviours({"none": Task(one.clean, one.corrupted, metric=lambda logits: logits[:, 0, 0])})
    with pytest.raises(ValueError, match="at least one task"):
        task_behaviours({})


def test_classes_of_next_tokens():
    model = load_model("smollm2-135m")
    text = "The cat sat, in 1987.\nParis has unbelievableness"
    tokens = torch.tensor([model.tokenizer(text).input_ids])
    words = [model.tokenizer.decode([t]) for t in tokens[0].tolist()]
    found = class_behaviours(model, tokens)
    said = {name: [words[i + 1] for i in mask[0].nonzero()[:, 0].tolist()] for name, mask in found.items()}
    assert (
        said["newline"] == ["\n"]
        and said["punctuation"] == [",", "."]
        and set("1987") == set(said["digit"])
        and said["capital"] == ["Paris"]
        and " cat" in said["word"]
        and all(not w[0].isspace() for w in said["inside of a word"])
    )
    assert sum(mask.sum() for mask in found.values()) == tokens.numel() - 1


def test_clusters_of_losses_are_disjoint_and_tell_circuits_apart(known):
    found = loss_behaviours(known.model, known.tokens, 4, skip_first=0)
    total = sum(mask.int() for mask in found.values())
    assert (
        (total[:, :-1] == 1).all()
        and (total[:, -1] == 0).all()
        and list(found) == [f"loss {i}" for i in range(len(found))]
    )
    label = sum(mask.int() * i for i, mask in enumerate(found.values()))
    sure = known.behaviours["copying"] | known.behaviours["counting"]
    assert adjusted_mutual_info_score(sure[:, :-1].flatten(), label[:, :-1].flatten()) > 0.5
    with pytest.raises(ValueError, match="n must lie"):
        loss_behaviours(known.model, known.tokens[:1], 9, skip_first=0)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "attention-only"])
def test_gradients_of_losses_are_what_scaling_a_module_does(architecture):
    """Against central differences; gpt2 has biases, which belong to what a module writes."""
    model = tiny_model(architecture)
    tokens = random_tokens(model, 3, 7)
    found, names = (
        loss_gradients(model, tokens, chunk=3, run=Run(batch_size=2)),
        [f"{kind}{i}" for i in range(2) for kind in ("a" if architecture == "attention-only" else "am")],
    )
    assert found.shape == (3, 7, len(names)) and found[:, -1].isnan().all() and not found.requires_grad

    def losses(name, by):
        return next_loss(
            run_logits(
                model,
                visit_modules(
                    model,
                    tokens,
                    lambda kind, layer, places: by * places["output"] if f"{kind}{layer}" == name else None,
                ),
            ),
            tokens,
        )

    for m, name in enumerate(names):
        expected = (losses(name, 1 + 1e-5) - losses(name, 1 - 1e-5)) / 2e-5
        assert (
            torch.allclose(found[:, :-1, m], expected[:, :-1].detach(), atol=1e-7)
            and found[:, :-1, m].abs().max() > 1e-3
        )
    assert torch.allclose(found, loss_gradients(model, tokens), equal_nan=True)


def test_clusters_of_gradients_are_the_behaviours(known):
    found = gradient_behaviours(known.model, known.tokens, 3, skip_first=0, run=Run(batch_size=60))
    assert list(found) == ["gradient 0", "gradient 1", "gradient 2"] and all(
        any((mask == one).all() for one in found.values()) for mask in known.behaviours.values()
    )
    late = gradient_behaviours(known.model, known.tokens, 3, skip_first=2, run=Run(batch_size=60))
    assert (sum(mask.int() for mask in late.values()) == (torch.arange(9) >= 2) & (torch.arange(9) < 8)).all()
    with pytest.raises(ValueError, match="n must lie"):
        gradient_behaviours(known.model, known.tokens[:1], 9, skip_first=0)


def direct_edge(seed=0):
    """A model with random weights, and its edge from the embedding straight to the logits as one community.

    Without it, the loss rises by what the current token is.
    """
    model = tiny_model("llama")
    tokens, whole = (
        torch.randint(12, (40, 20), generator=torch.Generator().manual_seed(seed)),
        complete_graph(model),
    )
    graph = Graph(
        whole.nodes.assign(community=np.where(whole.nodes["name"].isin(["embed", "logits"]), 0, -1)),
        whole.edges,
        whole.meta,
    )
    rise = ablation_losses(model, graph, tokens, community_edges(graph), run=QUIET)[0]
    mean = pd.Series(rise[:, :-1].ravel()).groupby(tokens[:, :-1].numpy().ravel()).mean()
    return (
        model,
        graph,
        tokens,
        torch.from_numpy(rise),
        torch.isin(tokens, torch.from_numpy(mean.nlargest(4).index.to_numpy(copy=True))),
    )


def test_a_reaction_to_a_token_is_no_behaviour_within_it():
    model, graph, tokens, rise, loud = direct_edge()
    lot, whole = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.5, loud.clone()
    masks = {
        "by lot": loud & lot,
        "where it rises": loud & (rise > rise[:, :-1].median()),
        "all of them": whole,
    }
    table = match_behaviours(
        model, graph, tokens, masks, matching=Matching(n_controls=1, n_permutations=199), run=QUIET
    ).loc[0]
    assert (
        (table["p_position"] < 0.05).all()
        and table["p_token"]["by lot"] > 0.2
        and table["p_token"]["where it rises"] < 0.05
    )
    assert (
        table["p_token"]["all of them"] == 1 and table["movable"]["all of them"] == 0
    )  # the behaviour is its tokens: nothing can be permuted
    token, inside = tokens[:, :-1], masks["by lot"][:, :-1]
    assert table["movable"]["by lot"] == sum(
        int(((token == t) & inside).sum()) for t in range(12) if ((token == t) & ~inside).any()
    )
    assert (table["p"] == table[["p_control", "p_position"]].max(axis=1)).all()


def test_permutations_stay_within_groups():
    """Four positions in two groups: by hand, of the two orders of each group (one moves nothing)."""
    rise, masks = np.array([[[3.0, 1.0, 0.0, 2.0]]]), np.array([[[True, False, True, False]]])
    p = permute_positions(rise, masks, np.array([[0, 0, 1, 1]]), 4_000, 0)[
        0, 0
    ]  # contrasts (3 + 0) - (1 + 2) = 0 of the orders: 0, -4, 4, 0
    assert abs(p - 0.75) < 0.03
    alone = permute_positions(rise, masks, np.array([[0, 1, 2, 3]]), 50, 0)[0, 0]
    one = permute_positions(rise, masks, np.array([[0, 0, 0, 0]]), 6_000, 0)[
        0, 0
    ]  # six choices of two positions: sums 4, 3, 5, 1, 3, 2 against 3
    assert alone == 1 and abs(one - 4 / 6) < 0.03
    late = permute_positions(
        np.concatenate([np.full((1, 1, 1), np.nan), rise], 2),
        np.concatenate([np.zeros((1, 1, 1), dtype=bool), masks], 2),
        np.array([[0, 0, 0, 1, 1]]),
        4_000,
        0,
    )[0, 0]
    assert abs(late - 0.75) < 0.03  # what does not count moves nowhere


def test_groupings_side_by_side(known, found):
    options = {
        "value": "zero",
        "dictionaries": known.dictionaries,
        "matching": Matching(n_controls=3, n_permutations=19),
        "run": QUIET,
    }
    tokens, masks = known.tokens[::3], {name: mask[::3] for name, mask in known.behaviours.items()}
    others = other_groupings(
        known.model, found, known.tokens, known.dictionaries, skip_first=0, resolutions=(0.1, 0.2, 0.5)
    )
    summary, tables = compare_groupings(
        known.model,
        {"own": found, "tokens": others["tokens"], "directions": others["directions"]},
        tokens,
        masks,
        **options,
    )
    assert (
        tables.loc["own"].equals(match_behaviours(known.model, found, tokens, masks, **options))
        and summary.loc["own"][3:].tolist() == summarise_matches(tables.loc["own"]).tolist()
    )
    assert score(known, others["tokens"]) == 1 and np.allclose(
        tables.loc["tokens"]["effect"], tables.loc["own"]["effect"], atol=1e-3
    )
    assert (
        summary["groups"].tolist() == [2, 2, 0]
        and "directions" not in tables.index.get_level_values(0)
        and np.isnan(summary["cells"]["directions"])
    )  # directions are orthogonal here: no two nodes write alike
    with pytest.raises(ValueError, match="nothing can be ablated"):
        compare_groupings(known.model, {"directions": others["directions"]}, tokens, masks, **options)


def test_behaviours_may_overlap_and_are_refused_where_they_can_not_be_measured(known, found):
    copying, empty = known.behaviours["copying"], torch.zeros_like(known.tokens, dtype=torch.bool)
    both = known.behaviours | {"either": copying | known.behaviours["counting"]}
    table = match_behaviours(
        known.model,
        found,
        known.tokens,
        both,
        value="zero",
        dictionaries=known.dictionaries,
        matching=Matching(n_controls=3, n_permutations=3),
        run=QUIET,
    )
    share = copying.sum().item() / both["either"].sum().item()
    assert np.allclose(
        table["effect"].unstack()["either"], np.log(9) * np.array([share, 1 - share]), atol=1e-3
    )
    at_the_end = empty.clone()
    at_the_end[:, -1] = True
    for given, words in [
        ({}, "at least one"),
        ({"none": empty}, "'none' is empty"),
        ({"end": at_the_end}, "'end' is empty"),
        ({"a": copying, "b": copying}, "has the positions of 'a'"),
        ({"a": copying[:3]}, "shape"),
        ({"a": copying.int()}, "bool tensor"),
        ({"a": [True]}, "list"),
    ]:
        with pytest.raises(ValueError, match=words):
            check_behaviours(given, known.tokens)
    first = empty.clone()
    first[:, 0] = True
    with pytest.raises(ValueError, match="is empty"):
        check_behaviours({"first": first}, known.tokens, skip_first=1)


def test_refusals(known, graph, found):
    options = {"value": "zero", "dictionaries": known.dictionaries, "run": QUIET}
    apart = Graph(found.nodes.assign(community=np.arange(len(found.nodes))), found.edges, found.meta)
    for run, words in [
        (
            lambda: match_behaviours(known.model, graph, known.tokens, known.behaviours, **options),
            "find_communities first",
        ),
        (
            lambda: match_behaviours(known.model, apart, known.tokens, known.behaviours, **options),
            "nothing can be ablated",
        ),
        (
            lambda: match_behaviours(
                known.model, found, known.tokens[:1], {"a": known.behaviours["copying"][:1]}, **options
            ),
            "two sequences",
        ),
        (lambda: Matching(n_controls=0), "n_controls"),
        (lambda: community_edges(found, "all"), "edges must be"),
        (lambda: draw_controls(found, -1), "community must lie"),
        (
            lambda: ablation_losses(
                known.model, found, known.tokens, np.zeros((1, 3), dtype=bool), **options
            ),
            "ablated must be bool",
        ),
        (
            lambda: ablation_losses(known.model, found, known.tokens, np.zeros((1, len(found))), **options),
            "ablated must be bool",
        ),
        (lambda: class_behaviours(known.model, known.tokens), "tokenizer"),
        (
            lambda: ablation_losses(
                tiny_model("llama"), found, known.tokens, community_edges(found), **options
            ),
            "graph",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            run()


# Views


def test_views_of_one_community(found):
    one = plot_community_layers(found, 60, community=1)
    assert {trace.name for trace in one.data if trace.name} == {"community 1"}
    flow = flow_between(found)
    assert np.isclose(flow["flow"].sum(), 1) and np.isclose(flow["expected"].sum(), 1)
    member = found.nodes.set_index("name")["community"]
    for c in (0, 1):
        members = list_members(found, c)
        assert set(members["node"]) == set(member.index[member == c])
        assert (np.diff(members["in"] + members["out"]) <= 0).all()
        assert (found.nodes["name"].to_numpy()[members["row"]] == members["node"]).all()


def test_the_threshold_of_the_inspector_hides_small_edges(found):
    widget = view_communities(found)
    (_, _, least), text = widget.children[0].children, widget.children[2]
    before = text.value
    least.value = 0.3
    assert text.value != before


def test_what_views_refuse(known, graph, found):
    activity = read_patterns(known.model, found, known.tokens, known.dictionaries, skip_first=0, run=QUIET)
    text = {"model": known.model, "corpus": known.tokens[:2], "activity": activity}
    table = pd.DataFrame({"effect": [1.0]})
    for run, words in [
        (lambda: view_communities(graph), "find_communities first"),
        (lambda: view_communities(found, model=known.model), "given together"),
        (lambda: view_communities(found, **text), "activity must have the shape"),
        (lambda: plot_community_layers(found, community=5), "community must lie"),
        (lambda: plot_behaviours(table, "size"), "columns size and p_corrected"),
        (lambda: list_members(found, 9), "community must lie"),
        (lambda: flow_between(found.keep([])), "edge with weight"),
    ]:
        with pytest.raises(ValueError, match=words):
            run()
