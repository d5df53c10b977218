"""The pages of docs/benchmarks say what was measured, and which goals are reached."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from benchmarks import cases, models, ops, paired, profiles, roofline, speeds, tables, targets

MACHINE = {
    "device": "cpu",
    "processor": "A Processor",
    "cores": 2,
    "threads": 1,
    "gpu": None,
    "versions": {"python": "3.12", "torch": "2.14"},
    "date": "2026-11-27",
}
DESCRIBED = "A Processor, 2 cores; 1 thread; python 3.12, torch 2.14"


def results(factor: float) -> list[dict[str, Any]]:
    """What the programs write where every goal is reached by this factor, in CPU time alone."""
    seconds: dict[str, dict[tuple[str, str], float]] = {"ops": {}, "models": {}}
    curves: list[dict[str, Any]] = []
    peaks: dict[tuple[str, str], float] = {}
    for target in targets.TARGETS:
        for case in target.cases:
            named, ours = f"{case}, {target.mode}", target.ours[0]
            if target.program == "growth":
                curve = {"operator": case, "mode": target.mode, "name": ours}
                curves.append({**curve, "exponent": target.goal / factor})
            elif target.program == "memory":
                peaks |= {(named, target.against): 1000.0, (named, ours): 1000 * target.goal / factor}
            else:
                own = seconds[target.program]
                own |= {(named, target.against): factor * target.goal, (named, ours): 1.0}
    timed = {
        program: [
            {"case": case, "name": name, "seconds": [1.0] * 3, "cpu_seconds": [0.9 * one, one, 1.2 * one]}
            for (case, name), one in own.items()
        ]
        for program, own in seconds.items()
    }
    return [
        {"program": "ops", "machine": MACHINE, "timings": timed["ops"]},
        {"program": "models", "machine": MACHINE, "timings": timed["models"]},
        {"program": "growth", "machine": MACHINE, "timings": [], "curves": curves},
        {
            "program": "memory",
            "machine": MACHINE,
            "timings": [],
            "peaks": [{"case": case, "name": name, "bytes": size} for (case, name), size in peaks.items()],
        },
    ]


def test_a_goal_is_reached_from_its_number_on() -> None:
    for factor, reached in ((1.01, True), (0.99, False)):
        rows = targets.judge(results(factor))
        assert len(rows) == len(targets.TARGETS)
        for target, row in zip(targets.TARGETS, rows, strict=True):
            assert row["reached"] is reached, row
            measured = target.goal * factor if target.is_least else target.goal / factor
            assert row["measured"] == pytest.approx(measured)
        [(title, _, cells)] = targets.tables(rows)
        count = len(rows) if reached else 0
        assert title == f"{count} of {len(rows)} goals that were measured are reached."
        assert {cell[-1] for cell in cells} == {"yes" if reached else "no"}
        assert all(cell[3] for cell in cells)


def test_several_cases_count_by_their_geometric_mean_and_memory_by_the_worst() -> None:
    found = results(1.0)
    three = targets.THREE_STAGES
    for one in found[0]["timings"]:
        if one["case"] == f"{three[0]}, forward" and one["name"] == "auto":
            one["cpu_seconds"] = [8 * second for second in one["cpu_seconds"]]
    [memory] = [one for one in found if one["program"] == "memory"]
    [halo] = [
        t for t in targets.TARGETS if t.program == "memory" and t.against == "timm" and "halo" in t.what
    ]
    for one in memory["peaks"]:
        if one["case"] == f"{halo.cases[1]}, training" and one["name"] == "auto":
            one["bytes"] = 1300
    measured = {(row["what"], row["against"]): row for row in targets.judge(found)}
    [routing] = [t for t in targets.TARGETS if t.cases == three and t.mode == "forward"]
    assert measured[routing.what, "authors'"]["measured"] == pytest.approx(1.6 / 2)
    assert measured[halo.what, "timm"]["measured"] == pytest.approx(1.3)


def test_a_goal_that_was_not_measured_says_why() -> None:
    found = results(1.0)
    case = f"{targets.PLAIN}, forward"
    found[0]["timings"] = [one for one in found[0]["timings"] if one["name"] != "natten"]
    found[0]["left_out"] = [{"case": case, "name": "natten", "why": "natten cannot be imported"}]
    rows = targets.judge([found[0]])
    natten = next(row for row in rows if row["against"] == "natten")
    assert (natten["measured"], natten["reached"]) == (None, None)
    assert natten["why"] == "natten cannot be imported"
    [(_, _, cells)] = targets.tables(rows)
    assert ["-", "natten cannot be imported"] in [[cell[4], cell[3]] for cell in cells]
    growth = [row for row, target in zip(rows, targets.TARGETS, strict=True) if target.program == "growth"]
    assert {row["why"] for row in growth} == {"not measured: visionsel bench growth"}


def test_goals_are_judged_on_the_cpu_and_by_one_thread_where_it_was_measured() -> None:
    slow, fast = results(0.5), results(2.0)
    for one in slow:
        one["machine"] = {**MACHINE, "threads": 2}
    for order in ([*slow, *fast], [*fast, *slow]):
        assert all(row["reached"] for row in targets.judge(order))
    on_gpu = [{**one, "machine": {**MACHINE, "device": "cuda", "gpu": "A GPU"}} for one in fast]
    in_half = [{**one, "options": {"dtype": "bfloat16"}} for one in fast]
    for passed_over in (on_gpu, in_half):
        assert all(row["reached"] is None for row in targets.judge(passed_over))


def test_the_targets_have_a_page_where_all_programs_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "page", lambda found, name: f"# {name}")
    files = []
    for found in results(1.0):
        files.append(tmp_path / f"{found['program']}.json")
        files[-1].write_text(json.dumps(found))
    written = tables.write(files, tmp_path / "docs")
    assert [page.name for page in written] == [*(f"{file.stem}.md" for file in files), "targets.md"]
    assert written[-1].read_text().count("| yes |") == len(targets.TARGETS)


def test_goals_are_of_cases_that_are_measured_and_name_every_operator() -> None:
    replaced = {case.name: {*case.prepare().others} for case in cases.at_224()}
    for target in targets.TARGETS:
        if target.program in ("ops", "memory"):
            assert set(target.cases) <= set(replaced)
            assert all(target.against in replaced[case] for case in target.cases), target
        elif target.program == "models":
            name, side = target.cases[0].split()
            assert int(side) == timm.get_pretrained_cfg(name).input_size[1]
            assert target.against in (
                {models.OURS[name]} if name in models.OURS else {"timm", "transformers"}
            )
            assert name in {*models.OURS, *models.TIMMS}
    of_case = {case.name: case.operator for case in cases.at_224()}
    for program in ("ops", "growth", "memory"):
        own = [case for target in targets.TARGETS if target.program == program for case in target.cases]
        assert {of_case.get(case, case) for case in own} == set(cases.OPERATORS)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A small measurement."""
    monkeypatch.setattr(cases, "at_224", lambda batch: [cases.Halo(8, 16, 1, batch, 4, 1)])
    monkeypatch.setattr(ops, "limits", partial(roofline.limits, scale=16))
    monkeypatch.setattr(paired, "_repeats", lambda function: 1)
    return ops.measure(
        rounds=1, batch=1, operators=["halo"], backends=["auto", "reference"], dtype="float32", device="cpu"
    )


