"""Corpora: properties over random documents, large sources, other processes, every refusal."""

import dataclasses
import gzip
import hashlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitgraph.data import corpus as data
from circuitgraph.data.corpus import Document, Texts, check_tokens, hash_tokens, load_corpus, open_texts
from circuitgraph.data.corpus import read_corpus, register_mask
from circuitgraph.model.loading import load_model, tiny_model


class WordTokenizer:
    "A number is its own token, any other word is 99,999; 0 is BOS."

    bos_token_id = 0

    def __call__(self, text, **_):
        if isinstance(text, list):
            return SimpleNamespace(input_ids=[self(part).input_ids for part in text])
        return SimpleNamespace(input_ids=[int(w) if w.isdigit() else 99_999 for w in text.split()])


def toy_model(n_ctx=64, d_vocab=100_000):
    tokenizer = WordTokenizer()
    return SimpleNamespace(name="toy", tokenizer=tokenizer, n_ctx=n_ctx, d_vocab=d_vocab)


def number_documents(lengths):
    "Documents in which no token occurs twice, in or between them: a token tells where it comes from."
    starts = [1 + sum(lengths[:i]) for i in range(len(lengths))]
    return [list(range(start, start + n)) for start, n in zip(starts, lengths, strict=True)]


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@settings(deadline=None, max_examples=200)
@given(lengths, st.integers(2, 9), st.booleans(), st.integers(0, 2**31), st.data())
def test_sequences_are_pieces_of_one_document(lengths, seq_len, prepend_bos, seed, draw):
    documents, length = number_documents(lengths), seq_len - prepend_bos
    strings = [" ".join(map(str, ids)) for ids in documents]
    available = sum(n // length for n in lengths)
    if available == 0:
        with pytest.raises(ValueError, match="seq_len must be at most|is empty"):
            read_corpus(strings, toy_model(), 1, seq_len=seq_len, prepend_bos=prepend_bos)
        return
    n = draw.draw(st.integers(1, available))

    def read(n_tokens, seed=seed):
        options = {"seq_len": seq_len, "prepend_bos": prepend_bos, "seed": seed}
        return read_corpus(strings, toy_model(), n_tokens, **options)

    corpus = read(n * seq_len)
    text = corpus.tokens[:, int(prepend_bos) :]
    assert corpus.tokens.shape == corpus.document.shape == (n, seq_len)
    assert not prepend_bos or (corpus.tokens[:, 0] == 0).all()
    for row, owner in zip(text.tolist(), corpus.document.tolist(), strict=True):
        assert len(set(owner)) == 1
        title = corpus.documents.document[owner[0]]
        ids = documents[int(title.removeprefix("string "))]
        k = ids.index(row[0])
        assert k % length == 0 and ids[k : k + length] == row
    assert len(text.unique()) == text.numel(), "a position was drawn twice"
    assert corpus.documents.n_tokens.tolist() == lengths
    assert torch.equal(read(n * seq_len).tokens, corpus.tokens)
    assert torch.equal(read(n * seq_len - seq_len + 1).tokens, corpus.tokens), (
        "n_tokens is rounded up to whole sequences"
    )
    # All sequences, under any two seeds, are the same set in another order.
    every, other = read(available * seq_len), read(available * seq_len, seed=seed + 1)
    assert torch.equal(every.tokens[:n], corpus.tokens)
    assert sorted(every.tokens.tolist()) == sorted(other.tokens.tolist())
    with pytest.raises(ValueError, match=f"n_tokens must be at most {available * seq_len} "):
        read(available * seq_len + 1)


def test_every_order_is_as_likely():
    "Six orders of three sequences, 600 seeds: each within five standard deviations of 100."
    orders = [
        tuple(load_corpus(["1 2 3 4", "5 6"], toy_model(), 6, seq_len=2, seed=seed)[:, 0].tolist())
        for seed in range(600)
    ]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and all(abs(count - 100) < 5 * (600 * 1 / 6 * 5 / 6) ** 0.5 for count in counts)


@settings(deadline=None)
@given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 20))
def test_parts_make_up_the_text(text, size):
    parts = data._split_parts(text, size)
    assert all(0 < len(part) <= size and part.strip() for part in parts)
    rest = text
    for part in parts:
        blank, found, rest = rest.partition(part)
        assert found and not blank.strip()
    assert not rest.strip()


