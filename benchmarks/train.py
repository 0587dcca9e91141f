"""Cost of training many dictionaries, against its matrix products and against SAELens' trainer one by one.

    python benchmarks/train.py            # prints a table and writes benchmarks/train.csv

All numbers are CPU seconds from tokens to dictionaries, in one run on one machine. "Plain" is the model's
forward pass over the text, measured, plus the products of a dense dictionary (two forward and three backward,
or three and five for "gated", whose loss holds two reconstructions) at the rate at which all cores at once
take one of them here, measured. A TopK step does without most of these products, so that its ratio can be
below 1. "One by one" collects each module's activations with a pass of its own, and takes SAELens' own steps
on all cores.
"""

import argparse
import datetime
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from circuitgraph.data.corpus import load_corpus
from circuitgraph.dictionary.places import visit_modules
from circuitgraph.dictionary.train import collect_activations, standardise, train_dictionaries
from circuitgraph.dictionary.trainer import TrainConfig, draw_batch, make_trainer, saelens_overrides
from circuitgraph.dictionary.trainer import take_step
from circuitgraph.model.blocks import Model
from circuitgraph.model.loading import load_model
from circuitgraph.options import Run

QUIET = Run(memory=8e9, progress=False)
PRODUCTS = {"gated": 8}  # matrix products of a step, if not 5


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def matmul_rate(n: int, d_model: int, d_dict: int) -> float:
    "Operations a second of one core for an encoder's product while all cores take it: best of six twenties."

    def seconds(_: int) -> float:
        torch.set_num_threads(1)
        x, W, out = torch.randn(n, d_model), torch.randn(d_model, d_dict), torch.empty(n, d_dict)
        start = time.thread_time()
        for _ in range(20):
            torch.mm(x, W, out=out)
        return (time.thread_time() - start) / 20

    n_cores = torch.get_num_threads()
    with ThreadPoolExecutor(n_cores) as pool:
        best = min(sum(pool.map(seconds, range(n_cores))) / n_cores for _ in range(6))
    torch.set_num_threads(n_cores)
    return 2 * n * d_model * d_dict / best


@torch.no_grad()
def plain_forward(model: Model, corpus: torch.Tensor, n_layers: int) -> None:
    for tokens in corpus.split(8):
        visit_modules(model, tokens, lambda *_: None, n_layers)


def one_by_one(model: Model, corpus: torch.Tensor, modules: list[str], config: TrainConfig) -> None:
    for module in modules:
        activations = collect_activations(model, corpus, [module], run=QUIET)[module][0]
        y = standardise(activations)
        trainer = make_trainer(config, y, torch.device("cpu"))
        for name in saelens_overrides(config.kind, torch.device("cpu")):
            delattr(trainer.sae, name)  # the class's own step
        for step in range(config.n_steps):
            batch = draw_batch(len(activations), step, config.batch_size, 0)
            take_step(trainer, y.take(batch))


def compare(
    model: Model, corpus: torch.Tensor, modules: list[str], config: TrainConfig, forward: float
) -> dict[str, float]:
    "One kind: plain cost, cost here, and cost one by one."
    rate = matmul_rate(config.batch_size, model.d_model, config.d_dict)
    flop = 2 * config.batch_size * model.d_model * config.d_dict
    n_products = len(modules) * config.n_steps * PRODUCTS.get(config.kind, 5)
    plain = forward + n_products * flop / rate
    ours = cpu_seconds(lambda: train_dictionaries(model, corpus, modules, config, run=QUIET))
    theirs = cpu_seconds(lambda: one_by_one(model, corpus, modules, config))
    numbers = {
        "dictionaries": len(modules),
        "GFLOP/s a core": rate / 1e9,
        "plain": plain,
        "train_dictionaries": ours,
        "over plain": ours / plain,
        "one by one": theirs,
        "one by one over ours": theirs / ours,
    }
    return {name: round(value, 2) for name, value in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n-tokens", type=int, default=24_576)
    parser.add_argument(
        "--n-steps",
        type=int,
        default=300,
        help="for each dictionary: as many epochs as 1,200 steps on 100,000 tokens have",
    )
    parser.add_argument("--modules", default="a9,m9,a10,m10,a11,m11")
    args = parser.parse_args()
    model, modules = load_model("smollm2-135m"), args.modules.split(",")
    corpus, rows = load_corpus("default", model, args.n_tokens), {}
    d_dict, n_layers = 4 * model.d_model, 1 + max(int(module[1:]) for module in modules)
    plain_forward(model, corpus[:8], n_layers)
    forward = cpu_seconds(lambda: plain_forward(model, corpus, n_layers))
    print(f"forward of {n_layers} layers over {corpus.numel():,} tokens {forward:.1f} CPU s", flush=True)
    configs = [TrainConfig(d_dict, n_steps=args.n_steps)]
    configs += [replace(configs[0], kind=kind, sparsity=2.0) for kind in ("mlp", "gated", "jumprelu")]
    for config in configs:
        kind = config.kind
        rows[kind] = compare(model, corpus, modules, config, forward)
        print(kind, rows[kind], flush=True)
        table = pd.DataFrame(rows).T.rename_axis("kind")
        table.assign(
            date=datetime.date.today(),
            machine=f"{platform.machine()}, {torch.get_num_threads()} threads",
            torch=torch.__version__,
        ).to_csv(Path(__file__).with_suffix(".csv"))
    print(table.to_string())


if __name__ == "__main__":
    main()
