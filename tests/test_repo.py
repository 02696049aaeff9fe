"""Rules of the repository that no other tool checks: who owns what, and what is not allowed."""

import ast
import itertools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from ember_pp import __version__

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ember_pp"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

# One file owns each outside library; torch is for what runs on a device.
OWNERS = {
    "hydra": {"__main__.py"},
    "omegaconf": {"__main__.py"},
    "zmq": {"sockets.py"},
    "msgpack": {"protocol.py"},
    "tokenizers": {"tokenizer.py"},
    "jinja2": {"template_sandbox.py"},
    "safetensors": {"checkpoint.py"},
    "huggingface_hub": {"checkpoint.py"},
    "cuda": {"kernels/build.py", "kernels/launch.py"},
    "PIL": {"coordinator/drawing.py"},
    "transformers": {"stage/transformers_run.py"},
}
TORCH_ROOMS = ("kernels/", "stage/", "checkpoint.py")
# The environment is read in one place; the launcher hands a secret to the process it starts.
ENVIRONMENT_READERS = {
    "__main__.py",
    "coordinator/launcher.py",
    "kernels/build.py",
    "stage/__main__.py",
}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module named in an import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def importers(library: str) -> set[str]:
    return {
        name_of(path)
        for path, tree in TREES.items()
        if any(module.partition(".")[0] == library for module in imports(tree))
    }


def places(matches) -> list[str]:
    """``file:line`` of every node that ``matches`` says yes to."""
    return [
        f"{name_of(path)}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if matches(node)
    ]


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name_of(path)}:{node.lineno} {node.name}", node


def is_call_of(node: ast.AST, *names: str) -> bool:
    """Whether ``node`` calls one of ``names``, given plain or as an attribute."""
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
    return name in names


@pytest.mark.parametrize("library", OWNERS)
def test_one_file_owns_each_outside_library(library):
    assert importers(library) == OWNERS[library]


def test_torch_stays_where_devices_are():
    assert {name for name in importers("torch") if not name.startswith(TORCH_ROOMS)} == set()


def test_only_declared_dependencies_are_imported():
    required = [*PROJECT["dependencies"], *EXTRAS["picture"], *EXTRAS["compare"]]
    declared = {re.split(r"[<>=]", line)[0].lower() for line in required}
    modules = {"pyzmq": "zmq", "hydra-core": "hydra", "huggingface-hub": "huggingface_hub"}
    modules["pillow"] = "PIL"
    allowed = {modules.get(name, name) for name in declared}
    allowed |= {"omegaconf", "ember_pp"}  # omegaconf is part of what hydra-core is
    allowed |= {"cuda"}  # of the extra "cuda"; imported where a kernel is built or loaded
    allowed |= set(sys.stdlib_module_names)
    used = {module.partition(".")[0] for tree in TREES.values() for module in imports(tree)}
    assert used - allowed == set()
    unused = allowed - set(sys.stdlib_module_names) - used
    assert unused == {"numpy"}  # torch warns at every start where it is missing


def test_nothing_is_pickled_or_evaluated():
    unsafe = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    assert {name for library in unsafe for name in importers(library)} == set()
    by_name = places(
        lambda node: isinstance(node, ast.Name) and node.id in {"eval", "exec", "__import__"}
    )
    assert by_name == []
    loads = places(
        lambda node: (
            isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save"}
        )
    )
    assert loads == []
    assert places(lambda node: is_call_of(node, "send_pyobj", "recv_pyobj")) == []


def test_only_one_place_binds_a_zmq_socket():
    bound = places(lambda node: is_call_of(node, "bind"))
    # One where others connect, and one inside the process that is asked whether they may.
    assert len([place for place in bound if place.startswith("sockets.py:")]) == 2
    assert [
        place for place in bound if not place.startswith(("sockets.py:", "stage/handoff/"))
    ] == []


def test_the_environment_is_read_in_few_places():
    readers = places(
        lambda node: isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
    )
    assert {place.partition(":")[0] for place in readers} <= ENVIRONMENT_READERS


def test_configuration_is_never_written_to():
    assert places(lambda node: is_call_of(node, "__setattr__")) == []


def test_no_function_writes_a_module_variable():
    assert places(lambda node: isinstance(node, ast.Global)) == []


def test_no_room_for_what_belongs_nowhere():
    names = {part for path in FILES for part in (path.stem, path.parent.name)}
    assert names & FORBIDDEN_NAMES == set()


