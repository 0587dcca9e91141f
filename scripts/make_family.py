"""A family of small language models of several sizes and seeds, for graphs to be compared.

    make family
    python scripts/make_family.py --sizes 2x64 2x128        # the small ones alone

A size such as 2x64 has 2 layers of width 64, with heads of 16 dimensions. Each model is a Llama that reads
32 sequences of 64 tokens at each of 1,000 steps. One sequence in four repeats its first half, so that there
is something to learn for induction heads. All models share a byte-pair vocabulary of 2,048 tokens. The text
is the package's own, of which the last tenth of each document is held out; --text adds files.

Of each size there are three seeds (of 4x192 two), a twin that was trained on the same tokens in random order,
and the weights that each began with. The models go to graphs/family, as folders that `load_model` reads, and
a table of them to nbs/results/family.csv. A run that was stopped goes on from its last checkpoint, and gives
the same files. CPU time on one core: 1.6 minutes a model of 2x64, 2.8 of 2x128, 4.5 of 4x128, and about 7 of
4x192, by its first steps.
"""

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from circuitgraph.community.behaviour import next_loss
from circuitgraph.data.corpus import Document, open_texts
from circuitgraph.files import hold_folder, replace_file
from exp_small_features import add_row, has_row

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "graphs/family"
N_SEEDS = {"2x64": 3, "2x128": 3, "4x128": 3, "4x192": 2}
SHUFFLED = 100  # the seed of a twin on shuffled text, which shares its initial weights with no other model
N_VOCAB, SEQ_LEN, BATCH, D_HEAD = 2048, 64, 32, 16
HELD_OUT = 0.1  # of each document
REPEATED = 0.25  # of the sequences
SAVE_STEPS = 100


# Text


def read_documents(files: list[Path]) -> tuple[list[Document], list[Document]]:
    "The documents to train on and their ends, which are held out."
    known, held_out = [], []
    for source in ("default", *files):
        texts = open_texts(source)
        for document in texts.read(range(texts.n_documents)):
            at = int((1 - HELD_OUT) * len(document.text))
            border = document.text.rfind(" ", 0, at) + 1
            known.append(Document(document.register, document.title, document.text[:border]))
            held_out.append(Document(document.register, document.title, document.text[border:]))
    return known, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    "Byte pairs, such that any text can be written."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def encode(tokenizer: Any, documents: list[Document]) -> list[Tensor]:
    "The tokens of each document."
    texts = [document.text for document in documents]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    return [torch.tensor(ids) for ids in encoded.input_ids]


def cut_sequences(documents: list[Tensor], length: int = SEQ_LEN) -> Tensor:
    "Sequences one after the other, each of one document; tails are dropped."
    pieces = []
    for tokens in documents:
        whole = len(tokens) // length * length
        pieces.append(tokens[:whole].view(-1, length))
    return torch.cat(pieces)


def draw_sequences(documents: list[Tensor], n: int, seed: int, is_shuffled: bool) -> Tensor:
    "Sequences from anywhere in the documents, of which some repeat their first half."
    generator = torch.Generator().manual_seed(seed)
    documents = [tokens for tokens in documents if len(tokens) >= SEQ_LEN]
    text = torch.cat(documents)
    if is_shuffled:
        order = torch.randperm(len(text), generator=generator)
        text = text[order]
    lengths = [len(tokens) for tokens in documents]
    ends = np.cumsum(lengths)
    spans = zip(ends - lengths, ends, strict=True)
    starts = torch.cat([torch.arange(start, end - SEQ_LEN + 1) for start, end in spans])
    drawn = starts[torch.randint(len(starts), (n,), generator=generator)]
    sequences = text[drawn[:, None] + torch.arange(SEQ_LEN)]
    half = SEQ_LEN // 2
    repeats = torch.rand(n, generator=generator) < REPEATED
    sequences[repeats, half:] = sequences[repeats, :half]
    return sequences


# Training


@dataclass(frozen=True)
class Member:
    "A model of the family."

    size: str  # layers x width
    seed: int

    @property
    def is_shuffled(self) -> bool:
        return self.seed == SHUFFLED

    @property
    def name(self) -> str:
        return f"{self.size}-{'shuffled' if self.is_shuffled else self.seed}"

    def create(self) -> LlamaForCausalLM:
        "The model with its initial weights."
        n_layers, width = (int(number) for number in self.size.split("x"))
        config = LlamaConfig(
            vocab_size=N_VOCAB,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=n_layers,
            num_attention_heads=width // D_HEAD,
            num_key_value_heads=width // D_HEAD,
            max_position_embeddings=2 * SEQ_LEN,
            bos_token_id=None,
            eos_token_id=0,
        )
        torch.manual_seed(self.seed)
        return LlamaForCausalLM(config)


def list_members(sizes: list[str]) -> list[Member]:
    "All models that are trained, the small ones first."
    members = []
    for size in sizes:
        seeds = [*range(N_SEEDS[size]), SHUFFLED]
        members += [Member(size, seed) for seed in seeds]
    return members


def find_checkpoint(folder: Path) -> Path | None:
    "The last checkpoint that was written whole; what was being written when a run was stopped is deleted."
    found = {}
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_bytes())  # it is written last
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(path)
            continue
        found[state["global_step"]] = path
    return found[max(found)] if found else None


