"""What a run leaves behind: a JSON file, from which all that is shown is made, and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .families import FAMILIES
from .finetune import FineTune
from .measure import Entry, Row
from .users.tables import lines as lines_of_users
from .whole import merged as whole_merged

Results = dict[str, Any]


def collect(
    meta: dict[str, Any],
    rows: Sequence[Row],
    finetunes: Sequence[FineTune],
    users: dict[str, Any] | None = None,
    mixed: dict[str, Any] | None = None,
    whole: dict[str, Any] | None = None,
) -> Results:
    found = {
        "meta": meta,
        "kernels": [_row(row) for row in _in_order(rows)],
        "finetune": [_finetune(one) for one in finetunes],
        "users": _rounded(users),
        "mixed": _rounded(mixed),
        "whole": _rounded(whole),
    }
    return {**found, "commits": commits_of(found)}


def commits_of(results: Results) -> dict[str, str]:
    """Of each part that was measured: what code it is of, since a run may keep parts of the last one."""
    if "commits" in results:
        found: dict[str, str] = results["commits"]
        return found
    parts = [f"kernels of {row['family']}" for row in results["kernels"]]
    parts += [f"fine-tune with {one['plan']['method']}" for one in results["finetune"]]
    parts += [part for part in ("users", "mixed", "whole") if results.get(part)]
    return dict.fromkeys(parts, results["meta"]["commit"] or "unknown")


def rows_of(results: Results, family: str) -> list[dict[str, Any]]:
    return [row for row in results["kernels"] if row["family"] == family]


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """As they are shown; they are measured the short ones first."""
    families = list(FAMILIES)
    return sorted(rows, key=lambda row: (families.index(row.case.family), row.case.order))


def save(results: Results, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1, default=_plain) + "\n")
    _write_csv(folder / "kernels.csv", list(_flat_kernels(results)))
    _write_csv(folder / "finetune.csv", list(_flat_finetune(results)))
    _write_csv(folder / "users.csv", lines_of_users(results.get("users")))


def load(folder: Path) -> Results:
    results: Results = json.loads((folder / "results.json").read_text())
    return results


def merged(new: Results, folder: Path) -> Results:
    """``new``, with what was not run this time taken from the folder's last results."""
    if not (folder / "results.json").exists():
        return new
    old = load(folder)

    def fresh_or_old(part: str, key: Callable[[dict[str, Any]], str]) -> list[dict[str, Any]]:
        fresh = {key(item) for item in new[part]}
        # in the order in which they are shown
        return sorted(
            [item for item in old[part] if key(item) not in fresh] + new[part],
            key=lambda item: list(FAMILIES).index(key(item)),
        )

    return {
        **new,
        "kernels": fresh_or_old("kernels", lambda row: row["family"]),
        "finetune": fresh_or_old("finetune", lambda one: one["plan"]["method"]),
        **{part: new.get(part) or old.get(part) for part in ("users", "mixed")},
        "whole": whole_merged(new.get("whole"), old.get("whole")),
        "commits": {**commits_of(old), **commits_of(new)},
    }


def _row(row: Row) -> dict[str, Any]:
    case = row.case
    return {
        **case.record,
        "main_pass": case.main_pass,
        "flops": case.flops,
        "bytes": case.bytes,
        "rounds": row.rounds,
        "not_run": row.not_run,
        "contenders": {name: _entry(entry) for name, entry in row.entries.items()},
    }


def _entry(entry: Entry) -> dict[str, Any]:
    plain = {key: value for key, value in vars(entry).items() if key not in ("name", "samples")}
    return _rounded({key: _as_plain(value) for key, value in plain.items()})


def _finetune(one: FineTune) -> dict[str, Any]:
    runs = {
        kind: {
            "losses": run.losses,
            "accuracy": run.accuracy,
            "step_ms": asdict(run.step_ms),
            "model_ms": asdict(run.model_ms),
            "saved_bytes": run.saved_bytes,
            "peak_bytes": run.peak_bytes,
        }
        for kind, run in one.runs.items()
    }
    return {
        "plan": asdict(one.plan),
        "trained": one.plan.trains,
        "replaced": one.replaced,
        "runs": _rounded(runs),
        "overhead": _rounded(_as_plain(one.overhead)),
        "step_overhead": _rounded(_as_plain(one.step_overhead)),
    }


def _as_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_plain(item) for key, item in value.items()}
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def _rounded(value: Any) -> Any:
    """Five digits are more than any timing holds, and keep the file readable."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> str:
    return str(value)


LEFT_OUT = ("main_pass", "flops", "bytes", "not_run", "contenders")


def _flat_kernels(results: Results) -> Any:
    """Long format: one line per case, contender and pass."""
    for row in results["kernels"]:
        head = {key: value for key, value in row.items() if key not in LEFT_OUT}
        if row["not_run"]:
            yield {**head, "note": "not run: " + row["not_run"]}
        for name, entry in row["contenders"].items():
            for pass_, stat in entry["times"].items():
                overhead = entry["overhead"].get(pass_) or {}
                error = entry["error_ratio"] or {}
                yield {
                    **head,
                    "contender": name,
                    "pass": pass_,
                    "ran": entry["ran"],
                    "median_ms": stat["median"],
                    "p20_ms": stat["p20"],
                    "p80_ms": stat["p80"],
                    "host_ms": entry["host_ms"],
                    "overhead": overhead.get("value"),
                    "overhead_p10": overhead.get("low"),
                    "overhead_p90": overhead.get("high"),
                    "max_error_over_eager": error.get("max"),
                    "mean_error_over_eager": error.get("mean"),
                    "saved_bytes": entry["saved_bytes"],
                    "peak_bytes": entry["peak_bytes"],
                    "note": "",
                }
            if entry["wrong"] or entry["missing"]:
                yield {**head, "contender": name, "note": entry["wrong"] or entry["missing"]}


def _flat_finetune(results: Results) -> Any:
    """One line per method, dtype, kind, seed and step."""
    for one in results["finetune"]:
        for kind, run in one["runs"].items():
            for seed, losses in enumerate(run["losses"]):
                for step, loss in enumerate(losses):
                    yield {
                        "method": one["plan"]["method"],
                        "dtype": one["plan"]["dtype"],
                        "kind": kind,
                        "seed": seed,
                        "step": step,
                        "loss": loss,
                    }


def _write_csv(path: Path, lines: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for line in lines for key in line))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
