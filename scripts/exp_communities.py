"""Communities of the head graph and of a graph of features of the embedded model, and their behaviours.

    python scripts/exp_communities.py   # writes nbs/results/communities_*, the tables of 92_exp_communities

It needs the dictionaries that `make graph` trains, and takes 45 minutes of one core. A small run of
everything:

    python scripts/exp_communities.py --n-tokens 512 --n-null 3 --n-prompts 1 --n-controls 1 --n-few 1 \\
        --n-communities 2 --n-edges 2000 --graphs small --out small

CPU seconds: graphs 100 (heads) and 190 (features); communities, patterns and network of heads 145, of
features 380; one ablation of heads takes 0.6 for four sequences of 16 tokens and 1.1 for eight prompts, of
features 1. With four communities of 100 controls each, a text takes some 400 ablations: behaviours 730 and
260, groupings 300 and 260. Graphs and ablations are kept in graphs/, and a stopped run goes on. The
partition of heads is read from communities_head_members.csv where that is there.
"""

import argparse
import random
import time
from pathlib import Path

import igraph
import networkx as nx
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import adjusted_mutual_info_score

from circuitgraph.build.build import build_graph
from circuitgraph.community.behaviour import Matching, class_behaviours, community_edges, loss_behaviours
from circuitgraph.community.behaviour import match_behaviours, summarise_matches, task_behaviours
from circuitgraph.community.confirm import confirm_communities
from circuitgraph.community.groupings import other_groupings, profile_resolutions
from circuitgraph.community.links import edge_codes, keep_shares, leave_out, node_levels, share_weights
from circuitgraph.community.nulls import judge_communities, rewire
from circuitgraph.community.patterns import compare_patterns, judge_patterns, read_patterns
from circuitgraph.community.search import find_communities
from circuitgraph.data.corpus import load_corpus
from circuitgraph.data.prompts import load_task
from circuitgraph.dictionary.store import load_dictionaries
from circuitgraph.graph.graph import Graph
from circuitgraph.model.loading import load_model
from circuitgraph.options import Run

ROOT = Path(__file__).resolve().parent.parent
HUBS = ["embed", "logits"]  # of the head graph; of the graph of features, all that are no features
TASKS = ("ioi", "greater-than", "agreement-attractor", "capitals")  # prompts of up to 18 tokens


def build_halves(model, grain: str, dictionaries, args) -> dict[str, Graph]:
    "The graph of all tokens, and of each half of them."
    n = args.n_tokens if grain == "head" else min(1_024, args.n_tokens)
    corpus = load_corpus("default", model, n, seq_len=128)
    graphs = {}
    for name, rows in (("one", corpus[0::2]), ("other", corpus[1::2])):
        folder = args.graphs / f"communities_{grain}_{n}_{name}"
        if not (folder / "meta.json").exists():
            build_graph(model, rows, dictionaries or grain, run=Run(memory=2e9)).save(folder)
        graphs[name] = Graph.load(folder)
    return graphs | {"all": graphs["one"].merge(graphs["other"])}


def find(kinds: dict[str, dict[str, Graph]], args) -> dict[str, pd.DataFrame]:
    "Nulls, resolutions, and what is found on one half and holds on the other, with hubs and without."
    resolutions = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
    judged, profiles, confirmed = {}, {}, {}
    for kind, graphs in kinds.items():
        for method, null in (("layered", "layered"), ("leiden", "layered"), ("leiden", "configuration")):
            key = kind, method, null
            judged[key] = judge_communities(graphs["all"], method, null=null, n_null=args.n_null)
        for method in ("layered", "leiden"):
            profiles[kind, method] = profile_resolutions(graphs["all"], method, resolutions)
            tested = confirm_communities(graphs["one"], graphs["other"], method, n_null=args.n_confirm)
            confirmed[kind, method] = tested.query("nodes >= 5")
    names = ["graph", "method"]
    return {
        "judged": pd.DataFrame(judged).T.rename_axis([*names, "rewired"]),
        "profiles": pd.concat(profiles, names=names),
        "confirmed": pd.concat(confirmed, names=names),
    }


