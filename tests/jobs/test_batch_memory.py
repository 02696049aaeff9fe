"""The memory of a batch does not grow with its input; the benchmark measures it in full."""

import json
import subprocess
import sys
from pathlib import Path

# From 1,000 to 200,000 lines it may grow by 64 MB, so from 1,000 to 30,000 by a seventh.
MAX_GROWTH_BYTES = 9_000_000


def test_memory_grows_little_with_the_input(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.batch_memory", "--lines", "1000", "30000"]
    subprocess.run(
        [*command, "--output", str(report)],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        timeout=240,
    )
    measured = json.loads(report.read_text())
    sent = {(r["num_lines"], r["mode"]): r["num_submitted"] for r in measured["results"]}
    assert sent[30_000, "fresh"] == sent[30_000, "ordered"] == 30_000
    assert 14_000 < sent[30_000, "resumed"] < 16_000
    for mode, growth in measured["growth_bytes"].items():
        assert growth < MAX_GROWTH_BYTES, (mode, measured)
