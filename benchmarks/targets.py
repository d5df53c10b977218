"""Goals, and whether they are reached: `python -m benchmarks.targets runs/bench/*.json`.

The goals are of a CPU in float32: ratios of CPU time where one thread was used, of the wall clock where more
were. A goal over several cases is of their geometric mean. Nothing is measured here; a goal whose measurement
is not among the files says so.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import cases, paired
from benchmarks.paired import Table

__all__ = ["TARGETS", "Target", "judge", "main", "tables"]

THREE_STAGES = [case.name for case in cases.at_224() if isinstance(case, cases.BilevelRouting)][:3]
DETECTION = [case.name for case in cases.at_224() if isinstance(case, cases.BilevelRouting)][3:]
HALOS = [case.name for case in cases.at_224() if isinstance(case, cases.Halo)]
FOCALS = [case.name for case in cases.at_224() if isinstance(case, cases.Focal)]
PLAIN, BIASED = (cases.Neighborhood(56, 2, bias=bias).name for bias in (False, True))
LINEAR = 1.15
BEST = ("auto", "accelerated", "packed")


@dataclass(frozen=True)
class Target:
    """One goal.

    Attributes:
        program: whose results have it: "ops", "models", "growth" or "memory".
        cases: of the program; of growth, the operator.
        mode: "forward" or "training".
        against: the name of what it is compared with; "" for none.
        goal: at least this many times as fast; of growth the largest exponent, of memory the largest ratio.
        ours: backends of which the best one counts.
    """

    program: str
    cases: Sequence[str]
    mode: str
    against: str
    goal: float
    ours: tuple[str, ...] = ("auto",)

    @property
    def what(self) -> str:
        """A line about it."""
        several = f" and {len(self.cases) - 1} more" if len(self.cases) > 1 else ""
        kind = {"growth": "growth with tokens, ", "memory": "peak memory, "}.get(self.program, "")
        return f"{kind}{self.cases[0]}{several}, {self.mode}"

    @property
    def is_least(self) -> bool:
        """Whether more is better."""
        return self.program in ("ops", "models")


def _memory_targets() -> list[Target]:
    baselines = {"neighborhood": ["naive gather"], "bilevel_routing": ["authors'"], "halo": ["timm"]}
    baselines["focal_modulation"] = ["authors'", "timm"]
    return [
        Target(
            "memory", [case.name for case in cases.chosen(cases.at_224(), [operator])], "training", name, 1.0
        )
        for operator, names in baselines.items()
        for name in names
    ]


TARGETS = [
    Target("ops", [PLAIN], "forward", "naive gather", 15),
    Target("ops", [PLAIN], "training", "naive gather", 15),
    Target("ops", [BIASED], "forward", "naive gather", 10),
    Target("ops", [BIASED], "training", "naive gather", 8),
    Target("ops", [PLAIN], "forward", "natten", 100),
    Target("ops", THREE_STAGES, "forward", "authors'", 1.6),
    Target("ops", THREE_STAGES, "training", "authors'", 2.5),
    Target("ops", DETECTION, "forward", "authors'", 1.9),
    Target("ops", HALOS, "forward", "timm", 2, ("auto", "compiled")),
    Target("ops", HALOS, "training", "timm", 1.5, ("auto", "compiled")),
    Target("ops", FOCALS, "forward", "authors'", 1.6),
    Target("ops", FOCALS, "forward", "timm", 1.6),
    Target("models", ["nat_tiny 224"], "forward", "naive gather", 5, BEST),
    Target("models", ["dinat_tiny 224"], "forward", "naive gather", 5, BEST),
    Target("models", ["biformer_tiny 224"], "forward", "authors'", 1.6, BEST),
    Target("models", ["focalnet_tiny_srf 224"], "forward", "transformers", 1.6, BEST),
    Target("models", ["focalnet_tiny_srf 224"], "forward", "timm", 1.6, BEST),
    Target("models", ["halonet50ts 256"], "forward", "timm", 1.5, BEST),
    *(Target("growth", [operator], "forward", "", LINEAR) for operator in cases.OPERATORS),
    *_memory_targets(),
]


def judge(results: Iterable[Mapping[str, Any]], targets: Sequence[Target] = TARGETS) -> list[dict[str, Any]]:
    """Each goal with what was measured.

    Args:
        results: of the programs; those on a GPU, of several images or in half precision are passed over, and
            of two from one program the one of a single thread counts.
        targets: the goals.

    Returns:
        A dict a goal: `what`, `against`, `goal`, `measured` (None where it was not), `reached` (the same),
        `name` of what was best, and `why` it was not measured.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for one in results:
        if is_of_the_goals(one) and (one["program"] not in found or one["machine"]["threads"] == 1):
            found[one["program"]] = one
    return [_judged(target, found.get(target.program)) for target in targets]


