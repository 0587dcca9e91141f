"""How long a search for communities takes, and whether it finds what was planted.

    python benchmarks/community.py            # prints a table and writes benchmarks/community.csv

Graphs of 1,000 to 100,000 nodes, of three kinds. Layered: each node has a level (of 12) and a planted
community (of 20 or 100); 85 % of the edges that would leave a community are drawn anew, and an edge over d
levels is kept with probability 0.35 ** (d - 1). Heavy tails: degrees from 8 to 100 (exponent 2.5), sizes
from 20 to 1,000 (exponent 1.5), 30 % of a node's edges leave its community, as Lancichinetti, Fortunato and
Radicchi draw them; resolution 2 and 5. Signed: signs alone tell 5 communities apart, 20 edges a node, 5 %
of the signs wrong. Agreement is adjusted mutual information. CPU seconds; peak memory of the process so
far.
"""

import argparse
import datetime
import platform
import resource
import sys
import time
from pathlib import Path

import igraph
import numpy as np
import pandas as pd
from sklearn.metrics import adjusted_mutual_info_score

from circuitgraph.community.search import find_communities
from circuitgraph.graph.graph import Graph

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from planted import make_graph  # noqa: E402


def draw(
    n: int,
    n_edges: int,
    n_planted: int,
    within: float = 0.85,
    near: float = 0.35,
    n_levels: int = 12,
    seed: int = 0,
) -> tuple[Graph, np.ndarray, np.ndarray]:
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
        fits = (level[source] < level[target]) & (
            generator.random(len(source)) < near ** (level[target] - level[source] - 1.0)
        )
        pairs = np.unique(np.concatenate([pairs, np.stack([source[fits], target[fits]])], 1), axis=1)
    pairs = pairs[:, np.sort(generator.permutation(pairs.shape[1])[:n_edges])]
    return make_graph(*pairs, np.ones(n_edges), level), planted, level


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
    while sum(sizes) < n:
        sizes.append(int(power_law(generator, 1, 20, min(1_000, n / 10), 1.5)[0]))
    planted = generator.permutation(np.repeat(np.arange(len(sizes)), sizes)[:n])
    degree = power_law(generator, n, 8, 100, 2.5)
    within = np.minimum(np.round((1 - mixing) * degree), np.bincount(planted)[planted] - 1).astype(int)
    inner = [
        pair_up(generator, np.repeat(mine, within[mine]))
        for mine in np.split(np.argsort(planted, kind="stable"), np.cumsum(np.bincount(planted))[:-1])
    ]
    pairs = np.sort(
        np.concatenate(
            [*inner, pair_up(generator, np.repeat(np.arange(n), np.round(mixing * degree).astype(int)))]
        ),
        axis=1,
    )
    pairs = np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)
    return make_graph(*pairs.T, np.ones(len(pairs)), np.zeros(n, dtype=int)), planted


def draw_signed(
    n: int, n_planted: int = 5, degree: int = 20, wrong: float = 0.05, seed: int = 0
) -> tuple[Graph, np.ndarray]:
    "Pairs at random, which raise within a community and lower between two, but for a share that is wrong."
    generator = np.random.default_rng(seed)
    planted = generator.integers(n_planted, size=n)
    pairs = np.unique(np.sort(generator.integers(n, size=(n * degree, 2)), axis=1), axis=0)
    source, target = pairs[pairs[:, 0] < pairs[:, 1]].T
    sign = np.where(planted[source] == planted[target], 1.0, -1.0)
    sign *= np.where(generator.random(len(source)) < wrong, -1, 1)
    return make_graph(source, target, sign, np.zeros(n, dtype=int)), planted


def measure(kind: str, drawn: tuple, method: str, resolution: float = 1.0) -> dict:
    "Two searches: seconds, and agreement with what was planted, with levels and with each other."
    graph, planted, *levels = drawn
    options = {"weight": "abs_weight", "resolution": resolution}
    start = time.process_time()
    found = [
        find_communities(graph, method, seed=seed, **options).nodes["community"].to_numpy() for seed in (0, 1)
    ]
    seconds, shown = (time.process_time() - start) / 2, found[0] >= 0
    with_levels = [adjusted_mutual_info_score(level[shown], found[0][shown]) for level in levels]
    row = {
        "graph": kind,
        "nodes": len(planted),
        "edges": len(graph),
        "planted": len(np.unique(planted)),
        "method": method,
        "found": int(found[0].max()) + 1,
        "AMI with planted": adjusted_mutual_info_score(planted[shown], found[0][shown]),
        "AMI with levels": with_levels[0] if with_levels else np.nan,
        "AMI between seeds": adjusted_mutual_info_score(*found),
        "CPU s": seconds,
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(row, flush=True)
    return row


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    find_communities(draw(120, 600, 2)[0], "layered")  # compiles
    rows = []
    for n, n_edges, n_planted in ((1_000, 20_000, 20), (10_000, 100_000, 20), (100_000, 1_000_000, 100)):
        for method in ("leiden", "layered"):
            rows.append(measure("layered", draw(n, n_edges, n_planted), method))
    for n, resolution in ((1_000, 2.0), (100_000, 5.0)):
        for method in ("leiden", "layered"):
            rows.append(measure("heavy tails", draw_heavy(n), method, resolution))
        if n == 1_000:
            rows.append(measure("heavy tails", draw_heavy(n), "infomap"))
        rows.append(measure("signed", draw_signed(n), "signed"))
    table = pd.DataFrame(rows).round(2)
    stamp = {"date": datetime.date.today(), "machine": platform.machine(), "igraph": igraph.__version__}
    table.assign(**stamp).to_csv(Path(__file__).with_suffix(".csv"), index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
