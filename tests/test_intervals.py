"""Intervals of scores, against SciPy and against samples whose true value is known; areas over decades."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from circuitgraph.ablation.judge import bootstrap, compare_curves, mean_over_decades
from circuitgraph.build.build import complete_graph
from circuitgraph.graph.graph import Graph
from circuitgraph.methods.compare import Comparing, compare_methods, list_methods
from circuitgraph.model.loading import tiny_model
from circuitgraph.options import Judging, Run
from known import KNOWN
from oracles import written_tokens


def ratio(graph, model):
    return graph.mean(-1) / model.mean(-1)


def lognormal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).exp()


def redraw(n, n_boot, seed):
    "The draws that `bootstrap` makes."
    draws = torch.randint(n, (n_boot, n), generator=torch.Generator().manual_seed(seed))
    return draws.sort(1).values.numpy()


def widen(level, n):
    "The level of a normal interval as wide as Student's of so many inputs."
    return 2 * scipy.stats.norm.cdf((n / (n - 1)) ** 0.5 * scipy.stats.t.ppf((1 + level) / 2, n - 1)) - 1


def scipy_bca(statistic, samples, draws=None, **options):
    "SciPy's interval of paired samples, from given draws or from its own."
    samples = [sample.numpy() for sample in samples]
    options |= {"method": "BCa", "paired": True, "vectorized": True}
    if draws is not None:
        known = scipy.stats.bootstrap(samples, statistic, n_resamples=99, **options)
        known.bootstrap_distribution = statistic(*(sample[draws] for sample in samples), axis=-1)
        options |= {"n_resamples": 0, "bootstrap_result": known}
    interval = scipy.stats.bootstrap(samples, statistic, **options).confidence_interval
    return interval.low, interval.high


def numpy_ratio(graph, model, axis):
    return graph.mean(axis) / model.mean(axis)


@pytest.mark.parametrize("n", [3, 8, 40])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_intervals_equal_scipys_on_the_same_draws(n, level):
    samples = lognormal(2, n, seed=n)
    expected = scipy_bca(numpy_ratio, samples, redraw(n, 500, 3), confidence_level=widen(level, n))
    found = bootstrap(ratio, *samples, n_boot=500, seed=3, level=level)
    assert [float(end) for end in found] == pytest.approx(expected, rel=1e-9)


def test_intervals_equal_scipys_on_its_own_draws():
    samples = lognormal(2, 12)
    options = {"n_resamples": 20_000, "rng": np.random.default_rng(0), "confidence_level": widen(0.95, 12)}
    expected = scipy_bca(numpy_ratio, samples, **options)
    low, high = bootstrap(ratio, *samples, n_boot=20_000)
    assert (float(low), float(high)) == pytest.approx(expected, rel=0.05)


def test_stacked_graphs_have_the_intervals_that_each_has_alone():
    graphs, model = lognormal(2, 3, 9), lognormal(9, seed=1)
    low, high = bootstrap(ratio, graphs, model, n_boot=200)
    assert low.shape == high.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = bootstrap(ratio, graphs[i, j], model, n_boot=200)
            assert torch.allclose(torch.stack(alone), torch.stack([low[i, j], high[i, j]]), rtol=1e-12)


def cover(truth, low, high):
    "How often intervals of samples hold the truth."
    return float(((np.asarray(low) <= truth) & (truth <= np.asarray(high))).mean())


@pytest.mark.parametrize("n", [4, 8])
def test_skewed_samples_are_covered_more_often_than_by_percentiles(n):
    "The ratio of two lognormal means is 1, and one of them is exp(1/2)."
    samples, n_boot = lognormal(2, 1000, n), 400
    drawn = samples.numpy()[:, :, redraw(n, n_boot, 0)].mean(-1)
    for truth, resampled, statistic, values in (
        (1, drawn[0] / drawn[1], ratio, samples),
        (np.exp(0.5), drawn[0], lambda v: v.mean(-1), samples[:1]),
    ):
        by_percentiles = cover(truth, *np.quantile(resampled, [0.025, 0.975], axis=-1))
        covered = cover(truth, *bootstrap(statistic, *values, n_boot=n_boot))
        assert by_percentiles + 0.03 < covered < 0.96


def test_normal_inputs_are_covered_like_by_students_interval():
    samples = torch.randn(1000, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    low, high = bootstrap(lambda v: v.mean(-1), samples, n_boot=2000)
    width = 2 * scipy.stats.t.ppf(0.975, 7) * samples.std(-1) / 8**0.5
    assert 0.92 < cover(0, low, high) < 0.97
    assert (high - low).mean() == pytest.approx(float(width.mean()), rel=0.05)


def test_where_all_draws_agree_the_interval_is_the_point():
    values = torch.stack([torch.full((5,), 0.1), lognormal(5)]).double()
    low, high = bootstrap(lambda v: v.mean(-1), values)
    assert low[0] == high[0] == values[0].mean() and low[1] < values[1].mean() < high[1]


def test_an_interval_holds_its_estimate_at_the_end_of_a_range():
    "The distance of a mean of exactly 1 from 1 is 0, and larger in nearly every draw."
    values = torch.tensor([0.25, 1.75, 0.5, 1.5]).double()
    low, high = bootstrap(lambda v: (1 - v.mean(-1)).abs(), values)
    assert low == 0 < high


def test_intervals_are_undefined_for_one_input_and_where_a_draw_is():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    low, high = bootstrap(lambda v: v.mean(-1), values[:, :1])
    assert low.isnan().all() and high.isnan().all() and low.shape == (2,)
    roots = bootstrap(lambda v: v.mean(-1).sqrt(), torch.tensor([-1.0, 5.0, 6.0]))
    assert all(end.isnan() for end in roots)


def test_a_curve_has_its_mean_over_decades():
    values = torch.tensor([[0.0, 1.0, 1.0], [0.3, 0.3, 0.3]])
    assert mean_over_decades([10, 100, 10_000], values).tolist() == pytest.approx([2.5 / 3, 0.3])
    assert mean_over_decades([0, 10, 1000], torch.tensor([9.0, 0.0, 1.0])) == 0.5  # no edges: no decade
    assert mean_over_decades([7], torch.tensor([1.0])).isnan()


def test_areas_over_decades_are_those_of_the_curve():
    model = tiny_model("llama")
    graph = complete_graph(model, "head")
    weights = np.random.default_rng(0).normal(size=len(graph))
    graph = Graph(graph.nodes, graph.edges.assign(weight=weights), graph.meta)
    judging = Judging(n_boot=50, run=Run(progress=False))
    budgets = [5, 40, len(graph)]
    areas, curves = compare_curves(model, {"a": graph}, written_tokens(model, 4, 6), budgets, judging=judging)
    for area in areas.itertuples():
        f = curves.loc[curves["ablation"] == area.ablation, "faithfulness"].to_numpy()
        decades = np.diff(np.log10(budgets))
        for name, y in (("cpr_log", f), ("cmd_log", np.abs(1 - f))):
            by_hand = ((y[1:] + y[:-1]) / 2 * decades).sum() / decades.sum()
            assert getattr(area, name) == pytest.approx(by_hand)
            low, high = getattr(area, f"{name}_low"), getattr(area, f"{name}_high")
            assert low <= getattr(area, name) <= high


def test_methods_are_compared_over_decades_and_in_the_modes_asked_for(tmp_path):
    known, budgets = KNOWN["copy"](), [1, 10, 100]
    eap = {"EAP": list_methods()["EAP"]}
    options = {"n_boot": 20, "progress": False}
    comparing = Comparing(ablation="edge", out=tmp_path / "rows.csv", **options)
    rows = compare_methods(known.model, known.task, known.task, eap, budgets, comparing=comparing)
    assert rows["ablation"].tolist() == ["edge"] * 3
    f = rows["faithfulness"].to_numpy()
    assert np.allclose(rows["cpr_log"], (f[0] / 2 + f[1] + f[2] / 2) / 2, atol=1e-4)
    assert np.allclose(rows["cpr"], np.trapezoid(f, budgets) / 99, atol=1e-4)
    both = compare_methods(known.model, known.task, known.task, eap, budgets, comparing=Comparing(**options))
    assert set(both["ablation"]) == {"edge", "node"}


def test_rows_are_added_to_a_table_from_before_the_areas_over_decades(tmp_path):
    known, path = KNOWN["copy"](), tmp_path / "rows.csv"
    options = {"n_boot": 20, "out": path, "progress": False, "ablation": "edge"}

    def compare(name):
        methods = {name: list_methods()[name]}
        comparing = Comparing(**options)
        return compare_methods(known.model, known.task, known.task, methods, [1, 10], comparing=comparing)

    rows = compare("EAP")
    rows[[name for name in rows if "_log" not in name]].to_csv(path, index=False)
    assert compare("random")["method"].unique().tolist() == ["random"]
    rows = pd.read_csv(path).set_index("method")
    assert rows.loc["EAP", "cpr_log"].isna().all() and rows.loc["random", "cpr_log"].notna().all()
