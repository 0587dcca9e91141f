"""Noise that must not look like communities: a table of 92_exp_communities.

    python scripts/exp_community_noise.py

Writes nbs/results/community_noise.csv: for each kind of noise and each of 200 draws, the smallest p of any
community. Noise lies on edges between features of one kind of token (`tokens`, `heavy`, `hubs`, `normal`),
and between levels without kinds (`layered`). Communities are found on one half of a text and tested on the
other. A second run goes on after the rows that are there. CPU time on one core: 15 minutes.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from circuitgraph.community.confirm import confirm_communities
from circuitgraph.graph.graph import Graph
from exp_small_features import add_row, has_row

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from planted import draw_layered, draw_tokens, halve  # noqa: E402

NOISE = ("tokens", "heavy", "hubs", "layered", "normal")


def draw_noise(kind: str, seed: int) -> list[Graph]:
    "Two halves of a graph without communities."
    if kind == "layered":
        graph = draw_layered(within=0.0, n_edges=1_500, width=12, seed=seed)[0]
    else:
        graph = draw_tokens(n_kinds=6, width=24, noise=kind, seed=seed)[0]
    return halve(graph, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--noise", nargs="*", default=list(NOISE), choices=NOISE)
    parser.add_argument("--n-draws", type=int, default=200, help="of each kind of noise")
    parser.add_argument("--n-null", type=int, default=9, help="random pairs of each test")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results/community_noise.csv")
    args = parser.parse_args()
    for kind in args.noise:
        for seed in range(args.n_draws):
            if has_row(args.out, noise=kind, seed=seed):
                continue
            options = {"weight": "abs_weight", "n_null": args.n_null, "seed": seed}
            tested = confirm_communities(*draw_noise(kind, seed), "co-active", **options)
            row = {"noise": kind, "seed": seed, "n_null": args.n_null, "communities": len(tested)}
            add_row(args.out, pd.DataFrame([row | {"smallest_p": tested["p"].min()}]))


if __name__ == "__main__":
    main()
