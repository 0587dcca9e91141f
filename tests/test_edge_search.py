"""Edges between features: their candidates by loops, gradients by dense products, and the search itself."""

import pytest
import torch

from circuitgraph.ablation.judge import measure, open_judge
from circuitgraph.cut import cut_model
from circuitgraph.methods.edge_search import (
    EdgeConfig,
    _KeptSum,
    check_encoders,
    keep_candidates,
    list_candidates,
    search_edges,
    trace_ablated,
)
from circuitgraph.model.blocks import norm_scale
from circuitgraph.model.loading import tiny_model
from circuitgraph.options import Judging, Run
from feature_oracles import all_dictionaries
from oracles import random_tokens

QUIET = Judging(metric="kl", run=Run(progress=False))


def judge_transcoders(name="llama", value="mean", reads="normed", **options):
    model = tiny_model(name)
    every = all_dictionaries(model, reads=reads, **options)
    cut = cut_model(model, {module: d for module, d in every.items() if module[0] == "m"})
    return open_judge(cut, random_tokens(model, 8, 6), value, QUIET)


def test_gradients_of_kept_edges_are_those_of_a_dense_product():
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    writer, reader = torch.tensor([0, 3, 6, 2, 1]), torch.tensor([1, 1, 0, 2, 2])
    weight = torch.randn(5, generator=generator, dtype=torch.float64)
    mask = torch.tensor([1.0, 0, 1, 0, 1], dtype=torch.float64, requires_grad=True)
    dense = torch.zeros(7, 3, dtype=torch.float64).index_put((writer, reader), weight * mask)
    ours, wanted = _KeptSum.apply(change, mask, writer, reader, weight, 3), change @ dense
    assert torch.allclose(ours, wanted)
    g = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    by_loop, found = (torch.autograd.grad(y, (change, mask), g) for y in (wanted, ours))
    assert all(torch.allclose(a, b) for a, b in zip(found, by_loop, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_candidates_by_a_loop(name):
    judge = judge_transcoders(name)
    cut, tokens = judge.cut, judge.data.tokens
    trace, ablated = cut.trace(tokens), trace_ablated(judge, slice(0, 8))
    (first, second), (found,) = check_encoders(cut), list_candidates(judge, slice(0, 8), 2).values()
    layer = cut.model.layers[second.layer]
    scale = norm_scale(layer.ln2, trace.reads[second.module])
    wanted = {}
    for j in range(second.n_nodes - 1):
        sizes = []
        for i in range(first.n_nodes - 1):
            with torch.no_grad():
                direction = first.dictionary.W_dec[i]
                if layer.ln2.kind == "layer":
                    direction = direction - direction.mean()
                weight = direction @ (layer.ln2.weight * second.dictionary.W_enc[:, j])
                change = trace.acts[first.module][:, 1:, i] - ablated.acts[first.module][:, 1:, i]
                where = (trace.acts[second.module][:, 1:, j] != 0) * scale[:, 1:, 0]
                sizes.append((float((change * where).sum() * weight), i))
        largest = sorted(((abs(size), i) for size, i in sizes if size), reverse=True)[:2]
        wanted |= {(i, j): size for size, i in largest}
    norms = second.dictionary.W_dec.norm(dim=1)
    ends = zip(found.writer.tolist(), found.reader.tolist(), found.size.tolist(), strict=True)
    ours = {(i, j): size / float(norms[j]) for i, j, size in ends}
    assert ours.keys() == wanted.keys() and ours == pytest.approx(wanted)


def test_the_search_beats_random_edges():
    judge = judge_transcoders()
    candidates = list_candidates(judge, slice(0, 8))
    n = sum(len(some.weight) for some in candidates.values())
    config = EdgeConfig(n_steps=12, n_inputs=8)
    found = search_edges(judge, candidates, n // 4, config)
    assert found.n_edges == n // 4 and found.backbone
    assert (search_edges(judge, candidates, n // 4, config).source == found.source).all()
    random = []
    for seed in range(20):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        random.append(keep_candidates(judge, candidates, order < n // 4))
    kl = measure(judge, [found.none(), found, *random])["kl"].mean(1)
    none, ours, others = kl[1], kl[2], kl[3:]
    assert ours < none and ours < others.min()


def test_what_is_refused():
    judge = judge_transcoders(reads="output")
    with pytest.raises(ValueError, match="transcode=True"):
        list_candidates(judge, slice(0, 8))
    judge = judge_transcoders()
    candidates = list_candidates(judge, slice(0, 8))
    with pytest.raises(ValueError, match="n_edges must lie in"):
        search_edges(judge, candidates, 10_000)
    with pytest.raises(ValueError, match="n_steps"):
        EdgeConfig(n_steps=1)
    with pytest.raises(ValueError, match="swap"):
        EdgeConfig(swap=2)
