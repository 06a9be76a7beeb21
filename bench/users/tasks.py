"""Eight tasks that the movie reviews give by themselves: every label is in the data or is counted in the text."""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import data

WORDS = 24
"""Of a long review, as much as fits into a short sample."""
CONTRAST = re.compile(r"\b(but|though|although|yet|however|despite|while)\b")
NEGATION = re.compile(r"\b(not|no|never|nothing|none|neither|nor|without)\b|n't")
FIRST_PERSON = re.compile(r"\b(i|my|me)\b")
STARS = re.compile(r"\b(10|[1-9])\s?(?:/|out of)\s?(?:10|ten)\b")
SHORT, LONG = 15, 26
"""Words; about the quartiles of the critics' sentences."""
Texts = dict[str, int]
"""Text and label."""
Labelled = list[tuple[str, int]]


@dataclass(frozen=True)
class Task:
    """``label`` makes (text, class) of the reviews of critics (one sentence each) and of viewers, or leaves one out."""

    name: str
    what: str
    classes: int
    label: Callable[[Texts, Texts], Labelled]


def _contains(pattern: re.Pattern[str], texts: Labelled) -> Labelled:
    return [(text, int(bool(pattern.search(text)))) for text, _ in texts]


def _opening(texts: Texts) -> Labelled:
    return [
        (" ".join(text.split(None, WORDS)[:WORDS]).lower(), label) for text, label in texts.items()
    ]


def _ending(texts: Texts) -> Labelled:
    return [
        (" ".join(text.rsplit(None, WORDS)[-WORDS:]).lower(), label)
        for text, label in texts.items()
    ]


def _before_stars(viewers: Texts) -> Labelled:
    found = []
    for text in viewers:
        match = STARS.search(text) if "10" in text or " ten" in text else None
        words = text[: match.start()].lower().rsplit(None, WORDS)[-WORDS:] if match else []
        if match and len(words) == WORDS:
            stars = int(match[1])
            found.append((" ".join(words), (stars > 3) + (stars > 6)))
    return found


def _length(critics: Texts) -> Labelled:
    lengths = [(text, len(text.split())) for text in critics]
    return [(text, int(n >= LONG)) for text, n in lengths if n <= SHORT or n >= LONG]


def _source(critics: Texts, viewers: Texts) -> Labelled:
    return [(text, 0) for text in critics] + [(text, 1) for text, _ in _opening(viewers)]


TASKS = (
    Task("critic", "a critic's sentence: for or against", 2, lambda c, v: list(c.items())),
    Task("viewer", "end of a viewer's review: for or against", 2, lambda c, v: _ending(v)),
    Task("stars", "words before 'n/10': n ≤ 3, 4 to 6, ≥ 7", 3, lambda c, v: _before_stars(v)),
    Task("source", "by a critic or by a viewer", 2, _source),
    Task("contrast", "has but, though, yet, ...", 2, lambda c, v: _contains(CONTRAST, list(c.items()))),
    Task("negation", "has not, no, never, ...", 2, lambda c, v: _contains(NEGATION, list(c.items()))),
    Task("first person", "opens with I, my, me", 2, lambda c, v: _contains(FIRST_PERSON, _opening(v))),
    Task("length", f"at most {SHORT} words or at least {LONG}", 2, lambda c, v: _length(c)),
)  # fmt: skip
"""One for each user that trains."""


def load(train: int, held_out: int, length: int) -> list[tuple[data.Split, data.Split]]:
    """Of each task, training and held-out samples with as many of every class; no text is on both sides."""
    from transformers import AutoTokenizer

    critics, viewers = reviews()
    tokenizer = AutoTokenizer.from_pretrained(data.model_dir(), local_files_only=True)
    found = []
    for number, task in enumerate(TASKS):
        chosen = _balanced(task, critics, viewers, train + held_out, seed=number)
        tokens = tokenizer(
            [text for text, _ in chosen],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        labels = torch.tensor([label for _, label in chosen])
        parts = (slice(held_out, None), slice(held_out))
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        first, second = (data.Split(ids[part], mask[part], labels[part]) for part in parts)
        found.append((first, second))
    return found


def labelled(name: str) -> Labelled:
    """All samples of the task of that name, sorted by text, with as many of every class."""
    task = next((task for task in TASKS if task.name == name), None)
    if task is None:
        raise ValueError(f"no task {name!r}; there are {', '.join(task.name for task in TASKS)}")
    texts = sorted(dict(task.label(*reviews())).items())
    random.Random(0).shuffle(texts)
    of_class = [[text for text in texts if text[1] == c] for c in range(task.classes)]
    return sorted(one[i] for i in range(min(map(len, of_class))) for one in of_class)


def _balanced(task: Task, critics: Texts, viewers: Texts, count: int, seed: int) -> Labelled:
    """Classes take turns, so that each part of the list has as many of all."""
    texts = sorted(dict(task.label(critics, viewers)).items())
    random.Random(seed).shuffle(texts)
    of_class = [[t for t in texts if t[1] == c] for c in range(task.classes)]
    each = -(-count // task.classes)
    if min(map(len, of_class)) < each:
        raise ValueError(f"{task.name} has {list(map(len, of_class))} texts; expected {each}")
    return [one[i] for i in range(each) for one in of_class][:count]


def reviews() -> tuple[Texts, Texts]:
    """Of critics and of viewers, each text once."""
    found: dict[str, Texts] = {"rotten_tomatoes": {}, "imdb": {}}
    with data.reviews_path().open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = row["text"].replace("<br />", " ").strip()
            found[row["source"]][text] = int(row["label"])
    return found["rotten_tomatoes"], found["imdb"]
