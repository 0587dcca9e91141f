"""The cost of edges between features, against the matrix products of their closed form, and its growth.

    python benchmarks/feature_graph.py            # two hours, most of it for the whole model

prints tables and writes benchmarks/feature_graph.csv, and _memory, _growth and _whole beside it. The rate of
matrix products is measured in the same run.

Dictionaries are TopK with directions drawn from whitened activations: training would change which features
are active, not how many. Numbers are CPU seconds. Operations are those of the closed form as it is written
down: back from each reader to the residual stream, then dot products with all writers there; for an MLP at
the reader's position, for attention at every source, where the gradients at keys and values are carried to
the stream together. The operations of attention in the heads' own coordinates (nbs/54_attention.ipynb), which
are fewer, are counted beside them; the code does fewer still.

"Edges" are pairs of a reader and a writer that are active together, counted at each position of the reader;
those into attention at each port."""

import argparse
import datetime
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from circuitgraph.attribution.method import Attribution
from circuitgraph.build.attention import project_writers
from circuitgraph.build.build import build_graph
from circuitgraph.build.features import PartBatch, add_part
from circuitgraph.build.readers import carry_cotangents, list_active, list_writers
from circuitgraph.build.sums import Sums
from circuitgraph.cut import cut_model, part_ports, read_activity
from circuitgraph.data.corpus import load_corpus
from circuitgraph.dictionary.protocol import Dictionary, Gate, LinearDictionary
from circuitgraph.dictionary.train import collect_activations
from circuitgraph.dictionary.trainer import whiten
from circuitgraph.model.blocks import Model
from circuitgraph.model.loading import load_model
from circuitgraph.options import Run

QUIET = Run(progress=False)


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def matmul_rate(n: int = 512, d_in: int = 1536, d_out: int = 576) -> float:
    "Operations a CPU second: the best of six tens."
    x, W, out = torch.randn(n, d_in), torch.randn(d_in, d_out), torch.empty(n, d_out)
    return (
        2
        * n
        * d_in
        * d_out
        / min(cpu_seconds(lambda: [torch.mm(x, W, out=out) for _ in range(10)]) / 10 for _ in range(6))
    )


def draw_dictionaries(model: Model, modules: list[str], d_dict: int, k: int) -> dict[str, Dictionary]:
    "TopK dictionaries whose directions are whitened activations, each with a bias that centres it."
    made: dict[str, Dictionary] = {}
    corpus = load_corpus("default", model, 4096, seed=1)
    for start in range(0, len(modules), 12):
        for name, (values, scale) in collect_activations(
            model, corpus, modules[start : start + 12], run=QUIET
        ).items():
            x = values.float() * scale
            W, mean = (
                whiten(x - x.mean(0))[
                    torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:d_dict]
                ],
                x.mean(0),
            )
            made[name] = LinearDictionary(
                name, "output", W.mT.contiguous(), W, torch.zeros(d_dict), mean, Gate("topk", k=k), b_in=mean
            )
    return made


def count_operations(model: Model, kind: str, n_readers: int, n_writers: int, n_pos: int) -> float:
    "Of the closed form through the residual stream, for a position."
    d, S, dots = model.d_model, (n_pos + 1) / 2, 2 * n_readers * n_writers * model.d_model
    if kind == "mlp":
        mlp = model.layers[0].mlp
        assert mlp is not None
        return 2 * n_readers * len(mlp.W_in) * d * (1 if mlp.W_gate is None else 2) + dots
    width, shared = model.n_heads * model.d_head, model.n_kv_heads * model.d_head
    return (
        S * (2 * 2 * n_readers * shared * d + dots + 4 * n_readers * width) + 2 * n_readers * width * d + dots
    )  # the last two: queries


def count_in_heads(model: Model, n_readers: int, n_writers: int, n_pos: int) -> float:
    "Of attention's closed form in the heads' own coordinates, for a position."
    d, S, width = model.d_model, (n_pos + 1) / 2, model.n_heads * model.d_head
    by_value, by_key = (
        2 * n_readers * n_writers * model.n_kv_heads * model.d_head * S,
        2 * n_writers * width * S + 2 * n_readers * n_writers * model.n_heads * S,
    )
    return by_value + by_key + 4 * n_readers * width * S + 2 * n_readers * (width + n_writers) * d