@pytest.mark.parametrize(
    ("text", "size", "parts"),
    [
        ("one two\nthree four", 9, ["one two", "\nthree", " four"]),
        ("x" * 25, 10, ["x" * 10, "x" * 10, "x" * 5]),
        ("short", 10, ["short"]),
        (" \n", 10, []),
    ],
)
def test_parts_end_before_a_newline_or_a_space(text, size, parts):
    assert data._split_parts(text, size) == parts


def test_a_large_source_is_not_read_whole(monkeypatch):
    monkeypatch.setattr(data, "_POOL_CHARS", 2_000)
    monkeypatch.setattr(data, "_BATCH_CHARS", 500)
    seen = []

    def read(indices):
        seen.extend(indices)
        return [data.Document("text", f"string {i}", " ".join(["7"] * 50)) for i in indices]

    many = Texts("many", 1_000_000, read)
    corpus = read_corpus(many, toy_model(), 100, seq_len=10)
    assert len(seen) == len(set(seen)) <= 64
    assert len(corpus.documents) <= len(seen) and max(seen) > 1_000, (
        "documents are taken from all of the source"
    )
    assert torch.equal(read_corpus(many, toy_model(), 100, seq_len=10).document, corpus.document)
    seen.clear()
    assert read_corpus(many, toy_model(), 20_000, seq_len=10).tokens.shape == (2_000, 10)
    assert 400 <= len(seen) < 500, "more is read only if more is asked for"


def test_a_long_document_is_sampled_all_over(monkeypatch):
    monkeypatch.setattr(data, "_PART_CHARS", 160)
    monkeypatch.setattr(data, "_POOL_CHARS", 2_000)
    monkeypatch.setattr(data, "_BATCH_CHARS", 500)
    tokens = load_corpus([" ".join(map(str, range(1, 20_001)))], toy_model(), 100, seq_len=5)
    assert (tokens.diff(dim=1) == 1).all() and tokens.min() < 5_000 and tokens.max() > 15_000


@pytest.fixture(scope="module")
def model():
    return load_model("smollm2-135m")


# The corpus of the quickstart. If the embedded text is made anew, this and every number in the paper change.
QUICKSTART = "791b7949928af51f0160c38b3adedfa6405c420d47058345f8bb4e9558e7fc3d"


