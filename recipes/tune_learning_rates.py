"""Chooses the learning rates of expert and head on the first tasks of a stream, a fifth of their images held out.

    python recipes/tune_learning_rates.py --benchmark digits --method s_lora --learning_rates 1e-3 5e-3 2e-2

One task is enough where every task has an expert of its own; a pool must be seen to forget, so give it three. No test
image and no later task is looked at, so that what is chosen is fair to report on. Prints the options to use
and writes every trial to `tuning.csv` in the output folder.
"""

import csv
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from hf_clpeft import METHODS, ConfigError, ContinualTrainingArguments, Task, TaskStream
from hf_clpeft.config.checks import MOST, check_ranges, check_types
from hf_clpeft.config.errors import errors_in_one_line
from hf_clpeft.training.options import BackboneArguments, StreamArguments, options_of, parse
from hf_clpeft.training.recipe import learn


@dataclass
class TuningArguments:
    method: str = field(default="s_lora", metadata={"help": "Method to tune for, one that trains."})
    tuning_tasks: int = field(default=1, metadata={"help": "How many of the first tasks to look at."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 5e-3, 2e-2], metadata={"help": "Learning rates of the expert to try."}
    )
    head_learning_rates: list[float] = field(
        default_factory=lambda: [2e-3, 1e-2], metadata={"help": "Learning rates of the head to try."}
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


def hold_out(task: Task, seed: int) -> Task:
    """The task, judged by a fifth of its own training images."""
    halves = task.train.dataset.train_test_split(test_size=0.2, seed=seed)
    train, held_out = (replace(task.train, dataset=halves[side]) for side in ("train", "test"))
    return replace(task, train=train, test=held_out)


def main():
    groups = (StreamArguments, BackboneArguments, ContinualTrainingArguments, TuningArguments)
    stream_args, backbone, training, tuning = parse(groups)
    tasks = [hold_out(task, training.seed) for task in stream_args.load()[: tuning.tuning_tasks]]
    stream = TaskStream(tasks, name=f"first {len(tasks)} tasks")
    kind = options_of(tuning.method)
    method = kind(**{f.name: 1 for f in fields(kind) if f.name == "k"})  # no route is judged: the least to compute
    trials = []
    for head_rate, rate in product(tuning.head_learning_rates, tuning.learning_rates):
        with TemporaryDirectory() as folder:  # nobody needs the models
            rates = {"learning_rate": rate, "head_learning_rate": head_rate}
            summary = learn(stream, backbone, replace(training, output_dir=folder, **rates), method).summary()
        trials.append((summary.get("oracle_accuracy", summary["average_accuracy"]), rate, head_rate))
        print("accuracy {:.4f} with --learning_rate {:g} --head_learning_rate {:g}".format(*trials[-1]))
    Path(training.output_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(training.output_dir, "tuning.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["accuracy", "learning_rate", "head_learning_rate"])
        writer.writerows(trials)
    # Of equal ones the middle: as far as can be from what is too little and what is too much.
    best = sorted(trial for trial in trials if trial[0] == max(trials)[0])
    best = best[(len(best) - 1) // 2]
    print("best: {:.4f} with --learning_rate {:g} --head_learning_rate {:g}".format(*best))


if __name__ == "__main__":
    with errors_in_one_line():
        main()
