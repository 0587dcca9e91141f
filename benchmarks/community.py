"""How long a search for communities takes, and whether it finds what was planted: in layered acyclic graphs, in graphs with heavy-tailed degrees and community sizes (as Lancichinetti, Fortunato and Radicchi draw them), and in graphs where signs alone tell communities apart; of 1,000 to 100,000 nodes.

    python benchmarks/community.py            # prints a table and writes benchmarks/community.csv

Layered: each node has a level (of 12) and a planted community (of 20 or 100); 85 % of the edges that would leave a community are drawn anew, and an edge over d levels is kept with probability 0.35 ** (d - 1). Heavy tails: degrees from 8 to 100 (exponent 2.5), sizes from 20 to 1,000 (exponent 1.5), 30 % of a node's edges leave its community; resolution 2 and 5. Signed: 5 communities, 20 edges a node, 5 % of the signs wrong. Agreement is adjusted mutual information. CPU seconds; peak memory of the process so far."""

import argparse
import datetime
import platform
import resource
import time
from pathlib import Path

import igraph
import numpy as np
import pandas as pd
from sklearn.metrics import adjusted_mutual_info_score

from circuitgraph.community import find_communities
from circuitgraph.graph import Graph


def draw(n: int, n_edges: int, n_planted: int, within: float = 0.85, near: float = 0.35, n_levels: int = 12, seed: int = 0) -> tuple[Graph, np.ndarray, np.ndarray]:
    "A layered graph, its planted communities and its levels."
    generator, level = np.random.default_rng(seed), np.sort(np.arange(n) % n_levels)
    planted, pairs = generator.integers(n_planted, size=n), np.zeros((2, 0), dtype=np.int64)
    members = [np.flatnonzero(planted == c) for c in range(n_planted)]
    while pairs.shape[1] < n_edges:
        source, target = generator.integers(n, size=(2, 4 * n_edges))
        stay = np.flatnonzero(generator.random(len(source)) < within)
        for c, mine in enumerate(members):
            here = stay[planted[source[stay]] == c]
            target[here] = generator.choice(mine, len(here))
        fits = (level[source] < level[target]) & (generator.random(len(source)) < near ** (level[target] - level[source] - 1.0))
        pairs = np.unique(np.concatenate([pairs, np.stack([source[fits], target[fits]])], 1), axis=1)
    pairs = pairs[:, np.sort(generator.permutation(pairs.shape[1])[:n_edges])]
    names = [f"m{r}/{i}" for i, r in enumerate(level)]
    nodes = pd.DataFrame({"name": names, "module": [f"m{r}" for r in level], "kind": "feature", "layer": level, "index": np.arange(n), "frequency": 1.0, "mean_activation": 1.0})
    ones = np.ones(n_edges)
    edges = pd.DataFrame({"source": pd.Categorical.from_codes(pairs[0], names), "target": pd.Categorical.from_codes(pairs[1], names), "port": "mlp", "weight": ones, "abs_weight": ones, "rms_weight": ones, "count": 1})
    return Graph(nodes, edges, {"nodes": "feature"}), planted, level


def make(source: np.ndarray, target: np.ndarray, weight: np.ndarray, n: int) -> Graph:
    "A graph of one level."
    names = [f"m0/{i}" for i in range(n)]
    nodes = pd.DataFrame({"name": names, "module": "m0", "kind": "feature", "layer": 0, "index": np.arange(n), "frequency": 1.0, "mean_activation": 1.0})
    edges = pd.DataFrame({"source": pd.Categorical.from_codes(source, names), "target": pd.Categorical.from_codes(target, names), "port": "mlp", "weight": weight, "abs_weight": abs(weight), "rms_weight": abs(weight), "count": 1})
    return Graph(nodes, edges, {"nodes": "feature"})


def power_law(generator: np.random.Generator, n: int, low: float, high: float, exponent: float) -> np.ndarray:
    "Numbers between two bounds with a heavy tail."
    a, u = 1 - exponent, generator.random(n)
    return ((high**a - low**a) * u + low**a) ** (1 / a)