def test_the_default_corpus_is_the_same_everywhere(model):
    assert hash_tokens(load_corpus("default", model, 20_000)) == QUICKSTART
    code = (
        "from circuitgraph.data.corpus import hash_tokens, load_corpus; "
        "from circuitgraph.model.loading import load_model; "
        "print(hash_tokens(load_corpus('default', load_model('smollm2-135m'), 20_000)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == QUICKSTART


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(min_size=1, max_size=80), min_size=1, max_size=5), st.integers(0, 100))
def test_real_tokenizer_on_any_text(model, texts, seed):
    ids = [
        model.tokenizer(text, add_special_tokens=False).input_ids if text.strip() else [] for text in texts
    ]
    available = sum(len(i) // 4 for i in ids)
    if available == 0:
        return
    corpus = read_corpus(texts, model, available * 4, seq_len=4, seed=seed)
    wanted = sorted((d, *i[k : k + 4]) for d, i in enumerate(ids) for k in range(0, len(i) // 4 * 4, 4))
    owners = corpus.document[:, 0].tolist()
    assert sorted((d, *row) for d, row in zip(owners, corpus.tokens.tolist(), strict=True)) == wanted


def test_embedded_text_and_notice_agree():
    from importlib import resources

    folder = resources.files("circuitgraph").joinpath("texts")
    packed = folder.joinpath("default.jsonl.gz").read_bytes()
    assert packed[4:8] == bytes(4), "a time stamp would make each build differ"
    rows = [json.loads(line) for line in gzip.decompress(packed).decode().split("\n")[:-1]]
    assert all(set(row) == {"register", "document", "text"} for row in rows)
    notice = folder.joinpath("LICENSES.md").read_text(encoding="utf-8")
    assert hashlib.sha256(gzip.decompress(packed)).hexdigest() in notice
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in notice and "Open Knowledge Foundation" in notice


def test_a_folder_of_two_kinds_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "rows.jsonl.gz").touch()
    with pytest.raises(ValueError, match=r"\.txt and \.jsonl"):
        open_texts(tmp_path)


@pytest.mark.parametrize(
    ("name", "contents", "match"),
    [
        ("rows.jsonl", b'{"text": "one"}\n{"text": null}\n', "NoneType in row 1"),
        ("rows.jsonl", b'{"text": "one"}\n{"text"', "could not be read as a dataset"),
        ("rows.jsonl", b'{"content": "one"}\n', "field must be a column of .*content.*got 'text'"),
        ("rows.parquet", b"PAR1 cut short", "could not be read as a dataset"),
        ("folder/readme", b"nothing here", "could not be read as a dataset"),
    ],
)
def test_bad_datasets_are_refused(tmp_path, monkeypatch, name, contents, match):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "source" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=match):
        read_corpus(path.parent if name.startswith("folder") else path, toy_model(), 2, seq_len=2)


def test_an_unknown_split_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "source").mkdir()
    datasets.Dataset.from_dict({"text": ["1 2 3 4"]}).to_parquet(tmp_path / "source" / "train.parquet")
    assert load_corpus(tmp_path / "source", toy_model(), 4, seq_len=4).tolist() == [[1, 2, 3, 4]]
    with pytest.raises(ValueError, match=r"source .* could not be read .*validation.*\['train'\]"):
        open_texts(tmp_path / "source", split="validation")


def test_files_are_read_in_order_with_their_folder_as_register(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfOne.\r\nTwo.")
    (tmp_path / "letters" / "a.txt").write_text("Dear Sir", encoding="utf-8")
    letter, numbers = open_texts(tmp_path).read([1, 0])
    assert letter == Document("letters", "letters/a.txt", "Dear Sir")
    assert numbers == Document("text", "b.txt", "One.\nTwo.")


def test_a_dataset_is_the_same_in_every_format(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"text": ["To be", "or not", ""], "line": ["a", "b", "c"]})
    rows.to_json(tmp_path / "rows.jsonl")
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_csv(tmp_path / "rows.csv", index=False)
    (tmp_path / "parts").mkdir()
    rows.to_parquet(tmp_path / "parts" / "test.parquet")
    opened = [open_texts(tmp_path / name) for name in ("rows.jsonl", "rows.parquet")]
    opened += [open_texts(str(tmp_path / "parts"), split="test"), open_texts(rows)]
    for texts in opened:
        assert texts.n_documents == 3 and [d.title for d in texts.read([1, 0])] == ["row 1", "row 0"]
        assert [d.text for d in texts.read([1, 0])] == ["or not", "To be"]
    assert open_texts(tmp_path / "rows.csv", field="line").read([2])[0].text == "c"


def test_hash_of_tokens_is_of_shape_and_values():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert hash_tokens(ids) == hash_tokens(ids.int()) == hash_tokens(ids.T.contiguous().T)
    others = (ids.T, ids.view(1, 6), ids + 1)
    assert len({hash_tokens(ids), *map(hash_tokens, others)}) == 4
    by_hand = hashlib.sha256(b"".join(n.to_bytes(8, "little") for n in (1, 2, 1, 2)))
    assert hash_tokens(ids[:1, :2]) == by_hand.hexdigest()


