"""Training of transcoders: planted features, dense gradients, folded scales, runs that go on, refusals."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from circuitgraph import build_graph
from circuitgraph.cli import app
from circuitgraph.data.corpus import load_corpus
from circuitgraph.dictionary import train as train_module
from circuitgraph.dictionary.measure import check_dictionary
from circuitgraph.dictionary.places import read_places
from circuitgraph.dictionary.protocol import Gate, LinearDictionary, reconstruct
from circuitgraph.dictionary.store import load_dictionaries, load_dictionary
from circuitgraph.dictionary.train import rescale_input, rescale_output, standardise, train_dictionaries
from circuitgraph.dictionary.train import train_dictionary
from circuitgraph.dictionary.trainer import KINDS, Standardised, TrainConfig, draw_batch, make_trainer
from circuitgraph.dictionary.trainer import saelens_overrides, take_step
from circuitgraph.model.loading import load_model, tiny_model
from circuitgraph.options import Run
from oracles import random_tokens

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")
TINY, QUIET, CPU = tiny_model("llama"), Run(progress=False), torch.device("cpu")
SMALL = {"d_dict": 40, "k": 5, "n_steps": 12, "batch_size": 32, "transcode": True}
TEXT = random_tokens(TINY, 12, 20, seed=3)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unexplained(y, recon):
    return float((y - recon).square().sum() / (y - y.mean(0)).square().sum())


def planted(n=12_000, d=32):
    "Inputs of sparse orthogonal features, targets that they write in other directions, and those."
    read = torch.linalg.qr(normal(d, d, seed=1)).Q
    written = torch.nn.functional.normalize(normal(d, d, seed=2), dim=1)
    generator = torch.Generator().manual_seed(3)
    active = torch.rand(n, d, generator=generator).argsort(1) < 4
    acts = (torch.rand(n, d, generator=generator) + 0.5) * active
    return 3 * acts @ read + 5, 0.1 * acts @ written - 2, written


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu"])
def test_planted_features_are_found(kind):
    x, y, written = planted()
    config = TrainConfig(64, kind, k=4, n_steps=400, batch_size=128, lr=1e-2, transcode=True)
    learned = train_dictionary(y, "m0", config, inputs=x, run=QUIET)
    cosines = written @ torch.nn.functional.normalize(learned.W_dec, dim=1).mT
    assert unexplained(y, reconstruct(learned, x)) < 0.05
    assert cosines.max(1).values.mean() > 0.95
    assert learned.reads == "normed" and learned.b_in is None


def test_a_linear_map_is_the_skip_path():
    x, M = normal(4000, 12) + 3, normal(12, 12, seed=1)
    y = x @ M.mT - 7
    config = TrainConfig(8, k=1, n_steps=300, batch_size=128, lr=1e-2, transcode=True)
    with_skip, without = (
        train_dictionary(y, "m0", replace(config, skip=skip), inputs=x, run=QUIET) for skip in (True, False)
    )
    assert without.W_skip is None and unexplained(y, reconstruct(without, x)) > 0.2
    assert unexplained(y, reconstruct(with_skip, x)) < 1e-3


def dense_acts(kind, sae, pre, k):
    "Activations from their definition, with all features."
    if kind == "jumprelu":
        return pre * (pre > sae.threshold)
    if kind == "mlp":
        return pre.relu()
    score = (pre * sae.W_dec.norm(dim=1)).relu()
    lowest = (
        score.topk(k, 1).values[:, -1:] if kind == "topk" else score.flatten().topk(k * len(pre)).values[-1]
    )
    return pre.relu() * (score >= lowest)


def dense_loss(kind, sae, x, y, k):
    "The loss of the first step from its definition: penalties have not begun."
    target = y - x @ sae.W_skip.mT if hasattr(sae, "W_skip") else y
    if kind == "gated":
        gate = (x @ sae.W_enc + sae.b_gate).relu()
        magnitude = (x @ sae.W_enc * sae.r_mag.exp() + sae.b_mag).relu()
        codes = [magnitude * (gate > 0), gate]
    else:
        codes = [dense_acts(kind, sae, x @ sae.W_enc + sae.b_enc, k)]
    recons = [acts @ sae.W_dec + sae.b_dec for acts in codes]
    return sum((target - recon).square().sum(1).mean() for recon in recons)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "gated", "mlp"])
def test_a_gradient_is_that_of_the_dense_formula(kind, skip, monkeypatch):
    x, y = normal(500, 24), normal(500, 24, seed=1)
    config = TrainConfig(80, kind, k=6, n_steps=40, batch_size=128, transcode=True, skip=skip)
    inputs, targets = (Standardised(values, torch.zeros(24), 1.0) for values in (x, y))
    trainer = make_trainer(config, targets, CPU, inputs)
    sae = trainer.sae.double()
    with torch.no_grad():
        for i, parameter in enumerate(sae.parameters()):
            parameter += 0.1 * normal(*parameter.shape, seed=i).abs()
    named = {name: p for name, p in sae.named_parameters() if "threshold" not in name}
    loss = dense_loss(kind, sae, x[:128].double(), y[:128].double(), config.k)
    expected = torch.autograd.grad(loss, list(named.values()))
    found = {}
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    trainer.optimizer.step = lambda: found.update({name: p.grad.clone() for name, p in named.items()})
    output = take_step(trainer, y[:128], x[:128])
    assert abs(float(output.loss - loss)) < 1e-6 * float(loss)
    for name, gradient in zip(named, expected, strict=True):
        assert gradient.abs().max() > 0, name
        assert torch.allclose(found[name], gradient, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])  # SAELens' gated step encodes its target
def test_a_step_is_that_of_saelens(kind):
    x, y = normal(900, 24), normal(900, 24, seed=1)
    config = TrainConfig(300, kind, k=3, n_steps=60, batch_size=40, lr=3e-3, transcode=True, skip=True)
    inputs, targets = (Standardised(values, torch.zeros(24), 1.0) for values in (x, y))
    ours, theirs = (make_trainer(config, targets, CPU, inputs) for _ in range(2))
    for name in saelens_overrides(kind, CPU):
        delattr(theirs.sae, name)
    revived = 0
    for step in range(config.n_steps):
        rows = draw_batch(len(y), step, config.batch_size, 0)
        losses = [take_step(trainer, y[rows], x[rows]).losses for trainer in (ours, theirs)]
        revived += float(losses[1].get("auxiliary_reconstruction_loss", 0)) > 0
    assert revived > 10 or kind == "jumprelu"
    for a, b in zip(ours.sae.parameters(), theirs.sae.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_scales_of_input_and_target_are_folded_exactly():
    W_enc, W_dec, W_skip, x = (
        normal(*s, seed=i).double() for i, s in enumerate([(6, 9), (9, 6), (6, 6), (50, 6)])
    )
    b_enc, b_dec, mean, other = (normal(n, seed=10 + i).double() for i, n in enumerate([9, 6, 6, 6]))
    for b_in in (None, normal(6, seed=20).double()):
        one = LinearDictionary("m0", "normed", W_enc, W_dec, b_enc, b_dec, Gate("topk", k=3), b_in, W_skip)
        moved = rescale_output(rescale_input(one, 3.0, mean), 0.2, other)
        assert torch.allclose(moved.encode(3 * x + mean), one.encode(x), atol=1e-12)
        expected = 0.2 * reconstruct(one, x) + other
        assert torch.allclose(reconstruct(moved, 3 * x + mean), expected, atol=1e-12)


def test_the_bias_begins_as_the_mean_of_the_target():
    x, y = normal(400, 12) + 1, normal(400, 12, seed=1) - 4
    config = TrainConfig(20, k=2, n_steps=1, batch_size=50, lr=1e-9, transcode=True, skip=True)
    first = train_dictionary(y, "m0", config, inputs=x, run=QUIET)
    assert torch.allclose(first.b_dec, y.mean(0), atol=1e-4)
    assert torch.allclose(standardise(y).mean, y.mean(0), atol=1e-5)


@pytest.mark.parametrize("kind, skip", [*((kind, True) for kind in KINDS), ("topk", False), ("mlp", False)])
def test_a_trained_transcoder_is_a_dictionary(kind, skip, tmp_path):
    config = TrainConfig(kind=kind, skip=skip, **SMALL)
    made = train_dictionaries(TINY, TEXT, "mlp", config, out=tmp_path / "run", run=QUIET)
    loaded = load_dictionaries(tmp_path / "run", TINY)
    assert list(made) == list(loaded) == ["m0", "m1"]
    read = read_places(TINY, TEXT, [("m1", "normed"), ("m1", "output")])
    x, y = (read["m1", place].float() for place in ("normed", "output"))
    stored = load_dictionary(tmp_path / "run" / "m1")
    assert torch.equal(stored.encode(x), made["m1"].encode(x))
    assert torch.equal(reconstruct(stored, x), reconstruct(made["m1"], x))
    rows = slice(1, None)
    error = unexplained(y[:, rows].flatten(0, 1), reconstruct(stored, x)[:, rows].flatten(0, 1))
    check = check_dictionary(TINY, loaded["m1"], TEXT)
    assert abs(check.fvu - error) < 1e-4
    graph = build_graph(TINY, TEXT[:4], nodes=loaded, run=QUIET)
    assert graph.nodes["name"].str.startswith("m1/").any() and len(graph.edges) > 0
    if stored.gate.kind in ("relu", "jumprelu"):  # SAELens has no transcoder with another gate
        from sae_lens import SAE  # warns where it is imported

        theirs = SAE.load_from_disk(tmp_path / "run" / "m1")
        assert torch.allclose(theirs.encode(x), stored.encode(x), atol=1e-5)
        assert torch.allclose(theirs(x), reconstruct(stored, x), atol=1e-5)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    config = TrainConfig(**(SMALL | {"n_steps": 50, "d_dict": 300, "skip": True}))
    save_state = train_module.save_state

    def save_and_stop(trainer, path):
        save_state(trainer, path)
        if trainer.n_training_steps == 30:
            raise KeyboardInterrupt

    def train(out=None):
        return train_dictionaries(TINY, TEXT, ["m1"], config, out=out, checkpoint_every=10, run=QUIET)["m1"]

    monkeypatch.setattr(train_module, "save_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run")
    monkeypatch.undo()
    whole, resumed = train(), train(tmp_path / "run")
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip"):
        assert torch.equal(getattr(whole, name), getattr(resumed, name)), name


def test_an_mlp_of_smollm2_is_transcoded():
    model = load_model("smollm2-135m")
    text = load_corpus("default", model, 640, seq_len=32)
    config = TrainConfig(256, k=32, n_steps=60, batch_size=128, lr=2e-3, transcode=True)
    first, learned = (
        train_dictionaries(model, text[:16], ["m9"], each, run=QUIET)["m9"]
        for each in (replace(config, n_steps=1, lr=1e-9), config)
    )
    read = read_places(model, text[16:], [("m9", "normed"), ("m9", "output")])
    x, y = (read["m9", place][:, 1:].flatten(0, 1) for place in ("normed", "output"))
    before, after = (unexplained(y, reconstruct(dictionary, x)) for dictionary in (first, learned))
    assert after < min(0.9, before)  # the mean of the text that is measured leaves 1


def test_refusals_and_old_folders(tmp_path):
    config, y = TrainConfig(**SMALL), normal(90, 8)
    autoencoder = replace(config, transcode=False)
    run = {"out": tmp_path / "run", "run": QUIET}
    for words, request in {
        "skip needs transcode=True": lambda: TrainConfig(skip=True),
        "transcode must be for MLPs, such as 'm3', got a0, a1": lambda: train_dictionaries(
            TINY, TEXT, "all", config, **run
        ),
        "got a1.h0": lambda: train_dictionaries(TINY, TEXT, ["m0", "a1.h0"], config, **run),
        "got b1": lambda: train_dictionary(y, "b1", config, inputs=y, run=QUIET),
        "inputs must be given for a transcoder.*transcode is True": lambda: train_dictionary(
            y, "m0", config, run=QUIET
        ),
        "transcode is False": lambda: train_dictionary(y, "m0", autoencoder, inputs=y, run=QUIET),
        "one for each activation": lambda: train_dictionary(y, "m0", config, inputs=y[:80], run=QUIET),
        "inputs must be finite": lambda: train_dictionary(y, "m0", config, inputs=y / 0, run=QUIET),
    }.items():
        with pytest.raises(ValueError, match=words):
            request()
    assert not (tmp_path / "run").exists()
    made = train_dictionaries(TINY, TEXT, ["m1"], autoencoder, **run)["m1"]
    path = tmp_path / "run" / "train.json"
    request = json.loads(path.read_text())
    path.write_text(
        json.dumps({name: request[name] for name in request if name not in ("transcode", "skip")})
    )
    with pytest.raises(ValueError, match="is not of this run .*transcode False there, True here"):
        train_dictionaries(TINY, TEXT, ["m1"], config, **run)
    again = train_dictionaries(TINY, TEXT, ["m1"], autoencoder, **run)["m1"]
    assert torch.equal(again.W_dec, made.W_dec.to(again.W_dec))


def test_the_shell_trains_transcoders(tmp_path, monkeypatch):
    monkeypatch.setattr("circuitgraph.model.loading.load_model", lambda *_, **__: TINY)
    monkeypatch.setattr("circuitgraph.data.corpus.load_corpus", lambda *_, **__: TEXT)

    def shell(*options):
        sizes = ["--d-dict", "40", "--k", "5", "--n-steps", "12", "--batch-size", "32"]
        return CliRunner().invoke(app, ["train", "--out", str(tmp_path / "run"), *sizes, *options])

    wrong = shell("--skip-connection")
    assert wrong.exit_code == 2 and "skip needs transcode=True" in wrong.output
    wrong = shell("--modules", "a0", "--kind", "lib", "--transcode")
    assert wrong.exit_code == 2 and "got kind lib" in wrong.output
    done = shell("--transcode", "--skip-connection")
    assert done.exit_code == 0 and "m0, reads normed: 40 features, gate topk, skip" in done.output
    expected = train_dictionaries(TINY, TEXT, "mlp", TrainConfig(skip=True, **SMALL), run=QUIET)
    for name, found in load_dictionaries(tmp_path / "run", TINY).items():
        assert torch.equal(found.W_skip, expected[name].W_skip.to(found.W_skip))
