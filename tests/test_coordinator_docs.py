"""docs/coordinator.md: its figures are those that the benchmarks stored."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "coordinator.md").read_text()


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def rows(heading):
    """Cells of the first table below ``heading``, without its head."""
    table = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\|(.*)\|$", table, re.MULTILINE)[2:]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_figures_per_token_are_those_measured():
    kinds = {"one that": "stream", "`job=b": "batch", "512 con": "clients"}
    shown = {}
    for clients, stages, *figures in rows("A token"):
        (kind,) = [kind for start, kind in kinds.items() if clients.startswith(start)]
        shown[kind, int(stages)] = figures
    names = ("coordinator_us", "main_thread_us", "client_us")
    measured = {
        (result["kind"], result["num_stages"]): [
            f"{result['rows_per_plan']['median']:.0f}",
            *(f"{result[name]['median']:.1f}" for name in names),
        ]
        for result in results("token_cpu")["results"]
    }
    assert shown == measured


def test_figures_per_plan_are_those_measured():
    measured = []
    for result in results("coordinator_cpu")["per_plan"]:
        part = {name: times["median"] for name, times in result["parts_us"].items()}
        ahead = part["next_plan"] + part["plan_to_execute"] + part["encode"]
        figures = (result["usual_us"]["median"], ahead, part["decode"], part["complete"])
        measured.append([f"{result['num_rows']:,}", *(f"{figure:.1f}" for figure in figures)])
    assert rows("A plan") == measured
