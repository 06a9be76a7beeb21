"""Patterns mean what they mean to ``re``."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelt_fast.serving import patterns

ATOMS = st.sampled_from(
    ["a", "b", r"\.", ".", r"\d", r"\w", "[ab]", "[^a.]", "[a-c0-9]", r"[\d_]", r"\b", r"\W", "1"]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.builds(
            "(?:{}){}".format,
            inner,
            st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{0,3}?", "{2,}"]),
        ),
        inner.map("(?={}).*".format),
        inner.map("(?!{})".format),
    ),
    max_leaves=6,
)
NAMES = st.text(alphabet="ab1_.", max_size=6)


@given(pattern=PATTERNS, name=NAMES)
@settings(max_examples=500, deadline=None)
def test_as_re(pattern: str, name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = re.fullmatch(pattern, name) is not None
        suffix = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert patterns.fullmatch(pattern, name) == expected
    assert patterns.ends_with(pattern, name) == suffix


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
        r"^(?!.*vision).*(?:q_proj|up_proj)$",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.(?:up_proj))",
        "model.layers.3.mlp.up_proj",
    ],
)
def test_patterns_of_the_wild(pattern: str):
    for name in (
        "model.layers.3.self_attn.q_proj",
        "model.layers.13.mlp.up_proj",
        "model.language_model.layers.3.mlp.up_proj",
        "model.vision.layers.3.mlp.up_proj",
        "lm_head",
    ):
        assert patterns.fullmatch(pattern, name) == bool(re.fullmatch(pattern, name))
        assert patterns.ends_with(pattern, name) == bool(re.match(rf"(.*\.)?({pattern})$", name))


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        (r"(a)\1", "GROUPREF"),
        ("(?<=a)b", "ASSERT"),
        ("(?i)a", "has flags"),
        ("(?i:a)", "SUBPATTERN"),
        ("(", "no pattern"),
        ("a{99999999999999999999}", "no pattern"),
        ("(a)" * 1000, "3000 characters"),
    ],
)
def test_refused(pattern: str, match: str):
    with pytest.raises(ValueError, match=match):
        patterns.fullmatch(pattern, "a")


@pytest.mark.parametrize(
    "pattern", ["(a+)+", "(a|a)*b", "((a*)*)*", "(a?){1000}b", "a?" * 200 + "b", ".*" * 200 + "b"]
)
def test_nothing_backtracks(pattern: str):
    """``re`` would take years."""
    start = time.monotonic()
    try:
        assert not patterns.fullmatch(pattern, "a" * 60 + "!")
    except ValueError as error:
        assert "too long" in str(error)  # noqa: PT017
    assert time.monotonic() - start < 20


def test_patterns_share_a_limit(monkeypatch):
    monkeypatch.setattr(patterns, "_STEPS", 1000)
    with patterns.limited():
        for i in range(5):
            patterns.fullmatch("(a|b)*", f"{i}")
        with pytest.raises(ValueError, match="too long"):
            [patterns.fullmatch("(a|b)*", f"a{i}") for i in range(1000)]
    patterns.fullmatch("(a|b)*", "c")


def test_deep_patterns_match_or_are_refused():
    for depth in (10, 100, 900):
        pattern = "(" * depth + "a" + ")" * depth
        try:
            assert patterns.fullmatch(pattern, "a")
        except ValueError as error:
            assert "no pattern" in str(error)  # noqa: PT017
