"""Measures whether a lift to thousands of random features pays with many images: a YAML file in; a CSV out.

    python recipes/lift.py --config recipes/configs/lift.yaml --data_root my/data --backbone my/vit

Ridge regression and LDA, each on the query features themselves and on random features of them (LayUP and RanPAC,
SLDA++ and KLDA), see the same features of a quarter, a half and all of the training images. These are computed once,
of several views of every image, with the first task's expert, which has learnt from all of its task.
"""

from pathlib import Path

import torch

from hf_clpeft import METHODS, ConfigError, ContinualModel
from hf_clpeft.comparing import CompareArguments, Run, plan, read_config, read_rows, write_rows
from hf_clpeft.comparing.plan import folder_of, make_method, split_options
from hf_clpeft.config.errors import errors_in_one_line
from hf_clpeft.routing import ClassRouter, GaussianRouter, KldaRouter, LinearRidgeRouter, RidgeRouter
from hf_clpeft.streams import TaskStream, cache_images
from hf_clpeft.training import ContinualTrainingArguments
from hf_clpeft.training.options import BackboneArguments, StreamArguments
from hf_clpeft.training.parsing import OptionParser
from hf_clpeft.training.recipe import learn


SHARES = (0.25, 0.5, 1.0)
LIFT = 5_000  # random features
RANK = 128  # of a task's covariance, as in SLDA++
BATCH = 64
ALL, DEPTHS = 6, 4  # layers that LayUP's router sees; last ones of them that the others see


class Looks(METHODS["slda_pp"], name="looks"):
    """SLDA++ that keeps the features it learns from, and has the cheapest router."""

    which_router = "class_means"
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # features, (images, views, width), and classes of each task

    def observe(self, features_of):
        features, classes = super().observe(features_of)
        self.seen.append((features.cpu().half(), classes.cpu()))
        return features, classes


def routers(width: int) -> dict[str, tuple[ClassRouter, slice]]:
    """Routers by name, and the features that they see."""
    last = slice(width - width * DEPTHS // ALL, width)
    size = last.stop - last.start
    gaussian, klda = GaussianRouter(size, RANK), KldaRouter(size, LIFT, covariance_rank=RANK)
    gaussian.measures = klda.measures = False  # no rejection
    return {
        "slda_pp": (gaussian, last),
        "klda": (klda, last),
        "layup": (LinearRidgeRouter(width), slice(0, width)),
        "ranpac": (RidgeRouter(size, LIFT), last),
    }


@torch.no_grad()
def of_tests(model: ContinualModel, stream: TaskStream) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Query features of the test images of each task, `(images, test_views, width)`, and their classes."""
    found = []
    for task in stream:
        images = cache_images(task.test, model.backbone.transform)
        numbers = torch.tensor([model.config.classes.index(label) for label in task.classes])
        queries, labels = [], []
        for start in range(0, len(images), BATCH):
            batch = images.__getitems__(list(range(start, min(start + BATCH, len(images)))))
            queries.append(model.method.query(model.backbone.transform.normalize(batch["pixels"])).half())
            labels.append(batch["label"])
        found.append((torch.cat(queries), numbers[torch.cat(labels)]))
    return found


def accuracy(router: ClassRouter, queries: torch.Tensor, classes: torch.Tensor) -> float:
    scores = [router.class_scores(router(some.float()).scores) for some in queries.split(256)]
    return (torch.cat(scores).argmax(dim=1) == classes).double().mean().item()


def measure(run: Run) -> list[dict]:
    """Learns a stream once, and fits all routers to its features. Gives rows of the CSV."""
    (stream_options, backbone_options, training_options), _ = split_options(run)
    stream: TaskStream = StreamArguments(**stream_options).load()
    training = ContinualTrainingArguments(**{"disable_tqdm": True, **training_options, "output_dir": run.folder})
    Looks.seen.clear()
    report = learn(stream, BackboneArguments(**backbone_options), training, make_method(run))
    model = ContinualModel.from_pretrained(run.folder, backbone_options["backbone"], dtype="float32")
    tests, environment, rows = of_tests(model, stream), report.environment, []
    for share in SHARES:
        for name, (router, part) in routers(model.method.query_size).items():
            count = 0
            for features, classes in Looks.seen:
                order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(run.seed))
                kept = order[: max(1, round(share * len(classes)))]
                router.learn(features[kept][:, :, part].float(), classes[kept], seed=run.seed)
                count += len(kept)
            right = [accuracy(router, queries[:, :, part], classes) for queries, classes in tests]
            rows.append(
                {
                    "benchmark": run.benchmark,
                    "method": name,
                    "seed": run.seed,
                    "training_images": count,
                    "views": model.method.options.views,
                    "average_accuracy": round(sum(right) / len(right), 6),
                    "test_images": sum(len(classes) for _, classes in tests),
                    "random_features": LIFT if name in ("klda", "ranpac") else 0,
                    "weight_hash": environment["backbone"]["weight_hash"],
                    "image_size": environment["backbone"]["image_size"],
                    "device": environment["device"],
                    "versions": str(environment["versions"]),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main():
    (args,) = OptionParser((CompareArguments,)).read()
    results = Path(args.results or folder_of(args) / "results.csv")
    rows = read_rows(results)
    runs = plan(args, read_config(args.config))
    for run in runs:
        layers = getattr(make_method(run), "query_layers", None)
        if run.options["method"] != "slda_pp" or layers is None or len(layers) != ALL:
            raise ConfigError(f"{run.method} must be slda_pp with {ALL} query_layers, and has {layers}.")
        run.options["method"] = "looks"
    for run in runs:
        if (run.benchmark, run.seed) not in {(row["benchmark"], int(row["seed"])) for row in rows}:
            rows += measure(run)
            write_rows(rows, results)


if __name__ == "__main__":
    with errors_in_one_line():
        main()