def save_model(model: LlamaForCausalLM, tokenizer: Any, folder: Path) -> None:
    "Write a model so that its folder is there only when it is whole."
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, folder)


@contextmanager
def name_full_disk(folder: Path) -> Iterator[None]:
    "Say which folder can't be written, where torch and safetensors say which of their lines has failed."
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        said = str(error).partition("\n")[0]
        if isinstance(error, RuntimeError) and "inline_container" not in said:
            raise
        raise OSError(
            f"{folder} can't be written ({said}); make room, and the same command goes on"
        ) from error


def train_member(member: Member, tokenizer: Any, documents: list[Tensor], out: Path, n_steps: int) -> None:
    "Train a model, or go on with it, and save it and its start, unless they are there."
    model = member.create()
    if not (out / f"{member.name}-untrained").exists():
        save_model(model, tokenizer, out / f"{member.name}-untrained")
    if (out / member.name).exists():
        return
    tokens = draw_sequences(documents, n_steps * BATCH, member.seed, member.is_shuffled)
    checkpoints = out / "checkpoints" / member.name
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=n_steps,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=n_steps // 10,
        weight_decay=0.1,
        adam_beta2=0.95,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        logging_steps=SAVE_STEPS,
        seed=member.seed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    checkpoint = find_checkpoint(checkpoints)
    with name_full_disk(checkpoints):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    save_model(model, tokenizer, out / member.name)
    shutil.rmtree(checkpoints)


# What was learned


def bigram_loss(known: list[Tensor], sequences: Tensor) -> float:
    "Loss of a bigram model that is smoothed by single tokens (nats); the smoothing is the best for the test."
    counts = torch.zeros(N_VOCAB, N_VOCAB, dtype=torch.float64)
    for tokens in known:
        ones = torch.ones(len(tokens) - 1, dtype=torch.float64)
        counts.index_put_((tokens[:-1], tokens[1:]), ones, accumulate=True)
    single = counts.sum(0) + 1
    single /= single.sum()
    before, after = sequences[:, :-1].flatten(), sequences[:, 1:].flatten()
    seen = counts.sum(1)[before]
    losses = []
    for weight in 2.0 ** np.arange(10):
        chance = (counts[before, after] + weight * single[after]) / (seen + weight)
        losses.append(float(-chance.log().mean()))
    return min(losses)


@torch.no_grad()
def mean_losses(model: LlamaForCausalLM, sequences: Tensor) -> Tensor:
    "The mean loss of each position but the first."
    losses = [next_loss(model(rows).logits, rows) for rows in sequences.split(64)]
    return torch.cat(losses)[:, :-1].mean(0)


def measure(folder: Path, sequences: Tensor) -> dict[str, Any]:
    "A row of the table."
    model = LlamaForCausalLM.from_pretrained(folder)
    half = SEQ_LEN // 2
    first = sequences[:, :half]
    repeated = mean_losses(model, torch.cat([first, first], 1))
    row = {"name": folder.name, "n_parameters": model.num_parameters()}
    row["loss"] = float(mean_losses(model, sequences).mean())
    row["loss_first"] = float(repeated[: half - 1].mean())
    row["loss_repeated"] = float(repeated[half:].mean())  # of the same tokens
    return row


def add_rows(member: Member, out: Path, sequences: Tensor, bigram: float, file: Path) -> None:
    "What a model has learned, and what its initial weights know, unless the table says so."
    text = "shuffled" if member.is_shuffled else "text"
    for end, trained_on in (("", text), ("-untrained", "nothing")):
        name = f"{member.name}{end}"
        if not has_row(file, name=name):
            row = {"size": member.size, "seed": member.seed, "trained_on": trained_on}
            row |= measure(out / name, sequences) | {"bigram": bigram}
            row["induction"] = row["loss_first"] - row["loss_repeated"]
            add_row(file, pd.DataFrame([row]).round(4))


def keep_settings(out: Path, settings: dict[str, Any]) -> None:
    "Refuse a folder whose models were trained in another way."
    out.mkdir(parents=True, exist_ok=True)
    file = out / "family.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise SystemExit(f"{out} holds models with other settings ({file.read_text()}): give another --out")
    with replace_file(file) as partial:
        partial.write_text(json.dumps(settings))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(N_SEEDS), default=list(N_SEEDS))
    parser.add_argument(
        "--text", type=Path, nargs="*", default=[], help="files to train on, beside the package's"
    )
    parser.add_argument("--n-steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--table", type=Path, default=ROOT / "nbs/results/family.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the last digits of weights, depend on it
    known, held_out = read_documents(args.text)
    joined = "".join(document.text for document in known)
    digest = hashlib.sha256(joined.encode()).hexdigest()
    keep_settings(args.out, {"n_steps": args.n_steps, "text": digest})
    tokenizer = train_tokenizer([document.text for document in known])
    documents = encode(tokenizer, known)
    sequences = cut_sequences(encode(tokenizer, held_out))
    bigram = bigram_loss(documents, sequences)
    with hold_folder(args.out):  # a second process waits, and finds what this one has made
        for member in list_members(args.sizes):
            began = time.process_time()
            train_member(member, tokenizer, documents, args.out, args.n_steps)
            print(f"{member.name}: {time.process_time() - began:.0f} CPU-seconds", flush=True)
            add_rows(member, args.out, sequences, bigram, args.table)


if __name__ == "__main__":
    main()
