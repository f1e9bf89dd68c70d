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
    """Modules of the package that a file imports, late or early, for type hints alone, too."""
    name, found = FILES[path], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    if path == PACKAGE / "__init__.py":
        return found  # the public names, each imported when it is first used
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package.split(".")
            base = ".".join([*above[: len(above) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in MODULES else base)
    return found - {name}


ROOMS = "config backbones experts routing methods metrics streams reports storage hub TOP training comparing".split()
ROOMS += ["demo", "cli"]


def room_of(module):
    parts = module.split(".")[1:]
    return parts[0] if parts and parts[0] in ROOMS else "TOP"


def test_a_room_imports_only_from_those_above_it():
    for path, name in FILES.items():
        for other in imports_of(path) if path != PACKAGE / "__init__.py" else ():
            assert other == "hf_clpeft" or ROOMS.index(room_of(other)) <= ROOMS.index(room_of(name)), (name, other)


def test_nothing_outside_methods_and_routing_asks_for_a_name():
    """Abilities decide, never the name of a method or router."""
    names = {*hf_clpeft.METHODS, *hf_clpeft.ROUTERS}
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] in ("methods", "routing") or path.name == "version1.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                found = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)} & names
                assert not found, f"{path.relative_to(ROOT)}:{node.lineno} compares with {found}"


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
