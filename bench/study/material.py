"""Models and texts: pretrained MiniLM and real texts from packages, or a tiny BERT and texts made up for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar
from typing import Protocol as Interface

import torch
from torch import Tensor, nn

from .. import data
from ..users import tasks as users_tasks

SOURCES = ("viewer", "stars")
"""Tasks whose adapters fusion has beside the task's own; ``bench.users.tasks`` makes them of the reviews."""


@dataclass(frozen=True)
class Texts:
    """Token ids of each text, as long as it is, and its class."""

    ids: list[list[int]]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Iterable[int]) -> Texts:
        chosen = list(index)
        return Texts([self.ids[i] for i in chosen], [self.labels[i] for i in chosen])

    def batch(self, index: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Padded to the longest of them."""
        texts = [torch.tensor(self.ids[i]) for i in index]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)  # 0 is [PAD]
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], True)
        labels = torch.tensor([self.labels[i] for i in index])
        found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: tensor.to(device) for name, tensor in found.items()}


@dataclass(frozen=True)
class Task:
    """``pool`` is what training and development samples are drawn from; no seed ever sees ``test``."""

    name: str
    words: str
    classes: int
    pool: Texts
    test: Texts

    def draw(self, samples: int, dev: int, seed: int) -> tuple[Texts, Texts]:
        """After shuffling, the first K samples, and the next ``dev`` or what is left."""
        if samples >= len(self.pool):
            raise ValueError(
                f"task {self.name}: {samples} samples to train on were asked for; expected fewer than the "
                f"{len(self.pool)} that it has beside its test"
            )
        order = list(range(len(self.pool)))
        random.Random(seed).shuffle(order)
        return self.pool.take(order[:samples]), self.pool.take(order[samples : samples + dev])


class Material(Interface):
    """What a study is made of."""

    name: ClassVar[str]
    """Of the model."""
    tasks: ClassVar[dict[str, str]]
    """By name, in words: what can be studied."""

    def task(self, name: str, length: int, test: int) -> Task: ...

    def model(self, classes: int, dropout: float | None = None) -> nn.Module:
        """A classifier; a dropout takes the place of the model's own."""
        ...

    def long(self, count: int, length: int) -> Texts:
        """Texts with ``length`` tokens each, to time a step on."""
        ...


class Packages:
    """MiniLM-L6 (22 million parameters) and labelled texts, all from packages."""

    name = "MiniLM-L6-H384"
    tasks: ClassVar = {
        "sentiment": "critics' sentences, for or against (Rotten Tomatoes, 2 classes)",
        "topics": "news by topic (BBC, 5 classes)",
    }

    def task(self, name: str, length: int, test: int) -> Task:
        words = self.tasks.get(name, name)
        if name == "sentiment":
            labelled = users_tasks.labelled("critic")
        elif name == "topics":
            labelled = data.topics()
            test = min(test, 225)  # of 2,127: the rest is for K = 1000 and 902 to develop on
        else:
            labelled = users_tasks.labelled(name)
        random.Random(0).shuffle(labelled)
        texts = self._tokenized(labelled, length)
        classes = len(set(texts.labels))
        ends = range(len(texts) - test, len(texts))
        return Task(name, words, classes, texts.take(range(len(texts) - test)), texts.take(ends))

    def model(self, classes: int, dropout: float | None = None) -> nn.Module:
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import logging

        logging.set_verbosity_error()  # says that the head is new, in each run
        other = {} if dropout is None else _dropout(dropout)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            data.model_dir(), num_labels=classes, local_files_only=True, **other
        )
        return model

    def long(self, count: int, length: int) -> Texts:
        _, viewers = users_tasks.reviews()
        texts = [text for text in sorted(viewers) if len(text.split()) >= length][:count]
        return self._tokenized([(text, 0) for text in texts], length)

    def _tokenized(self, labelled: Sequence[tuple[str, int]], length: int) -> Texts:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(data.model_dir(), local_files_only=True)
        ids = tokenizer([text for text, _ in labelled], truncation=True, max_length=length)
        return Texts(ids["input_ids"], [label for _, label in labelled])


class Tiny:
    """A BERT of random weights, and texts whose class is whether a word is in them: a study in seconds."""

    name = "tiny BERT, random weights"
    tasks: ClassVar = {"word": "has the word (2 classes)"}
    vocabulary, longest = 60, 12

    def task(self, name: str, length: int, test: int) -> Task:
        words: dict[str, Callable[[list[int]], int]] = {
            "word": lambda ids: int(5 in ids),
            "viewer": lambda ids: int(6 in ids),
            "stars": lambda ids: (7 in ids) + (8 in ids),
        }
        draw = random.Random(0)
        longest = min(self.longest, length)
        count = 200 + test
        ids = [draw.choices(range(4, 10), k=draw.randint(4, longest)) for _ in range(count)]
        texts = Texts(ids, [words[name](text) for text in ids])
        classes = 3 if name == "stars" else 2
        ends = range(200, count)
        return Task(
            name, self.tasks.get(name, name), classes, texts.take(range(200)), texts.take(ends)
        )

    def model(self, classes: int, dropout: float | None = None) -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
            num_labels=classes,
            initializer_range=0.2,  # so that each layer matters
            **({} if dropout is None else _dropout(dropout)),
        )
        state = torch.random.get_rng_state()
        torch.manual_seed(0)  # "pretrained": the same in every run
        model: nn.Module = BertForSequenceClassification(config)
        torch.random.set_rng_state(state)
        return model

    def long(self, count: int, length: int) -> Texts:
        draw = random.Random(1)
        return Texts([draw.choices(range(4, 60), k=length) for _ in range(count)], [0] * count)


def _dropout(p: float) -> dict[str, float]:
    return {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}
