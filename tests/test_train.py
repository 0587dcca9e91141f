"""Training: every kind is saved and loaded as it was trained, a killed run goes on to the same tensors, activations are the model's, refusals leave everything as it was."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from circuitgraph.data import load_corpus
from circuitgraph.dictionary import find_structure, load_dictionaries, load_dictionary
from circuitgraph.model import load_model, tiny_model, trace_modules
from circuitgraph.train import KINDS, Recipe, collect_activations, list_modules, measure_dictionaries, rescale, train_dictionaries, train_dictionary
from oracles import random_tokens

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")  # transformers and TransformerLens warn while they boot a model; what this package causes is an error
TINY, SMALL = tiny_model("llama"), {"d_dict": 40, "k": 5, "n_steps": 12, "batch_size": 32, "progress": False}


def text(n=12, seed=3): return random_tokens(TINY, n, 20, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_saved_as_it_was_trained(kind, tmp_path):
    made = train_dictionaries(TINY, text(), ["m1", "a0"], kind, out=tmp_path / "run", **SMALL)
    assert list(made) == ["m1", "a0"] and sorted(p.name for p in (tmp_path / "run").iterdir()) == ["a0", "m1", "train.json"]
    again, y = load_dictionaries(tmp_path / "run", TINY), torch.randn(50, TINY.d_model, generator=torch.Generator().manual_seed(0))
    for name, d in made.items():
        back = load_dictionary(tmp_path / "run" / name, TINY)
        assert torch.equal(back.encode(y), d.encode(y)) and torch.equal(back.decode(back.encode(y)), d.decode(d.encode(y)))
        assert find_structure(back).gate.kind == {"mlp": "relu", "batchtopk": "jumprelu", "matryoshka": "jumprelu"}.get(kind, kind)
    assert list(again) == ["a0", "m1"] and measure_dictionaries(TINY, again, text(seed=4), progress=False).loc["m1":].notna().any(axis=1).all()
    other = train_dictionaries(TINY, text(), ["a0"], kind, **SMALL)["a0"]
    assert torch.equal(other.W_dec, made["a0"].W_dec) and not torch.equal(train_dictionaries(TINY, text(), ["a0"], kind, seed=1, **SMALL)["a0"].W_dec, other.W_dec)


def test_groups_of_modules_change_nothing():
    apart, together = (train_dictionaries(TINY, text(), "all", memory=memory, **SMALL) for memory in (1, 8e9))
    assert list(apart) == ["a0", "m0", "a1", "m1"] and all(torch.equal(apart[name].W_dec, together[name].W_dec) for name in apart)


def test_activations_are_what_the_modules_write():
    trace = trace_modules(TINY, text(), "layer")
    found = collect_activations(TINY, text(), ["m1", "a0"], skip_first=2, batch_size=5, progress=False)
    for name, row in (("a0", 1), ("m1", 4)):
        values, scale = found[name]
        wrote = trace.writes[:, 2:, row].flatten(0, 1)
        assert values.dtype == torch.float16 and torch.allclose(values.double() * scale, wrote, atol=2e-3 * float(wrote.abs().max()))


def test_a_rescaled_dictionary_has_the_same_code():
    y, mean = torch.randn(400, 16, generator=torch.Generator().manual_seed(0)), torch.randn(16)
    for kind in KINDS:
        d = train_dictionary(y, "m0", Recipe(30, kind, k=4, n_steps=5, batch_size=50), progress=False)
        for one in (d, replace(d, b_in=None)):
            moved = rescale(one, 3.0, mean)
            assert torch.allclose(moved.encode(3 * y + mean), one.encode(y), atol=1e-4) and torch.allclose(moved.decode(one.encode(y)), 3 * one.decode(one.encode(y)) + mean, atol=1e-4)


RUN = "import sys; from circuitgraph.cli import app; app()"


def command(folder, *more):
    return [sys.executable, "-c", RUN, "train", "--modules", "a0,m0", "--n-tokens", "2048", "--seq-len", "64", "--d-dict", "256", "--n-steps", "600", "--batch-size", "64", "--out", str(folder), *more]


def test_a_killed_run_goes_on_to_the_same_tensors(tmp_path):
    env, folder = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}, tmp_path / "run"
    whole = subprocess.Popen(command(tmp_path / "whole"), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for file in (".a0.ckpt", ".m0.ckpt"):  # killed once in the first dictionary, once in the second
        run, deadline = subprocess.Popen(command(folder), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), time.monotonic() + 200
        while not (folder / file).exists() and run.poll() is None and time.monotonic() < deadline: time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert (folder / file).exists() and not (folder / file[1:3]).exists()
    done = subprocess.run(command(folder), env=env, check=True, capture_output=True, text=True)
    assert "saved to" in done.stdout and " 0/600 " not in done.stderr.split("m0, topk", 1)[1]  # the bar begins where the run before it stopped
    assert whole.wait(timeout=200) == 0
    for name in ("a0", "m0"): assert (folder / name / "sae_weights.safetensors").read_bytes() == (tmp_path / "whole" / name / "sae_weights.safetensors").read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["a0", "m0", "train.json"]


def test_refusals_leave_everything_as_it_was(tmp_path, monkeypatch):
    good = {"model": TINY, "corpus": text(), "modules": ["m1"], **SMALL}
    train_dictionaries(out=tmp_path / "run", **good)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for words, change in {
        "kind must be one of topk, .* got 'vae'": {"kind": "vae"}, r"k must lie in \[1, 40\] \(d_dict\), got 41": {"k": 41}, "n_steps must be at least 1, got 0": {"n_steps": 0}, "lr must be positive": {"lr": 0.0},
        "d_dict must be at least 8 for 'matryoshka'": {"kind": "matryoshka", "d_dict": 7}, "so there is no 'm9'": {"modules": ["m9"]}, "modules must name at least one": {"modules": []}, "module must be named like": {"modules": "everything"},
        "at least batch_size = 4000 activations, got 228": {"batch_size": 4000}, "is not of this run .*d_dict 40 there, 48 here": {"d_dict": 48, "out": tmp_path / "run"}, "is not of this run .*corpus": {"corpus": text(seed=9), "out": tmp_path / "run"},
        r"skip_first must lie in \[0, 19\]": {"skip_first": 20},
    }.items():
        with pytest.raises(ValueError, match=words): train_dictionaries(**(good | change))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not of this run"): train_dictionaries(out=tmp_path / "other", **good)
    assert json.loads((tmp_path / "run" / "train.json").read_text())["weights_hash"] == TINY.weights_hash and not (tmp_path / "other" / "train.json").exists()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state").write_bytes(b"half a checkpoint")
    with pytest.raises(ValueError, match="can't be read .* remove it to train"): train_dictionary(torch.randn(90, 8), "m0", Recipe(16, k=2, n_steps=3, batch_size=8), checkpoint=tmp_path / "broken" / "state", progress=False)
    with pytest.raises(ValueError, match="all of them are the same"): train_dictionary(torch.ones(90, 8), "m0", Recipe(16, k=2, n_steps=3, batch_size=8), progress=False)
    with pytest.raises(ValueError, match="at least one"): measure_dictionaries(TINY, {}, text())
    monkeypatch.setattr("circuitgraph.train.read_places", lambda *_: {("m1", "output"): torch.full((2, 20, TINY.d_model), torch.nan)})
    with pytest.raises(ValueError, match="activations of m1 must be finite"): collect_activations(TINY, text(), ["m1"], progress=False)
    monkeypatch.setitem(sys.modules, "sae_lens.config", None)
    with pytest.raises(ModuleNotFoundError, match="trained by SAELens"): train_dictionary(torch.randn(90, 8), "m0", Recipe(16, k=2, n_steps=3, batch_size=8), progress=False)


def test_words_for_modules():
    assert list_modules(TINY, "attn") == ["a0", "a1"] and list_modules(TINY, "mlp") == ["m0", "m1"] and list_modules(TINY, "m1,a0.h2") == ["m1", "a0.h2"] and list_modules(TINY, ["m1", "m1"]) == ["m1"]


def test_the_shell_trains_what_python_trains(tmp_path):
    done = subprocess.run(command(tmp_path / "run", "--n-steps", "8", "--kind", "gated"), env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True, capture_output=True, text=True)
    model = load_model("smollm2-135m")
    made = train_dictionaries(model, load_corpus("default", model, 2048, seq_len=64), "a0,m0", "gated", 256, n_steps=8, batch_size=64, progress=False)
    assert done.stdout.count("LinearDictionary") == 2 and all(torch.allclose(load_dictionary(tmp_path / "run" / name, model).W_dec, d.W_dec, atol=1e-5) for name, d in made.items())
