"""The demo of `make demo`: S-LoRA, S-Prompts and the forgetting floor learn handwritten digits, two at a time.

Needs no download: the digits come with scikit-learn, the backbone comes with this package.
"""

from dataclasses import replace
from pathlib import Path

from hf_clpeft import ContinualTrainingArguments, s_lora, s_prompts, sequential_lora
from hf_clpeft.plots import plot_comparison
from hf_clpeft.streams import BENCHMARKS
from hf_clpeft.training.recipe import BackboneArguments, StreamArguments, learn, parse, print_reports


def main():
    groups = (StreamArguments, BackboneArguments, ContinualTrainingArguments)
    stream_args, backbone, training = parse(groups, default_benchmark="digits")
    stream = stream_args.load()
    folder = Path(training.output_dir)
    k = BENCHMARKS["digits"].defaults["k"]
    methods = (s_lora(k=k), s_prompts(k=k), sequential_lora())
    reports = [
        learn(stream, backbone, replace(training, output_dir=str(folder / method.name)), method) for method in methods
    ]
    plot_comparison(reports, folder / "demo.png")
    print_reports(reports, folder / "demo.png")


if __name__ == "__main__":
    main()
