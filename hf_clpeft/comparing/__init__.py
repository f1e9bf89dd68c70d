"""Comparisons of methods on benchmarks over seeds: what `hf-clpeft compare` and the recipes of that name run."""

from .command import compare
from .drawing import draw
from .plan import CompareArguments, Run, config_of, plan, read_config
from .rows import key_of, read_rows, write_rows
from .runs import run_all
from .tables import make_table


__all__ = [
    "CompareArguments",
    "Run",
    "compare",
    "config_of",
    "draw",
    "key_of",
    "make_table",
    "plan",
    "read_config",
    "read_rows",
    "run_all",
    "write_rows",
]