def compare_partitions(graphs: dict[str, Graph], activity, measure: str, args) -> dict[str, pd.DataFrame]:
    """Communities of activation beside shuffled ones, and how far partitions agree.

    Partitions are levels, what searches find on all tokens and on each half, and groups by activation.
    """
    graph, similarity = graphs["all"], compare_patterns(activity, measure)
    partitions = {"levels": node_levels(graph.nodes)}
    for method in ("layered", "leiden"):
        for name, part in graphs.items():
            label = method if name == "all" else f"{method}, {name} half"
            partitions[label] = find_communities(part, method, n_seeds=3).nodes["community"].to_numpy()
    for method in ("activation", "joint"):
        found = find_communities(graph, method, similarity=similarity)
        partitions[method] = found.nodes["community"].to_numpy()
    shown = np.logical_and.reduce([member >= 0 for member in partitions.values()])
    alike = {
        a: {b: adjusted_mutual_info_score(one[shown], other[shown]) for b, other in partitions.items()}
        for a, one in partitions.items()
    }
    sizes = [len(np.unique(member[shown])) for member in partitions.values()]
    table = pd.DataFrame(alike).assign(nodes=shown.sum(), communities=sizes).rename_axis("partition")
    active = activity[:, np.flatnonzero(partitions["layered"] >= 0)]
    judged = judge_patterns(active, measure, n_null=args.n_null)
    return {"patterns": pd.DataFrame({measure: judged}).T.rename_axis("measure"), "alike": table}


def strongest(graph: Graph, share: float = 0.05) -> igraph.Graph:
    "The edges that hold the largest shares, directions and ports left out."
    weight = share_weights(graph)
    strong = graph.keep(weight >= np.quantile(weight, 1 - share))
    source, target, _ = edge_codes(strong)
    return igraph.Graph(len(graph.nodes), np.stack([source, target], 1)).simplify()


def describe(simple: igraph.Graph) -> pd.Series:
    "Clustering, path lengths, rich club, degrees."
    degree = np.array(simple.degree())
    club = nx.rich_club_coefficient(nx.Graph(simple.get_edgelist()), normalized=False)
    top = int(np.quantile(degree[degree > 0], 0.9))
    return pd.Series(
        {
            "edges": simple.ecount(),
            "clustering": simple.transitivity_avglocal_undirected(mode="zero"),
            "transitivity": simple.transitivity_undirected(),
            "path length": simple.average_path_length(),
            "rich club": club.get(min(top, max(club)), np.nan),
            "largest degree": degree.max(),
            "degree gini": gini(degree),
        }
    )


def gini(x: np.ndarray) -> float:
    x = np.sort(x)
    return float(2 * (np.arange(1, len(x) + 1) * x).sum() / (len(x) * x.sum()) - (len(x) + 1) / len(x))


def shuffle_degrees(simple: igraph.Graph) -> igraph.Graph:
    "As many edges at each node, otherwise at random, layers or not."
    made = simple.copy()
    made.rewire(10 * simple.ecount())
    return made


def compare_network(graph: Graph, args) -> dict[str, pd.DataFrame]:
    "Statistics of the strongest edges beside those of two kinds of random graphs, and the hubs."
    igraph.set_random_number_generator(random.Random(0))
    simple, tables = strongest(graph), {}
    draws = {
        "layers kept": lambda seed: strongest(rewire(graph, seed, by="share")),
        "degrees kept": lambda _: shuffle_degrees(simple),
    }
    for null, draw in draws.items():
        own = describe(simple)
        chance = pd.DataFrame([describe(draw(seed)) for seed in range(args.n_null)])
        own["small world"] = 1.0
        clustering, length = (
            chance["clustering"] / own["clustering"],
            chance["path length"] / own["path length"],
        )
        chance["small world"] = clustering / length
        table = pd.DataFrame({"graph": own, "null": chance.mean(), "null_sd": chance.std(ddof=1)})
        tables[null] = table.assign(z=(table["graph"] - table["null"]) / table["null_sd"])
    share, nodes = share_weights(graph), graph.nodes
    source, _, _ = edge_codes(graph)
    hubs = pd.DataFrame(
        {
            "node": nodes["name"],
            "kind": nodes["kind"],
            "out": np.bincount(source, share, len(nodes)) / share.sum(),
            "degree": simple.degree(),
            "community": nodes["community"],
        }
    )
    return {
        "network": pd.concat(tables, names=["kept", "statistic"]),
        "hubs": hubs.sort_values("out", ascending=False).reset_index(drop=True),
    }


