"""The models built by hand do what they say: their answers are those of a line of Python, given with
certainty. That their edges are the true ones is tested with edge ablation (test_ablate.py)."""

import pytest
import torch

from circuitgraph.model.blocks import run_logits
from circuitgraph.model.modules import trace_modules
from known import CERTAIN, KNOWN


def mirrored(prompt):
    words, again = prompt[: prompt.index(0)], prompt[prompt.index(0) + 1 :]
    assert again == words[::-1][: len(again)]
    return words[::-1][len(again)]


def sorted_next(prompt):
    numbers, again = prompt[: prompt.index(0)], prompt[prompt.index(0) + 1 :]
    assert again == sorted(numbers)[: len(again)]
    return sorted(numbers)[len(again)]


def balanced(prompt):
    text, before = "".join("()"[t] for t in prompt), None
    while text != before:
        text, before = text.replace("()", ""), text
    return 3 if text else 2


def computed(prompt):
    b0, b1, b2, b3 = (int(bit) for bit in f"{prompt[-1]:04b}")
    return 16 + (((b0 and b1) or b2) != b3)


ANSWERS = {
    "copy": lambda prompt: prompt[-2],
    "induction": lambda prompt: prompt[prompt.index(prompt[-1]) + 1],
    "reverse": mirrored,
    "count": lambda prompt: 3 + prompt.count(prompt[-1]),
    "sort": sorted_next,
    "brackets": balanced,
    "gates": computed,
}  # by the last of the prompt; the chain's permutation is part of the model


@torch.no_grad()
@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("seed", [0, 1])
def test_answers_are_right_and_certain(name, seed):
    k = KNOWN[name](seed=seed)
    task, logits = k.task, run_logits(k.model, trace_modules(k.model, k.task.clean).reads["logits"])[:, -1]
    if name in ANSWERS:
        assert task.answers[:, 0].tolist() == [ANSWERS[name](prompt) for prompt in task.clean.tolist()]
    if name in ("reverse", "count", "sort", "brackets", "gates"):
        assert task.wrong[:, 0].tolist() == [ANSWERS[name](prompt) for prompt in task.corrupted.tolist()]
    assert torch.equal(logits.argmax(1), task.answers[:, 0]) and torch.allclose(
        logits.gather(1, task.answers) - logits.scatter(1, task.answers, -torch.inf).amax(1, keepdim=True),
        torch.tensor(CERTAIN, dtype=logits.dtype),
        atol=1e-3,
    )
    assert len({tuple(row) for row in task.clean.tolist()}) > 8 and not (task.answers == task.wrong).any()


@torch.no_grad()
@pytest.mark.parametrize("name", KNOWN)
def test_what_stands_beside_the_circuit_is_not_silent(name):
    """Every head and MLP reads something and writes something, but those of the circuit: else false edges
    would be easy to tell."""
    k = KNOWN[name]()
    writes, inside = (
        trace_modules(k.model, k.task.clean, "head").writes,
        {end for edge in k.edges for end in edge.split("<")[0].split("->")},
    )
    names = [*k.every.nodes["name"]][:-1]
    assert all(
        float(writes[:, :, i].std(0).amax()) > 0.1
        for i, node in enumerate(names)
        if node[0] in "am" and node not in inside
    )
