"""Communities of the head graph and of a graph of features of the embedded model, and whether they are behaviours: the tables of nbs/21_exp_communities.ipynb.

    python scripts/exp_communities.py      # writes nbs/results/communities_*; needs the dictionaries that `make graph` trains; 45 minutes of one core
    python scripts/exp_communities.py --n-tokens 512 --n-null 3 --n-prompts 1 --n-controls 1 --n-few 1 --n-communities 2 --n-edges 2000 --graphs small --out small      # a small run of everything

CPU seconds: graphs 100 (heads) and 190 (features); communities, patterns and network of heads 145, of features 380; cuts of heads 0.6 for four sequences of 16 tokens and 1.1 for eight prompts, of features 1 (some 400 cuts a text with 4 communities of 100 controls each): behaviours 730 and 260, groupings 300 and 260. Graphs and cuts are kept in graphs/, and a run goes on where it stopped. The partition of heads is read from communities_head_members.csv where that is there."""

import argparse
import hashlib
import random
import time
from pathlib import Path

import igraph
import networkx as nx
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import adjusted_mutual_info_score

import circuitgraph.behaviour as behaviour
from circuitgraph.behaviour import class_behaviours, community_edges, loss_behaviours, match_behaviours, summarise_matches, task_behaviours
from circuitgraph.build import build_graph
from circuitgraph.community import compare_patterns, confirm_communities, find_communities, judge_communities, judge_patterns, leave_out, levels_of, other_groupings, profile_resolutions, read_patterns, rewire, share_weights
from circuitgraph.data import load_corpus
from circuitgraph.dictionary import load_dictionaries
from circuitgraph.graph import Graph, load_graph
from circuitgraph.model import load_model
from circuitgraph.task import load_task

ROOT = Path(__file__).resolve().parent.parent
HUBS = ["embed", "logits"]  # of the head graph; of the graph of features, all that are no features
TASKS = ("ioi", "greater-than", "agreement-attractor", "capitals")  # prompts of up to 18 tokens


def remember(cut):
    "Cuts kept on disk: each is made once, however many kinds of behaviours it is looked at for, and a stopped run goes on."
    def again(model, graph, tokens, cuts, **options):
        said = [tokens.numpy(), *(graph.edges[column].cat.codes.to_numpy() for column in ("source", "target", "port")), np.array([repr(options.get("value"))])]
        folder = KEPT / hashlib.sha256(b"".join(part.tobytes() for part in said)).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{hashlib.sha256(np.packbits(row).tobytes()).hexdigest()[:16]}.npy" for row in cuts]
        missing = [i for i, file in enumerate(files) if not file.exists()]
        for start in range(0, len(missing), 32):
            some = missing[start : start + 32]
            for i, rise in zip(some, cut(model, graph, tokens, cuts[some], **options | {"progress": False}), strict=True): np.save(files[i], rise)
            print(f"{start + len(some)} of {len(missing)} cuts, {time.process_time():.0f} s", flush=True)
        return np.stack([np.load(file) for file in files])
    return again


behaviour.cut_losses, KEPT = remember(behaviour.cut_losses), ROOT / "graphs/communities_cuts"


def build_halves(model, grain: str, dictionaries, args) -> dict[str, Graph]:
    "The graph of all tokens, and of each half of them."
    n = args.n_tokens if grain == "head" else min(1_024, args.n_tokens)
    corpus = load_corpus("default", model, n, seq_len=128)
    found = {}
    for name, rows in (("one", corpus[0::2]), ("other", corpus[1::2])):
        folder = args.graphs / f"communities_{grain}_{n}_{name}"
        if not folder.exists(): build_graph(model, rows, dictionaries or grain, memory=2e9).save(folder)
        found[name] = load_graph(folder)
    return found | {"all": found["one"].merge(found["other"])}


def find(kinds: dict[str, dict[str, Graph]], args) -> dict[str, pd.DataFrame]:
    "Nulls, resolutions, and what is found on one half and holds on the other, with hubs and without."
    judged, profiles, confirmed = {}, {}, {}
    for kind, now in kinds.items():
        for method, null in (("layered", "layered"), ("leiden", "layered"), ("leiden", "configuration")): judged[kind, method, null] = judge_communities(now["all"], method, null=null, n_null=args.n_null)
        for method in ("layered", "leiden"):
            profiles[kind, method] = profile_resolutions(now["all"], method, (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0))
            confirmed[kind, method] = confirm_communities(now["one"], now["other"], method, n_null=args.n_confirm).query("nodes >= 5")
    names = ["graph", "method"]
    return {"judged": pd.DataFrame(judged).T.rename_axis([*names, "rewired"]), "profiles": pd.concat(profiles, names=names), "confirmed": pd.concat(confirmed, names=names)}


