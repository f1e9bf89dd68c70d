"""Compares methods on benchmarks over seeds: one YAML file in; a CSV, a Markdown table and plots out.

    python recipes/compare.py --config recipes/configs/digits.yaml                # minutes, on a CPU, offline
    python recipes/compare.py --config recipes/configs/main_cpu.yaml --data_root my/data --backbone my/vit

The file names `seeds`, `benchmarks` and `methods`. An entry holds options of the recipes (see `s_lora.py --help`),
those of the method among them; options that hold for all runs stand under `options`, those of one method on one
benchmark under `methods` of the benchmark. `method` names the method where the entry has a name of its own,
`experts_from` another entry whose experts are taken over, not trained again, `tuned_as` another method whose learning
rates hold where the method has none of its own. `imports` lists Python files to run first, which define methods that
are not in the package; `base` other files, on top of which this one stands; `undrawn` methods that the pictures leave
out; `along` a column of the CSV along which families are drawn as lines. A seed decides the order of classes (0 keeps
the data set's own), the draw of weights and that of batches.

Results go into the CSV run by run. What stands there already is not run again, and a run that was killed goes on after
its last task, so the same command finishes the table. A run that fails says why and costs its own cell and those of
runs that take over its experts; the others go on.
"""

from hf_clpeft.comparing import compare
from hf_clpeft.config.errors import errors_in_one_line


if __name__ == "__main__":
    with errors_in_one_line():
        compare(about=__doc__)
