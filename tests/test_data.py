"""What the notebook of `data` can't hold: properties over random documents, large sources, other processes."""
import gzip
import hashlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitgraph import data
from circuitgraph.data import Texts, hash_tokens, load_corpus, open_texts, read_corpus
from circuitgraph.model import load_model


class WordTokenizer:
    "A number is its own token, any other word is 99,999; 0 is BOS."
    bos_token_id = 0

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=[self(t).input_ids for t in text] if isinstance(text, list) else [int(word) if word.isdigit() else 99_999 for word in text.split()])


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
    read = lambda n_tokens, seed=seed: read_corpus(strings, toy_model(), n_tokens, seq_len=seq_len, prepend_bos=prepend_bos, seed=seed)  # noqa: E731
    corpus = read(n * seq_len)
    text = corpus.tokens[:, int(prepend_bos):]
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
    assert torch.equal(read(n * seq_len - seq_len + 1).tokens, corpus.tokens), "n_tokens is rounded up to whole sequences"
    # All sequences, under any two seeds, are the same set in another order.
    every, other = read(available * seq_len), read(available * seq_len, seed=seed + 1)
    assert torch.equal(every.tokens[:n], corpus.tokens)
    assert sorted(every.tokens.tolist()) == sorted(other.tokens.tolist())
    with pytest.raises(ValueError, match=f"n_tokens must be at most {available * seq_len} "):
        read(available * seq_len + 1)


def test_every_order_is_as_likely():
    "Six orders of three sequences, 600 seeds: each within five standard deviations of 100."
    orders = [tuple(load_corpus(["1 2 3 4", "5 6"], toy_model(), 6, seq_len=2, seed=seed)[:, 0].tolist()) for seed in range(600)]
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


@pytest.mark.parametrize(("text", "size", "parts"), [
    ("one two\nthree four", 9, ["one two", "\nthree", " four"]), ("x" * 25, 10, ["x" * 10, "x" * 10, "x" * 5]), ("short", 10, ["short"]), (" \n", 10, [])])
def test_parts_end_before_a_newline_or_a_space(text, size, parts):
    assert data._split_parts(text, size) == parts


def test_a_large_source_is_not_read_whole(monkeypatch):
    monkeypatch.setattr(data, "_POOL_CHARS", 2_000)
    monkeypatch.setattr(data, "_BATCH_CHARS", 500)
    seen = []

    def read(indices):
        seen.extend(indices)
        return [data.Document("text", f"string {i}", " ".join(["7"] * 50)) for i in indices]

    monkeypatch.setattr(data, "open_texts", lambda *_, **__: Texts("many", 1_000_000, read))
    corpus = read_corpus("any", toy_model(), 100, seq_len=10)
    assert len(seen) == len(set(seen)) <= 64
    assert len(corpus.documents) <= len(seen) and max(seen) > 1_000, "documents are taken from all of the source"
    assert torch.equal(read_corpus("any", toy_model(), 100, seq_len=10).document, corpus.document)
    seen.clear()
    assert read_corpus("any", toy_model(), 20_000, seq_len=10).tokens.shape == (2_000, 10)
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


# The corpus of the quickstart. If the embedded text is made anew, this changes, and so does every number in the paper.
QUICKSTART = "791b7949928af51f0160c38b3adedfa6405c420d47058345f8bb4e9558e7fc3d"


def test_the_default_corpus_is_the_same_everywhere(model):
    assert hash_tokens(load_corpus("default", model, 20_000)) == QUICKSTART
    code = ("from circuitgraph.data import hash_tokens, load_corpus; from circuitgraph.model import load_model; "
            "print(hash_tokens(load_corpus('default', load_model('smollm2-135m'), 20_000)))")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "1", "TOKENIZERS_PARALLELISM": "false"}, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == QUICKSTART


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(min_size=1, max_size=80), min_size=1, max_size=5), st.integers(0, 100))
def test_real_tokenizer_on_any_text(model, texts, seed):
    ids = [model.tokenizer(text, add_special_tokens=False).input_ids if text.strip() else [] for text in texts]
    available = sum(len(i) // 4 for i in ids)
    if available == 0:
        return
    corpus = read_corpus(texts, model, available * 4, seq_len=4, seed=seed)
    wanted = sorted((d, *i[k : k + 4]) for d, i in enumerate(ids) for k in range(0, len(i) // 4 * 4, 4))
    assert sorted((d, *row) for d, row in zip(corpus.document[:, 0].tolist(), corpus.tokens.tolist(), strict=True)) == wanted


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


@pytest.mark.parametrize(("name", "contents", "match"), [
    ("rows.jsonl", b'{"text": "one"}\n{"text": null}\n', "NoneType in row 1"),
    ("rows.jsonl", b'{"text": "one"}\n{"text"', "could not be read as a dataset"),
    ("rows.jsonl", b'{"content": "one"}\n', "field must be a column of .*content.*got 'text'"),
    ("rows.parquet", b"PAR1 cut short", "could not be read as a dataset"),
    ("folder/readme", b"nothing here", "could not be read as a dataset"),
])
def test_bad_datasets_are_refused(tmp_path, monkeypatch, name, contents, match):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "source" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=match):
        read_corpus(path.parent if name.startswith("folder") else path, toy_model(), 2, seq_len=2)


def test_an_unknown_split_is_refused(tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "source").mkdir()
    datasets.Dataset.from_dict({"text": ["1 2 3 4"]}).to_parquet(tmp_path / "source" / "train.parquet")
    assert load_corpus(tmp_path / "source", toy_model(), 4, seq_len=4).tolist() == [[1, 2, 3, 4]]
    with pytest.raises(ValueError, match=r"source .* could not be read .*validation.*\['train'\]"):
        load_corpus(tmp_path / "source", toy_model(), 4, seq_len=4, split="validation")
