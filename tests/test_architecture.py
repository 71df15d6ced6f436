"""Imports point down, and a few things stand in one place only (documentation/ARCHITECTURE.md says why)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAMS = {"train", "demo", "toolkit", "benchmarks"}
MODULES = sorted(path for name in ("helpers", *PROGRAMS) for path in (*REPOSITORY.glob(f"{name}/**/*.py"), *REPOSITORY.glob(f"{name}.py")))

# Part of helpers => the parts it may import. What stands in neither column is imported by nothing but train.py and other programs.
ALLOWED = {
    "errors": set(),
    "registry": set(),
    "config": {"errors", "foreign_json"},
    "storage": {"errors", "foreign_json"},
    "threads": set(),
    "streams": set(),
    "foreign_json": set(),
    "library_settings": {"errors"},
    "ranks": {"errors"},
    "supervisor": {"errors", "ranks"},
    "data": {"errors", "config", "storage", "foreign_json"},
    "protocols": {"errors", "config", "data"},
    "families": {"errors", "config", "storage", "data", "protocols", "registry", "foreign_json"},
    "methods": {"errors", "config", "storage", "data", "protocols", "registry"},
    "objectives": {"errors", "config", "storage", "data", "protocols", "registry"},
    "training": {
        "errors",
        "config",
        "storage",
        "data",
        "protocols",
        "families",
        "methods",
        "objectives",
        "ranks",
        "library_settings",
        "streams",
        "foreign_json",
    },
    "reporting": {"errors", "config", "storage", "data", "protocols", "families", "methods", "objectives"},
    "choices": {"config", "families", "methods", "objectives"},
    "launch": {"errors", "config", "ranks", "supervisor", "choices", "library_settings", "streams"},
    "setup": {
        "errors",
        "config",
        "storage",
        "data",
        "protocols",
        "families",
        "methods",
        "objectives",
        "training",
        "reporting",
        "choices",
    },
}
# Libraries beside the standard one that a light part may use; it may name the types of any other.
LIGHT = {
    "errors": set(),
    "config": set(),
    "storage": {"boto3", "botocore", "datasets", "huggingface_hub", "pyarrow", "safetensors", "urllib3"},
    "ranks": set(),
    "library_settings": set(),
    "supervisor": set(),
    "launch": {"yaml"},
}
HEAVY_HOMES = {  # library => the parts that may import it
    "diffusers": {"families", "methods", "objectives", "training"},
    "transformers": {"families", "methods", "training"},
    "peft": {"families", "methods"},
    "accelerate": {"training", "reporting"},
    "cv2": {"data"},
    "datasets": {"storage"},
}
READS_ENVIRONMENT = {"helpers/config/read.py", "helpers/training/runtime.py", "helpers/launch.py", "train.py"}
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}


@dataclass(frozen=True)
class Import:
    """`module` as imported by `by`, at `line`; `typing_only` when it stands under TYPE_CHECKING, `in_function` when in a function."""

    by: Path
    line: int
    module: str
    typing_only: bool
    in_function: bool

    @property
    def library(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.by.relative_to(REPOSITORY)}:{self.line} imports {self.module}"


def part_of(path: Path) -> str:
    """`helpers/data/base/images.py` is of the part `data`, `helpers/errors.py` of `errors`, `train.py` of none."""
    inside = path.relative_to(REPOSITORY).parts
    return Path(inside[1]).stem if inside[0] == "helpers" else ""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[Import]:
    """Every import of a module, those inside functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    guarded = {id(inner) for block in guards for inner in ast.walk(block)}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    in_functions = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; say helpers.…"
            names = [_imported_module(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(path, node.lineno, name, id(node) in guarded, id(node) in in_functions)


def _imported_module(package: str, name: str) -> str:
    """The module that `from package import name` names: in our packages `name` may itself be one."""
    inside = REPOSITORY.joinpath(*package.split("."), name)
    is_module = package.partition(".")[0] == "helpers" and (inside.is_dir() or inside.with_suffix(".py").is_file())
    return f"{package}.{name}" if is_module else package


EVERY_IMPORT = [found for path in MODULES for found in imports(path)]


def circles(found: Iterable[Import]) -> list[str]:
    """The groups of modules of which each imports, directly or through others, every other one of its group."""
    graph: dict[str, set[str]] = {}
    for each in found:
        if not each.in_function:
            graph.setdefault(module_name(each.by), set()).add(each.module)
    reached = {module: _reachable(graph, module) for module in graph}
    groups = {frozenset(other for other in reached[module] if module in reached.get(other, ())) for module in graph}
    return sorted(" <-> ".join(sorted(group)) for group in groups if group)


def _reachable(graph: Mapping[str, Iterable[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        if (module := waiting.pop()) not in seen:
            seen.add(module)
            waiting += graph.get(module, ())
    return seen


def test_every_part_of_helpers_has_its_place_in_the_layers() -> None:
    parts = {part_of(path) for path in MODULES} - {"", "__init__"}
    assert parts <= set(ALLOWED)


def test_imports_point_down_and_siblings_do_not_import_one_another() -> None:
    wrong = []
    for found in EVERY_IMPORT:
        here = part_of(found.by)
        if found.library != "helpers" or here in ("", "__init__"):
            continue
        there = found.module.split(".")[1]
        if there != here and there not in ALLOWED[here]:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_one_another_in_a_circle() -> None:
    """Neither when they are loaded nor for their types; an import inside a function runs later, and counts no more than a call."""
    assert circles(EVERY_IMPORT) == []


def test_nothing_imports_the_programs_on_top() -> None:
    wrong = [str(found) for found in EVERY_IMPORT if found.library in PROGRAMS | {"tests"} and part_of(found.by)]
    assert not wrong, "\n".join(wrong)


def test_light_parts_need_hardly_more_than_the_standard_library() -> None:
    wrong = [
        str(found)
        for found in EVERY_IMPORT
        if part_of(found.by) in LIGHT
        and not found.typing_only
        and found.library not in sys.stdlib_module_names | {"helpers"} | LIGHT[part_of(found.by)]
    ]
    assert not wrong, "\n".join(wrong)


def test_big_libraries_are_imported_only_where_they_belong() -> None:
    wrong = [
        str(found)
        for found in EVERY_IMPORT
        if found.library in HEAVY_HOMES and part_of(found.by) and part_of(found.by) not in HEAVY_HOMES[found.library]
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_pickles() -> None:
    wrong = [str(found) for found in EVERY_IMPORT if found.library in PICKLING]
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            written = ast.unparse(node) if isinstance(node, ast.Attribute | ast.keyword) else ""
            if written in {"torch.load", "torch.save", "allow_pickle=True"}:
                wrong.append(f"{path.relative_to(REPOSITORY)}:{node.lineno} {written}")  # type: ignore[attr-defined]
    assert not wrong, "\n".join(wrong)


def test_the_environment_is_read_in_one_place() -> None:
    wrong = []
    for path in MODULES:
        name = str(path.relative_to(REPOSITORY))
        if not name.startswith("helpers/") and name != "train.py" or name in READS_ENVIRONMENT:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv"}:
                wrong.append(f"{name}:{node.lineno} reads {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


WITHOUT_LIBRARIES = """
import importlib, pathlib, sys

HIDDEN = {"torch", "numpy", "PIL", "diffusers", "transformers", "accelerate", "peft", "safetensors", "datasets", "pyarrow"}

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ImportError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())
for part in ("errors", "ranks", "supervisor", "launch", "library_settings", *sys.argv[1:]):
    importlib.import_module("helpers." + part)
from helpers.choices import known_axes
assert known_axes()
"""


def test_settings_can_be_judged_where_torch_cannot_be_imported() -> None:
    light = [
        ".".join(path.relative_to(REPOSITORY / "helpers").with_suffix("").parts).removesuffix(".__init__")
        for folder in ("config", "storage")
        for path in sorted((REPOSITORY / "helpers" / folder).rglob("*.py"))
        if path.stem not in ("s3", "__main__")
    ]
    done = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARIES, *light], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_circle_of_imports_is_noticed() -> None:
    def line(by: str, module: str, in_function: bool = False) -> Import:
        return Import(REPOSITORY / f"{by.replace('.', '/')}.py", 1, module, typing_only=True, in_function=in_function)

    chain = [line("helpers.a", "helpers.b"), line("helpers.b", "helpers.c"), line("helpers.c", "helpers.d")]
    assert circles([*chain, line("helpers.c", "helpers.a", in_function=True)]) == []
    assert circles([*chain, line("helpers.c", "helpers.a")]) == ["helpers.a <-> helpers.b <-> helpers.c"]


@pytest.mark.parametrize(
    "source", ["import helpers.families.sdxl", "def late():\n    from helpers.families import sdxl", "from helpers import families"]
)
def test_an_import_that_points_up_is_noticed(tmp_path: Path, source: str) -> None:
    module = tmp_path / "module.py"
    module.write_text(source)
    assert [found.module.split(".")[1] for found in imports(module)] == ["families"]