def match(model, groupings: dict[str, Graph], texts: dict, dictionaries, budget) -> dict[str, pd.DataFrame]:
    "Groups of nodes against behaviours: the largest groups of each grouping of one graph."
    n_controls, n_groups = budget
    options = {
        "dictionaries": dictionaries,
        "matching": Matching(n_controls=n_controls, skip_first=1),
        "run": Run(checkpoint=ROOT / "graphs/communities_ablated", progress=False),
    }
    tables, summaries = {}, {}
    for name, grouping in groupings.items():
        member = grouping.nodes["community"]
        nodes = grouping.nodes.assign(community=member.where(member < n_groups, -1))
        graph = Graph(nodes, grouping.edges, grouping.meta)
        if not community_edges(graph).any():
            continue  # nothing to ablate
        for kind, (tokens, masks) in texts.items():
            table = match_behaviours(model, graph, tokens, masks, **options)
            size = {"groups": int(member.max()) + 1, "controls": n_controls, "sequences": len(tokens)}
            tables[name, kind] = table
            summaries[name, kind] = pd.concat([summarise_matches(table), pd.Series(size)])
            print(name, kind, summaries[name, kind].round(3).to_dict(), flush=True)
    names = ["grouping", "kind"]
    return {"matrix": pd.concat(tables, names=names), "summary": pd.DataFrame(summaries).T.rename_axis(names)}


def text_of(model, args, n_losses: int = 4) -> dict:
    "A text with classes of tokens, and with clusters of losses; five positions at least in each half."
    text = load_corpus("default", model, args.n_text, seq_len=args.seq_len, seed=2)
    kinds = {"classes": class_behaviours(model, text), "losses": loss_behaviours(model, text, n_losses)}
    texts = {}
    for kind, masks in kinds.items():
        large = {
            name: mask for name, mask in masks.items() if min(mask[0::2, 1:].sum(), mask[1::2, 1:].sum()) >= 5
        }
        texts[kind] = (text, large)
    return texts


def task_of(model, args) -> dict:
    "Prompts of tasks."
    tasks = {name: load_task(name, model, n=args.n_prompts, seed=0) for name in TASKS}
    return {"tasks": task_behaviours(tasks)}


def match_groupings(model, found: Graph, text, dictionaries, args, budget) -> dict[str, pd.DataFrame]:
    "Communities and other groupings of the same nodes against behaviours of text."
    groupings = {"communities": found, **other_groupings(model, found, text, dictionaries)}
    tables = match(model, groupings, text_of(model, args), dictionaries, budget)
    return {f"groupings_{name}": table for name, table in tables.items()}