def pattern(graphs: dict[str, Graph], activity, measure: str, args) -> dict[str, pd.DataFrame]:
    "Communities of activation beside shuffled ones, and how far partitions agree: levels, what searches find on all tokens and on each half, and activation."
    graph, likeness = graphs["all"], compare_patterns(activity, measure)
    found = {"levels": levels_of(graph)}
    for method in ("layered", "leiden"):
        for name, part in graphs.items(): found[method if name == "all" else f"{method}, {name} half"] = find_communities(part, method, n_seeds=3).nodes["community"].to_numpy()
    for method in ("activation", "joint"): found[method] = find_communities(graph, method, likeness=likeness).nodes["community"].to_numpy()
    on = np.logical_and.reduce([member >= 0 for member in found.values()])
    alike = pd.DataFrame({a: {b: adjusted_mutual_info_score(x[on], y[on]) for b, y in found.items()} for a, x in found.items()})
    judged = judge_patterns(activity[:, np.flatnonzero(found["layered"] >= 0)], measure, n_null=args.n_null)
    return {"patterns": pd.DataFrame({measure: judged}).T.rename_axis("measure"), "alike": alike.assign(nodes=on.sum(), communities=[len(np.unique(member[on])) for member in found.values()]).rename_axis("partition")}


def strongest(graph: Graph, share: float = 0.05) -> igraph.Graph:
    "The edges that hold the largest shares, directions and ports left out."
    weight = share_weights(graph)
    strong = graph.keep(weight >= np.quantile(weight, 1 - share))
    return igraph.Graph(len(graph.nodes), [*zip(strong.edges["source"].cat.codes, strong.edges["target"].cat.codes, strict=True)]).simplify()


def describe(simple: igraph.Graph) -> pd.Series:
    "Clustering, path lengths, rich club, degrees."
    degree = np.array(simple.degree())
    club = nx.rich_club_coefficient(nx.Graph(simple.get_edgelist()), normalized=False)
    top = int(np.quantile(degree[degree > 0], 0.9))
    return pd.Series({"edges": simple.ecount(), "clustering": simple.transitivity_avglocal_undirected(mode="zero"), "transitivity": simple.transitivity_undirected(), "path length": simple.average_path_length(), "rich club": club.get(min(top, max(club)), np.nan), "largest degree": degree.max(), "degree gini": gini(degree)})


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
    for null, draw in (("layers kept", lambda seed: strongest(rewire(graph, seed, by="share"))), ("degrees kept", lambda _: shuffle_degrees(simple))):
        own, chance = describe(simple), pd.DataFrame([describe(draw(seed)) for seed in range(args.n_null)])
        own["small world"] = 1.0
        chance["small world"] = (chance["clustering"] / own["clustering"]) / (chance["path length"] / own["path length"])
        tables[null] = pd.DataFrame({"graph": own, "null": chance.mean(), "null_sd": chance.std(ddof=1)}).assign(z=lambda t: (t["graph"] - t["null"]) / t["null_sd"])
    share, nodes = share_weights(graph), graph.nodes
    ends = {end: graph.edges[end].cat.codes.to_numpy() for end in ("source", "target")}
    hubs = pd.DataFrame({"node": nodes["name"], "kind": nodes["kind"], "out": np.bincount(ends["source"], share, len(nodes)) / share.sum(), "degree": simple.degree(), "community": nodes["community"]})
    return {"network": pd.concat(tables, names=["kept", "statistic"]), "hubs": hubs.sort_values("out", ascending=False).reset_index(drop=True)}


def match(model, groupings: dict[str, Graph], texts: dict, dictionaries, n_controls: int, n_groups: int) -> dict[str, pd.DataFrame]:
    "Groups of nodes against behaviours: the largest groups of each grouping of one graph, at equal budgets."
    tables, summaries = {}, {}
    for name, grouping in groupings.items():
        member = grouping.nodes["community"]
        graph = Graph(grouping.nodes.assign(community=member.where(member < n_groups, -1)), grouping.edges, grouping.meta)
        for kind, (tokens, masks) in texts.items():
            if not community_edges(graph).any(): continue  # nothing to cut
            table = match_behaviours(model, graph, tokens, masks, n_controls=n_controls, skip_first=1, dictionaries=dictionaries, progress=False)
            tables[name, kind], summaries[name, kind] = table, pd.concat([summarise_matches(table), pd.Series({"groups": int(member.max()) + 1, "controls": n_controls, "sequences": len(tokens)})])
            print(name, kind, summaries[name, kind].round(3).to_dict(), flush=True)
    names = ["grouping", "kind"]
    return {"matrix": pd.concat(tables, names=names), "summary": pd.DataFrame(summaries).T.rename_axis(names)}


