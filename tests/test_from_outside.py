"""What a user adds without editing the package: a kind of ablated value, and a metric.

Methods of attribution and null models have tests of their own (`test_methods_api.py`, `test_community.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from circuitgraph import AblatedValue, Budgets, Judging, Run, ablation_curve, complete_graph, evaluate
from circuitgraph import minimality, run_ablated
from circuitgraph.ablation.values import FixedValues, Mean
from circuitgraph.model.loading import tiny_model
from feature_oracles import all_dictionaries, every_edge, gap
from oracles import random_tokens, written_tokens

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")


@dataclass(frozen=True, eq=False)
class Shifted(AblatedValue):
    """What a writer writes on the text, moved along by some positions."""

    name: ClassVar[str] = "shifted"
    by: int = 1

    def fix(self, cut, text):  # noqa: ARG002
        return FixedValues(other=text.tokens.roll(self.by, 1))


@dataclass(frozen=True, eq=False)
class FirstMean(AblatedValue):
    """The mean over the first sequences of a text."""

    name: ClassVar[str] = "first mean"
    n: int = 2

    def fix(self, cut, text):
        return FixedValues(cut.mean(text.tokens[: self.n], run=text.run))


@torch.no_grad()
@pytest.mark.parametrize("grain", ["head", "feature"])
def test_a_kind_of_ablated_value(grain):
    model = tiny_model("llama")
    text = written_tokens(model, 4, 8)
    dictionaries = all_dictionaries(model) if grain == "feature" else None
    graph = every_edge(model, text, dictionaries) if dictionaries else complete_graph(model)
    options = {"dictionaries": dictionaries}
    nothing = run_ablated(model, graph.keep([]), text, value=Shifted(2), **options)
    assert gap(nothing, model(text.roll(2, 1))) < 1e-5
    half = graph.keep(np.random.default_rng(0).random(len(graph)) < 0.5)
    ours = run_ablated(model, half, text, value=FirstMean(), **options)
    assert gap(ours, run_ablated(model, half, text, value=Mean(text[:2], n_apart=0), **options)) == 0
    judging = Judging(n_boot=10, run=Run(progress=False))
    result = evaluate(model, half, text, value=Shifted(), judging=judging, **options)
    assert result.value == "shifted" and np.isfinite(result.faithfulness)


def first_logit(logits):
    """A metric: the mean logit of token 0."""
    return logits[..., 0].mean(1)


@torch.no_grad()
def test_a_metric_of_text():
    model, judging = tiny_model("llama"), Judging(metric=first_logit, n_boot=10, run=Run(progress=False))
    text, graph = random_tokens(model, 4, 8), complete_graph(model)
    half = graph.keep(np.random.default_rng(0).random(len(graph)) < 0.5)
    result = evaluate(model, half, text, value="zero", judging=judging)
    kept, none = (run_ablated(model, g, text, value="zero") for g in (half, graph.keep([])))
    score = [first_logit(logits).mean() for logits in (kept, none, model(text))]
    assert np.isclose(result.faithfulness, (score[0] - score[1]) / (score[2] - score[1]), atol=1e-6)
    assert result.metric == "own"
    curve = ablation_curve(
        model, half, text, Budgets([5, len(half)]), ablation="edge", value="zero", judging=judging
    )
    assert np.isclose(curve["faithfulness"].iloc[-1], result.faithfulness)
    assert len(minimality(model, half, text, 3, value="zero", judging=judging)) == 3


def test_a_metric_that_is_none_is_refused():
    model, judging = tiny_model("llama"), Judging(metric=lambda logits: logits.sum(), run=Run(progress=False))
    with pytest.raises(ValueError, match="one number for each of the 4 inputs"):
        evaluate(model, complete_graph(model), random_tokens(model, 4, 8), judging=judging)
