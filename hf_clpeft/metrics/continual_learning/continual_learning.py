"""The formulas of `hf_clpeft.metrics` as a module for `evaluate.load`."""

import datasets
import evaluate

import hf_clpeft.metrics as continual_metrics


_DESCRIPTION = """
Average accuracy, average incremental accuracy, forgetting, backward and (given the accuracy of an untrained model)
forward transfer of a continual learner, from its accuracy matrix: row i holds the accuracies on every task's test
split after learning task i.
"""

_INPUTS = """
Args:
    predictions: rows of the accuracy matrix, one per task learnt.
    references: for each task, the accuracy of an untrained model. May be left out of `compute`.
"""

_CITATION = """
@article{wistuba2024choice,
  title={Choice of PEFT Technique in Continual Learning: Prompt Tuning Is Not All You Need},
  author={Wistuba, Martin and Sivaprasad, Prabhu Teja and Balles, Lukas and Zappella, Giovanni},
  journal={arXiv preprint arXiv:2406.03216},
  year={2024}
}
"""


class ContinualLearning(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            inputs_description=_INPUTS,
            citation=_CITATION,
            features=[
                datasets.Features({"predictions": row, "references": datasets.Value("float64")}),
                datasets.Features({"predictions": row}),
            ],
        )

    def _compute(self, predictions: list[list[float]], references: list[float] | None = None) -> dict[str, float]:
        return continual_metrics.summarize(predictions, references)
