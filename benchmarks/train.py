"""What training many dictionaries costs, against its matrix products alone, and against one run of SAELens' trainer for each module, in one run on one machine.

    python benchmarks/train.py            # prints a table and writes benchmarks/train.csv

All numbers are CPU seconds from tokens to dictionaries. "Plain" is the model's forward pass over the text, measured, plus the products of a dense dictionary (two forward, three backward; three and five for "gated", whose loss holds two reconstructions) at the rate at which all cores at once take one of them here, measured.
A TopK step does without most of these products, so that its ratio can be below 1. "One by one" collects each module's activations with a pass of its own, and takes SAELens' own steps on all cores.
"""

import argparse
import datetime
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch

from circuitgraph.data import load_corpus
from circuitgraph.dictionary import visit_modules
from circuitgraph.model import Model, load_model
from circuitgraph.train import Recipe, _cheaper, _draw_batch, _make_trainer, _standardise, collect_activations, train_dictionaries


PRODUCTS = {"gated": 8}  # matrix products of a step, if not 5


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def matmul_rate(n: int, d_model: int, d_dict: int) -> float:
    "Operations a second of one core for an encoder's product while all cores take it, as those do that train: the best of five twenties."
    def seconds(_: int) -> float:
        torch.set_num_threads(1)
        x, W, out = torch.randn(n, d_model), torch.randn(d_model, d_dict), torch.empty(n, d_dict)
        start = time.thread_time()
        for _ in range(20): torch.mm(x, W, out=out)
        return (time.thread_time() - start) / 20
    n_cores = torch.get_num_threads()
    with ThreadPoolExecutor(n_cores) as pool: best = min(sum(pool.map(seconds, range(n_cores))) / n_cores for _ in range(6))
    torch.set_num_threads(n_cores)
    return 2 * n * d_model * d_dict / best


@torch.no_grad()
def plain_forward(model: Model, corpus: torch.Tensor, n_layers: int) -> None:
    for tokens in corpus.split(8): visit_modules(model, tokens, lambda *_: None, n_layers)


def one_by_one(model: Model, corpus: torch.Tensor, modules: list[str], recipe: Recipe) -> None:
    for module in modules:
        activations = collect_activations(model, corpus, [module], progress=False)[module][0]
        mean, spread = _standardise(activations)
        trainer = _make_trainer(recipe, activations, mean, spread, torch.device("cpu"))
        for name in _cheaper(recipe.kind, torch.device("cpu")): delattr(trainer.sae, name)  # the class's own step
        for step in range(recipe.n_steps):
            trainer.step((activations[_draw_batch(len(activations), step, recipe.batch_size, 0)].float() - mean) / spread)
            trainer.n_training_steps += 1


def compare(model: Model, corpus: torch.Tensor, modules: list[str], recipe: Recipe, forward: float) -> dict[str, float]:
    "One kind: plain cost, cost here, and cost one by one."
    rate = matmul_rate(recipe.batch_size, model.d_model, recipe.d_dict)
    plain = forward + len(modules) * recipe.n_steps * PRODUCTS.get(recipe.kind, 5) * 2 * recipe.batch_size * model.d_model * recipe.d_dict / rate
    ours = cpu_seconds(lambda: train_dictionaries(model, corpus, modules, recipe.kind, k=recipe.k, sparsity=recipe.sparsity, n_steps=recipe.n_steps, progress=False))
    theirs = cpu_seconds(lambda: one_by_one(model, corpus, modules, recipe))
    numbers = {"dictionaries": len(modules), "GFLOP/s a core": rate / 1e9, "plain": plain, "train_dictionaries": ours, "over plain": ours / plain, "one by one": theirs, "one by one over ours": theirs / ours}
    return {name: round(value, 2) for name, value in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-tokens", type=int, default=24_576)
    parser.add_argument("--n-steps", type=int, default=300, help="for each dictionary: as many epochs as 1,200 steps on 100,000 tokens have")
    parser.add_argument("--modules", default="a9,m9,a10,m10,a11,m11")
    args = parser.parse_args()
    model, modules = load_model("smollm2-135m"), args.modules.split(",")
    corpus, rows = load_corpus("default", model, args.n_tokens), {}
    d_dict, n_layers = 4 * model.d_model, 1 + max(int(module[1:]) for module in modules)
    plain_forward(model, corpus[:8], n_layers)
    forward = cpu_seconds(lambda: plain_forward(model, corpus, n_layers))
    print(f"forward of {n_layers} layers over {corpus.numel():,} tokens {forward:.1f} CPU s", flush=True)
    for kind, settings in {"topk": {"k": 32}, "mlp": {"sparsity": 2.0}, "gated": {"sparsity": 2.0}, "jumprelu": {"sparsity": 2.0}}.items():
        rows[kind] = compare(model, corpus, modules, Recipe(d_dict, kind, n_steps=args.n_steps, **settings), forward)  # type: ignore[arg-type]
        print(kind, rows[kind], flush=True)
        table = pd.DataFrame(rows).T.rename_axis("kind")
        table.assign(date=datetime.date.today(), machine=f"{platform.machine()}, {torch.get_num_threads()} threads", torch=torch.__version__).to_csv(Path(__file__).with_suffix(".csv"))
    print(table.to_string())


if __name__ == "__main__":
    main()
