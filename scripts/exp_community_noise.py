"""Noise that must not look like communities, and planted ones that must: two tables of 92_exp_communities.

    make graph                              # trains the dictionaries of layers 8 to 11
    python scripts/exp_community_noise.py

Writes to nbs/results:

- community_noise.csv: for each kind of noise and each of 200 draws, the smallest p of any community;
- community_power.csv: communities of features that are planted in the graph of two halves of a text, whose
  weights are noise otherwise. A row for each size, strength and draw: how many are planted and confirmed.

Noise lies on edges between features of one kind of token (`tokens`, `heavy`, `hubs`, `normal`), and between
levels without kinds (`layered`). In the graph of the text, weights change places among edges of nearly the
same expected weight, and those within a planted group are then multiplied by the strength, in both halves
alike. A group grows from a random feature along the graph's edges, so its features are active together. A
second run goes on after the rows that are there. CPU time on one core: 10 minutes for noise, 15 for power.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from circuitgraph.community.confirm import confirm_communities
from circuitgraph.community.links import NULLS, Links, leave_out, read_links, share_weights
from circuitgraph.community.nulls import redraw
from circuitgraph.community.search import find_search, rank_communities
from circuitgraph.dictionary.store import load_dictionaries
from circuitgraph.graph.graph import Graph
from circuitgraph.model.loading import load_model
from exp_communities import build_halves
from exp_small_features import add_row, has_row

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from planted import draw_layered, draw_tokens, halve  # noqa: E402

CACHE = Path.home() / ".cache/circuitgraph/dictionaries/smollm2-135m-layers-8-11"
NOISE = ("tokens", "heavy", "hubs", "layered", "normal")
SIZES, STRENGTHS = (20, 60, 200), (1.0, 1.5, 2.0, 3.0, 5.0)
N_PLANTED = 5  # groups of one size in a graph


def draw_noise(kind: str, seed: int) -> list[Graph]:
    "Two halves of a graph without communities."
    if kind == "layered":
        graph = draw_layered(within=0.0, n_edges=1_500, width=12, seed=seed)[0]
    else:
        graph = draw_tokens(n_kinds=6, width=24, noise=kind, seed=seed)[0]
    return halve(graph, seed)


def add_noise(file: Path, n_draws: int, n_null: int) -> None:
    "Add the smallest p of each draw."
    for kind in NOISE:
        for seed in range(n_draws):
            if has_row(file, noise=kind, seed=seed):
                continue
            tested = confirm_communities(
                *draw_noise(kind, seed), "co-active", weight="abs_weight", n_null=n_null, seed=seed
            )
            row = {"noise": kind, "seed": seed, "n_null": n_null, "communities": len(tested)}
            add_row(file, pd.DataFrame([row | {"smallest_p": tested["p"].min()}]))


# Planted communities


def read_halves(args: argparse.Namespace) -> list[Graph]:
    "The edges between features that hold the largest shares on one half of a text, weighed on each half."
    model = load_model("smollm2-135m")
    graphs = build_halves(model, "feature", load_dictionaries(args.dictionaries, model), args)
    hubs = sorted(set(graphs["one"].nodes["kind"]) - {"feature"})
    one, other = (leave_out(graphs[name], hubs) for name in ("one", "other"))
    share = share_weights(one)
    chosen = one.keep(share >= np.partition(share, -args.n_edges)[-args.n_edges])
    halves = []
    for graph in (one, other):
        by_name = pd.Series(share_weights(graph), index=graph.edge_names)
        weight = by_name.reindex(chosen.edge_names).fillna(0).to_numpy()
        halves.append(Graph(chosen.nodes, chosen.edges.assign(abs_weight=weight), chosen.meta))
    return halves


def grow_group(joined: sp.csr_array, size: int, free: np.ndarray, draw: np.random.Generator) -> list[int]:
    "Free nodes that hang together, from a random one on; fewer than `size` where there are no more."
    group = [int(draw.choice(np.flatnonzero(free)))]
    border: set[int] = set()
    while len(group) < size:
        border |= set(joined[[group[-1]]].indices.tolist())
        border = {node for node in border if free[node]} - set(group)
        if not border:
            break
        group.append(int(draw.choice(sorted(border))))
    return group


def plant(links: list[Links], size: int, strength: float, seed: int) -> tuple[list[Links], np.ndarray]:
    "Noise on the edges of two halves, with groups of features; and the group of each node, -1 for none."
    draw = np.random.default_rng(seed)
    drawn = redraw(links, NULLS["co-active"], draw)
    first = drawn[0]
    n, ends = len(first.nodes), (first.source, first.target)
    joined = sp.csr_array((np.ones(len(first.source)), ends), shape=(n, n))
    joined = sp.csr_array(joined + joined.T)
    group = np.full(n, -1)
    for i in range(N_PLANTED):
        free = (np.diff(joined.indptr) > 0) & (group < 0)
        group[grow_group(joined, size, free, draw)] = i
    inside = (group[first.source] == group[first.target]) & (group[first.source] >= 0)
    factor = np.where(inside, strength, 1.0)
    return [one._replace(weight=one.weight * factor) for one in drawn], group


def overlap(member: np.ndarray, group: np.ndarray) -> np.ndarray:  # [group community]
    "Jaccard index of each planted group with each community."
    groups = [group == i for i in range(N_PLANTED)]
    communities = [member == c for c in range(member.max() + 1)]
    return np.array([[(g & c).sum() / (g | c).sum() for c in communities] for g in groups])


def add_power(file: Path, halves: list[Graph], args: argparse.Namespace) -> None:
    "Add how many planted groups are found and confirmed."
    links = [read_links(half, "abs_weight") for half in halves]
    search = find_search("co-active")
    for size, strength, seed in product(SIZES, STRENGTHS, range(args.n_power)):
        if has_row(file, size=size, strength=strength, seed=seed):
            continue
        planted, group = plant(links, size, strength, seed)
        graphs = [
            Graph(half.nodes, half.edges.assign(abs_weight=one.weight), half.meta)
            for half, one in zip(halves, planted, strict=True)
        ]
        options = {"weight": "abs_weight", "n_null": args.n_sure, "resolution": args.resolution}
        tested = confirm_communities(*graphs, "co-active", **options)
        member = rank_communities(search.find(planted[0], args.resolution, 0), planted[0].touched())
        is_same = overlap(member, group) >= 0.5
        is_sure = (tested["p"] < 0.05).to_numpy()
        row = {"size": size, "strength": strength, "seed": seed, "planted": N_PLANTED}
        row |= {"found": is_same.any(1).sum(), "confirmed": is_same[:, is_sure].any(1).sum()}
        row |= {"communities": len(tested), "others_confirmed": (is_sure & ~is_same.any(0)).sum()}
        add_row(file, pd.DataFrame([row]))
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-draws", type=int, default=200, help="of each kind of noise")
    parser.add_argument("--n-null", type=int, default=9, help="random pairs of each test of noise")
    parser.add_argument("--n-sure", type=int, default=19, help="random pairs of each test of planted groups")
    parser.add_argument("--n-power", type=int, default=4, help="graphs for each size and strength")
    parser.add_argument("--n-tokens", type=int, default=1_024)
    parser.add_argument("--n-edges", type=int, default=30_000)
    parser.add_argument("--resolution", type=float, default=1.0)
    parser.add_argument("--graphs", type=Path, default=ROOT / "graphs")
    parser.add_argument("--dictionaries", type=Path, default=CACHE)
    parser.add_argument("--parts", nargs="*", default=["noise", "power"])
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    args = parser.parse_args()
    if "noise" in args.parts:
        add_noise(args.out / "community_noise.csv", args.n_draws, args.n_null)
    if "power" in args.parts:
        add_power(args.out / "community_power.csv", read_halves(args), args)


if __name__ == "__main__":
    main()
