"""Chooses the learning rates of expert and head on the first tasks of a stream, a fifth of their images held out.

    python recipes/tune_learning_rates.py --benchmark digits --method s_lora --learning_rates 1e-3 5e-3 2e-2

One task is enough where every task has an expert of its own; a pool must be seen to forget, so give it three. No test
image and no later task is looked at, so that what is chosen is fair to report on. Prints the options to use
and writes every trial to `tuning.csv` in the output folder.
"""

import csv
from dataclasses import dataclass, field, fields
from pathlib import Path

from hf_clpeft import METHODS, ConfigError, ContinualTrainingArguments
from hf_clpeft.config.checks import MOST, check_ranges, check_types
from hf_clpeft.config.errors import errors_in_one_line
from hf_clpeft.training.options import BackboneArguments, StreamArguments, options_of, parse
from hf_clpeft.training.recipe import open_model
from hf_clpeft.training.tuning import HEAD_LEARNING_RATES, LEARNING_RATES, Trial, best_of, tune


@dataclass
class TuningArguments:
    method: str = field(default="s_lora", metadata={"help": "Method to tune for, one that trains."})
    tuning_tasks: int = field(default=1, metadata={"help": "How many of the first tasks to look at."})
    learning_rates: list[float] = field(
        default_factory=lambda: [*LEARNING_RATES], metadata={"help": "Learning rates of the expert to try."}
    )
    head_learning_rates: list[float] = field(
        default_factory=lambda: [*HEAD_LEARNING_RATES], metadata={"help": "Learning rates of the head to try."}
    )

    def __post_init__(self):
        check_types(self)
        check_ranges(self, tuning_tasks=(1, MOST))
        options_of(self.method)  # there is one of that name
        if not METHODS[self.method].trains:
            raise ConfigError(f"method={self.method!r} makes no optimizer steps: there is no learning rate to choose.")
        for rate in [*self.learning_rates, *self.head_learning_rates]:
            if not 0 <= rate <= MOST:
                raise ConfigError(
                    f"learning_rates and head_learning_rates: {rate} must be a finite number, 0 or more."
                )


def main():
    groups = (StreamArguments, BackboneArguments, ContinualTrainingArguments, TuningArguments)
    stream_args, backbone, training, tuning = parse(groups)
    tasks = stream_args.load()[: tuning.tuning_tasks]
    kind = options_of(tuning.method)
    method = kind(**{f.name: 1 for f in fields(kind) if f.name == "k"})  # no route is judged: the least to compute

    def tell(trial: Trial) -> None:
        print("accuracy {:.4f} with --learning_rate {:g} --head_learning_rate {:g}".format(*trial))

    rates = tuning.learning_rates, tuning.head_learning_rates
    trials = tune(tasks, lambda: open_model(backbone, training, method), training, *rates, after_trial=tell)
    Path(training.output_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(training.output_dir, "tuning.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["accuracy", "learning_rate", "head_learning_rate"])
        writer.writerows(trials)
    print("best: {:.4f} with --learning_rate {:g} --head_learning_rate {:g}".format(*best_of(trials)))


if __name__ == "__main__":
    with errors_in_one_line():
        main()
