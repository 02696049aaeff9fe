"""The wheel: holds all that a run needs, and works outside the checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from ember_pp import __version__, config

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def call(*command, cwd, expect=0):
    """Run without what could lead back to the checkout; stdout and stderr as text."""
    kept = {"PATH", "HOME", "TMPDIR", "LANG", "OMP_NUM_THREADS", "HF_HUB_OFFLINE"}
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name in kept},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == expect, ran.stdout + ran.stderr
    return ran


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder]
    call(*build, ROOT, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory):
    """``ember-pp`` of a fresh environment that has the wheel and, by path, what it needs."""
    folder = tmp_path_factory.mktemp("fresh") / "env"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    call(*pip, wheel, cwd=folder)
    # A plain path in a .pth file: the packages there are found, but the .pth files there,
    # such as the one that points at this checkout, are not read.
    (packages,) = folder.glob("lib/python*/site-packages")
    needed = {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}
    (packages / "needed.pth").write_text("\n".join(sorted(needed)) + "\n")
    return folder / "bin" / "ember-pp"


def test_holds_the_presets_the_demo_model_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"ember_pp/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")
    }
    demo = (ROOT / "ember_pp" / "demo").rglob("*")
    expected |= {path.relative_to(ROOT).as_posix() for path in demo if path.is_file()}
    for suffix in ("py", "cuh"):
        code = (ROOT / "ember_pp").rglob(f"*.{suffix}")
        expected |= {path.relative_to(ROOT).as_posix() for path in code}
    expected.add("ember_pp/cards.json")
    expected |= {f"ember_pp-{__version__}.dist-info/licenses/LICENSE"}
    expected = {name for name in expected if "__pycache__" not in name}
    assert expected - names == set()
    assert {name.partition("/")[0] for name in names} == {
        "ember_pp",
        f"ember_pp-{__version__}.dist-info",
    }
    assert wheel.stat().st_size < 16 * 1024 * 1024


def test_is_not_the_checkout(command, tmp_path):
    where = "import ember_pp; print(ember_pp.__file__)"
    told = call(command.with_name("python"), "-c", where, cwd=tmp_path).stdout
    assert told.startswith(str(command.parent.parent))


def test_composes_as_in_a_checkout(command, tmp_path):
    assert call(command, "--version", cwd=tmp_path).stdout == f"ember-pp {__version__}\n"
    assert "job=batch" in call(command, "--help", cwd=tmp_path).stdout
    for arguments in (["job=serve"], ["model=qwen3-32b"], ["model.path=/m", "pipeline.stages=4"]):
        there = call(command, "--cfg", "job", *arguments, cwd=tmp_path).stdout
        here = call(sys.executable, "-m", "ember_pp", "--cfg", "job", *arguments, cwd=ROOT).stdout
        assert there == here
    told = call(command, "pipeline.stgaes=2", cwd=tmp_path, expect=2).stderr
    assert told == "ember-pp: pipeline.stgaes: no such setting; did you mean 'pipeline.stages'?\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.multiproc
def test_runs_the_demo(command, tmp_path):
    """The bundled prompts through the bundled model over two processes, from the wheel alone."""
    ran = call(command, cwd=tmp_path)
    answers = (tmp_path / "ember-out" / "answers.jsonl").read_text().splitlines()
    assert len(answers) > 1
    assert config.BatchJob().output is None  # so that the folder is the job's own choice
    assert "ember-out/answers.jsonl" in ran.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["ember-out"]
