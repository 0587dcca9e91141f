"""Tasks: every template and seed on the embedded model, other tokenizers, files of one's own, refusals."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from circuitgraph.model.loading import load_model
from circuitgraph.data.task import METRICS, TASKS, Task, load_task, score_answers

# transformers and TransformerLens warn while they boot a model; what this package causes is an error.
pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")


@pytest.fixture(scope="module")
def model():
    return load_model("smollm2-135m")


def parts(task):
    return [task.clean, task.corrupted, task.answers, task.wrong, task.last]


def global_random_state():
    return repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))  # noqa: NPY002


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_its_seed_and_its_pairs_correspond(model, name):
    before = global_random_state()
    task, again, other = (load_task(name, model, n=12, seed=seed, check=False) for seed in (5, 5, 6))
    assert global_random_state() == before
    assert all(torch.equal(a, b) for a, b in zip(parts(task), parts(again), strict=True))
    assert task.clean.shape != other.clean.shape or not torch.equal(task.clean, other.clean)
    assert task.accuracy > task.chance and len(task) == len(task.clean.unique(dim=0)) == 12
    for clean, corrupted, answers, wrong, last in zip(*parts(task), strict=True):
        assert (clean != corrupted)[: last + 1].any()
        assert torch.equal(clean[last + 1 :], corrupted[last + 1 :])
        prompt, right = model.tokenizer.decode(clean[: last + 1]), {int(a) for a in answers if a >= 0}
        for token in right:
            text = prompt + model.tokenizer.decode([token])
            ids = model.tokenizer(text, add_special_tokens=False).input_ids
            assert ids == [*clean[: last + 1].tolist(), token]
        assert right and not right & set(wrong.tolist())


def test_padding_at_the_end_changes_nothing_at_the_answer(model):
    task = load_task("induction", model, n=8)
    assert task.lengths is not None and len(set(task.lengths.tolist())) > 1
    with torch.no_grad():
        together = model(task.clean)[torch.arange(8), task.last]
    for i, length in enumerate(task.lengths):
        with torch.no_grad():
            alone = model(task.clean[i : i + 1, :length])[0, -1]
        assert (alone - together[i]).abs().max() < 1e-3
    assert load_task("induction", model, n=8, batch_size=3).accuracy == task.accuracy


def digit_pairs():
    "A tokenizer of whole words and pairs of digits, as many models have."
    nouns = ["war", "siege", "voyage", "trial", "project", "dynasty", "reign", "strike", "famine"]
    numbers = [*(f"{i:02}" for i in range(100)), *map(str, range(10))]
    words = ["[UNK]", "The", "lasted", "from", "the", "year", "to", *numbers, *nouns]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split(pattern=Regex(r"\d\d"), behavior="isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def test_years_are_asked_for_in_the_tokens_that_there_are(model):
    other = dataclasses.replace(load_model(tiny_wide()), tokenizer=digit_pairs())
    task = load_task("greater-than", other, n=10, check=False)
    for clean, answers, wrong in zip(task.clean, task.answers, task.wrong, strict=True):
        text = other.tokenizer.convert_ids_to_tokens(clean.tolist())
        later, earlier = (
            [int(t) for t in other.tokenizer.convert_ids_to_tokens(tokens[tokens >= 0].tolist())]
            for tokens in (answers, wrong)
        )
        start = int(text[7])
        assert (
            text[6] == text[-1] and min(later) == start + 1 and max(later) == 99 and max(earlier) == start - 1
        )
    ours = load_task("greater-than", model, n=10)
    assert all(len(t) == 1 for t in model.tokenizer.batch_decode(ours.answers[ours.answers >= 0][:, None]))


def tiny_wide():
    """A small random transformer with room for the words above."""
    import warnings

    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerBridge.boot_native(
            TransformerBridgeConfig(
                n_layers=1,
                n_heads=2,
                d_model=16,
                d_head=8,
                d_mlp=32,
                n_ctx=24,
                d_vocab=200,
                act_fn="gelu",
                normalization_type=None,
            )
        )


ROWS = [
    ("The colour of snow is", "The colour of grass is", [" white"], [" black", " green"]),
    ("The colour of grass is", "The colour of snow is", [" green"], [" white"]),
]


def write(folder, suffix, rows=ROWS, wrong=True):
    path = folder / f"colours{suffix}"
    if suffix == ".csv":
        path.write_text(
            "clean,corrupted,answers,wrong\n"
            + "".join(f'"{a}",{b},{"|".join(c)},{"|".join(d) if wrong else ""}\n' for a, b, c, d in rows),
            encoding="utf-8-sig",
        )
    else:
        path.write_text(
            "\n".join(
                json.dumps({"clean": a, "corrupted": b, "answers": c, **({"wrong": d} if wrong else {})})
                for a, b, c, d in rows
            )
            + "\n\n"
        )
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_file_of_ones_own_is_a_task(model, tmp_path, suffix):
    task = load_task(write(tmp_path, suffix), model)
    assert (
        (task.name, task.metric, len(task), task.lengths) == ("colours", "logit_diff", 2, None)
        and task.wrong.shape == (2, 2)
        and task.wrong[1, 1] == -1
    )
    assert model.tokenizer.batch_decode(task.clean) == [
        row[0] for row in ROWS
    ] and model.tokenizer.batch_decode(task.corrupted) == [row[1] for row in ROWS]
    assert len(load_task(str(write(tmp_path, suffix)), model, n=1, check=False)) == 1
    plain = load_task(write(tmp_path, suffix, wrong=False), model, check=False)
    assert plain.wrong is None and plain.metric == "ce" and plain.chance == pytest.approx(1 / model.d_vocab)


@pytest.mark.parametrize(
    "text, suffix, words",
    [
        ("clean,answers\nThe sky is, blue\n", ".csv", "line 2: must have corrupted"),
        (
            "clean,corrupted,answers\nThe sky is,The old sea is, blue\n",
            ".csv",
            "line 2: clean and corrupted must have the same number of tokens, at least one, got 3 and 4",
        ),
        ("clean,corrupted,answers\nThe sky i,The sea i,s\n", ".csv", "line 2: 's' does not follow"),
        (
            "clean,corrupted,answers,wrong\nThe sky is,The sea is, blue, blue\n",
            ".csv",
            "answers and wrong must differ",
        ),
        (
            "clean,corrupted,answers,wrong\nThe sky is,The sea is, blue,\nThe sea is,The sky is, blue, red\n",
            ".csv",
            "either every row",
        ),
        ("clean,corrupted,answers\n", ".csv", "at least one pair"),
        ("", ".jsonl", "at least one pair"),
        ('{"clean": "a"\n', ".jsonl", "line 1: not JSON"),
        ("[1]\n", ".jsonl", "line 1: must be an object"),
        (
            '\n{"clean": "The sky is", "corrupted": "The sea is", "answers": [1]}\n',
            ".jsonl",
            "line 2: must hold texts",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_by_line(model, tmp_path, text, suffix, words):
    path = tmp_path / f"mine{suffix}"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_task(path, model)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="must be UTF-8"):
        load_task(path, model)


def test_requests_that_can_not_be_met_are_refused(model):
    for words, request in {
        r"source must be one of ioi, .* got 'sums'": ("sums", model),
        "must have a tokenizer": ("ioi", dataclasses.replace(model, tokenizer=None)),
        "n must be at least 1, got 0": ("ioi", model, 0),
        "n must be at most about": ("successor", model, 4000),
        "source must be one of": ("missing.csv", model),
    }.items():
        with pytest.raises(ValueError, match=words):
            load_task(*request)
    with pytest.raises(ValueError, match="metric must be one of .* got 'f1'"):
        load_task("ioi", model, n=2, metric="f1")
    ids, one = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 1, dtype=torch.long)
    for words, options in {
        "corrupted must have the shape of clean": {"corrupted": ids[:, :2]},
        "corrupted must be an integer tensor": {"corrupted": ids.float()},
        "metric must be one of": {"metric": "f1"},
        "needs answers and wrong": {"answers": None, "wrong": None},
        "'logit_diff' needs wrong": {"wrong": None},
        "prompt 1 has none": {"answers": torch.tensor([[1], [-1]])},
        r"answers must have the shape \[2 prompts": {"answers": one[:1]},
        "lengths must be a number from 1 to 3": {"lengths": torch.tensor([3, 4])},
    }.items():
        with pytest.raises(ValueError, match=words):
            Task(**({"clean": ids, "corrupted": ids, "answers": one, "wrong": one} | options))


def test_a_model_at_chance_is_refused_unless_told_otherwise(model, tmp_path):
    path = write(
        tmp_path, ".csv", [("The colour of snow is", "The colour of grass is", [" quantum"], [" white"])]
    )
    with pytest.raises(
        ValueError, match="must be above chance at 'colours' .* accuracy 0.00, chance 0.50: .* check=False"
    ):
        load_task(path, model)
    assert load_task(path, model, check=False).accuracy == 0


@pytest.mark.parametrize("metric", METRICS)
def test_padding_of_answers_is_left_out_of_scores(metric):
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    answers, wrong = (
        torch.tensor([[0, 1, -1], [2, -1, -1], [3, 4, 5]]),
        torch.tensor([[8, -1], [7, 6], [1, -1]]),
    )
    alone = [
        score_answers(
            logits[i : i + 1],
            answers[i : i + 1][:, answers[i] >= 0],
            wrong[i : i + 1][:, wrong[i] >= 0],
            metric,
        ).item()
        for i in range(3)
    ]
    assert score_answers(logits, answers, wrong, metric).tolist() == pytest.approx(alone)
    with pytest.raises(ValueError, match="metric must be one of"):
        score_answers(logits, answers, wrong, "f1")
