"""Interventions, against hooks on the model of transformers that know nothing of this package."""

import copy
from contextlib import contextmanager

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from circuitgraph.ablation.intervene import cut_edges, steer
from circuitgraph.ablation.values import Mean
from circuitgraph.build.build import build_graph, complete_graph
from circuitgraph.build.prompt import Prompt
from circuitgraph.dictionary.protocol import FunctionDictionary, Gate, LinearDictionary
from circuitgraph.model.loading import load_model
from circuitgraph.options import Pruning, Run
from oracles import random_tokens

CLOSE = {"rtol": 0, "atol": 1e-5}  # the norms of transformers are in single precision
QUIET = Run(progress=False)
pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")

SHAPE = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 24}
SHAPE |= {"num_attention_heads": 2, "vocab_size": 50, "attn_implementation": "eager"}
SHAPE |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def make(family):
    """A model of transformers, and the same one loaded by this package."""
    torch.manual_seed(0)
    if family == "llama":
        hf = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=1))
    else:
        hf = GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE))
    for parameter in hf.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    hf = hf.double().eval()
    return hf, load_model(copy.deepcopy(hf))


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@contextmanager
def hooked(module, function):
    """A forward hook that changes what a module of transformers gives back."""

    def hook(_, __, output):
        if isinstance(output, tuple):
            return (function(output[0]), *output[1:])
        return function(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def linear(model, module, d_dict=6):
    """A random dictionary."""
    draw = torch.Generator().manual_seed(len(module))
    shapes = ((model.d_model, d_dict), (d_dict, model.d_model), (d_dict,), (model.d_model,))
    tensors = [torch.randn(*shape, generator=draw, dtype=model.dtype) for shape in shapes]
    return LinearDictionary(module, "output", *tensors, Gate("relu"))


PLACES = {
    "llama": {
        "embed": lambda hf: hf.model.embed_tokens,
        "a1": lambda hf: hf.model.layers[1].self_attn,
        "a0.h1": lambda hf: hf.model.layers[0].self_attn,
        "m0": lambda hf: hf.model.layers[0].mlp,
        "b0": lambda hf: hf.model.layers[0],
    },
    "gpt-neox": {
        "a0": lambda hf: hf.gpt_neox.layers[0].attention,
        "m1": lambda hf: hf.gpt_neox.layers[1].mlp,
    },
}


@pytest.mark.parametrize("family", PLACES)
def test_steering_adds_the_direction_as_a_hook_does(family):
    hf, model = make(family)
    tokens = random_tokens(model, 1, 7)
    for module, place in PLACES[family].items():
        dictionary = linear(model, module)
        direction = 3 * dictionary.W_dec[4] - 0.5 * dictionary.W_dec[1]
        done = steer(model, {module: dictionary}, {f"{module}/4": 3.0, f"{module}/1": -0.5}, tokens, 6)
        with torch.no_grad(), hooked(place(hf), lambda y, direction=direction: y + direction):
            expected = hf(tokens).logits
            written = hf.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=False)
        torch.testing.assert_close(done.logits.after, expected, **CLOSE)
        assert done.tokens_after.tolist() == written[0, 7:].tolist()
        with torch.no_grad():
            torch.testing.assert_close(done.logits.before, hf(tokens).logits, **CLOSE)
            own = hf.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=False)
        assert done.tokens_before.tolist() == own[0, 7:].tolist()
        assert (done.logits.after - done.logits.before).abs().max() > 1e-2


def test_some_positions_are_steered_and_no_other(llama):
    hf, model = llama
    tokens, dictionary = random_tokens(model, 1, 7), linear(model, "m0")
    shift = torch.zeros(7, 16, dtype=model.dtype)
    shift[[2, 6]] = 2 * dictionary.W_dec[0]
    done = steer(model, {"m0": dictionary}, {"m0/0": 2.0}, tokens, 0, positions=[2, -1])
    with torch.no_grad(), hooked(hf.model.layers[0].mlp, lambda y: y + shift):
        torch.testing.assert_close(done.logits.after, hf(tokens).logits, **CLOSE)
    assert len(done.tokens_after) == 0
    torch.testing.assert_close(done.logits.after[:, :2], done.logits.before[:, :2], **CLOSE)
    late = steer(model, {"m0": dictionary}, {"m0/0": 2.0}, tokens, 3, positions=[8])
    torch.testing.assert_close(late.logits.after, late.logits.before, **CLOSE)  # it is not in the prompt