def refuse(words, function, *arguments, **options):
    "The call must raise a ValueError that has all these words."
    with pytest.raises(ValueError) as error:
        function(*arguments, **options)
    missing = [word for word in words if str(word) not in str(error.value)]
    assert not missing, f"{error.value} lacks {missing}"


@pytest.mark.parametrize(
    ("words", "arguments", "options"),
    [
        (["n_tokens", "got 1000000", "ask for fewer"], [1_000_000], {}),
        (["seq_len", 8192, 8193], [1_000], {"seq_len": 8193}),
        (["seq_len", "at least 2", "got 1"], [1_000], {"seq_len": 1}),
        (["n_tokens", "at least 1"], [0], {}),
        (["n_tokens", "20000.0"], [2e4], {}),
        (["seed", "-1"], [], {"seed": -1}),
        (["prepend_bos", "'yes'"], [], {"prepend_bos": "yes"}),
    ],
)
def test_requests_that_can_not_be_met_are_refused(model, words, arguments, options):
    refuse(words, load_corpus, "default", model, *arguments, **options)


@pytest.mark.parametrize(
    ("words", "source"),
    [
        (["is empty"], []),
        (["nowhere.txt", "exists"], "nowhere.txt"),
        (["bytes", "index 1", "decode"], ["text", b"bytes"]),
        (["dict", "one split"], {"train": "text"}),
        (["seq_len must be at most 3", "got 128"], ["1 2 3"]),
    ],
)
def test_sources_that_are_no_text_are_refused(words, source):
    refuse(words, load_corpus, source, toy_model(n_ctx=128), 100)


def test_files_that_are_no_text_are_refused(tmp_path):
    files = {"blank.txt": b" \n", "latin.txt": "na\u00efve".encode("latin-1"), "paper.pdf": b""}
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
    model = toy_model(n_ctx=128)
    refuse(["blank.txt", "is empty"], load_corpus, tmp_path / "blank.txt", model)
    refuse(["latin.txt", "0xef", "offset 2", "iconv"], load_corpus, tmp_path / "latin.txt", model)
    refuse(["paper.pdf", ".txt", "read_text"], load_corpus, tmp_path / "paper.pdf", model)


def test_options_that_a_source_has_no_use_for_are_refused():
    rows = datasets.Dataset.from_dict({"text": ["To be"], "line": ["a"]})
    refuse(["field", "text, line", "'content'"], open_texts, rows, field="content")
    refuse(["split", "leave it out"], open_texts, "default", split="test")


def test_a_dataset_that_can_not_be_reached_is_refused(model, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    name = "owner/no-such-dataset"
    refuse([repr(name), "network", "'default' needs none"], load_corpus, name, model)


def test_tokens_of_another_model_are_refused(model):
    mute = dataclasses.replace(model, tokenizer=None)
    narrow = dataclasses.replace(tiny_model("llama"), tokenizer=model.tokenizer)
    refuse(["model", "has none"], load_corpus, "default", mute)
    refuse(["vocabulary", "[0, 50)"], load_corpus, "default", narrow, seq_len=16)
    refuse(["documentation", "'poetry'"], register_mask, read_corpus("default", model, 1_000), "poetry")
    too_long, top = torch.ones(1, model.n_ctx + 1, dtype=torch.int64), model.d_vocab
    refuse(["tokens", "list"], check_tokens, [[1, 2]], model)
    refuse(["corpus", "(3,)"], check_tokens, torch.ones(3, dtype=torch.int64), model, "corpus")
    refuse(["float32", "int64"], check_tokens, torch.ones(2, 3), model)
    refuse(["empty", "(0, 3)"], check_tokens, torch.ones(0, 3, dtype=torch.int64), model)
    refuse([model.n_ctx, model.n_ctx + 1, "shorter"], check_tokens, too_long, model)
    refuse([f"got {top} at [1, 1]"], check_tokens, torch.tensor([[0, 1], [2, top]]), model, "clean")
    refuse(["got -1 at [0, 1]"], check_tokens, torch.tensor([[0, -1]]), model)
