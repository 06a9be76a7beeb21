"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path

from . import finetune_picture
from .adapter import picture as adapter_picture
from .lora import picture as lora_picture
from .multi_lora import picture as multi_lora_picture
from .results import Results
from .users import picture as users_picture

DRAWN = {
    "overhead.png": lora_picture.draw,
    "adapter.png": adapter_picture.draw,
    "multi_lora.png": multi_lora_picture.draw,
    "users.png": users_picture.draw,
    "finetune.png": finetune_picture.draw,
}


def plot_all(results: Results, folder: Path) -> list[Path]:
    """Draws what the results allow; an earlier picture that they do not allow is removed."""
    drawn = []
    for name, draw in DRAWN.items():
        path = folder / name
        if draw(results, path):
            drawn.append(path)
        else:
            path.unlink(missing_ok=True)
    return drawn
