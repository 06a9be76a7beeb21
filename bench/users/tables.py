"""What a person reads about the users of one model."""

from __future__ import annotations

from typing import Any

from ..tables import LOST, MIB, NEVER, TextTable, marked, number

Users = dict[str, Any]
SERVED = {
    "none": "no adapters",
    "ours": "ours, mixed batches",
    "loop": "loop over the users of a batch",
    "merged": "merge for each user of a batch",
    "merged by user": "the same, stream sorted by user",
}
TRAINED = {
    "frozen": "heads alone, no adapters",
    "mixed": "ours, mixed batch",
    "loop": "loop over the users of the batch",
    "alone": "ours, one user after the other",
}


def headlines(users: Users | None) -> list[str]:
    if not users:
        return []
    stream, step = users["serving"]["stream_ms"], users["step_ms"]
    plan, lines = users["plan"], []
    if "ours" in stream:
        ours = stream["ours"]["median"]
        others = [
            f"{_times(stream, name, 'ours')} {words}"
            for name, words in (
                *(("loop", "of a loop over the users of a batch"), ("merged", "of merging for each of them")),
                ("none", "of the model without adapters"),
            )
            if name in stream
        ]  # fmt: skip
        per_second = 1e3 * users["serving"]["requests"] / ours
        lines.append(
            f"{users['users']} users on one MiniLM: {per_second:.0f} requests a second, the throughput "
            + ", ".join(others)
            + "."
        )
    if "mixed" in step and "alone" in step:
        equal, count = users["gradients"]
        lines.append(
            f"{plan['present']} users in a training step: {step['mixed']['median'] / step['alone']['median']:.2f} × "
            f"the time of one after the other; losses differ by at most {users['largest_difference']:.1g}, "
            f"and {equal} of {count} gradients of an adapter are bitwise those of its rows alone."
        )
    return lines + [f"WRONG {LOST}: {text}." for text in users["wrong"]]


def _times(stream: dict[str, Any], name: str, ours: str) -> str:
    return f"{stream[name]['median'] / stream[ours]['median']:.2f} × that"


def tables(users: Users | None) -> list[TextTable]:
    return [_serving(users), _steps(users), _tasks(users)] if users else []


def _serving(users: Users) -> TextTable:
    served = users["serving"]
    stream = served["stream_ms"]
    table = TextTable(
        f"Serving {users['users']} users on one MiniLM-L6, LoRA r = {users['rank']} on query and value",
        ["", "requests / s", "of no adapters", "ours is faster", "stream, ms", "p20 to p80", "error"],
        wide=("p20 to p80",),
    )  # fmt: skip
    for name, words in SERVED.items():
        if name not in stream:
            continue
        median, ours = stream[name]["median"], stream.get("ours", {}).get("median")
        error = served["errors"].get(name)
        faster = median / ours if ours and name not in ("none", "ours") else None
        table.rows.append(
            [
                words,
                f"{1e3 * served['requests'] / median:.0f}",
                f"{stream['none']['median'] / median:.2f}" if "none" in stream else NEVER,
                marked(f"{faster:.2f} ×", 1 / faster) if faster else NEVER,
                number(median),
                f"{number(stream[name]['p20'])} to {number(stream[name]['p80'])}",
                f"{error:.1e}" if error is not None else NEVER,
            ]
        )
    table.notes = [
        f"{served['requests']} requests of {users['plan']['length']} tokens, shuffled, in batches of "
        f"{served['batch']}, {served['rounds']} rounds in turns. The plan of each batch, and whose samples are where, "
        f"is found within the time. *error*: largest distance of a logit from fp64. All adapters take "
        f"{served['adapter_bytes'] / MIB:.0f} MiB; weights merged in advance would take "
        f"{served['merged_bytes'] / MIB:.0f} MiB."
    ]
    return table


def _steps(users: Users) -> TextTable:
    plan, step = users["plan"], users["step_ms"]
    table = TextTable(
        "Training several users' adapters, forward and backward of a step (ms, medians)",
        ["", "ms", "p20 to p80", "of no adapters"],
    )
    for kind, words in TRAINED.items():
        if kind in step:
            one = step[kind]
            floor = step.get("frozen", {}).get("median")
            table.rows.append(
                [
                    words,
                    number(one["median"]),
                    f"{number(one['p20'])} to {number(one['p80'])}",
                    f"{one['median'] / floor:.2f}" if floor else NEVER,
                ]
            )
    table.notes = [
        f"{plan['present']} of {len(users['tasks'])} users send {plan['samples']} samples of {plan['length']} tokens "
        f"each; {plan['steps']} steps, {plan['timed']} of them with the loop and without adapters."
    ]
    return table


def _tasks(users: Users) -> TextTable:
    table = TextTable(
        f"What {len(users['tasks'])} users learn at once, each a task of movie reviews with a head of its own",
        ["user", "task", "steps", "first loss", "last loss", "alone", "largest gap", "adapters apart"]
        + ["among strangers", "held out"],
        wide=("task", "first loss"),
    )  # fmt: skip
    for task in users["tasks"]:
        mixed, alone = task["mixed"], task["alone"]
        same = task["among_strangers"]
        last = min(10, max(1, len(mixed)))
        table.rows.append(
            [
                task["name"],
                f"{task['what']} ({task['classes']} classes)",
                str(len(mixed)),
                f"{sum(mixed[:last]) / last:.3f}",
                f"{sum(mixed[-last:]) / last:.3f}",
                f"{sum(alone[-last:]) / last:.3f}",
                f"{max((abs(a - b) for a, b in zip(mixed, alone, strict=True)), default=0):.1e}",
                f"{task['apart']:.1e}",
                NEVER if same is None else "bitwise equal" if same else "not equal",
                f"{100 * task['accuracy']:.0f} %",
            ]
        )
    equal, count = users["gradients"]
    table.notes = [
        "Losses are means of ten steps (fewer in a short run); *alone*: the same user by itself, on the same samples; "
        "*largest gap*: between the two losses of a step; *adapters apart*: the distance of their weights at the end, "
        "over how far they moved. *Among strangers*: once more in the same batches, the others without adapter and "
        "loss, so that the frozen part computes the same numbers: losses and adapters are then compared bit by bit. "
        f"Layer by layer, {equal} of {count} gradients of A and B are bitwise those of the adapter's rows alone. "
        f"The {users['users'] - len(users['tasks'])} adapters without a token are "
        + ("as they were, bit by bit." if users["others_unchanged"] else f"CHANGED {LOST}.")
        + " Classes are balanced, but the samples of a short run teach little."
    ]
    return table


def lines(users: Users | None) -> list[dict[str, Any]]:
    """For a CSV file: the loss of each step, user and way of training; then the times."""
    if not users:
        return []
    found: list[dict[str, Any]] = [
        {"part": "training", "kind": kind, "task": task["name"], "step": step, "loss": loss}
        for task in users["tasks"]
        for kind in ("mixed", "alone")
        for step, loss in enumerate(task[kind])
    ]
    for part, stats in (("training", users["step_ms"]), ("serving", users["serving"]["stream_ms"])):
        for kind, stat in stats.items():
            times = {f"{key}_ms": value for key, value in stat.items()}
            found.append({"part": part, "kind": kind, **times})
    return found