def test_a_decoder_that_is_not_affine_moves_along_its_own_path(llama):
    hf, model = llama
    tokens = random_tokens(model, 1, 5)
    dictionary = FunctionDictionary("m0", "output", 16, torch.asinh, torch.sinh)
    done = steer(model, {"m0": dictionary}, {"m0/3": 0.7}, tokens, 0)

    def move(y):
        codes = torch.asinh(y)
        codes[..., 3] += 0.7
        return torch.sinh(codes)

    with torch.no_grad(), hooked(hf.model.layers[0].mlp, move):
        torch.testing.assert_close(done.logits.after, hf(tokens).logits, **CLOSE)


def test_strength_zero_and_no_feature_change_nothing(llama):
    _, model = llama
    tokens, dictionaries = random_tokens(model, 1, 5), {"m0": linear(model, "m0")}
    for features in ({}, {"m0/0": 0.0}):
        done = steer(model, dictionaries, features, tokens, 4)
        torch.testing.assert_close(done.logits.after, done.logits.before, **CLOSE)
        assert done.tokens_after.tolist() == done.tokens_before.tolist()
        assert done.logits.losses()["kl"] < 1e-9


def test_drawn_text_depends_on_the_seed_alone(llama):
    _, model = llama
    tokens, dictionaries = random_tokens(model, 1, 4), {"m0": linear(model, "m0")}

    def write(**options):
        return steer(model, dictionaries, {"m0/1": 1.0}, tokens, 12, **options).tokens_after.tolist()

    first = write(temperature=3.0, seed=1)
    assert first == write(temperature=3.0, seed=1)
    assert first != write(temperature=3.0, seed=2) and first != write()
    assert write(temperature=1e-4, seed=5) == write()  # nearly greedy


def test_bad_steering_is_refused_before_the_model_runs(llama, monkeypatch):
    _, model = llama
    tokens, dictionaries = random_tokens(model, 1, 5), {"m0": linear(model, "m0"), "m1": linear(model, "m1")}

    def reached(*_, **__):
        raise AssertionError("the model was run")

    monkeypatch.setattr("circuitgraph.ablation.intervene.visit_modules", reached)
    monkeypatch.setattr(type(model), "__call__", reached)
    for features, options, words in (
        ({"m0/6": 1.0}, {}, "from 0 to 5, got 'm0/6'"),
        ({"m00/1": 1.0}, {}, "got those of m0, m1; the closest are m0"),
        ({"m0": 1.0}, {}, "named like 'm10/17', got 'm0'"),
        ({"m0/-1": 1.0}, {}, "named like"),
        ({"m0/1": float("nan")}, {}, "finite number, got dict"),
        ({"m0/1": 1.0}, {"prompt": tokens[:, :0]}, "must not be empty"),
        ({"m0/1": 1.0}, {"prompt": "hello"}, "has no tokenizer"),
        ({"m0/1": 1.0}, {"prompt": random_tokens(model, 2, 3)}, "must be one sequence"),
        ({"m0/1": 1.0}, {"max_new_tokens": 20}, r"max_new_tokens must lie in \[0, 19\]"),
        ({"m0/1": 1.0}, {"temperature": -1.0}, "temperature must be"),
        ({"m0/1": 1.0}, {"positions": [7], "max_new_tokens": 2}, r"positions must lie in \[-5, 7\)"),
    ):
        with pytest.raises(ValueError, match=words):
            steer(
                model,
                dictionaries,
                features,
                options.pop("prompt", tokens),
                **{"max_new_tokens": 2} | options,
            )


def test_a_prompt_as_text_is_read_by_the_models_tokenizer():
    model = load_model("smollm2-135m")
    ids = torch.tensor([model.tokenizer("The capital of France is").input_ids])
    dictionaries = {"m3": linear(model, "m3")}
    of_text, of_ids = (
        steer(model, dictionaries, {"m3/2": 0.1}, prompt, 3) for prompt in ("The capital of France is", ids)
    )
    assert of_text.text_after == of_ids.text_after and isinstance(of_text.text_before, str)
    assert of_text.text_before == model.tokenizer.decode(of_text.tokens_before)
    assert repr(of_text.text_before) in repr(of_text) and " Paris" in repr(of_text.logits)
    with pytest.raises(ValueError, match="prompt must hold text"):
        steer(model, dictionaries, {"m3/2": 0.1}, "")


