"""Tasks: every template and seed on the embedded model, other tokenizers, files of one's own, refusals."""

import copy
import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from circuitgraph.data.prompts import TASKS, chat_prompt, load_task, show_prompts
from circuitgraph.data.task import METRICS, Task, check_task, score_answers
from circuitgraph.model.loading import load_model, tiny_model

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
        (
            '{"clean": ["a", "b"], "corrupted": "c", "answers": "d"}\n',
            ".jsonl",
            "line 1: clean must be one text",
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


def test_padding_of_prompts_has_one_form():
    "The side, the amount and the token of the padding are gone once a task is made."
    rows, other = [[5, 6, 7], [8, 9]], [[5, 6, 3], [4, 9]]
    answers, wrong = torch.tensor([[1], [2]]), torch.tensor([[2], [1]])

    def padded(prompts, side, width, token):
        out, mask = torch.full((2, width), token), torch.zeros(2, width, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            place = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
            out[i, place] = torch.tensor(prompt)
            mask[i, place] = 1
        return out, mask

    for side, width, token in [("right", 3, 0), ("right", 6, 17), ("left", 3, 4), ("left", 7, 0)]:
        clean, mask = padded(rows, side, width, token)
        task = Task(clean, padded(other, side, width, token)[0], answers=answers, wrong=wrong, mask=mask)
        assert task.clean.tolist() == [[5, 6, 7], [8, 9, 0]]
        assert task.corrupted.tolist() == [[5, 6, 3], [4, 9, 0]]
        assert task.lengths.tolist() == [3, 2] and task.last.tolist() == [2, 1]
        assert torch.equal(dataclasses.replace(task, name="again").clean, task.clean)
    full = Task(clean[:, -2:], clean[:, -2:], answers=answers, wrong=wrong, lengths=torch.tensor([2, 2]))
    assert full.lengths is None
    holes = torch.tensor([[1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    for words, mask in {"one run of tokens": holes, "the shape of clean": holes[:, :3]}.items():
        with pytest.raises(ValueError, match=words):
            Task(clean, clean, answers=answers, wrong=wrong, mask=mask)


@pytest.mark.parametrize("bad", [[[1], [2]], torch.tensor([[1.0], [2.0]])])
def test_answers_must_be_a_tensor_of_tokens(bad):
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="answers must be an integer tensor .* padded with -1"):
        Task(ids, ids, "ce", answers=bad)


def test_a_task_must_fit_the_model():
    causal, ahead = tiny_model("llama"), tiny_model("bidirectional")
    ids, one = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 1, dtype=torch.long)
    check_task(Task(ids, ids, "ce", one, lengths=torch.tensor([3, 2])), causal)
    for words, task, model in [
        (r"answers must lie in \[0, 50\)", Task(ids, ids, "ce", 50 * one), causal),
        ("corrupted must lie in", Task(ids, 77 * ids, "ce", one), causal),
        ("must have one length", Task(ids, ids, "ce", one, lengths=torch.tensor([3, 2])), ahead),
    ]:
        with pytest.raises(ValueError, match=words):
            check_task(task, model)


LONG = [
    ("The name of the city is", "The name of the child is", [" Llanfairpwll"], []),
    ("The sea is", "The sky is", [" deep"], []),
]


def test_answers_of_several_tokens_have_a_rule(model, tmp_path):
    path = write(tmp_path, ".jsonl", LONG)
    with pytest.raises(ValueError, match="line 1: .* of one token each, but ' Llanfairpwll' has"):
        load_task(path, model)
    first = load_task(path, model, multi_token="first", check=False)
    joint = load_task(path, model, multi_token="joint", check=False)
    assert first.metric == "ce" and first.clean.shape[1] < joint.clean.shape[1]
    with torch.no_grad():
        scores = joint.metric(model(joint.clean))
    for (prompt, _, (answer,), _), score in zip(LONG, scores, strict=True):
        ids = torch.tensor(model.tokenizer(prompt + answer).input_ids)
        n_prompt = len(model.tokenizer(prompt).input_ids)
        with torch.no_grad():
            log_p = model(ids[None])[0].log_softmax(-1)
        by_hand = sum(log_p[i - 1, ids[i]] for i in range(n_prompt, len(ids)))
        assert score.item() == pytest.approx(by_hand.item(), abs=1e-3)
    assert joint.accuracy in (0, 0.5, 1) and 0 < joint.chance < 1e-4
    with pytest.raises(ValueError, match="'joint' is a metric of its own"):
        load_task("ioi", model, multi_token="joint")
    with pytest.raises(ValueError, match="multi_token must be one of"):
        load_task(path, model, multi_token="last")
    with pytest.raises(ValueError, match="one answer and no wrong ones, got 1 and 1"):
        load_task(write(tmp_path, ".jsonl", [(*LONG[0][:3], [" Rome"])]), model, multi_token="joint")


def set_bos(model):
    "The model with a tokenizer that begins every text with BOS by itself."
    tokenizer = copy.deepcopy(model.tokenizer)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    assert tokenizer("a").input_ids[0] == bos[1] != model.tokenizer("a").input_ids[0]
    return dataclasses.replace(model, tokenizer=tokenizer)


def test_a_bos_of_the_text_is_not_set_twice(model, tmp_path):
    bos = model.tokenizer.bos_token
    with_bos = set_bos(model)
    rows = [(bos + LONG[1][0], bos + LONG[1][1], [" deep"], [])]
    with pytest.warns(UserWarning, match="1 prompts begin with .* themselves"):
        task = load_task(write(tmp_path, ".jsonl", rows), with_bos, check=False)
    plain = load_task(write(tmp_path, ".jsonl", LONG[1:]), model, check=False)
    assert task.clean[0].tolist() == [model.tokenizer.bos_token_id, *plain.clean[0].tolist()]
    shown = show_prompts(task, model)
    assert shown.clean[0] == f"{bos}·The· sea· is" and shown.answers[0] == " deep" and shown.wrong[0] == ""


QUESTIONS = ["What is the capital of France?", "What is the capital of Italy?"]


def test_a_chat_prompt_is_the_template_with_one_message(model, tmp_path):
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    by_hand = (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        f"<|im_start|>user\n{QUESTIONS[0]}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat_prompt(model, QUESTIONS[0]) == by_hand
    clean, corrupted = (chat_prompt(model, question, "It is") for question in QUESTIONS)
    assert clean == by_hand + "It is"
    with pytest.warns(UserWarning, match="1 prompts begin with .* themselves"):
        task = load_task(write(tmp_path, ".jsonl", [(clean, corrupted, [" Paris"], [" Rome"])]), model)
    for tokens, question in ((task.clean[0], QUESTIONS[0]), (task.corrupted[0], QUESTIONS[1])):
        message = [{"role": "user", "content": question}]
        theirs = model.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        assert tokens.tolist() == theirs + model.tokenizer("It is").input_ids
    assert task.answers.tolist() == [model.tokenizer(" Paris").input_ids] and task.accuracy == 1


@pytest.mark.parametrize("writes_bos", [True, False])
def test_the_bos_of_a_chat_stands_there_once(model, tmp_path, writes_bos):
    chatty = set_bos(model)
    start = "{{ bos_token }}" if writes_bos else ""
    chatty.tokenizer.chat_template = (
        start + "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' Answer:' }}{% endif %}"
    )
    clean, corrupted = (chat_prompt(chatty, question) for question in QUESTIONS)
    bos = chatty.tokenizer.bos_token
    assert clean == (bos if writes_bos else "") + f"{QUESTIONS[0]} Answer:"
    task = load_task(write(tmp_path, ".jsonl", [(clean, corrupted, [" Paris"], [])]), chatty, check=False)
    plain = model.tokenizer(f"{QUESTIONS[0]} Answer:").input_ids
    assert task.clean[0].tolist() == [chatty.tokenizer.bos_token_id, *plain]


def test_a_chat_without_a_template_is_refused(model):
    bare = dataclasses.replace(model, tokenizer=digit_pairs())
    for asked in (bare, dataclasses.replace(model, tokenizer=None)):
        with pytest.raises(ValueError, match="model must have a tokenizer with a chat template"):
            chat_prompt(asked, "The war lasted")
    with pytest.raises(ValueError, match="text must be a text, got list: call it for each message"):
        chat_prompt(model, QUESTIONS)
    with pytest.raises(ValueError, match="answer_start must be a text, got NoneType"):
        chat_prompt(model, QUESTIONS[0], None)
