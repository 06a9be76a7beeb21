"""What a pool raises beside TypeError, ValueError and OSError."""

from __future__ import annotations


class UnknownAdapter(KeyError):
    """No adapter of that name is in the pool."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class PoolFull(RuntimeError):
    """Every slot holds an adapter that is pinned or in use."""
