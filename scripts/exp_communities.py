"""Communities of the head graph of the embedded model, and whether they are behaviours: the tables of nbs/21_exp_communities.ipynb.

    python scripts/exp_communities.py --parts communities,network,behaviours      # writes nbs/results/communities_*
    python scripts/exp_communities.py --n-tokens 512 --n-null 3 --n-prompts 1 --n-text 128 --n-controls 1 --n-communities 2 --out small      # a small run of everything: two minutes

On one core, 4 prompts, or 2 sequences of 64 tokens, are run with some edges cut in a second. The defaults cut 511 sets of edges, on 24 prompts and twice on 8 sequences: two hours; the rest takes minutes."""

import argparse
import time
from pathlib import Path

import igraph
import networkx as nx
import numpy as np
import pandas as pd
import torch

from circuitgraph.behaviour import class_behaviours, loss_behaviours, match_behaviours, summarise_matches, task_behaviours
from circuitgraph.build import build_graph
from circuitgraph.community import compare_patterns, confirm_communities, find_communities, judge_communities, judge_patterns, leave_out, profile_resolutions, read_patterns, rewire, share_weights
from circuitgraph.data import load_corpus
from circuitgraph.graph import Graph, load_graph
from circuitgraph.model import load_model
from circuitgraph.task import load_task

ROOT = Path(__file__).resolve().parent.parent
HUBS = ["embed", "logits"]
TASKS = ("ioi", "greater-than", "agreement", "induction", "docstring", "capitals")


def build_halves(model, args) -> dict[str, Graph]:
    "The graph of all tokens, and of each half of them."
    corpus = load_corpus("default", model, args.n_tokens, seq_len=128)
    found = {}
    for name, rows in (("one", corpus[0::2]), ("other", corpus[1::2])):
        folder = args.out / f"communities_graph_{name}"
        if not folder.exists(): build_graph(model, rows, "head").save(folder)
        found[name] = load_graph(folder)
    return found | {"all": found["one"].merge(found["other"])}


def find(graphs: dict[str, Graph], model, args) -> dict[str, pd.DataFrame]:
    "Resolutions, nulls, and what is found on one half and holds on the other, with hubs and without."
    judged, profiles, confirmed = {}, {}, {}
    for hubs in ("with hubs", "without hubs"):
        now = {name: graph if hubs == "with hubs" else leave_out(graph, HUBS) for name, graph in graphs.items()}
        for method, null in (("layered", "layered"), ("leiden", "layered"), ("leiden", "configuration")): judged[hubs, method, null] = judge_communities(now["all"], method, null=null, n_null=args.n_null)
        for method in ("layered", "leiden"): profiles[hubs, method] = profile_resolutions(now["all"], method)
        for method in ("layered", "leiden"): confirmed[hubs, method] = confirm_communities(now["one"], now["other"], method, n_null=max(19, args.n_null))
    text = load_corpus("default", model, args.n_tokens, seq_len=128, seed=1)
    activity = read_patterns(model, graphs["all"], text, progress=False)
    judged["patterns", "leiden", "shuffled"] = judge_patterns(activity, "correlation", n_null=args.n_null)
    return {"judged": pd.DataFrame(judged).T, "profiles": pd.concat(profiles), "confirmed": pd.concat(confirmed)}


def describe(graph: Graph, share: float = 0.05) -> pd.Series:
    "Network statistics of the strongest edges, directions left out: clustering, path lengths, rich club, degrees."
    strong = graph.keep(share_weights(graph) >= np.quantile(share_weights(graph), 1 - share))
    simple = igraph.Graph(len(graph.nodes), [*zip(strong.edges["source"].cat.codes, strong.edges["target"].cat.codes, strict=True)]).simplify()
    degree = np.array(simple.degree())
    net = nx.Graph(simple.get_edgelist())
    club = nx.rich_club_coefficient(net, normalized=False)
    top = int(np.quantile(degree[degree > 0], 0.9))
    out = graph.out_strength().to_numpy()
    return pd.Series({"edges": simple.ecount(), "transitivity": simple.transitivity_undirected(), "path length": simple.average_path_length(), "rich club": club.get(min(top, max(club)), np.nan), "largest degree": degree.max(), "degree gini": gini(degree), "out-strength gini": gini(out)})


