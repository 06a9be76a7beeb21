from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from bench import environment, report
from bench import results as records
from bench.lora.tables import mean_overheads
from bench.tables import LOST, lost, marked

Results = dict[str, Any]


def test_losses_are_shown_and_marked(results: Results) -> None:
    text = report.markdown(results, Path("/nowhere/results"), Path("/nowhere"))
    (won,) = (line for line in text.splitlines() if "| 14.00 | 11.00 |" in line)
    (lost,) = (line for line in text.splitlines() if "| 46.00 |" in line)
    assert LOST not in won
    assert "+0.25" in won
    assert f"+1.50 {LOST}" in lost
    assert "Slower than PEFT in 1 of 2 comparisons" in text


def test_adapters_are_compared_with_the_layernorm_and_with_eager(results: Results) -> None:
    table = report.tables(results, "adapter")[1]
    won, lost = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (won["ours / LN"], won["ours / eager"], won["error / eager"]) == ("1.60", "0.40", "0.90")
    assert (lost["ours / LN"], lost["ours / eager"]) == ("6.00", f"1.50 {LOST}")
    assert (lost["fwd / eager"], lost["error / eager"]) == (f"1.50 {LOST}", f"1.20 {LOST}")
    lines = " ".join(report.headlines(results, "adapter"))
    assert "Slower than eager PyTorch in 1 of 2 rows" in lines
    assert "fp32, mean of 2 row(s): forward and backward take 0.77 × eager's time" in lines


def test_multi_lora_is_compared_with_the_frozen_linear_and_the_loop(results: Results) -> None:
    found = {table.title: table for table in report.tables(results, "multi_lora")}
    (steps,) = (table for title, table in found.items() if "r = 16, forward + backward" in title)
    won, lost = (dict(zip(steps.columns, row, strict=True)) for row in steps.rows)
    assert (won["ours / frozen"], won["ours / loop"], won["overhead"]) == ("1.10", "0.55", "+0.10")
    assert (lost["ours / loop"], lost["overhead"]) == (f"1.05 {LOST}", f"+1.10 {LOST}")
    (kinds,) = (table for title, table in found.items() if "who names whom" in title)
    assert len(kinds.rows) == 3
    first = dict(zip(kinds.columns, kinds.rows[0], strict=True))
    assert (first["loop − frozen"], first["ours − frozen"], first["their MiB"]) == (
        "10.00",
        "2.00",
        "1.00",
    )
    lines = " ".join(report.headlines(results, "multi_lora"))
    assert "forward + backward +0.60 (1.52 × the frozen linear)" in lines
    assert "Slower than the loop in 1 of 5 rows" in lines


def test_users_are_compared_with_every_way_to_serve_them(results: Results) -> None:
    served, steps, tasks = report.tables(results, "multi_lora")[:3]
    cells = {row[0]: row for row in served.rows}
    assert cells["ours, mixed batches"][1:4] == ["512", "0.80", "–"]
    assert cells["loop over the users of a batch"][3] == "2.00 ×"
    assert cells["merge for each user of a batch"][3] == f"0.96 × {LOST}"
    assert [row[3] for row in steps.rows] == ["1.00", "1.10", "1.20", "1.30"]
    assert [row[8] for row in tasks.rows[:3]] == ["bitwise equal", "not equal", "–"]
    lines = report.headlines(results, "multi_lora")
    assert "512 requests a second" in lines[0]
    results["users"]["wrong"] = ["an adapter without a token has changed"]
    assert f"WRONG {LOST}: an adapter without a token has changed." in report.headlines(
        results, "multi_lora"
    )
    assert report.tables({**results, "users": None}, "multi_lora")[0].title not in served.title


@pytest.mark.parametrize(("ratio", "is_lost"), [(0.98, False), (1.004, False), (1.006, True)])
def test_a_near_tie_is_no_loss(ratio: float, is_lost: bool) -> None:
    assert lost(ratio) == is_lost
    assert marked("cell", ratio) == (f"cell {LOST}" if is_lost else "cell")


@pytest.mark.parametrize(
    ("family", "row"),
    [
        ("lora", ["fp32 8192 × 768 → 768", "estimated 99 s"]),
        ("adapter", ["fp32 8192 × 768 → 48", "estimated 77 s"]),
        ("multi_lora", ["fp32 8192 × 768 → 768, 64 adapters", "estimated 55 s"]),
    ],
)
def test_rows_that_did_not_run_are_listed_with_the_reason(
    results: Results, family: str, row: list[str]
) -> None:
    (table,) = [t for t in report.tables(results, family) if t.title == "Not run"]
    assert table.rows == [row]


