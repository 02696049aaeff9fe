"""launch.sh and scripts/bootstrap.sh: what they install, when, and what they refuse.

A stand-in for Python on PATH plays version check, venv and pip, so nothing is downloaded;
it writes down every installation.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PYTHON = """#!/bin/bash
# $PLAY: folder with what to play; here: version (major minor), no_venv, pip_fails, installs.
case "$*" in
  *"sys.version_info < (3, 11)"*) [[ ! -e $PLAY/too_old ]] ;;
  *"import ensurepip, venv"*) [[ ! -e $PLAY/no_venv ]] ;;
  --version) echo "Python 3.99.0" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && date +%N >"$3/made" ;;
  "-m pip "*)
    echo "$@" >>"$PLAY/installs"
    [[ ! -e $PLAY/pip_dies ]] || kill -9 $PPID
    [[ ! -e $PLAY/pip_fails ]]
    ;;
  "-m ember_pp"*) shift 2; printf 'ran in %s with %s\\n' "$PWD" "$*" ;;
  *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""


class Checkout:
    """A copy of the scripts with a stand-in Python, and what it was asked to do."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.play = folder / "play"
        self.elsewhere = folder / "elsewhere"
        for made in (self.root / "scripts", self.play, self.elsewhere, folder / "bin"):
            made.mkdir(parents=True)
        for name in ("launch.sh", "scripts/bootstrap.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        python = folder / "bin" / "python3"
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{python.parent}:/usr/bin:/bin",
            "PLAY": str(self.play),
        }
        self.environment.pop("EMBER_PYTHON", None)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.root / "launch.sh"), *arguments],
            cwd=self.elsewhere,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def launch(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def environment_for(self, kind: str) -> int:
        script = f'source "{self.root}/scripts/bootstrap.sh"; ember_environment {kind}'
        command = ["bash", "-euo", "pipefail", "-c", script]
        return subprocess.run(command, env=self.environment, timeout=60).returncode

    def installs(self) -> list[str]:
        log = self.play / "installs"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_installs_once_then_only_runs(checkout):
    code, out, err = checkout.launch("job=batch", "job.input=a b.jsonl")
    assert (code, out) == (0, f"ran in {checkout.elsewhere} with job=batch job.input=a b.jsonl\n")
    assert "making .venv" in err
    assert len(checkout.installs()) == 1
    assert "--constraint" in checkout.installs()[0]

    code, out, err = checkout.launch()
    assert (code, err) == (0, "")
    assert len(checkout.installs()) == 1


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_installs_again_when_what_is_needed_changes(checkout, changed):
    checkout.launch()
    with (checkout.root / changed).open("a") as file:
        file.write("# a change\n")
    checkout.launch()
    checkout.launch()
    assert len(checkout.installs()) == 2


def test_a_moved_checkout_is_installed_again(checkout):
    checkout.launch()
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    code, _, _ = checkout.launch()
    assert code == 0
    assert len(checkout.installs()) == 2


def test_a_failed_installation_is_begun_again(checkout):
    (checkout.play / "pip_fails").touch()
    code, out, err = checkout.launch()
    assert (code, out) == (2, "")
    assert "installing failed" in err
    made = (checkout.root / ".venv" / "made").read_text()

    (checkout.play / "pip_fails").unlink()
    assert checkout.launch()[0] == 0
    assert len(checkout.installs()) == 2
    assert (checkout.root / ".venv" / "made").read_text() != made, "the half-made .venv was kept"


def test_a_killed_installation_is_begun_again(checkout):
    (checkout.play / "pip_dies").touch()
    assert checkout.launch()[0] != 0
    (checkout.play / "pip_dies").unlink()
    code, out, _ = checkout.launch()
    assert code == 0
    assert out.startswith("ran in")
    assert len(checkout.installs()) == 2


def test_after_a_failed_renewal_going_back_installs_too(checkout):
    """What is installed then is neither the old nor the new."""
    checkout.launch()
    pins = checkout.root / "constraints.txt"
    before = pins.read_text()
    pins.write_text("# new\n")
    (checkout.play / "pip_fails").touch()
    assert checkout.launch()[0] == 2
    (checkout.play / "pip_fails").unlink()
    pins.write_text(before)
    assert checkout.launch()[0] == 0
    assert len(checkout.installs()) == 3


def test_a_venv_that_somebody_else_made_is_kept(checkout):
    (checkout.root / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(checkout.elsewhere.parent / "bin/python3", checkout.root / ".venv/bin/python")
    (checkout.root / ".venv" / "mine").touch()
    (checkout.play / "pip_fails").touch()
    checkout.launch()
    (checkout.play / "pip_fails").unlink()
    assert checkout.launch()[0] == 0
    assert (checkout.root / ".venv" / "mine").exists()


def test_runs_at_the_same_time_install_once(checkout):
    runs = [checkout.start() for _ in range(4)]
    for run in runs:
        out, _ = run.communicate(timeout=60)
        assert (run.returncode, out) == (0, f"ran in {checkout.elsewhere} with \n")
    assert len(checkout.installs()) == 1


def test_a_development_environment_does_for_both(checkout):
    assert checkout.environment_for("dev") == 0
    assert "[dev]" in checkout.installs()[0]
    assert checkout.launch()[0] == 0
    assert len(checkout.installs()) == 1


def test_with_a_driver_comes_what_compiles_kernels(checkout):
    """Once; a machine without one that shares the checkout is served by it, too."""
    driver = checkout.root.parent / "bin" / "nvidia-smi"
    driver.write_text("#!/bin/bash\n")
    driver.chmod(0o755)
    checkout.launch()
    checkout.launch()
    assert len(checkout.installs()) == 1
    assert checkout.installs()[0].endswith(f"--editable {checkout.root}[cuda]")
    driver.unlink()
    checkout.launch()
    assert len(checkout.installs()) == 1
    (checkout.root / "constraints.txt").write_text("torch==99\n")
    checkout.launch()
    assert checkout.installs()[1].endswith("[cuda]")  # a renewal keeps it


@pytest.mark.skipif(
    Path("/proc/driver/nvidia/version").exists() or bool(shutil.which("nvidia-smi")),
    reason="this machine has a driver",
)
def test_a_driver_that_comes_later_adds_what_compiles_kernels(checkout):
    checkout.launch()
    driver = checkout.root.parent / "bin" / "nvidia-smi"
    driver.write_text("#!/bin/bash\n")
    driver.chmod(0o755)
    checkout.launch()
    first, second = checkout.installs()
    assert first.endswith(f"--editable {checkout.root}")
    assert second.endswith("[cuda]")


def test_a_running_environment_is_added_to_for_development_and_stays_so(checkout):
    checkout.launch()
    assert checkout.environment_for("dev") == 0
    (checkout.root / "constraints.txt").write_text("")
    checkout.launch()
    assert ["[dev]" in line for line in checkout.installs()] == [False, True, True]


def test_an_old_python_is_told_what_to_do(checkout):
    (checkout.play / "too_old").touch()
    # No other Python may be found either.
    for name in ("python3.11", "python3.12", "python3.13", "python3.14"):
        shutil.copy(
            checkout.elsewhere.parent / "bin/python3", checkout.elsewhere.parent / "bin" / name
        )
    code, _, err = checkout.launch()
    assert code == 2
    assert "needs Python 3.11 or newer" in err
    assert "too old: python3" in err
    assert "EMBER_PYTHON" in err
    assert checkout.installs() == []
    assert not (checkout.root / ".venv").exists()


def test_a_python_without_venv_is_told_what_to_install(checkout):
    (checkout.play / "no_venv").touch()
    for name in ("python3.11", "python3.12", "python3.13", "python3.14"):
        shutil.copy(
            checkout.elsewhere.parent / "bin/python3", checkout.elsewhere.parent / "bin" / name
        )
    code, _, err = checkout.launch()
    assert code == 2
    assert "apt install python3-venv" in err


def test_another_interpreter_is_used_as_it_is(checkout):
    python = checkout.elsewhere.parent / "bin" / "python3"
    code, out, err = checkout.launch("job=chat", EMBER_PYTHON=str(python))
    assert (code, out, err) == (0, f"ran in {checkout.elsewhere} with job=chat\n", "")
    assert checkout.installs() == []
    assert not (checkout.root / ".venv").exists()


def test_another_interpreter_that_is_missing_or_old_is_refused(checkout):
    code, _, err = checkout.launch(EMBER_PYTHON="/no/such/python")
    assert (code, err) == (2, "ember-pp: EMBER_PYTHON=/no/such/python: no such interpreter\n")
    (checkout.play / "too_old").touch()
    code, _, err = checkout.launch(EMBER_PYTHON="python3")
    assert code == 2
    assert "3.11 or newer" in err


def test_works_through_a_link_and_no_file_nearby_stands_in_for_a_module(tmp_path):
    (tmp_path / "ember").symlink_to(ROOT / "launch.sh")
    (tmp_path / "logging.py").write_text("raise SystemExit('the wrong logging')")
    ran = subprocess.run(
        [str(tmp_path / "ember"), "--version"],
        cwd=tmp_path,
        env=os.environ | {"EMBER_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("ember-pp ")


def test_check_refuses_an_unknown_flag_before_anything_else():
    ran = subprocess.run(
        [str(ROOT / "scripts" / "check"), "--quick"], capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stderr) == (2, "ember-pp: --quick: expected nothing or --fast\n")