def gini(x: np.ndarray) -> float:
    x = np.sort(x)
    return float(2 * (np.arange(1, len(x) + 1) * x).sum() / (len(x) * x.sum()) - (len(x) + 1) / len(x))


def compare_network(graph: Graph, args) -> dict[str, pd.DataFrame]:
    "Statistics beside those of rewired graphs, and the hubs."
    own, chance = describe(graph), pd.DataFrame([describe(rewire(graph, seed, by="share")) for seed in range(args.n_null)])
    table = pd.DataFrame({"graph": own, "null": chance.mean(), "null_sd": chance.std(ddof=1)})
    share, nodes = share_weights(graph), graph.nodes
    hubs = pd.DataFrame({"node": nodes["name"], "out": np.bincount(graph.edges["source"].cat.codes, share, len(nodes)), "community": find_communities(graph, "layered").nodes["community"]})
    return {"network": table.assign(z=(table["graph"] - table["null"]) / table["null_sd"]), "hubs": hubs.nlargest(40, "out")}


def match(graph: Graph, model, args) -> dict[str, pd.DataFrame]:
    "Communities against tasks, classes of tokens and clusters of losses."
    found = find_communities(leave_out(graph, HUBS), "layered", resolution=args.resolution, n_seeds=5)
    member = found.nodes["community"]
    kept = found.nodes.assign(community=member.where(member < args.n_communities, -1))
    found = Graph(kept, found.edges, found.meta)
    tables, summaries = {}, {}
    tokens, tasks = task_behaviours({name: load_task(name, model, n=args.n_prompts, seed=0) for name in TASKS})
    text = load_corpus("default", model, args.n_text, seq_len=64, seed=2)
    rare = lambda masks: {name: mask for name, mask in masks.items() if mask[:, 1:].sum() >= 5}  # noqa: E731
    for kind, (some, masks) in {"tasks": (tokens, tasks), "classes": (text, rare(class_behaviours(model, text))), "losses": (text, rare(loss_behaviours(model, text)))}.items():
        start = time.time()
        tables[kind] = match_behaviours(model, found, some, masks, n_controls=args.n_controls, skip_first=1, progress=True)
        summaries[kind] = summarise_matches(tables[kind])
        print(kind, f"{time.time() - start:.0f} s", summaries[kind].to_dict(), flush=True)
    likeness = compare_patterns(read_patterns(model, found, text, progress=False), "correlation")
    other = find_communities(found, "activation", likeness=likeness).nodes["community"]
    return {"matrix": pd.concat(tables), "summary": pd.DataFrame(summaries).T, "members": found.nodes.assign(activation=other)[["name", "community", "activation"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="communities,network,behaviours")
    for name, value, kind in (("n-tokens", 4_096, int), ("n-null", 20, int), ("n-controls", 100, int), ("n-prompts", 4, int), ("n-text", 512, int), ("n-communities", 5, int), ("resolution", 1.0, float)): parser.add_argument(f"--{name}", type=kind, default=value)
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    model, start = load_model("smollm2-135m"), time.time()
    graphs = build_halves(model, args)
    print(f"graph: {time.time() - start:.0f} s", flush=True)
    for part, run in (("communities", lambda: find(graphs, model, args)), ("network", lambda: compare_network(leave_out(graphs["all"], HUBS), args)), ("behaviours", lambda: match(graphs["all"], model, args))):
        if part not in args.parts.split(","): continue
        start = time.time()
        for name, table in run().items():
            table.to_csv(args.out / f"communities_{name}.csv", float_format="%.5g")
            print(name, table.head(12).to_string(), "", sep="\n", flush=True)
        print(f"{part}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