def test_errors_live_in_one_file():
    def is_error_class(node: ast.AST) -> bool:
        return isinstance(node, ast.ClassDef) and any(
            ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases
        )

    # What a template does wrong is a value of the sandbox; its caller makes it one of ours.
    allowed = {"errors.py", "template_sandbox.py"}
    assert {place.partition(":")[0] for place in places(is_error_class)} <= allowed


def test_loggers_are_named_and_only_the_entries_configure_them():
    assert [
        place
        for place in places(lambda node: is_call_of(node, "basicConfig", "addHandler"))
        if "__main__.py" not in place
    ] == []
    bare = places(lambda node: is_call_of(node, "getLogger") and not node.args)
    assert bare == []


def test_code_is_ascii():
    folders = ("ember_pp", "scripts", "benchmarks", "examples", "conf", ".ci")
    code = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".sh", ".yaml", ".cu", ".cuh", ""} and path.is_file()
    ]
    assert ROOT / "scripts" / "check" in code
    odd = [str(path.relative_to(ROOT)) for path in code if not path.read_bytes().isascii()]
    assert odd == []


def test_every_module_and_public_name_says_what_it_is():
    silent = [name_of(path) for path, tree in TREES.items() if not ast.get_docstring(tree)]
    silent += [
        f"{name_of(path)}:{node.lineno} {node.name}"
        for path, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


def test_functions_and_files_stay_small():
    """A question at review before it is an error here: the limits are where reading ends."""

    def num_statements(function: ast.AST) -> int:
        return sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1

    long = {name: size for name, node in functions() if (size := num_statements(node)) > 50}
    assert long == {}
    lines = [(node.end_lineno or 0) - node.lineno + 1 for _, node in functions()]
    assert median(lines) <= 12
    sizes = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: size for name, size in sizes.items() if size > 650} == {}


KERNEL_PAGE = ("What", "Shapes", "Mapping", "Bound", "Tried", "Test", "Bench", "Source")


def cuda_functions(code: str) -> Iterator[str]:
    """What ends with each function, those of structures too."""
    for body in re.split(r"^};?$", code, flags=re.M):
        is_structure = re.search(r"^struct .*\{$", body, re.M)
        yield from re.split(r"^  };?$", body, flags=re.M) if is_structure else [body]


def test_every_kernel_file_is_a_page():
    """What it computes, how, what bounds it, and where it is tested; no header but our own."""
    folder = PACKAGE / "kernels" / "csrc"
    files = sorted(folder.glob("*.cuh"))
    assert folder / "device.cuh" in files
    for path in files:
        text = path.read_text(encoding="ascii")
        page, _, code = text.partition("*/")
        includes = re.findall(r"#include (.*)", code)
        assert set(includes) <= {f'"{name.name}"' for name in files}, path.name
        if "__global__" in code:
            fields = set(re.findall(r"(?:^ \* |  )([A-Z][a-z]+)  +\S", page, re.M))
            assert set(KERNEL_PAGE) - fields == set(), path.name
            tests = re.findall(r"\btest_\w+\.py", page)
            assert tests, path.name
            assert [name for name in tests if not list(ROOT.glob(f"tests/**/{name}"))] == []
        longest = max(len(body.splitlines()) for body in cuda_functions(code))
        assert longest <= 120, f"{path.name}: a function of {longest} lines"


def test_the_version_is_one():
    assert PROJECT["version"] == __version__


def test_what_is_needed_is_pinned():
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    needed = [*PROJECT["dependencies"], *itertools.chain(*EXTRAS.values())]
    names = {re.split(r"[<>=]", line)[0].lower() for line in needed}
    assert names - pins.keys() == set()
    assert set(EXTRAS["cuda"]) <= set(EXTRAS["dev"]), "CI compiles every kernel"


def test_ci_runs_scripts_check_and_nothing_else():
    lines = [
        line
        for line in (ROOT / ".ci" / "run").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines == [
        "set -euo pipefail",
        'cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."',
        "exec bash scripts/check",
    ]


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
    ],
)
def test_pages_point_at_files_that_exist(page):
    """Links, and names of our own files in backticks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    linked = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    links = [link for link in linked if link and "://" not in link]
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    own = re.findall(r"`((?:ember_pp|docs|tests|scripts|conf|benchmarks|examples)/[\w./-]+)`", text)
    missing += [name for name in own if not (ROOT / name).exists()]
    assert missing == []


def test_the_change_log_has_a_place_for_what_is_next():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "[Unreleased]"