def test_mean_overhead(results: Results) -> None:
    means = mean_overheads(records.rows_of(results, "lora"), "fp32")
    assert means == pytest.approx({"base": 0.875})


def test_a_wrong_result_stays_in_the_table(results: Results) -> None:
    ours = results["kernels"][0]["contenders"]["ours_base"]
    ours.update(times={}, overhead={}, wrong="ours_base is wrong", error_ratio=None)
    assert f"WRONG {LOST}" in report.markdown(results, Path("/r/x"), Path("/r"))


def test_readme_changes_between_the_marks_only(results: Results, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    folder = tmp_path / "bench" / "results" / "some-cpu"
    folder.mkdir(parents=True)
    (folder / "overhead.png").touch()
    assert report.update_readme(readme, results, folder)
    once = readme.read_text()
    assert once.startswith(f"before\n{report.BEGIN}\n")
    assert once.endswith(f"{report.END}\nafter\n")
    assert "old" not in once
    assert "](bench/results/some-cpu/overhead.png)" in once
    assert "finetune.png" not in once
    report.update_readme(readme, results, folder)
    assert readme.read_text() == once


def test_readme_without_marks_is_left_alone(results: Results, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("mine")
    assert not report.update_readme(readme, results, tmp_path)
    assert readme.read_text() == "mine"


def test_files(results: Results, tmp_path: Path) -> None:
    records.save(results, tmp_path)
    assert records.load(tmp_path) == results
    with (tmp_path / "kernels.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    ours = [x for x in lines if x["contender"] == "ours_base" and x["pass"] == "both"]
    assert [(x["tokens"], x["median_ms"], x["overhead"]) for x in ours] == [
        ("512", "11.0", "0.25"),
        ("2048", "46.0", "1.5"),
    ]
    ours = [x for x in lines if x["contender"] == "ours" and x["pass"] == "forward"]
    assert [x["ids"] for x in ours[2:]] == ["even", "even", "identical", "uniform", "identical"]
    ours = [x for x in ours if x["family"] == "adapter"]
    assert [(x["features"], x["bottleneck"]) for x in ours] == [("768", "48")] * 2
    notes = [x["note"] for x in lines if x["note"]]
    assert notes == [f"not run: estimated {seconds} s" for seconds in (99, 77, 55)]
    with (tmp_path / "finetune.csv").open(newline="") as file:
        lines = [x for x in csv.DictReader(file) if x["kind"] == "eager"]
    assert [x["loss"] for x in lines] == ["0.7", "0.6", "0.5"] * 2
    assert [x["method"] for x in lines] == ["lora"] * 3 + ["adapter"] * 3
    with (tmp_path / "users.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8 * 2 * 2 + 4 + 5
    assert [x["median_ms"] for x in lines if x["kind"] == "merged"] == ["120.0"]


def test_what_was_not_run_is_kept(results: Results, tmp_path: Path) -> None:
    records.save(results, tmp_path)
    again = [{"plan": {"method": "lora"}, "again": True}]
    new = {"meta": {"commit": "new"}, "kernels": [], "finetune": again}
    assert records.merged(new, tmp_path) == {
        "meta": {"commit": "new"},
        "kernels": results["kernels"],
        "finetune": [*again, results["finetune"][1]],
        "users": results["users"],
        "mixed": results["mixed"],
        "whole": results["whole"],
        "commits": {**records.commits_of(results), "fine-tune with lora": "new"},
    }
    users = {"wrong": ["again"]}
    assert records.merged({**new, "users": users}, tmp_path)["users"] == users


def test_what_is_of_an_earlier_commit_is_named(results: Results, tmp_path: Path) -> None:
    assert "earlier" not in report.provenance(results)
    records.save({**results, "commits": {"users": "old"}}, tmp_path)
    new = {**results, "commits": {"mixed": results["meta"]["commit"]}}
    text = report.provenance(records.merged(new, tmp_path))
    assert text.endswith(" Measured earlier: users at commit old.")


def test_pictures(results: Results, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench import plots

    drawn = plots.plot_all(results, tmp_path)
    assert [path.name for path in drawn] == list(report.PICTURES)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    empty = {**results, "kernels": [], "finetune": [], "users": None}
    assert plots.plot_all(empty, tmp_path) == []
    assert not any(path.exists() for path in drawn)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Intel(R) Xeon(R) Processor @ 2.60GHz 2c AMX", "intel-xeon-2c-amx"),
        ("AMD EPYC 2c AVX2", "amd-epyc-2c-avx2"),
        ("NVIDIA H200", "nvidia-h200"),
    ],
)
def test_slug(name: str, slug: str) -> None:
    assert environment.slugify(name) == slug