def is_of_the_goals(found: Mapping[str, Any]) -> bool:
    """Whether results are of one image in float32 on a CPU, as the goals are."""
    options = found.get("options", {})
    plain = options.get("batch", 1) == 1 and options.get("dtype", "float32") == "float32"
    return plain and found["machine"]["device"] == "cpu"


def _judged(target: Target, found: Mapping[str, Any] | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "what": target.what,
        "against": target.against,
        "goal": f"{'>=' if target.is_least else '<='} {target.goal:g}",
        "measured": None,
        "reached": None,
        "name": None,
        "why": f"not measured: visionsel bench {target.program}",
    }
    if found is None:
        return row
    measured: dict[str, float] = {}
    for name in target.ours:
        values = [_value(target, found, case, name) for case in target.cases]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            # a memory goal is of each case, a speed goal of their geometric mean
            measured[name] = math.prod(known) ** (1 / len(known)) if target.is_least else max(known)
    if not measured:
        names = {*target.ours, target.against}
        row["why"] = next(
            (
                one["why"]
                for one in found.get("left_out", [])
                if _is_of(target, one["case"]) and one["name"] in names
            ),
            row["why"],
        )
        return row
    best = max if target.is_least else min
    name = best(measured, key=lambda name: measured[name])
    reached = measured[name] >= target.goal if target.is_least else measured[name] <= target.goal
    return row | {"measured": measured[name], "reached": reached, "name": name, "why": ""}


def _is_of(target: Target, case: str) -> bool:
    return case in [f"{one}, {target.mode}" for one in target.cases]


def _value(target: Target, found: Mapping[str, Any], case: str, name: str) -> float | None:
    """The number of one case; None where it was not measured."""
    if target.program == "growth":
        for curve in found["curves"]:
            if (curve["operator"], curve["mode"], curve["name"]) == (case, target.mode, name):
                return float(curve["exponent"])
        return None
    named = f"{case}, {target.mode}"
    if target.program == "memory":
        peaks = {one["name"]: one["bytes"] for one in found["peaks"] if one["case"] == named}
        return peaks[name] / peaks[target.against] if {name, target.against} <= set(peaks) else None
    clock = paired.counted(found["machine"])
    seconds = {one["name"]: one[clock] for one in found["timings"] if one["case"] == named}
    if not {name, target.against} <= set(seconds):
        return None
    return statistics.median(paired.ratios_of(seconds[target.against], seconds[name]))


def tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The goals, and whether they are reached."""
    header = ["what", "against", "goal", "measured", "reached"]
    cells = []
    for row in rows:
        measured = row["why"]
        if row["measured"] is not None:
            measured = f"{row['measured']:.2f}" + ("" if row["name"] == "auto" else f" ({row['name']})")
        reached = {True: "yes", False: "no", None: "-"}[row["reached"]]
        cells.append([row["what"], row["against"] or "-", row["goal"], measured, reached])
    known = [row["reached"] for row in rows if row["reached"] is not None]
    return [(f"{sum(known)} of {len(known)} goals that were measured are reached.", header, cells)]


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Results of the programs.

    Raises:
        ValueError: for a file that is none, or was written by an older version.
    """
    results = []
    for path in paths:
        content = json.loads(path.read_text())
        if (
            not isinstance(content, dict)
            or "date" not in content.get("machine", {})
            or "program" not in content
        ):
            raise ValueError(
                f"{path} has no results of a program of benchmarks/; measure again and give that"
            )
        results.append(content)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the goals with what was measured; status 1 where one was missed."""
    from visionsel.cli_text import table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what the programs wrote, JSON")
    rows = judge(read(parser.parse_args(arguments).files))
    [(title, header, cells)] = tables(rows)
    print(f"{title}\n\n{table(header, cells)}")
    return int(any(row["reached"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
