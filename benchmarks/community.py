"""How long a search for communities takes, and whether it finds what was planted, on layered acyclic graphs of 1,000 to 100,000 nodes.

    python benchmarks/community.py            # prints a table and writes benchmarks/community.csv

Each node has a level (of 12) and a planted community (of 20 or 100); 85 % of the edges that would leave a community are drawn anew, and an edge over d levels is kept with probability 0.35 ** (d - 1). CPU seconds; peak memory of the process so far."""

import argparse
import datetime
import platform
import resource
import time
from pathlib import Path

import igraph
import numpy as np
import pandas as pd

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


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    agree = lambda a, b: igraph.compare_communities(a.tolist(), b.tolist(), method="nmi")  # noqa: E731
    find_communities(draw(120, 600, 2)[0], "layered")  # compiles
    rows = []
    for n, n_edges, n_planted in ((1_000, 20_000, 20), (10_000, 100_000, 20), (100_000, 1_000_000, 100)):
        graph, planted, level = draw(n, n_edges, n_planted)
        for method in ("leiden", "layered"):
            start = time.process_time()
            found = find_communities(graph, method, weight="abs_weight").nodes["community"].to_numpy()
            seconds = time.process_time() - start
            on = found >= 0
            rows.append({"nodes": n, "edges": n_edges, "planted": n_planted, "method": method, "found": int(found.max()) + 1, "NMI with planted": agree(planted[on], found[on]), "NMI with levels": agree(level[on], found[on]), "CPU s": seconds, "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows).round(2)
    table.assign(date=datetime.date.today(), machine=platform.machine(), igraph=igraph.__version__).to_csv(Path(__file__).with_suffix(".csv"), index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
