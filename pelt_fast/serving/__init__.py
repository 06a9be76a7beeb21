"""Serving: many LoRA adapters over one frozen model, loaded and evicted while it runs."""

from .errors import PoolFull, UnknownAdapter
from .pool import AdapterPool
from .slots import Resident

__all__ = ["AdapterPool", "PoolFull", "Resident", "UnknownAdapter"]
