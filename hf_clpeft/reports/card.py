"""The model card, filled from the configuration and the report of a model."""

import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..backbones.license import license_of
from ..config import ContinualConfig, MethodOptions
from ..config.checks import read_json
from ..config.text import percent, printable
from ..methods import METHODS, Method
from ..methods.help import costs_of
from .provenance import made_how
from .report import METRICS_NAME, StreamReport


CARD_NAME = "README.md"
TEMPLATE = "model_card.md"
LIBRARY = "hf-clpeft"
NOT_PLAIN = ("PROMPT_TUNING", "PREFIX_TUNING")  # files of PEFT that PEFT alone cannot run on a vision transformer
EXAMPLES = "examples/"  # where pictures to try a model on are among its files
MOST_EXAMPLES = 10
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def make_card(
    config: ContinualConfig,
    report: StreamReport | None = None,
    repo_id: str = "path/to/this/folder",
    ask: bool = False,
) -> ModelCard:
    """Renders the model card from the template in `model_cards/`.

    Args:
        config ([`ContinualConfig`]): Configuration of the model.
        report ([`StreamReport`], *optional*): Its metrics.
        repo_id (`str`, *optional*): Repo id or folder, for the usage example.
        ask (`bool`, *optional*, defaults to `False`): Ask the Hub for the licence of the backbone, if it is not in
            the cache.

    Example:

    ```py
    >>> from hf_clpeft.config import BackboneConfig, ContinualConfig
    >>> from hf_clpeft.reports.card import make_card
    >>> from hf_clpeft.methods import s_lora

    >>> config = ContinualConfig(s_lora(), BackboneConfig("google/vit-base-patch16-224-in21k", 224, "0f3c"))
    >>> card = make_card(config, repo_id="me/pets")
    >>> card.data.library_name, card.data.base_model
    ('hf-clpeft', 'google/vit-base-patch16-224-in21k')

    ```
    """
    options, summary = config.method, report.summary() if report is not None else {}
    method = METHODS.get(options.name, Method)  # a model can be pushed without importing its method
    facts = describe(options)
    stream = printable(report.stream) if report is not None else "unknown"
    peft = getattr(options, "peft", None)  # what it is in a method of somebody else, nobody knows
    technique = peft.get("peft_type") if isinstance(peft, dict) else None
    # A local path is useless to readers.
    backbone_id = config.backbone.name_or_path if REPO_ID.fullmatch(config.backbone.name_or_path) else None
    on_the_hub = REPO_ID.fullmatch(repo_id) is not None
    examples = sorted(path for path in config.files if path.startswith(EXAMPLES))[:MOST_EXAMPLES]
    name = repo_id.split("/")[-1] if on_the_hub else printable(f"{options.name} on {stream}")
    revision = f", revision `{_plain(config.backbone.revision[:12])}`" if config.backbone.revision else ""
    data = ModelCardData(
        library_name=LIBRARY,
        license=printable(config.license),
        base_model=backbone_id,
        datasets=[printable(report.dataset)] if report is not None and report.dataset else None,
        pipeline_tag="image-classification",
        tags=["continual-learning", *(["peft", technique.lower()] if technique else []), printable(options.name)],
        model_name=name,
        eval_results=_eval_results(report, summary),
        widget=_widget(repo_id, examples) if on_the_hub and examples else None,
    )
    columns, rows = _table(config, report)
    measured = len(report.measured()) if report is not None else 0
    text = _template().render(
        card_data=data.to_yaml(),
        title=_plain(name),
        repo_id=repo_id,
        on_the_hub=on_the_hub,
        plain_peft=bool(backbone_id and on_the_hub and config.expert_names and technique not in NOT_PLAIN),
        backbone_id=backbone_id,
        expert_names=config.expert_names,
        method=_plain(options.name),
        backbone=f"[{backbone_id}](https://huggingface.co/{backbone_id}){revision}" if backbone_id else "a local one",
        image_size=config.backbone.image_size,
        weight_hash=_plain(config.backbone.weight_hash[:12]),
        experts=_plain(facts.pop("experts")),
        facts=[(name, _plain(text)) for name, text in facts.items()],
        paper=method.paper,
        citation=method.citation(),
        at_hand=options.name in METHODS,
        made_how=[(key, _plain(text)) for key, text in (made_how(report, method.trains) if report else {}).items()],
        backbone_license=license_of(config.backbone.name_or_path, config.backbone.revision, ask),
        method_title=method.title,
        costs=costs_of(method),
        stream=_plain(stream),
        scenario=_scenario(config),
        removed=", ".join(config.removed),
        tasks=rows,
        columns=columns,
        metrics=[(key.replace("_", " "), percent(value)) for key, value in summary.items()],
        coverage="" if measured == len(rows) else f", on the {measured} of {len(rows)} tasks whose data were at hand",
        routed=method.independent,
        rejects=method.rejects(options),
        calibrates=method.calibrates(options),
        calibrated=method.calibrates(options) and config.calibrated is not False,
        calibration_error=percent(summary["calibration_error"]) if "calibration_error" in summary else None,
        routing=percent(summary["routing_accuracy"]) if "routing_accuracy" in summary else None,
        license=_plain(config.license),
    )
    return ModelCard(text + "\n")


