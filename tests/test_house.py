"""The house stays in order: no circle of imports, no file that is two."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_clpeft


PACKAGE = Path(hf_clpeft.__file__).parent
ROOT = PACKAGE.parent
FILES = {
    path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if "continual_learning/" not in path.as_posix()
}
MODULES = set(FILES.values())


def imports_of(path):
    """Modules of the package that a file imports, late or early; those for type hints alone do not count."""
    name, found = FILES[path], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hints = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {child for node in hints for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node not in skipped:
            above = package.split(".")
            base = ".".join([*above[: len(above) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in MODULES else base)
    return found - {name}


def test_imports_run_in_one_direction():
    graph = {name: imports_of(path) for path, name in FILES.items()}
    assert all(found <= MODULES for found in graph.values())
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "recipes").rglob("*.py"))], ids=lambda path: path.name)
def test_a_file_is_not_longer_than_one_reads(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_type_checkers_see_every_public_name():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {node.module: sorted(alias.name for alias in node.names) for node in block.body}
    assert seen == {module: sorted(names) for module, names in hf_clpeft._MODULES.items()}


def test_backbones_load_no_data_set_library():
    code = "import sys, hf_clpeft.backbones; print(sorted({'datasets', 'pandas', 'pyarrow'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
