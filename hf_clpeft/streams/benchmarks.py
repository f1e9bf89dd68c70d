"""Named benchmarks: the Hub id of the data set, the protocol and its source."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..config.hub_errors import RevisionNotFoundError
from ..config.text import get_logger
from .digits import load_digits_dataset
from .source import StreamError
from .stream import TaskStream


logger = get_logger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """A named stream and its recommended settings.

    Args:
        scenario (`str`): `"class"` or `"domain"`.
        dataset (`str` or callable): Hub id, or a function that returns the data set.
        protocol (`str`): How the data is split, in one sentence, with its source.
        stream (`dict`): Arguments of [`TaskStream.class_incremental`] or [`TaskStream.domain_incremental`]. `revision`
            pins the data set to a commit; it is ignored when another `dataset` is given.
        defaults (`dict`): Recipe options whose defaults this benchmark overrides.
        tuned (`dict`): Further overrides by name of the method.

    Example:

    ```py
    >>> from hf_clpeft.streams import BENCHMARKS

    >>> BENCHMARKS["split_cifar100"].dataset
    'uoft-cs/cifar100'

    ```
    """

    scenario: str
    dataset: str | Callable
    protocol: str
    stream: dict = field(default_factory=dict)
    defaults: dict = field(default_factory=dict)
    tuned: dict[str, dict] = field(default_factory=dict)

    def options_for(self, method: str | None = None) -> dict:
        """Default recipe options for this benchmark and, if given, a method."""
        return {**self.defaults, **({} if method is None else self.tuned.get(method, {}))}


DIGITS_DEFAULTS = {
    "backbone": "hf-clpeft/vit-tiny-glyphs",
    "k": 20,
    "num_train_epochs": 10,
    "train_batch_size": 32,
    "learning_rate": 1e-2,
    "head_learning_rate": 2e-3,
}

# Tuned on a held-out fifth of the training images of all tasks. With one expert per task, a head that learns faster
# than the expert ends up with large weight norms, and a shared head then confuses images of later tasks with earlier
# classes. With a pool it is the reverse: updating the pool causes forgetting, so the head must learn faster. SSIAT
# was judged on the first three tasks: all tasks train one adapter, and features must not drift too far.
DIGITS_TUNED = {
    "s_lora_pp": {"learning_rate": 5e-3},
    "s_prompts": {"learning_rate": 2e-2},
    "s_prompts_pp": {"learning_rate": 2e-2},
    "ssiat": {"learning_rate": 3e-3},
    "l2l": {"learning_rate": 1e-3, "head_learning_rate": 1e-2},
    "l2p": {"learning_rate": 3e-4, "head_learning_rate": 1e-2},
}

BENCHMARKS: dict[str, Benchmark] = {
    "split_cifar100": Benchmark(
        scenario="class",
        dataset="uoft-cs/cifar100",
        protocol="10 tasks of 10 classes in an order shuffled with seed 1993, the usual one of class-incremental "
        "learning (iCaRL, arXiv 1611.07725; PILOT).",
        stream={
            "num_tasks": 10,
            "seed": 1993,
            "image_column": "img",
            "label_column": "fine_label",
            "revision": "aadb3af77e9048adbea6b47c21a81e47dd092ae5",
        },
    ),
    "split_tiny_imagenet": Benchmark(
        scenario="class",
        dataset="zh-plus/tiny-imagenet",
        protocol="10 tasks of 20 classes in an order shuffled with seed 1993; tested on the copy's split `valid`, as "
        "the test labels were never published (arXiv 2406.03216, section 4).",
        stream={
            "num_tasks": 10,
            "seed": 1993,
            "revision": "b427d143d5e9bf39d5132c552063f3c5ba3facd6",
        },
    ),
    "domainnet": Benchmark(
        scenario="domain",
        dataset="wltjr1007/DomainNet",
        protocol="6 domains x 345 classes, in the order of S-Prompts (arXiv 2207.12819, its `domainnet.yaml`).",
        stream={
            "domains": ["real", "quickdraw", "painting", "sketch", "infograph", "clipart"],
            "revision": "ee20570ae7a29c51571e55a9a17983f7625295d6",
        },
    ),
    "core50": Benchmark(
        scenario="domain",
        dataset="adrake17/core50",
        protocol="Learns sessions 1, 2, 4, 5, 6, 8, 9, 11 one after another and tests on sessions 3, 7, 10, whose "
        "images are split evenly across the tasks (arXiv 1705.03550; google-research/l2p issue 23). The Hub's copy is "
        "split at random, so both of its splits are read and regrouped by the column `session`.",
        stream={
            "domain_column": "session",
            "domains": ["1", "2", "4", "5", "6", "8", "9", "11"],
            "test_domains": ["3", "7", "10"],
            "train_split": "train+test",
            "test_split": "train+test",
        },
    ),
    "pacs": Benchmark(
        scenario="domain",
        dataset="flwrlabs/pacs",
        protocol="4 domains x 7 classes in alphabetical order; 20 % of every class held out of the only split for "
        "testing (images and domains: arXiv 1710.03077).",
        stream={
            "domains": ["art_painting", "cartoon", "photo", "sketch"],
            "revision": "394113073258ead631f617d2e13bb377c0715c4b",
        },
    ),
    "caltech101": Benchmark(
        scenario="class",
        dataset="flwrlabs/caltech101",
        protocol="10 tasks of 10 or 11 of the 101 object classes in an order shuffled with seed 1993; where the copy "
        "has one split, 20 % of every class are held out of it for testing (images: Fei-Fei et al., CVIU 2007).",
        stream={"num_tasks": 10, "seed": 1993, "revision": "afb5a6ba4fe9311de42497984d33266bb86e2bb9"},
    ),
    "cifar10": Benchmark(
        scenario="class",
        dataset="uoft-cs/cifar10",
        protocol="5 tasks of 2 classes in the data set's order, as Split CIFAR-10 mostly is (arXiv 1703.04200).",
        stream={"num_tasks": 5, "revision": "0b2714987fa478483af9968de7c934580d0bb9a2"},
    ),
    "digits": Benchmark(
        scenario="class",
        dataset=load_digits_dataset,
        protocol="scikit-learn's 1,797 handwritten digits: 5 tasks of 2 classes, needs no download.",
        stream={"num_tasks": 5},
        defaults=DIGITS_DEFAULTS,
        tuned=DIGITS_TUNED,
    ),
    "digits_domains": Benchmark(
        scenario="domain",
        dataset=lambda: load_digits_dataset(domains=True),
        protocol="scikit-learn's 1,797 handwritten digits in 4 domains: as scanned, inverted, rotated by 90°, on a "
        "textured background; needs no download.",
        defaults=DIGITS_DEFAULTS,
        tuned=DIGITS_TUNED,
    ),
}


def load_benchmark(name: str, **overrides: Any) -> TaskStream:
    """Builds the stream of a named benchmark.

    Args:
        name (`str`): A key of [`BENCHMARKS`].
        overrides: Arguments of [`TaskStream.class_incremental`] or [`TaskStream.domain_incremental`] to change; with
            `dataset` the protocol is applied to another copy of the data, for example a local folder.

    Raises:
        [`StreamError`]: There is no benchmark of that name.

    Example:

    ```py
    >>> from hf_clpeft.streams import load_benchmark

    >>> [task.classes for task in load_benchmark("digits")][:2]
    [('0', '1'), ('2', '3')]

    ```
    """
    if name not in BENCHMARKS:
        raise StreamError(f"There is no benchmark {name!r}; choose one of {sorted(BENCHMARKS)}.")
    benchmark = BENCHMARKS[name]
    dataset = overrides.pop("dataset", None) or benchmark.dataset
    options = {**benchmark.stream, **overrides}
    if dataset != benchmark.dataset and "revision" not in overrides:  # another repo does not have the commit
        options.pop("revision", None)
    dataset = dataset() if callable(dataset) else dataset
    make = TaskStream.class_incremental if benchmark.scenario == "class" else TaskStream.domain_incremental
    try:
        stream = make(dataset, **options)
    except StreamError as error:
        pinned = "revision" in options and "revision" not in overrides
        if not pinned or not isinstance(getattr(error.__cause__, "__cause__", None), RevisionNotFoundError):
            raise
        logger.warning(
            "%s no longer has commit %s, which the benchmark %s is pinned to: using the current revision instead.",
            dataset,
            options.pop("revision"),
            name,
        )
        stream = make(dataset, **options)
    stream.name = name
    return stream
