"""Training: kinds are loaded as they were trained, killed runs go on to the same tensors, bases, reports."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch

from circuitgraph.data.corpus import load_corpus
from circuitgraph.dictionary.places import fit_dictionary
from circuitgraph.dictionary.interaction import BasisConfig, interaction_basis, train_interaction_bases
from circuitgraph.dictionary.measure import measure_dictionaries
from circuitgraph.dictionary.places import read_places, visit_modules
from circuitgraph.dictionary.protocol import find_structure, reconstruct
from circuitgraph.dictionary.store import load_dictionaries, load_dictionary
from circuitgraph.dictionary.train import PRESETS, choose_settings, collect_activations, collect_gradients
from circuitgraph.dictionary.train import (
    list_modules,
    rescale_input,
    rescale_output,
    train_dictionaries,
    train_dictionary,
)
from circuitgraph.dictionary.trainer import KINDS, Standardised, TrainConfig, draw_batch, make_trainer
from circuitgraph.dictionary.trainer import saelens_overrides, take_step
from circuitgraph.model.blocks import run_logits
from circuitgraph.model.loading import load_model, tiny_model
from circuitgraph.model.modules import trace_modules
from circuitgraph.options import Run
from oracles import random_tokens

pytestmark = pytest.mark.filterwarnings(
    "ignore", "error:::circuitgraph"
)  # transformers and TransformerLens warn while they boot a model; what this package causes is an error
TINY, QUIET = tiny_model("llama"), Run(progress=False)
SMALL = {"d_dict": 40, "k": 5, "n_steps": 12, "batch_size": 32}


def text(n=12, seed=3):
    return random_tokens(TINY, n, 20, seed=seed)


def train(modules, kind="topk", run=QUIET, **options):
    "Small dictionaries of the tiny model."
    more = {name: options.pop(name) for name in ("out", "n_workers") if name in options}
    return train_dictionaries(
        TINY, text(), modules, TrainConfig(kind=kind, **(SMALL | options)), run=run, **more
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_saved_as_it_was_trained(kind, tmp_path):
    made = train(["m1", "a0"], kind, out=tmp_path / "run")
    assert list(made) == ["m1", "a0"] and sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "a0",
        "m1",
        "train.json",
    ]
    again, y = (
        load_dictionaries(tmp_path / "run", TINY),
        torch.randn(50, TINY.d_model, generator=torch.Generator().manual_seed(0)),
    )
    for name, d in made.items():
        back = load_dictionary(tmp_path / "run" / name, TINY)
        assert torch.equal(back.encode(y), d.encode(y)) and torch.equal(
            back.decode(back.encode(y)), d.decode(d.encode(y))
        )
        assert find_structure(back).gate.kind == {
            "mlp": "relu",
            "gradient": "relu",
            "batchtopk": "jumprelu",
            "matryoshka": "jumprelu",
        }.get(kind, kind)
    assert (
        list(again) == ["a0", "m1"]
        and measure_dictionaries(TINY, again, text(seed=4), run=QUIET).loc["m1":].notna().any(axis=1).all()
    )
    other, seeded = train(["a0"], kind)["a0"], train(["a0"], kind, seed=1)["a0"]
    assert torch.equal(other.W_dec, made["a0"].W_dec) and not torch.equal(seeded.W_dec, other.W_dec)


def test_groups_of_modules_change_nothing():
    apart, together = (train("all", run=Run(memory=memory, progress=False)) for memory in (1, 8e9))
    assert list(apart) == ["a0", "m0", "a1", "m1"] and all(
        torch.equal(apart[name].W_dec, together[name].W_dec) for name in apart
    )


def test_how_many_are_trained_at_once_changes_nothing():
    one, many = (train("all", n_workers=n) for n in (1, 3))
    assert all(
        torch.equal(one[name].W_dec, many[name].W_dec) and torch.equal(one[name].W_enc, many[name].W_enc)
        for name in one
    )


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"gradient"}))
def test_a_step_is_that_of_saelens(kind):
    y, config = (
        torch.randn(900, 24, generator=torch.Generator().manual_seed(0)),
        TrainConfig(300, kind, k=3, n_steps=60, batch_size=40, lr=3e-3),
    )
    ours, theirs = (
        make_trainer(config, Standardised(y, torch.zeros(24), 1.0), torch.device("cpu")) for _ in range(2)
    )
    for name in saelens_overrides(kind, torch.device("cpu")):
        delattr(theirs.sae, name)  # the class's own
    revived = 0
    for step in range(config.n_steps):
        batch = y[draw_batch(len(y), step, config.batch_size, 0)]
        losses = [take_step(trainer, batch).losses for trainer in (ours, theirs)]
        revived += float(losses[1].get("auxiliary_reconstruction_loss", 0)) > 0
        assert all(
            torch.allclose(losses[0][name], losses[1][name], rtol=1e-3, atol=1e-5) for name in losses[1]
        )
    assert (revived > 10) == (kind != "mlp" and kind != "jumprelu") and all(
        torch.allclose(a, b, atol=1e-4)
        for a, b in zip(ours.sae.parameters(), theirs.sae.parameters(), strict=True)
    )


def loss_with(tokens, module, add):
    "The model's summed cross-entropy with something added to what a module writes."
    kind, layer = module[0], int(module[1:])

    def visit(k, i, values):
        return values["output"] + add if (k, i) == (kind, layer) else None

    logits = run_logits(TINY, visit_modules(TINY, tokens, visit))
    return -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum()


@pytest.mark.parametrize("module", ["a0", "m1"])
def test_gradients_are_those_of_the_loss(module):
    tokens = text(5)
    found, scale = collect_gradients(
        TINY, tokens, [module], skip_first=0, run=Run(batch_size=2, progress=False)
    )[module]
    add = torch.zeros(*tokens.shape, TINY.d_model, dtype=TINY.W_U.dtype, requires_grad=True)
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(loss_with(tokens, module, add), add)
    assert torch.allclose(
        found.double() * scale, expected.flatten(0, 1).double(), atol=1e-3 * float(expected.abs().max())
    )


def influence_by_hand(tokens, here, there):
    "Mean of J'CC'J by one Jacobian for each sequence, from what stands at `here` to the code of `there`."
    places = {"a": "output", "m": "output", "b": "stream"}
    total = torch.zeros(TINY.d_model, TINY.d_model, dtype=torch.float64)
    for row in tokens[:, None].unbind(0):
        stood = read_places(TINY, row, [(here, places[here[0]])])[here, places[here[0]]].detach()

        def code(x, row=row, stood=stood):
            kept = {}

            def visit(kind, layer, values):
                if f"{kind}{layer}" == there.module:
                    kept["code"] = there.encode(values[there.reads])
                return values["output"] + x - stood if f"{kind}{layer}" == here else None

            visit_modules(TINY, row, visit)
            return kept["code"]

        J = torch.autograd.functional.jacobian(code, stood)[0, 1:, :, 0, 1:]  # pos, code, pos, d_model
        total += torch.einsum("pcqd,pcqe->de", J.double(), J.double())
    return total / (len(tokens) * (tokens.shape[1] - 1))


@pytest.mark.parametrize("modules", [["b0", "b1"], ["a0", "a1"], ["m0", "a1"]])
def test_the_interaction_basis_is_that_of_the_jacobian(modules, tmp_path):
    tokens = random_tokens(TINY, 3, 7, seed=5)
    made = train_interaction_bases(
        TINY, tokens, modules, BasisConfig(n_samples=None), out=tmp_path / "run", run=Run(2, progress=False)
    )
    here, there = made.values()
    with torch.enable_grad():
        influence = influence_by_hand(tokens, modules[0], there)
    reads = "stream" if modules[0].startswith("b") else "output"
    y = read_places(TINY, tokens, [(modules[0], reads)])[modules[0], reads][:, 1:].flatten(0, 1).double()
    expected = interaction_basis(
        y.mean(0), (y - y.mean(0)).mT @ (y - y.mean(0)) / len(y), influence, modules[0], reads
    )
    assert here.d_dict == expected.d_dict
    strong = (here.W_dec.double() * expected.W_dec).sum(1).abs() / (
        here.W_dec.double().norm(dim=1) * expected.W_dec.norm(dim=1)
    )
    assert strong[: here.d_dict // 2].min() > 0.9999  # the weakest directions are those of rounding
    code = here.encode(y.to(here.W_enc))
    assert (
        torch.allclose(
            (code.mT @ code / len(y)).diagonal().sqrt()[1:],
            (code.mT @ code / len(y)).diagonal().sqrt()[:-1],
            rtol=10,
        )
        and (code.mean(0).abs() < 1e-3 * code.std(0)).all()
    )
    again = train_interaction_bases(
        TINY, tokens, modules, BasisConfig(n_samples=None), out=tmp_path / "run", run=Run(2, progress=False)
    )
    for name, d in made.items():
        back = load_dictionary(tmp_path / "run" / name, TINY)
        assert torch.equal(back.encode(y.to(d.W_enc)), d.encode(y.to(d.W_enc))) and torch.equal(
            back.W_dec, again[name].W_dec
        )
    x = y.to(here.W_enc).requires_grad_()
    with torch.enable_grad():
        assert torch.autograd.grad(here.decode(here.encode(x)).square().sum(), x)[0].isfinite().all()
    assert torch.allclose(reconstruct(here, x) + (x - reconstruct(here, x)), x)


def test_interaction_bases_refuse(tmp_path):
    good = {"model": TINY, "corpus": text(), "modules": ["a0", "a1"], "run": QUIET}
    train_interaction_bases(out=tmp_path / "run", **good)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for words, change in {
        "in the order of computation, got a1, a0": {"modules": ["a1", "a0"]},
        "got none": {"modules": []},
        "got a0.h1": {"modules": ["a0.h1"]},
        "no 'b7'": {"modules": ["b7"]},
        "d_dict must lie in": {"config": BasisConfig(10_000)},
        "is not of this run .*seed": {"config": BasisConfig(seed=4), "out": tmp_path / "run"},
    }.items():
        with pytest.raises(ValueError, match=words):
            train_interaction_bases(**(good | change))
    with pytest.raises(ValueError, match="n_samples must be at least 1"):
        BasisConfig(n_samples=0)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    d, eye = TINY.d_model, torch.eye(TINY.d_model)
    for words, moments in {
        "must be finite": (torch.full((d,), torch.nan), eye, eye),
        "must vary": (torch.zeros(d), 0 * eye, eye),
        "must have influence": (torch.zeros(d), eye, 0 * eye),
    }.items():
        with pytest.raises(ValueError, match=words):
            interaction_basis(*moments, "b0", "stream")


def test_activations_are_what_the_modules_write():
    trace = trace_modules(TINY, text(), "layer")
    found = collect_activations(TINY, text(), ["m1", "a0"], skip_first=2, run=Run(5, progress=False))
    for name, row in (("a0", 1), ("m1", 4)):
        values, scale = found[name]
        wrote = trace.writes[:, 2:, row].flatten(0, 1)
        assert values.dtype == torch.float16 and torch.allclose(
            values.double() * scale, wrote, atol=2e-3 * float(wrote.abs().max())
        )


def test_a_rescaled_dictionary_has_the_same_code():
    y, mean = torch.randn(400, 16, generator=torch.Generator().manual_seed(0)), torch.randn(16)
    for kind in KINDS:
        d = train_dictionary(
            y,
            "m0",
            TrainConfig(30, kind, k=4, n_steps=5, batch_size=50),
            gradients=y if kind == "gradient" else None,
            run=QUIET,
        )
        for one in (d, replace(d, b_in=None)):
            moved = rescale_output(rescale_input(one, 3.0, mean), 3.0, mean)
            assert torch.allclose(moved.encode(3 * y + mean), one.encode(y), atol=1e-4) and torch.allclose(
                moved.decode(one.encode(y)), 3 * one.decode(one.encode(y)) + mean, atol=1e-4
            )


RUN = "import sys; from circuitgraph.cli import app; app()"


def command(folder, *more):
    return [
        sys.executable,
        "-c",
        RUN,
        "train",
        "--modules",
        "a0,m0",
        "--n-tokens",
        "2048",
        "--seq-len",
        "64",
        "--d-dict",
        "256",
        "--n-steps",
        "450",
        "--batch-size",
        "64",
        "--out",
        str(folder),
        *more,
    ]


def steps_kept(path):
    try:
        return torch.load(path, weights_only=True)["counts"]["n_training_steps"]
    except FileNotFoundError:
        return 0


def test_a_killed_run_goes_on_to_the_same_tensors(tmp_path):
    env, folder = (
        os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        tmp_path / "run",
    )
    whole = subprocess.Popen(
        command(tmp_path / "whole"), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for steps in (200, 400):  # killed twice
        run, deadline = (
            subprocess.Popen(command(folder), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
            time.monotonic() + 200,
        )
        while steps_kept(folder / ".a0.ckpt") < steps and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert steps <= steps_kept(folder / ".a0.ckpt") < 450 and not (folder / "a0").exists()
    done = subprocess.run(command(folder), env=env, check=True, capture_output=True, text=True)
    shown = [int(n) for n in re.findall(r"(\d+)/900 \[", done.stderr)]
    assert (
        "saved to" in done.stdout and shown[-1] == 900 and min(n for n in shown if n) >= 400
    )  # the bar begins where the run before it stopped
    assert whole.wait(timeout=200) == 0
    for name in ("a0", "m0"):
        assert (folder / name / "sae_weights.safetensors").read_bytes() == (
            tmp_path / "whole" / name / "sae_weights.safetensors"
        ).read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["a0", "m0", "train.json"]


def test_refusals_leave_everything_as_it_was(tmp_path):
    train(["m1"], out=tmp_path / "run")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    run = tmp_path / "run"
    for words, request in {
        "kind must be one of topk, .* got 'vae'": lambda: train(["m1"], "vae"),
        r"k must lie in \[1, 40\] \(d_dict\), got 41": lambda: train(["m1"], k=41),
        "n_steps must be at least 1, got 0": lambda: train(["m1"], n_steps=0),
        "lr must be positive": lambda: train(["m1"], lr=0.0),
        "d_dict must be at least 8 for 'matryoshka'": lambda: train(["m1"], "matryoshka", d_dict=7),
        "so there is no 'm9'": lambda: train(["m9"]),
        "modules must name at least one": lambda: train([]),
        "module must be named like": lambda: train("everything"),
        "at least batch_size = 4000 activations, got 228": lambda: train(["m1"], batch_size=4000),
        "is not of this run .*d_dict 40 there, 48 here": lambda: train(["m1"], d_dict=48, out=run),
        r"skip_first must lie in \[0, 19\]": lambda: train(["m1"], skip_first=20),
        "n_workers must be at least 1, got 0": lambda: train(["m1"], n_workers=0),
        "name that folder out": lambda: train(["m1"], run=Run(checkpoint=run)),
        r"k must lie in \[1, 64\]": lambda: train_dictionaries(TINY, text(), "all", TrainConfig(k=65)),
    }.items():
        with pytest.raises(ValueError, match=words):
            request()
    config = TrainConfig(**SMALL)
    with pytest.raises(ValueError, match="is not of this run .*corpus"):
        train_dictionaries(TINY, text(seed=9), ["m1"], config, out=run)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not of this run"):
        train(["m1"], out=tmp_path / "other")
    assert json.loads((run / "train.json").read_text())["weights_hash"] == TINY.weights_hash
    assert not (tmp_path / "other" / "train.json").exists()


def test_bad_activations_are_refused(tmp_path, monkeypatch):
    y, config = torch.randn(90, 8), TrainConfig(16, k=2, n_steps=3, batch_size=8)
    path = tmp_path / "state"
    path.write_bytes(b"half a checkpoint")
    with pytest.raises(ValueError, match="can't be read .* remove it to train"):
        train_dictionary(y, "m0", config, run=Run(checkpoint=path, progress=False))
    with pytest.raises(ValueError, match="activations must be finite"):
        train_dictionary(torch.full((90, 8), torch.nan), "m0", config, run=QUIET)
    with pytest.raises(ValueError, match="gradients must be given"):
        train_dictionary(y, "m0", replace(config, kind="gradient"), run=QUIET)
    with pytest.raises(ValueError, match="all of them are the same"):
        train_dictionary(torch.ones(90, 8), "m0", config, run=QUIET)
    with pytest.raises(ValueError, match="at least one"):
        measure_dictionaries(TINY, {}, text())
    bad = {("m1", "output"): torch.full((2, 20, TINY.d_model), torch.nan)}
    monkeypatch.setattr("circuitgraph.dictionary.train.read_places", lambda *_: bad)
    with pytest.raises(ValueError, match="activations of m1 must be finite"):
        collect_activations(TINY, text(), ["m1"], run=QUIET)
    monkeypatch.setitem(sys.modules, "sae_lens.config", None)
    with pytest.raises(ModuleNotFoundError, match="trained by SAELens"):
        train_dictionary(y, "m0", config, run=QUIET)


def test_the_report_by_hand():
    tokens = random_tokens(TINY, 3, 9)
    y = torch.randn(900, TINY.d_model, generator=torch.Generator().manual_seed(1))
    config = TrainConfig(40, k=5, n_steps=20, batch_size=64)
    small = {
        name: fit_dictionary(TINY, train_dictionary(y, name, config, run=QUIET)) for name in ("a0", "m1")
    }
    report = measure_dictionaries(TINY, small, tokens, run=Run(batch_size=2, progress=False))
    wrote = read_places(TINY, tokens, [("m1", "output")])["m1", "output"][:, 1:].flatten(0, 1)
    codes = small["m1"].encode(wrote)
    missed, spread = wrote - small["m1"].decode(codes), wrote - wrote.mean(0)
    assert abs(report["fvu"]["m1"] - float(missed.square().sum() / spread.square().sum())) < 1e-9
    assert report["l0"]["m1"] == (codes != 0).sum(1).double().mean()
    assert abs(report["dead"]["m1"] - (~(codes != 0).any(0)).double().mean()) < 1e-12
    assert report["fvu"].isna()["all"]


def test_words_for_modules():
    assert (
        list_modules(TINY, "attn") == ["a0", "a1"]
        and list_modules(TINY, "mlp") == ["m0", "m1"]
        and list_modules(TINY, "m1,a0.h2") == ["m1", "a0.h2"]
        and list_modules(TINY, ["m1", "m1"]) == ["m1"]
    )


def test_the_shell_trains_what_python_trains(tmp_path):
    done = subprocess.run(
        command(tmp_path / "run", "--n-steps", "8", "--kind", "gated"),
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    model = load_model("smollm2-135m")
    made = train_dictionaries(
        model,
        load_corpus("default", model, 2048, seq_len=64),
        "a0,m0",
        TrainConfig(256, "gated", n_steps=8, batch_size=64),
        run=QUIET,
    )
    assert done.stdout.count("LinearDictionary") == 2 and all(
        torch.allclose(load_dictionary(tmp_path / "run" / name, model).W_dec, d.W_dec, atol=1e-5)
        for name, d in made.items()
    )


def test_presets_are_the_defaults():
    cpu, config = PRESETS["cpu"], TrainConfig()
    for name in ("k", "n_steps", "batch_size", "lr"):
        assert getattr(config, name) == cpu[name]
    assert (
        config.at_width(10).d_dict
        == 10 * cpu["expansion"]
        == choose_settings(TINY)["d_dict"] / TINY.d_model * 10
    )
    assert choose_settings(TINY, k=3, lr=None) == choose_settings(TINY) | {"k": 3}


def test_the_shell_chooses_as_the_functions_do(tmp_path):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def run(*options):
        fixed = ["train", "--n-tokens", "256", "--seq-len", "32", "--out", str(tmp_path / "run")]
        return subprocess.run(
            [sys.executable, "-c", RUN, *fixed, *options], env=env, capture_output=True, text=True
        )

    wrong = run("--modules", "m0", "--preset", "tpu")
    assert wrong.returncode == 2 and "preset must be one of cpu, gpu, got 'tpu'" in wrong.stderr
    assert not (tmp_path / "run").exists()
    other = tmp_path / "other.txt"
    other.write_text("The cat sat on the mat while another dog ran through a park. " * 60)
    lib = ["--modules", "a0,a1", "--kind", "lib", "--d-dict", "20"]
    done = run(*lib, "--held-out", str(other), "--n-held-out", "64")
    assert done.returncode == 0, done.stderr
    report = pd.read_csv(tmp_path / "run" / "report.csv", index_col="module")
    assert list(report.index) == ["a0", "a1", "all"] and report["fvu"][:2].between(0, 1).all()
    assert sorted(load_dictionaries(tmp_path / "run", load_model("smollm2-135m"))) == ["a0", "a1"]
    assert "fvu" in done.stdout
