"""Every public name is explained, and every example in an explanation runs."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import hf_clpeft


MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(hf_clpeft.__path__, "hf_clpeft.")
    if not module.name.startswith("hf_clpeft.metrics.continual_learning")
)
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", hf_clpeft.__all__)
def test_public_names_have_a_docstring_with_an_example(name):
    thing = getattr(hf_clpeft, name)
    if isinstance(thing, dict):
        return
    assert ">>> " in inspect.getdoc(thing), f"{name} has no example"


def test_importing_the_package_imports_nothing_heavy():
    import subprocess
    import sys

    code = "import sys, hf_clpeft; print([name for name in ('torch', 'peft', 'datasets') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
