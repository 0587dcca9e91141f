"""Dictionaries of every module of the embedded model, of several seeds and of all kinds: the numbers of nbs/23_exp_dictionaries.ipynb.

    python scripts/exp_dictionaries.py --train wikitext-2-valid.txt --test wikitext-2-test.txt      # writes nbs/results/dictionaries_*.csv

Dictionaries are kept in the user's cache; each table, and each row of the table of kinds, is written when it is done; a second run does what is missing. 2 hours on 2 cores."""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch

from circuitgraph.data import load_corpus
from circuitgraph.dictionary import Dictionary, LinearDictionary, principal_components
from circuitgraph.model import Model, load_model
from circuitgraph.train import collect_activations, measure_dictionaries, train_dictionaries, train_interaction_bases

ROOT = Path(__file__).resolve().parent.parent
SEEDED = "a0,m0,a10,m10,a20,m20,a29,m29"
KINDS: list[tuple[str, dict[str, float]]] = [  # kind, settings
    *[("topk", {"k": k}) for k in (16, 32, 64)], ("batchtopk", {"k": 32}), ("matryoshka", {"k": 32}), *[("gated", {"sparsity": s}) for s in (0.5, 1.0, 2.0, 4.0)],
    *[(kind, {"sparsity": s}) for s in (2.0, 4.0) for kind in ("mlp", "gradient")], *[("jumprelu", {"sparsity": s}) for s in (0.5, 2.0)],
]


def train_modules(model: Model, corpus: torch.Tensor, folder: Path) -> dict[str, Dictionary]:
    return train_dictionaries(model, corpus, "all", out=folder)


def measure(model: Model, dictionaries: dict[str, Dictionary], test: torch.Tensor, n_spliced: int) -> pd.DataFrame:
    return measure_dictionaries(model, dictionaries, test, n_spliced=n_spliced).rename_axis("module").reset_index()


def measure_kinds(model: Model, corpus: torch.Tensor, test: torch.Tensor, n_spliced: int, path: Path) -> None:
    "Every kind on the MLP of layer 10, as one call from tokens to dictionary, with the processor time that it took."
    done = {tuple(row) for row in pd.read_csv(path)[["kind", "setting"]].itertuples(index=False)} if path.exists() else set()
    def add(kind: str, setting: str, make: object) -> None:
        if (kind, setting) in done: return
        start = time.process_time()
        made = make()  # type: ignore[operator]
        seconds = time.process_time() - start
        row = measure(model, {"m10": made}, test, n_spliced).iloc[[0]].assign(kind=kind, setting=setting, d_dict=made.d_dict, cpu_seconds=seconds)
        append(path, row.drop(columns="module"))
        print(kind, setting, row.round(4).to_dict("records")[0], flush=True)
    for kind, settings in KINDS:
        add(kind, " ".join(f"{name}={value}" for name, value in settings.items()), lambda k=kind, s=settings: train_dictionaries(model, corpus, "m10", k, **s)["m10"])  # type: ignore[arg-type]
    for n in (64, 128, 256):
        add("pca", f"d_dict={n}", lambda n=n: components(model, corpus, n))
        add("lib", f"d_dict={n}", lambda n=n: train_interaction_bases(model, corpus[::8], ["m10", "m11"], d_dict=n)["m10"])


def components(model: Model, corpus: torch.Tensor, n: int) -> LinearDictionary:
    values, scale = collect_activations(model, corpus, ["m10"])["m10"]
    return principal_components(values.float() * scale, n, "m10")


def append(path: Path, rows: pd.DataFrame) -> None:
    rows.round(5).to_csv(path, mode="a", header=not path.exists(), index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="text to train on; 100,000 tokens are drawn")
    parser.add_argument("--test", type=Path, required=True, help="text to measure on")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/circuitgraph/dictionaries/smollm2-135m-wikitext2")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    args = parser.parse_args()
    model = load_model("smollm2-135m")
    corpus, test = load_corpus(args.train, model, 100_000), load_corpus(args.test, model, 8192)
    every, seeds, kinds = (args.out / f"dictionaries_{name}.csv" for name in ("modules", "seeds", "kinds"))
    if not every.exists(): append(every, measure(model, train_modules(model, corpus, args.cache), test, 32))
    for seed in (0, 1, 2):
        if seeds.exists() and seed in set(pd.read_csv(seeds)["seed"]): continue
        folder = args.cache if seed == 0 else args.cache.with_name(f"{args.cache.name}-seed{seed}")
        append(seeds, measure(model, train_dictionaries(model, corpus, SEEDED, seed=seed, out=folder), test, 16).assign(seed=seed))
    measure_kinds(model, corpus, test, 16, kinds)


if __name__ == "__main__":
    main()