def head_parts(model, args) -> dict:
    "What is measured of the head graph, by part."
    graphs = build_halves(model, "head", None, args)
    halves = {name: leave_out(graph, HUBS) for name, graph in graphs.items()}
    text = load_corpus("default", model, args.n_tokens, seq_len=128, seed=1)
    bare, file = halves["all"], args.out / "communities_head_members.csv"
    if not file.exists():
        members = find_communities(bare, "layered", n_seeds=5).nodes[["name", "layer", "community"]]
        members.to_csv(file, index=False)
    member = pd.read_csv(file)["community"].to_numpy()
    found = Graph(bare.nodes.assign(community=member), bare.edges, bare.meta)
    many, few = (args.n_controls, args.n_communities), (args.n_few, args.n_communities)

    def patterns():
        activity = read_patterns(model, bare, text, run=Run(batch_size=8, progress=False))
        return compare_partitions(halves, activity, "correlation", args)

    def behaviours():
        texts = task_of(model, args) | text_of(model, args)
        return match(model, {"communities": found}, texts, None, many)

    return {
        "communities": lambda: find({"with hubs": graphs, "without hubs": halves}, args),
        "patterns": patterns,
        "network": lambda: compare_network(found, args),
        "behaviours": behaviours,
        "groupings": lambda: match_groupings(model, found, text, None, args, few),
    }


def largest(graph: Graph, n: int) -> Graph:
    "The edges that hold the largest shares; shares stay as they are."
    share = share_weights(graph)
    least = np.partition(share, -min(n, len(share)))[-min(n, len(share))]
    return keep_shares(graph, share >= least)


def feature_parts(model, args) -> dict:
    "What is measured of the graph of features, by part."
    dictionaries = load_dictionaries(args.dictionaries, model)
    graphs = build_halves(model, "feature", dictionaries, args)
    hubs = sorted(set(graphs["all"].nodes["kind"]) - {"feature"})
    text = load_corpus("default", model, min(2_048, args.n_tokens), seq_len=128, seed=1)
    halves = {name: largest(leave_out(graph, hubs), args.n_edges) for name, graph in graphs.items()}
    found = find_communities(halves["all"], "layered", resolution=args.resolution, n_seeds=3)
    fewer = argparse.Namespace(**vars(args) | {"n_null": max(2, args.n_null // 2)})
    many, few = (args.n_controls, args.n_feature_communities), (args.n_few, args.n_feature_communities)

    def patterns():
        activity = read_patterns(model, found, text, dictionaries, run=Run(batch_size=8, progress=False))
        return compare_partitions(halves, activity, "phi", fewer)

    return {
        "communities": lambda: find({"without hubs": halves}, fewer),
        "patterns": patterns,
        "behaviours": lambda: match(model, {"communities": found}, text_of(model, args), dictionaries, many),
        "groupings": lambda: match_groupings(model, found, text, dictionaries, args, few),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        default=",".join(
            f"{grain}-{part}"
            for grain in ("head", "feature")
            for part in ("communities", "patterns", "network", "behaviours", "groupings")
            if (grain, part) != ("feature", "network")
        ),
    )
    for name, value, kind in (
        ("n-tokens", 4_096, int),
        ("n-null", 20, int),
        ("n-confirm", 39, int),
        ("n-controls", 100, int),
        ("n-few", 39, int),
        ("n-prompts", 2, int),
        ("n-text", 64, int),
        ("seq-len", 16, int),
        ("n-communities", 4, int),
        ("n-feature-communities", 2, int),
        ("n-edges", 30_000, int),
        ("resolution", 4.0, float),
    ):
        parser.add_argument(f"--{name}", type=kind, default=value)
    parser.add_argument("--graphs", type=Path, default=ROOT / "graphs")
    parser.add_argument(
        "--dictionaries",
        type=Path,
        default=Path.home() / ".cache/circuitgraph/dictionaries/smollm2-135m-layers-8-11",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    model = load_model("smollm2-135m")
    for grain, parts in (("head", head_parts), ("feature", feature_parts)):
        wanted = [part.removeprefix(f"{grain}-") for part in args.parts.split(",") if part.startswith(grain)]
        runs = parts(model, args) if wanted else {}
        for part in wanted:
            start = time.process_time()
            for name, table in runs[part]().items():
                table.to_csv(args.out / f"communities_{grain}_{name}.csv", float_format="%.5g")
                print(name, table.head(40).to_string(), "", sep="\n", flush=True)
            print(f"{grain}-{part}: {time.process_time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
