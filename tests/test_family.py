"""The family of small models: training that is stopped and goes on, what is drawn, and what is saved."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from circuitgraph.build.build import build_graph
from circuitgraph.data.corpus import Document
from circuitgraph.model.loading import load_model
from circuitgraph.options import Run

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
N_STEPS = 6
STOPPED = """
import functools, os, signal, sys
sys.path.insert(0, sys.argv[1])
import make_family
from test_family import train
from transformers import TrainerCallback

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **more):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

make_family.Trainer = functools.partial(make_family.Trainer, callbacks=[Stop()])
train(make_family, sys.argv[2])
"""


@pytest.fixture(scope="module")
def family():
    sys.path.insert(0, str(SCRIPTS))
    import make_family

    yield make_family
    sys.path.remove(str(SCRIPTS))


def read_text():
    cats, numbers = "the cat sat on the mat and the dog saw it ", "one two three four five six seven eight "
    return [60 * cats, 60 * numbers]


def train(family, out):
    "Train a very small model, with a checkpoint after every second step."
    family.SAVE_STEPS = 2
    torch.set_num_threads(1)
    tokenizer = family.train_tokenizer(read_text())
    texts = [Document("text", "a", text) for text in read_text()]
    member = family.Member("1x16", 0)
    family.train_member(member, tokenizer, family.encode(tokenizer, texts), Path(out), N_STEPS)
    return Path(out) / member.name


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_that_was_killed_goes_on_to_the_same_model(family, tmp_path):
    whole = train(family, tmp_path / "whole")
    out = tmp_path / "stopped"
    command = [sys.executable, "-W", "ignore", "-c", STOPPED, str(SCRIPTS), str(out)]
    assert subprocess.run(command, cwd=Path(__file__).parent, capture_output=True).returncode == -9
    checkpoints = out / "checkpoints/1x16-0"
    assert not (out / "1x16-0").exists() and (checkpoints / "checkpoint-4").exists()
    half_written = checkpoints / "checkpoint-6"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"")
    resumed = train(family, out)
    assert read_files(resumed) == read_files(whole)
    assert not checkpoints.exists()
    start = tmp_path / "whole/1x16-0-untrained"
    assert read_files(start)["model.safetensors"] != read_files(whole)["model.safetensors"]
    model = load_model(resumed)
    tokens = torch.tensor([model.tokenizer(read_text()[0]).input_ids[:16]])
    graph = build_graph(model, tokens, nodes="head", run=Run(progress=False))
    assert graph.nodes["name"].tolist() == ["embed", "a0.h0", "m0", "logits"]


def test_sequences_come_from_one_document_and_some_repeat(family):
    documents = [torch.arange(0, 300), torch.arange(1000, 1100), torch.arange(50)]
    sequences = family.draw_sequences(documents, 400, 0, is_shuffled=False)
    assert torch.equal(sequences, family.draw_sequences(documents, 400, 0, is_shuffled=False))
    repeats = (sequences[:, :32] == sequences[:, 32:]).all(1)
    assert 0.15 < repeats.float().mean() < 0.35
    assert (sequences[~repeats].diff(dim=1) == 1).all() and (sequences < 1100).all()
    assert set(range(50)).isdisjoint(sequences[sequences >= 1000].tolist())
    shuffled = family.draw_sequences(documents, 400, 0, is_shuffled=True)
    assert (shuffled.diff(dim=1) == 1).float().mean() < 0.1


def test_what_is_held_out_was_not_trained_on(family):
    known, held_out = family.read_documents([])
    assert [one.title for one in known] == [one.title for one in held_out]
    lengths = [(len(one.text), len(other.text)) for one, other in zip(known, held_out, strict=True)]
    assert all(0.08 < end / (start + end) < 0.15 for start, end in lengths if start + end > 2000)


def test_a_bigram_model_knows_a_text_of_bigrams(family):
    text = torch.tensor([0, 1, 2, 3] * 200)
    sequences = text[:128].view(2, 64)
    assert family.bigram_loss([text], sequences) < 0.1
    random = torch.randint(4, (2, 64), generator=torch.Generator().manual_seed(0))
    assert family.bigram_loss([text], random) > 1


def test_a_folder_with_models_of_other_settings_is_refused(family, tmp_path):
    family.keep_settings(tmp_path, {"n_steps": 6})
    family.keep_settings(tmp_path, {"n_steps": 6})
    with pytest.raises(SystemExit, match="give another --out"):
        family.keep_settings(tmp_path, {"n_steps": 7})


def test_heads_in_another_order_are_the_same_function(family):
    from exp_ladder import permute_heads

    model = family.Member("2x64", 0).create().eval()
    tokens = torch.arange(20)[None]
    before = model(tokens).logits
    first = model.model.layers[0].self_attn.q_proj.weight.clone()
    permuted = permute_heads(model, seed=1)
    assert torch.allclose(permuted(tokens).logits, before, atol=1e-5)
    assert not torch.equal(permuted.model.layers[0].self_attn.q_proj.weight, first)


def test_behaviours_of_repetition_are_those_of_their_definition(family):  # noqa: ARG001  (finds scripts)
    from exp_ladder import follows_again, seen_before

    tokens = torch.tensor([[5, 6, 7, 5, 6, 9]])
    assert seen_before(tokens)[0, :-1].tolist() == [False, False, True, True, False]
    assert follows_again(tokens)[0, :-1].tolist() == [False, False, False, True, False]
