"""Dictionaries of every module of the embedded model, of several seeds and of all kinds.

    python scripts/exp_dictionaries.py --train wikitext-2-valid.txt --test wikitext-2-test.txt

writes nbs/results/dictionaries_*.csv, which nbs/93_exp_dictionaries.ipynb reads. Dictionaries are kept in
the user's cache. Each table, and each row of the table of kinds, is written when it is done, and a second
run does what is missing. 2 hours on 2 cores."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from circuitgraph.data.corpus import load_corpus
from circuitgraph.dictionary.interaction import BasisConfig, train_interaction_bases
from circuitgraph.dictionary.measure import measure_dictionaries
from circuitgraph.dictionary.places import principal_components
from circuitgraph.dictionary.protocol import Dictionary, LinearDictionary
from circuitgraph.dictionary.train import collect_activations, train_dictionaries
from circuitgraph.dictionary.trainer import TrainConfig
from circuitgraph.model.blocks import Model
from circuitgraph.model.loading import load_model

ROOT = Path(__file__).resolve().parent.parent
SEEDED = "a0,m0,a10,m10,a20,m20,a29,m29"
KINDS = [
    *(TrainConfig(kind="topk", k=k) for k in (16, 32, 64)),
    TrainConfig(kind="batchtopk", k=32),
    TrainConfig(kind="matryoshka", k=32),
    *(TrainConfig(kind="gated", sparsity=s) for s in (0.5, 1.0, 2.0, 4.0)),
    *(TrainConfig(kind=kind, sparsity=s) for s in (2.0, 4.0) for kind in ("mlp", "gradient")),
    *(TrainConfig(kind="jumprelu", sparsity=s) for s in (0.5, 2.0)),
]


def measure(
    model: Model, dictionaries: dict[str, Dictionary], test: torch.Tensor, n_spliced: int
) -> pd.DataFrame:
    report = measure_dictionaries(model, dictionaries, test, n_spliced=n_spliced)
    return report.rename_axis("module").reset_index()


def list_kinds(model: Model, corpus: torch.Tensor) -> dict[tuple[str, str], Callable[[], Dictionary]]:
    "By kind and setting, one call from tokens to a dictionary of layer 10's MLP."

    def train(config: TrainConfig) -> Dictionary:
        return train_dictionaries(model, corpus, "m10", config)["m10"]

    def find_components(n: int) -> LinearDictionary:
        values, scale = collect_activations(model, corpus, ["m10"])["m10"]
        return principal_components(values.float() * scale, n, "m10")

    def find_basis(n: int) -> Dictionary:
        return train_interaction_bases(model, corpus[::8], ["m10", "m11"], BasisConfig(n))["m10"]

    calls: dict[tuple[str, str], Callable[[], Dictionary]] = {}
    for config in KINDS:
        by_k = config.kind in ("topk", "batchtopk", "matryoshka")
        setting = f"k={config.k}" if by_k else f"sparsity={config.sparsity}"
        calls[config.kind, setting] = lambda config=config: train(config)
    for n in (64, 128, 256):
        calls["pca", f"d_dict={n}"] = lambda n=n: find_components(n)
        calls["lib", f"d_dict={n}"] = lambda n=n: find_basis(n)
    return calls


def measure_kinds(model: Model, corpus: torch.Tensor, test: torch.Tensor, n_spliced: int, path: Path) -> None:
    "Every kind on the MLP of layer 10, with the processor time from tokens to dictionary."
    done = set()
    if path.exists():
        done = set(pd.read_csv(path)[["kind", "setting"]].itertuples(index=False, name=None))
    for (kind, setting), make in list_kinds(model, corpus).items():
        if (kind, setting) in done:
            continue
        start = time.process_time()
        dictionary = make()
        cost = {"d_dict": dictionary.d_dict, "cpu_seconds": time.process_time() - start}
        row = measure(model, {"m10": dictionary}, test, n_spliced).iloc[[0]]
        row = row.assign(kind=kind, setting=setting, **cost)
        append(path, row.drop(columns="module"))
        print(kind, setting, row.round(4).to_dict("records")[0], flush=True)


def append(path: Path, rows: pd.DataFrame) -> None:
    rows.round(5).to_csv(path, mode="a", header=not path.exists(), index=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = Path.home() / ".cache/circuitgraph/dictionaries/smollm2-135m-wikitext2"
    parser.add_argument(
        "--train", type=Path, required=True, help="text to train on; 100,000 tokens are drawn"
    )
    parser.add_argument("--test", type=Path, required=True, help="text to measure on")
    parser.add_argument("--cache", type=Path, default=cache)
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    args = parser.parse_args()
    model = load_model("smollm2-135m")
    corpus, test = load_corpus(args.train, model, 100_000), load_corpus(args.test, model, 8192)
    every, seeds, kinds = (args.out / f"dictionaries_{name}.csv" for name in ("modules", "seeds", "kinds"))
    if not every.exists():
        append(every, measure(model, train_dictionaries(model, corpus, "all", out=args.cache), test, 32))
    for seed in (0, 1, 2):
        if seeds.exists() and seed in set(pd.read_csv(seeds)["seed"]):
            continue
        folder = args.cache if seed == 0 else args.cache.with_name(f"{args.cache.name}-seed{seed}")
        dictionaries = train_dictionaries(model, corpus, SEEDED, TrainConfig(seed=seed), out=folder)
        append(seeds, measure(model, dictionaries, test, 16).assign(seed=seed))
    measure_kinds(model, corpus, test, 16, kinds)


if __name__ == "__main__":
    main()
