"""The cost of the module graph, against a plain forward and backward pass over the same tokens, in one run.

    python benchmarks/module_graph.py            # prints a table and writes benchmarks/module_graph.csv

A ratio is of CPU time. The plain pass computes the mean next-token cross-entropy and its gradient with
respect to all weights; each measurement runs once to warm up and is then the best of two.
"""

import argparse
import datetime
import platform
import resource
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from circuitgraph.attribution.method import Attribution
from circuitgraph.build.build import build_graph
from circuitgraph.data.corpus import load_corpus
from circuitgraph.model.blocks import Model
from circuitgraph.model.loading import load_model
from circuitgraph.options import Run


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def best(run: Callable[[], object], repeats: int = 2) -> float:
    times = []
    for _ in range(repeats + 1):
        start = cpu_seconds()
        run()
        times.append(cpu_seconds() - start)
    return min(times[1:])


def forward_backward(model: Model, tokens: torch.Tensor) -> None:
    logits = model(tokens)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    model.bridge.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n-tokens", type=int, default=512, help="tokens in the one batch")
    parser.add_argument("--seq-len", type=int, default=128)
    args = parser.parse_args()
    model = load_model("smollm2-135m")
    tokens = load_corpus("default", model, args.n_tokens, seq_len=args.seq_len)
    rows = {}

    def measure(name: str, n_steps: int, run: Callable[[], object]) -> None:
        seconds = best(run)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows[name] = {
            "steps": n_steps,
            "CPU seconds": round(seconds, 2),
            "tokens per CPU-second": round(tokens.numel() / seconds),
            "peak memory so far, MB": round(peak),
        }
        print(name, rows[name], flush=True)

    options = {"run": Run(len(tokens), progress=False)}
    for grain in ("block", "layer", "head"):
        measure(
            f"{grain} graph, gradient",
            1,
            lambda g=grain: build_graph(model, tokens, g, attribution="gradient", **options),
        )
    for n in (4, 8):
        measure(
            f"head graph, IG {n} steps",
            n,
            lambda n=n: build_graph(model, tokens, "head", attribution=Attribution(n_steps=n), **options),
        )
    measure("block graph, IG 8 steps", 8, lambda: build_graph(model, tokens, "block", **options))
    for parameter in model.bridge.parameters():
        parameter.requires_grad_(True)
    measure("forward + backward", 1, lambda: forward_backward(model, tokens))
    table = pd.DataFrame(rows).T
    table.insert(
        2,
        "ratio to forward + backward",
        (table["CPU seconds"] / table.loc["forward + backward", "CPU seconds"]).round(2),
    )
    table.insert(3, "ratio per step", (table["ratio to forward + backward"] / table["steps"]).round(2))
    table["batch"] = f"{tokens.shape[0]} x {tokens.shape[1]}"
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    table["machine"] = f"{machine}, {datetime.date.today()}"
    path = Path(__file__).with_suffix(".csv")
    table.to_csv(path)
    print(table.drop(columns="machine").to_string(), f"\n{table['machine'].iloc[0]}\nwrote {path.name}")


if __name__ == "__main__":
    main()