def rows_of(page: str) -> list[list[str]]:
    """The cells of a page's tables, without headers."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    headers = {index - 1 for index, line in enumerate(lines) if set(line) == {"---"}}
    return [line for index, line in enumerate(lines) if index not in headers and set(line) != {"---"}]


def test_a_page_shows_the_numbers_of_its_file(measured: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "ops-small.json"
    file.write_text(json.dumps(measured))
    pages = tables.write([file], tmp_path / "docs")
    assert [page.name for page in pages] == ["ops-small.md"]
    text = pages[0].read_text()
    rows = rows_of(text)
    for row, timing in zip(rows, measured["timings"], strict=False):
        assert row[:2] == [timing["case"], timing["name"]]
        assert row[2:5] == [
            f"{timing['milliseconds']:.2f}",
            f"{timing['cpu_milliseconds']:.2f}",
            f"{timing['speedup']:.2f}x",
        ]
    shares = rows[len(measured["timings"]) :]
    for row, share in zip(shares, measured["shares"], strict=True):
        assert row == [
            share["case"],
            share["name"],
            f"{share['least_milliseconds']:.3f}",
            f"{100 * share['share']:.1f} %",
        ]
    assert text.startswith("# Operators\n")
    assert tables.page(measured | {"options": {"batch": 8}}).startswith("# Operators, 8 images at a time\n")
    machine = measured["machine"]
    assert f"Measured on {machine['date']}." in text
    assert f"torch {machine['versions']['torch']}" in text
    assert machine["processor"] in text
    assert "<!-- python -m benchmarks.tables runs/bench/ops-small.json -->" in text
    # nothing half-written is left behind
    assert {path.suffix for path in (tmp_path / "docs").iterdir()} == {".md"}


def test_the_page_of_goals_names_each_with_its_number_and_the_machine() -> None:
    page = tables.target_page(results(1.01))
    rows = rows_of(page)
    assert [row[0] for row in rows] == [target.what for target in targets.TARGETS]
    assert {row[-1] for row in rows} == {"yes"}
    assert f"Operators: {DESCRIBED}. Measured on 2026-11-27." in page


def test_the_programs_print_pages_and_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for found in results(0.99):
        files.append(tmp_path / f"{found['program']}.json")
        files[-1].write_text(json.dumps(found))
    assert targets.main([*map(str, files)]) == 1  # a goal was missed
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"0 of {len(targets.TARGETS)} goals that were measured are reached."
    assert len(lines) == 3 + len(targets.TARGETS)
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"machine": {"torch": "2.14"}, "timings": []}))
    with pytest.raises(ValueError, match=r"old\.json has no results of a program of benchmarks/"):
        tables.main([str(old), "--folder", str(tmp_path)])


def test_the_readmes_speeds_are_judged_as_the_goals_are() -> None:
    case = f"{targets.BIASED}, forward"
    timings = [
        {"case": case, "name": name, "seconds": seconds, "cpu_seconds": seconds}
        for name, seconds in {"naive gather": [8.0, 9.0, 8.0], "auto": [2.0, 3.0, 4.0]}.items()
    ]
    machine = {"device": "cpu", "threads": 1}
    rows = speeds.table([{"program": "ops", "machine": machine, "timings": timings}]).splitlines()
    assert rows[2].endswith("| 3.0x | - |")  # the median of 4, 3 and 2
    assert all(row.endswith("| - | - |") for row in rows[3:])
    assert len(rows) == 2 + len(speeds.ROWS)


def test_a_profile_tells_kinds_of_operators_apart() -> None:
    kinds = {
        "aten::addmm": "products, convolutions",
        "mkldnn::_linear_pointwise": "products, convolutions",
        "aten::mkldnn_convolution": "products, convolutions",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention kernel",
        "aten::native_batch_norm": "norms",
        "aten::index_select": "copies, gathers",
        "aten::gelu": "activations",
        "aten::add": "rest",
    }
    assert {name: profiles.kind_of(name) for name in kinds} == kinds
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.BatchNorm2d(8)).eval()
    found = profiles.measure(model, torch.randn(1, 3, 16, 16))
    assert {"products, convolutions", "activations", "norms"} <= set(found)
    assert (
        profiles.table([("`a`", {"norms": 3.0, "rest": 1.0})]).splitlines()[2].startswith("| `a` | 4 | 0 %")
    )