def pair_up(generator: np.random.Generator, stubs: np.ndarray) -> np.ndarray:
    "Ends of edges joined at random."
    stubs = generator.permutation(stubs)
    return stubs[: len(stubs) // 2 * 2].reshape(-1, 2)


def draw_heavy(n: int, mixing: float = 0.3, seed: int = 0) -> tuple[Graph, np.ndarray]:
    "Heavy-tailed degrees and community sizes; a share of each node's edges leaves its community."
    generator, sizes = np.random.default_rng(seed), []
    while sum(sizes) < n: sizes.append(int(power_law(generator, 1, 20, min(1_000, n / 10), 1.5)[0]))
    planted = generator.permutation(np.repeat(np.arange(len(sizes)), sizes)[:n])
    degree = power_law(generator, n, 8, 100, 2.5)
    within = np.minimum(np.round((1 - mixing) * degree), np.bincount(planted)[planted] - 1).astype(int)
    inner = [pair_up(generator, np.repeat(mine, within[mine])) for mine in np.split(np.argsort(planted, kind="stable"), np.cumsum(np.bincount(planted))[:-1])]
    pairs = np.sort(np.concatenate([*inner, pair_up(generator, np.repeat(np.arange(n), np.round(mixing * degree).astype(int)))]), axis=1)
    pairs = np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)
    return make(*pairs.T, np.ones(len(pairs)), n), planted


def draw_signed(n: int, n_planted: int = 5, degree: int = 20, wrong: float = 0.05, seed: int = 0) -> tuple[Graph, np.ndarray]:
    "Pairs at random, which raise within a community and lower between two, but for a share that is wrong."
    generator = np.random.default_rng(seed)
    planted, pairs = generator.integers(n_planted, size=n), np.unique(np.sort(generator.integers(n, size=(n * degree, 2)), axis=1), axis=0)
    source, target = pairs[pairs[:, 0] < pairs[:, 1]].T
    return make(source, target, np.where(planted[source] == planted[target], 1.0, -1.0) * np.where(generator.random(len(source)) < wrong, -1, 1), n), planted


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    find_communities(draw(120, 600, 2)[0], "layered")  # compiles
    rows = []
    def measure(kind: str, graph: Graph, planted: np.ndarray, level: np.ndarray | None, method: str, resolution: float = 1.0) -> None:
        found, start = [], time.process_time()
        for seed in (0, 1): found.append(find_communities(graph, method, weight="abs_weight", resolution=resolution, seed=seed).nodes["community"].to_numpy())
        seconds, on = (time.process_time() - start) / 2, found[0] >= 0
        rows.append({"graph": kind, "nodes": len(planted), "edges": len(graph), "planted": len(np.unique(planted)), "method": method, "found": int(found[0].max()) + 1, "AMI with planted": adjusted_mutual_info_score(planted[on], found[0][on]),
                     "AMI with levels": np.nan if level is None else adjusted_mutual_info_score(level[on], found[0][on]), "AMI between seeds": adjusted_mutual_info_score(*found), "CPU s": seconds, "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})
        print(rows[-1], flush=True)
    for n, n_edges, n_planted in ((1_000, 20_000, 20), (10_000, 100_000, 20), (100_000, 1_000_000, 100)):
        for method in ("leiden", "layered"): measure("layered", *draw(n, n_edges, n_planted), method)
    for n in (1_000, 100_000):
        for method in ("leiden", "layered", *(("infomap",) if n == 1_000 else ())): measure("heavy tails", *draw_heavy(n), None, method, 1.0 if method == "infomap" else 2.0 if n == 1_000 else 5.0)
        measure("signed", *draw_signed(n), None, "signed")
    table = pd.DataFrame(rows).round(2)
    table.assign(date=datetime.date.today(), machine=platform.machine(), igraph=igraph.__version__).to_csv(Path(__file__).with_suffix(".csv"), index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
