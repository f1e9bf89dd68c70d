"""Measures how well methods reject what they have not learnt: a YAML file in; a CSV and a Markdown table out.

    python recipes/rejection.py --config recipes/configs/rejection.yaml --data_root my/data --backbone my/vit

The file is one of `recipes/compare.py`. Every run learns its stream twice. Of all classes: which share of the test
images is rejected by mistake, at each rate, mean over tasks. Of the first half of the classes: the AUROC with which
p-values tell test images of this half from those of the other, and the share of the latter that is rejected at 5 %.

Beside it stand the AUROC of two scores of the field, from the sums of the same router: the Mahalanobis distance to the
nearest class (arXiv 1807.03888), and the relative one, which takes off the distance to the Gaussian of all images
(arXiv 2106.09022).
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from hf_clpeft import (
    METHODS,
    ROUTERS,
    ConfigError,
    ContinualModel,
    ContinualTrainingArguments,
    Task,
    TaskStream,
)
from hf_clpeft.comparing import CompareArguments, Run, key_of, plan, read_config, read_rows, write_rows
from hf_clpeft.comparing.plan import folder_of, make_method, split_options
from hf_clpeft.config.errors import errors_in_one_line
from hf_clpeft.routing import GaussianRouter
from hf_clpeft.routing.covariance import shrink
from hf_clpeft.streams import Split, cache_images
from hf_clpeft.training.options import BackboneArguments, StreamArguments
from hf_clpeft.training.parsing import OptionParser
from hf_clpeft.training.recipe import learn


RATES = (0.01, 0.05, 0.1, 0.2)
BATCH = 64


def restrict(split: Split, classes: tuple[str, ...], kept: list[str]) -> Split | None:
    """The images of some classes of a split; `None` if there are none."""
    labels = {value: kept.index(classes[place]) for value, place in split.labels.items() if classes[place] in kept}
    rows = np.flatnonzero(np.isin(split.dataset[split.label_column], list(labels)))
    return replace(split, dataset=split.dataset.select(rows), labels=labels) if len(rows) else None


def halves(stream: TaskStream) -> tuple[TaskStream, list[Split]]:
    """The stream of the first half of the classes, and test images of the others."""
    classes = list(dict.fromkeys(label for task in stream for label in task.classes))
    known = set(classes[: (len(classes) + 1) // 2])
    tasks, others = list[Task](), list[Split]()
    for task in stream:
        kept, left = ([label for label in task.classes if (label in known) == side] for side in (True, False))
        parts = [restrict(split, task.classes, kept) for split in (task.train, task.test)]
        if parts[0] is not None:
            tasks.append(replace(task, classes=tuple(kept), train=parts[0], test=parts[1]))
        unknown = restrict(task.test, task.classes, left)
        others += [] if unknown is None else [unknown]
    return TaskStream(tasks, name=f"half of {stream.name}"), others


@torch.no_grad()
def measure_scores(model: ContinualModel, split: Split) -> dict[str, torch.Tensor]:
    """p-values of the images of a split, and the scores of the field, of which higher ones are more typical."""
    images, method, router = cache_images(split, model.backbone.transform), model.method, model.router
    assert isinstance(router, GaussianRouter)
    means, counts = router._means.cpu().double(), router.counts.cpu().double()
    centre = counts @ means / counts.sum()
    between = (means - centre).T * counts @ (means - centre)
    freedom = max(1, int(counts.sum()) - 1)
    background = torch.linalg.inv(shrink((router.sum_up() + between) / freedom, freedom, router.query_size))
    found: dict[str, list[torch.Tensor]] = {"p_value": [], "mahalanobis": [], "relative": []}
    for start in range(0, len(images), BATCH):
        rows = list(range(start, min(start + BATCH, len(images))))
        query = method.query(model.backbone.transform.normalize(images.__getitems__(rows)["pixels"].to(model.device)))
        distances = method.route(query).distances
        apart = router._lift(query).cpu().double() - centre
        behind = ((apart @ background) * apart).sum(dim=-1).reshape(len(rows), -1).mean(dim=1)  # the mean of its views
        nearest = distances.amin(dim=1).cpu().double() ** 2
        found["p_value"].append(method.typicality(query, distances).cpu().double())
        found["mahalanobis"].append(-nearest)
        found["relative"].append(behind - nearest)
    return {name: torch.cat(parts) for name, parts in found.items()}


def auroc(known: Iterable[torch.Tensor], unknown: Iterable[torch.Tensor]) -> float:
    """The probability that an image of a class that was learnt scores higher than one of another class."""
    inside, outside = torch.cat(list(known)), torch.cat(list(unknown))
    return float(roc_auc_score([1] * len(inside) + [0] * len(outside), torch.cat([inside, outside])))


def measure(run: Run) -> dict:
    """Learns a stream and the half of it. Gives a row of the CSV."""
    (stream_options, backbone_options, training_options), _ = split_options(run)
    stream: TaskStream = StreamArguments(**stream_options).load()
    half, others = halves(stream)
    models = []
    for name, tasks in (("whole", stream), ("half", half)):
        with TemporaryDirectory() as folder:
            training = ContinualTrainingArguments(
                **{"disable_tqdm": True, **training_options, "output_dir": f"{folder}/{name}"}
            )
            report = learn(tasks, BackboneArguments(**backbone_options), training, make_method(run))
            options = {"dtype": backbone_options.get("dtype") or "float32"}
            models.append(ContinualModel.from_pretrained(training.output_dir, backbone_options["backbone"], **options))
    whole, part = models
    rejected = [measure_scores(whole, task.test)["p_value"] for task in stream]
    known = [measure_scores(part, task.test) for task in half]
    unknown = [measure_scores(part, split) for split in others]
    environment = report.environment
    return {
        "benchmark": run.benchmark,
        "method": run.method,
        "seed": run.seed,
        **{
            f"rejected_at_{rate:g}": round(float(np.mean([(one < rate).double().mean() for one in rejected])), 4)
            for rate in RATES
        },
        "test_images": sum(len(one) for one in rejected),
        "unknown_rejected_at_0.05": round(
            float((torch.cat([one["p_value"] for one in unknown]) < 0.05).double().mean()), 4
        ),
        **{
            f"auroc_{name}": round(auroc((one[name] for one in known), (one[name] for one in unknown)), 4)
            for name in known[0]
        },
        "weight_hash": environment["backbone"]["weight_hash"],
        "image_size": environment["backbone"]["image_size"],
        "device": environment["device"],
        "versions": str(environment["versions"]),
    }


def make_table(rows: list[dict]) -> str:
    """Markdown: one line for each method on each benchmark, means over seeds, in %."""
    columns = [name for name in rows[0] if name.startswith(("rejected_at", "unknown_rejected", "auroc"))]
    lines = ["| benchmark | method | seeds | " + " | ".join(name.replace("_", " ") for name in columns) + " |"]
    lines.append("|---|---|" + "---|" * (len(columns) + 1))
    for benchmark, method in dict.fromkeys((row["benchmark"], row["method"]) for row in rows):
        own = [row for row in rows if (row["benchmark"], row["method"]) == (benchmark, method)]
        means = [100 * np.mean([float(row[name]) for row in own]) for name in columns]
        lines.append(f"| {benchmark} | {method} | {len(own)} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
    return "\n".join(lines) + "\n"


def main():
    (args,) = OptionParser((CompareArguments,)).read()
    results = Path(args.results or folder_of(args) / "results.csv")
    rows = {key_of(row): row for row in read_rows(results)}
    runs = plan(args, read_config(args.config))
    for run in runs:
        options = make_method(run)
        kind = METHODS[options.name]
        if not kind.rejects(options) or not issubclass(
            ROUTERS[getattr(options, "router", kind.which_router)], GaussianRouter
        ):
            raise ConfigError(f"{run.method}: {options.name} has no router that measures Mahalanobis distances.")
    for run in runs:
        if run.key not in rows:
            rows[run.key] = measure(run)
            write_rows(rows.values(), results)
            print(run.key, rows[run.key], flush=True)
    table = make_table([rows[run.key] for run in runs])
    results.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
