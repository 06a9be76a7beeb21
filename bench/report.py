"""From results to what a person reads: the same in the terminal and in the README."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import finetune_tables, mixed, whole
from .adapter import tables as adapter_tables
from .compacter import tables as compacter_tables
from .delta import tables as delta_tables
from .environment import BUSY_LOAD
from .fusion import tables as fusion_tables
from .lora import tables as lora_tables
from .multi_bottleneck import tables as multi_bottleneck_tables
from .multi_lora import tables as multi_lora_tables
from .prefix import tables as prefix_tables
from .results import Results, rows_of
from .tables import TextTable
from .users import tables as users_tables

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SECTIONS: dict[str, Any] = {
    "lora": lora_tables,
    "adapter": adapter_tables,
    "multi_lora": multi_lora_tables,
    "multi_bottleneck": multi_bottleneck_tables,
    "compacter": compacter_tables,
    "delta": delta_tables,
    "prefix": prefix_tables,
    "fusion": fusion_tables,
}
"""By family, what has a TITLE, `tables` and `headlines`."""
USERS_FAMILY = "multi_lora"
"""Whose section the users of one model stand in, and batches of different methods."""
WHOLE_FAMILY = "fusion"
"""Whose section, the last one, the methods of whole models stand in."""
PICTURES = {
    "overhead.png": "PELT overhead of the LoRA linear by shape",
    "adapter.png": "Cost of a bottleneck adapter by shape, in units of the layernorm",
    "multi_lora.png": "Cost of batched multi-LoRA by shape, and by how the tokens name their adapters",
    "users.png": "64 users on one MiniLM: requests a second, step time, losses",
    "finetune.png": "MiniLM fine-tunes, loss and step time",
}


def tables(results: Results, family: str) -> list[TextTable]:
    """Every table of a family that has a row."""
    found = [
        finetune_tables.table(finetunes_of(results, family)),
        *(users_tables.tables(results.get("users")) if family == USERS_FAMILY else []),
        *(mixed.tables(results.get("mixed")) if family == USERS_FAMILY else []),
        *(whole.tables(results.get("whole")) if family == WHOLE_FAMILY else []),
        *SECTIONS[family].tables(rows_of(results, family), results["meta"]),
    ]
    return [table for table in found if table.rows]


def headlines(results: Results, family: str) -> list[str]:
    """The family's results in a few sentences."""
    lines = [finetune_tables.headline(one) for one in finetunes_of(results, family)]
    if family == USERS_FAMILY:
        lines += users_tables.headlines(results.get("users"))
        lines += mixed.headlines(results.get("mixed"))
    if family == WHOLE_FAMILY:
        lines += whole.headlines(results.get("whole"))
    return lines + SECTIONS[family].headlines(rows_of(results, family))


def finetunes_of(results: Results, family: str) -> list[dict[str, Any]]:
    return [one for one in results["finetune"] if one["plan"]["method"] == family]


def summary(results: Results) -> list[str]:
    """Lines of Markdown: per family a title and its headlines."""
    lines = []
    for family, section in SECTIONS.items():
        found = headlines(results, family)
        if found:
            lines += [f"**{section.TITLE}**", "", *(f"- {line}" for line in found), ""]
    return lines


def provenance(results: Results) -> str:
    meta = results["meta"]
    versions = ", ".join(f"{name} {v}" for name, v in meta["versions"].items() if v)
    text = (
        f"{meta['device']} ({meta['instruction_set']}, {meta['threads']} threads), {meta['date']}, "
    )
    text += f"commit {meta['commit'] or 'unknown'}; {versions}."
    load = meta.get("load_average", 0)
    if load > BUSY_LOAD:
        text += f" The machine was not idle at the start: load average {load}."
    return text + _kept(results)


def _kept(results: Results) -> str:
    """What is of an earlier commit than the rest."""
    earlier: dict[str, list[str]] = {}
    for part, commit in results.get("commits", {}).items():
        if commit != (results["meta"]["commit"] or "unknown"):
            earlier.setdefault(commit, []).append(part)
    parts = [f"{', '.join(named)} at commit {commit}" for commit, named in earlier.items()]
    return f" Measured earlier: {'; '.join(parts)}." if parts else ""


def update_readme(readme: Path, results: Results, folder: Path) -> bool:
    """Writes the results between the two marks; False when the README has no marks."""
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        return False
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(
        before + BEGIN + "\n" + markdown(results, folder, readme.parent) + END + after,
        encoding="utf-8",
    )
    return True


def markdown(results: Results, folder: Path, root: Path) -> str:
    """The results section, with its pictures linked relative to ``root``."""
    parts = [provenance(results), "", *summary(results)]
    for name, words in PICTURES.items():
        if (folder / name).exists():
            parts += [f"![{words}]({Path(os.path.relpath(folder / name, root)).as_posix()})", ""]
    for family, section in SECTIONS.items():
        found = tables(results, family)
        parts += [f"### {section.TITLE}", ""] if found else []
        parts += [table.markdown() for table in found]
    return "\n".join(parts) + "\n"