# Cut edges


def test_no_edge_cut_is_the_model(llama):
    hf, model = llama
    tokens = random_tokens(model, 2, 6)
    for grain in ("block", "layer", "head"):
        done = cut_edges(model, complete_graph(model, grain), [], tokens, "zero")
        with torch.no_grad():
            torch.testing.assert_close(done.after, hf(tokens).logits, **CLOSE)
        assert abs(done.losses()["before"] - done.losses()["after"]) < 1e-5


@pytest.mark.parametrize("value", ["zero", "mean"])
def test_an_edge_is_cut_as_a_hook_patches_it(llama, value):
    """`m0->m1`, and `m1->logits`: only one norm reads what the hook takes away."""
    hf, model = llama
    tokens, text = random_tokens(model, 2, 6), random_tokens(model, 5, 9, seed=8)
    layers, graph = hf.model.layers, complete_graph(model, "head")
    readers = {"m0->m1": (0, layers[1].post_attention_layernorm), "m1->logits": (1, hf.model.norm)}
    for edge, (writer, norm) in readers.items():
        written = []
        with torch.no_grad(), hooked(layers[writer].mlp, lambda y, w=written: w.append(y)):
            hf(text if value == "mean" else tokens)
            hf(tokens)
        carried = written[0].mean((0, 1)) if value == "mean" else 0
        change = carried - written[1]
        handle = norm.register_forward_pre_hook(lambda _, x, change=change: (x[0] + change,))
        with torch.no_grad():
            expected = hf(tokens).logits
        handle.remove()
        options = {"reference": text} if value == "mean" else {}
        done = cut_edges(model, graph, [edge], tokens, value, **options)
        torch.testing.assert_close(done.after, expected, **CLOSE)
        assert (done.after - done.before).abs().max() > 1e-3


def test_edges_that_a_graph_of_features_lacks_are_kept(llama):
    """A pruned graph says which edges are cut; all others of the model are kept, in the graph or not."""
    _, model = llama
    tokens, dictionaries = random_tokens(model, 2, 6), {"m0": linear(model, "m0"), "m1": linear(model, "m1")}
    graph = build_graph(model, tokens, dictionaries, pruning=Pruning(3), run=QUIET)
    done = cut_edges(model, graph, [], tokens, "zero", dictionaries=dictionaries)
    torch.testing.assert_close(done.after, done.before, **CLOSE)
    edges = (graph.edges["target"] == "m1/2").to_numpy()
    assert edges.any()
    some = cut_edges(model, graph, edges, tokens, Mean(tokens), dictionaries=dictionaries)
    assert (some.after - some.before).abs().max() > 1e-6
    by_name = [name for name, is_cut in zip(graph.edge_names, edges, strict=True) if is_cut]
    named = cut_edges(model, graph, by_name, tokens, Mean(tokens), dictionaries=dictionaries)
    assert torch.equal(some.after, named.after)


def test_bad_cuts_are_refused(llama):
    _, model = llama
    graph, tokens = complete_graph(model, "layer"), random_tokens(model, 1, 6)
    for call, words in (
        (lambda: cut_edges(model, graph, ["m0->m9"], tokens), "'m0->m9' is not"),
        (lambda: cut_edges(model, graph, [], tokens[:, :0]), "must not be empty"),
        (lambda: cut_edges(model, graph, [], tokens, "corrupted"), "corrupted missing"),
        (lambda: cut_edges(model, graph, [], tokens, "zero", reference=tokens), "reference goes with"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    prompt = build_graph(model, Prompt(tokens), {"m0": linear(model, "m0")}, run=QUIET)
    with pytest.raises(ValueError, match="got the graph of a prompt"):
        cut_edges(model, prompt, [], tokens)


def test_tokens_are_listed_by_how_their_probability_changes(llama):
    _, model = llama
    tokens, graph = random_tokens(model, 2, 6), complete_graph(model, "layer")
    done = cut_edges(model, graph, ["m1->logits"], tokens, "zero")
    table = done.next_tokens(50, seq=1, pos=3)
    p = done.before[1, 3].softmax(-1), done.after[1, 3].softmax(-1)
    assert sorted(table["token"]) == list(range(50))
    assert table["token"][0] == int((p[1] - p[0]).abs().argmax())
    assert torch.equal(torch.tensor(table["p_after"]), p[1][table["token"].tolist()].cpu())
    assert len(done.next_tokens(4)) == 4