def make_card_of(folder: str | Path, repo_id: str = "path/to/this/folder", ask: bool = False) -> ModelCard:
    """The card of a saved model; arguments as for [`make_card`].

    Args:
        folder (`str` or `Path`): Its folder, of which weights are not read.

    Raises:
        [`ConfigError`]: It holds no model, or `metrics.json` is of another one.

    Example:

    ```py
    >>> from hf_clpeft.backbones.bundled import bundled_folder
    >>> from hf_clpeft.reports.card import make_card_of

    >>> "**S-LoRA**" in make_card_of(bundled_folder("hf-clpeft/s-lora-digits"), "me/digits").text
    True

    ```
    """
    return make_card(*read_made(folder), repo_id, ask)


def read_made(folder: str | Path) -> tuple[ContinualConfig, StreamReport | None]:
    """Configuration and report of a saved model."""
    config, report = ContinualConfig.load(folder), None
    if Path(folder, METRICS_NAME).is_file():
        report = StreamReport.from_dict(read_json(Path(folder, METRICS_NAME)), config.tasks)
    return config, report


def _widget(repo_id: str, examples: Sequence[str]) -> list[dict[str, str]]:
    address = f"https://huggingface.co/{repo_id}/resolve/main"
    return [{"src": f"{address}/{quote(path)}", "example_title": Path(path).stem} for path in examples]


@cache
def _template() -> jinja2.Template:
    """Compiled once: a card is made with every task."""
    return jinja2.Template((files("hf_clpeft") / "assets" / TEMPLATE).read_text(encoding="utf-8"))


def describe(options: MethodOptions) -> dict[str, str]:
    """Descriptions of a model's experts, PEFT technique, router and head, from [`Method.facts`].

    If the method has not been imported, there is only a generic description of `experts`.

    Example:

    ```py
    >>> from hf_clpeft import s_lora
    >>> from hf_clpeft.reports.card import describe

    >>> describe(s_lora())["experts"]
    'one PEFT expert per task, of which every image chooses its own'

    ```
    """
    unknown = {"experts": "a method of its author's own"}
    return unknown | METHODS[options.name].facts(options) if options.name in METHODS else unknown


def _eval_results(report: StreamReport | None, summary: dict[str, float]) -> list[EvalResult] | None:
    if report is None or not summary:
        return None
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Continual image classification",
            dataset_type=printable(report.dataset or report.stream),
            dataset_name=printable(report.stream),
            metric_type="accuracy" if name == "average_accuracy" else name,
            metric_name=name.replace("_", " "),
            metric_value=round(value, 6),
        )
        for name, value in summary.items()
    ]


def _table(config: ContinualConfig, report: StreamReport | None) -> tuple[list[str], list[dict]]:
    """One row per task, with its accuracy when it was learnt and now."""
    columns = ["accuracy when learnt", "accuracy now"] if report is not None else []
    rows = []
    for i, task in enumerate(config.tasks):
        values = [report.accuracy_matrix[i][i], report.accuracy_matrix[-1][i]] if report is not None else []
        rows.append(
            {
                "name": task.name,
                "title": _plain(task.title),
                "images": f"{task.num_train_images:,}",
                "source": task.source and _plain(task.source),
                "accuracies": [percent(value) for value in values],
            }
        )
    return columns, rows


def _scenario(config: ContinualConfig) -> str:
    if not config.tasks:
        return ""
    return "class-incremental" if config.tasks[-1].domain is None else "domain-incremental"


def _plain(text: str) -> str:
    """Untrusted text (class names, domains) escaped for a Markdown table: no HTML and no links."""
    text = text.replace("<", "&lt;").replace("`", "'").replace("\n", " ")
    return re.sub(r"([|\[\]])", r"\\\1", printable(text))