def text_of(model, args, n_losses: int = 4) -> dict:
    "A text with classes of tokens, and with clusters of losses."
    text = load_corpus("default", model, args.n_text, seq_len=args.seq_len, seed=2)
    some = {"classes": class_behaviours(model, text), "losses": loss_behaviours(model, text, n_losses)}
    return {kind: (text, {name: mask for name, mask in masks.items() if min(mask[0::2, 1:].sum(), mask[1::2, 1:].sum()) >= 5}) for kind, masks in some.items()}


def task_of(model, args) -> dict:
    "Prompts of tasks."
    return {"tasks": task_behaviours({name: load_task(name, model, n=args.n_prompts, seed=0) for name in TASKS})}


def head_parts(model, args) -> dict:
    "What is measured of the head graph, by part."
    graphs = build_halves(model, "head", None, args)
    halves, text = {name: leave_out(graph, HUBS) for name, graph in graphs.items()}, load_corpus("default", model, args.n_tokens, seq_len=128, seed=1)
    bare, file = halves["all"], args.out / "communities_head_members.csv"
    if not file.exists(): find_communities(bare, "layered", n_seeds=5).nodes[["name", "layer", "community"]].to_csv(file, index=False)
    found = Graph(bare.nodes.assign(community=pd.read_csv(file)["community"].to_numpy()), bare.edges, bare.meta)
    return {"communities": lambda: find({"with hubs": graphs, "without hubs": halves}, args), "patterns": lambda: pattern(halves, read_patterns(model, bare, text, progress=False), "correlation", args), "network": lambda: compare_network(found, args),
            "behaviours": lambda: match(model, {"communities": found}, task_of(model, args) | text_of(model, args), None, args.n_controls, args.n_communities),
            "groupings": lambda: rename(match(model, {"communities": found, **other_groupings(model, found, text)}, text_of(model, args), None, args.n_few, args.n_communities))}


def rename(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]: return {f"groupings_{name}": table for name, table in tables.items()}


def largest(graph: Graph, n: int) -> Graph:
    "The edges that hold the largest shares; shares stay as they are."
    share, size, target = share_weights(graph), graph.edges["abs_weight"].to_numpy(), graph.edges["target"].cat.codes.to_numpy()
    stay = share >= np.partition(share, -min(n, len(share)))[-min(n, len(share))]
    before, after = (np.bincount(target[on], size[on], minlength=len(graph.nodes)) for on in (slice(None), stay))
    kept = graph.nodes["kept"].to_numpy() * after / np.where(before > 0, before, 1)
    return Graph(graph.nodes.assign(kept=kept), graph.edges.loc[stay], graph.meta)


def feature_parts(model, args) -> dict:
    "What is measured of the graph of features, by part."
    dictionaries = load_dictionaries(args.dictionaries, model)
    graphs = build_halves(model, "feature", dictionaries, args)
    hubs, text = sorted(set(graphs["all"].nodes["kind"]) - {"feature"}), load_corpus("default", model, min(2_048, args.n_tokens), seq_len=128, seed=1)
    halves = {name: largest(leave_out(graph, hubs), args.n_edges) for name, graph in graphs.items()}
    found = find_communities(halves["all"], "layered", resolution=args.resolution, n_seeds=3)
    few = argparse.Namespace(**vars(args) | {"n_null": max(2, args.n_null // 2)})
    return {"communities": lambda: find({"without hubs": halves}, few), "patterns": lambda: pattern(halves, read_patterns(model, found, text, dictionaries, progress=False), "phi", few), "behaviours": lambda: match(model, {"communities": found}, text_of(model, args), dictionaries, args.n_controls, args.n_feature_communities),
            "groupings": lambda: rename(match(model, {"communities": found, **other_groupings(model, found, text, dictionaries)}, text_of(model, args), dictionaries, args.n_few, args.n_feature_communities))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(f"{grain}-{part}" for grain in ("head", "feature") for part in ("communities", "patterns", "network", "behaviours", "groupings") if (grain, part) != ("feature", "network")))
    for name, value, kind in (("n-tokens", 4_096, int), ("n-null", 20, int), ("n-confirm", 39, int), ("n-controls", 100, int), ("n-few", 39, int), ("n-prompts", 2, int), ("n-text", 64, int), ("seq-len", 16, int), ("n-communities", 4, int), ("n-feature-communities", 2, int), ("n-edges", 30_000, int), ("resolution", 4.0, float)): parser.add_argument(f"--{name}", type=kind, default=value)
    parser.add_argument("--graphs", type=Path, default=ROOT / "graphs")
    parser.add_argument("--dictionaries", type=Path, default=Path.home() / ".cache/circuitgraph/dictionaries/smollm2-135m-layers-8-11")
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
