"""PEFT's patterns of module names, out of files that nobody vouches for: no pattern takes more than polynomial time.

Python's own ``re`` backtracks, and a config of twenty characters can keep it busy for years. Here it only parses. What
a part of a pattern can match is the set of places where it can end, found once for each place where it can begin.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        from re import _parser as _sre  # type: ignore[attr-defined]
    except ImportError:  # Python 3.10
        import sre_parse as _sre

_LENGTH = 2000
_STEPS = 2_000_000  # a pattern and a name take some hundreds
_left: ContextVar[list[int] | None] = ContextVar("pelt_fast_pattern_steps", default=None)
_PLAIN = re.compile(r"[\w.\-]*", re.ASCII)
_WORDS: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
}


@contextmanager
def limited() -> Iterator[None]:
    """Within the block all matching together may take some seconds; ValueError then."""
    token = _left.set([_STEPS])
    try:
        yield
    finally:
        _left.reset(token)


def is_plain(pattern: str) -> bool:
    """Whether nothing in it but the dot is an operator, so that ``re`` is safe."""
    return _PLAIN.fullmatch(pattern) is not None


def fullmatch(pattern: str, name: str) -> bool:
    """``re.fullmatch(pattern, name) is not None``.

    Raises:
        ValueError: it is no pattern, too long, or has back references, flags or other things that names do not need.
    """
    if is_plain(pattern):
        return re.fullmatch(pattern, name) is not None
    return _matched(pattern, name)


def ends_with(pattern: str, name: str) -> bool:
    """Whether the name, or what follows one of its dots, matches: how PEFT reads rank_pattern and alpha_pattern."""
    if is_plain(pattern):
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None
    return fullmatch(rf"(.*\.)?({pattern})", name)


@lru_cache(maxsize=2**14)
def _matched(pattern: str, name: str) -> bool:
    return len(name) in _Matcher(name).sequence(_parsed(pattern), 0)


@lru_cache(maxsize=256)
def _parsed(pattern: str) -> Any:
    if len(pattern) > _LENGTH:
        raise ValueError(f"a pattern has {len(pattern)} characters; expected at most {_LENGTH}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = _sre.parse(pattern)
        _check(tree)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern[:200]!r} is no pattern: {error}") from None
    if tree.state.flags & ~re.UNICODE:
        raise ValueError(f"{pattern[:200]!r} has flags; expected a pattern without")
    return tree


def _check(items: Any) -> None:
    """Raises for what ``_Matcher`` does not know, wherever it stands."""
    for op, value in items:
        name = str(op)
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            continue
        if name == "AT" and str(value) in _PLACES:
            continue
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            _check(value[2])
        elif name == "BRANCH":
            for branch in value[1]:
                _check(branch)
        elif name == "SUBPATTERN" and not value[1] and not value[2]:
            _check(value[3])
        elif name in ("ASSERT", "ASSERT_NOT") and value[0] == 1:
            _check(value[1])
        else:
            raise ValueError(f"a pattern of module names has a {name}, which is not supported")


_PLACES: dict[str, Callable[[str, int], bool]] = {
    "AT_BEGINNING": lambda text, at: at == 0,
    "AT_BEGINNING_STRING": lambda text, at: at == 0,
    "AT_END": lambda text, at: at == len(text),
    "AT_END_STRING": lambda text, at: at == len(text),
    "AT_BOUNDARY": lambda text, at: _is_word(text, at - 1) != _is_word(text, at),
    "AT_NON_BOUNDARY": lambda text, at: _is_word(text, at - 1) == _is_word(text, at),
}


def _is_word(text: str, at: int) -> bool:
    return 0 <= at < len(text) and _WORDS["CATEGORY_WORD"](text[at])


class _Matcher:
    """One name; ``known`` keeps where a part that began at a place can end."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.known: dict[tuple[int, int], frozenset[int]] = {}
        self.left = _left.get() or [_STEPS]

    def count(self) -> None:
        self.left[0] -= 1
        if self.left[0] <= 0:
            raise ValueError("its patterns take too long to match")

    def sequence(self, items: Any, start: int) -> frozenset[int]:
        self.count()
        key = (id(items), start)
        if key not in self.known:
            places = frozenset((start,))
            for item in items:
                places = self.all(item, places)
            self.known[key] = places
        return self.known[key]

    def all(self, item: Any, places: frozenset[int]) -> frozenset[int]:
        return frozenset(end for place in places for end in self.item(item, place))

    def item(self, item: Any, at: int) -> frozenset[int]:
        self.count()
        op, value = item
        name = str(op)
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            hit = at < len(self.text) and _takes(name, value, self.text[at])
            return frozenset((at + 1,)) if hit else frozenset()
        if name == "SUBPATTERN":
            return self.sequence(value[3], at)
        if name == "BRANCH":
            return frozenset().union(*(self.sequence(branch, at) for branch in value[1]))
        if name == "AT":
            return frozenset((at,)) if _PLACES[str(value)](self.text, at) else frozenset()
        if name in ("ASSERT", "ASSERT_NOT"):
            found = bool(self.sequence(value[1], at))
            return frozenset((at,)) if found == (name == "ASSERT") else frozenset()
        least, most, body = value
        return self.repeat(int(least), int(most), body, at)

    def repeat(self, least: int, most: int, body: Any, at: int) -> frozenset[int]:
        places, ends, times = frozenset((at,)), frozenset[int](), 0
        while places and times <= most:
            if times >= least:
                if places <= ends:
                    break
                ends |= places
            after = frozenset(end for place in places for end in self.sequence(body, place))
            times += 1
            if after == places:  # no further repetition changes anything
                return ends | places if most >= least else ends
            places = after
        return ends


def _takes(name: str, value: Any, character: str) -> bool:
    if name == "ANY":
        return character != "\n"
    if name == "IN":
        return _in_set(value, character)
    return (ord(character) == value) == (name == "LITERAL")


def _in_set(members: Sequence[Any], character: str) -> bool:
    negated, found = False, False
    for op, value in members:
        name = str(op)
        if name == "NEGATE":
            negated = True
        elif name == "LITERAL":
            found |= ord(character) == value
        elif name == "RANGE":
            found |= value[0] <= ord(character) <= value[1]
        else:  # CATEGORY_DIGIT, CATEGORY_NOT_DIGIT, ...
            positive = str(value).replace("_NOT_", "_")
            found |= _WORDS[positive](character) == (positive == str(value))
    return found != negated
