"""The demo of `make demo`: S-LoRA, S-Prompts and the forgetting floor learn handwritten digits, two at a time.

Needs no download: the digits come with scikit-learn, the backbone comes with this package.
"""

from dataclasses import replace
from pathlib import Path
from shlex import quote

from hf_clpeft import ContinualTrainingArguments, s_lora, s_prompts, sequential_lora
from hf_clpeft.config.errors import errors_in_one_line
from hf_clpeft.reports.plots import plot_comparison
from hf_clpeft.streams import BENCHMARKS
from hf_clpeft.training.console import print_reports
from hf_clpeft.training.options import BackboneArguments, StreamArguments, parse
from hf_clpeft.training.recipe import learn


PICTURE = "demo.png"


def main():
    groups = (StreamArguments, BackboneArguments, ContinualTrainingArguments)
    k, reports = BENCHMARKS["digits"].defaults["k"], []
    for method in (s_lora(k=k), s_prompts(k=k), sequential_lora()):
        stream_args, backbone, training = parse(groups, default_benchmark="digits", method=method.name)
        folder = Path(training.output_dir)
        # What an earlier demo has left there may go.
        anew = training.overwrite_output_dir or (folder / PICTURE).is_file()
        training = replace(training, output_dir=str(folder / method.name), overwrite_output_dir=anew)
        reports.append(learn(stream_args.load(), backbone, training, method))
    plot_comparison(reports, folder / PICTURE)
    print_reports(reports, f"picture: {folder / PICTURE}", f"next: hf-clpeft demo {quote(str(folder / 's_lora'))}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