def time_modules(model: Model, names: list[str], n_tokens: int) -> pd.DataFrame:
    tokens, n_layers = load_corpus("default", model, n_tokens), 1 + max(int(name[1:]) for name in names)
    dictionaries, rate = (
        draw_dictionaries(model, [f"{kind}{i}" for i in range(n_layers) for kind in "am"], 2304, 32),
        matmul_rate(),
    )
    cut, rule, rows = cut_model(model, dictionaries), Attribution(), []
    activity = read_activity(model, tokens, cut.parts)
    for part in [p for p in cut.parts if p.module in names]:
        writers, projected = list_writers(cut.parts, cut.names, activity, part, cut.table), {}
        if part.kind == "attn":
            directions = cut.table[: part.n_before]
            projected = {port: project_writers(model, part, directions, port) for port in ("k", "v")}
        cotangents, x = carry_cotangents(model, part), activity.reads[part.module]
        sums = Sums(part_ports(part, rule), (0, part.n_nodes), part.n_before, model.device)

        def run(part=part, cotangents=cotangents, writers=writers, x=x, projected=projected, sums=sums):
            readers = list_active(model, part, cotangents, activity)
            add_part(sums, PartBatch(model, part, readers, writers, x, rule, projected))

        run()  # compiles, and touches the store
        before = sums.table[..., 3].sum()
        seconds = min(cpu_seconds(run) for _ in range(3))
        edges = float(sums.table[..., 3].sum() - before) / 3
        n_readers, n_writers, n = (
            activity.index[part.module].shape[1] + 1,
            writers.nodes.shape[1],
            tokens.numel(),
        )
        operations = count_operations(model, part.kind, n_readers, n_writers, tokens.shape[1])
        in_heads = (
            operations if part.kind == "mlp" else count_in_heads(model, n_readers, n_writers, tokens.shape[1])
        )
        rows.append(
            {
                "module": part.module,
                "writers at a position": n_writers,
                "tokens / CPU s": n / seconds,
                "million edges / CPU s": edges / seconds / 1e6,
                "MFLOP / token": operations / 1e6,
                "share of matmul rate": n * operations / seconds / rate,
                "share, in heads": n * in_heads / seconds / rate,
            }
        )
    return pd.DataFrame(rows).round(2).assign(**{"matmul GFLOP / CPU s": round(rate / 1e9, 1)})


def grow(model: Model, tokens: torch.Tensor) -> pd.DataFrame:
    "The whole graph of the first layers: one thing grows at a time."
    rows = []
    for n_layers, d_dict, k in [
        (2, 1152, 16),
        (4, 1152, 16),
        (8, 1152, 16),
        (8, 576, 16),
        (8, 2304, 16),
        (8, 1152, 8),
        (8, 1152, 32),
    ]:
        made = draw_dictionaries(model, [f"{kind}{i}" for i in range(n_layers) for kind in "am"], d_dict, k)
        seconds = cpu_seconds(lambda made=made: build_graph(model, tokens, made, run=QUIET))
        rows.append(
            {
                "layers with dictionaries": n_layers,
                "d_dict": d_dict,
                "active": k,
                "CPU ms / token": 1000 * seconds / tokens.numel(),
            }
        )
    return pd.DataFrame(rows)


def take_all(model: Model, tokens: torch.Tensor) -> pd.DataFrame:
    "The graph of the whole model: the cost of each module, and of each token."
    made = draw_dictionaries(model, [f"{kind}{i}" for i in range(model.n_layers) for kind in "am"], 2304, 32)
    seconds = {
        n * tokens.shape[1]: cpu_seconds(lambda n=n: build_graph(model, tokens[:n], made, run=QUIET))
        for n in (1, len(tokens))
    }
    (few, less), (many, more) = seconds.items()
    each = (more - less) / (many - few)
    return pd.DataFrame(
        [
            {
                "modules": len(made),
                "tokens": many,
                "CPU s": more,
                "CPU ms / token, all": 1000 * more / many,
                "CPU ms / token, further": 1000 * each,
                "CPU s / module, once": (less - few * each) / len(made),
            }
        ]
    )


def peak(n_tokens: int) -> float:
    "Peak memory in MB of a process that builds the graph of four modules."
    return float(
        subprocess.run(
            [sys.executable, __file__, "--peak", str(n_tokens)], capture_output=True, text=True, check=True
        ).stdout.split()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n-tokens", type=int, default=512)
    parser.add_argument("--modules", default="m14,a14")
    parser.add_argument("--tables", default="modules,memory,growth,whole", help="which tables are made")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model, names, here = load_model("smollm2-135m"), args.modules.split(","), Path(__file__).parent
    if args.peak:
        build_graph(
            model,
            load_corpus("default", model, args.peak),
            draw_dictionaries(model, ["a8", "m8", "a9", "m9"], 2304, 32),
            run=QUIET,
        )
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    marks = {
        "date": datetime.date.today(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }

    def save(table: pd.DataFrame, name: str) -> None:
        print(table.to_string(index=False), flush=True)
        table.assign(**marks).to_csv(here / f"feature_graph{name and '_'}{name}.csv", index=False)

    if "modules" in args.tables:
        save(time_modules(model, names, args.n_tokens), "")
    tokens = load_corpus("default", model, args.n_tokens)
    if "memory" in args.tables:
        save(pd.DataFrame([{"tokens": n, "peak MB": round(peak(n))} for n in (512, 1024, 2048)]), "memory")
    if "growth" in args.tables:
        save(grow(model, tokens[:2]).round(1), "growth")
    if "whole" in args.tables:
        save(take_all(model, tokens[:4]).round(1), "whole")


if __name__ == "__main__":
    main()
