"""The model card that is saved with every model."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..config import ContinualConfig


CARD = """---
{metadata}
---

# {method} on {stream}

A frozen vision transformer that learnt {num_tasks} tasks one after another with {experts}, made with `hf_clpeft`.

```py
from hf_clpeft import ContinualModel

model = ContinualModel.from_pretrained("path/to/this/folder")
model.predict(["picture.png"])
```

| | |
|---|---|
| backbone | `{backbone}`, {image_size} px, weights `{weight_hash}…` |
| PEFT | `{peft}` |
| head | {head} |
{metrics}

| task | classes or domain | images | accuracy after the last task |
|---|---|---|---|
{tasks}

![accuracy matrix and routing](accuracy_and_routing.png)
"""


EXPERTS = {
    "per_task": "one PEFT expert per task, of which every image chooses its own",
    "pool": "a pool of {pool_size} PEFT experts, of which every image selects {top_n}",
    "single": "one PEFT expert that all of them trained in turn",
}


def make_card(config: ContinualConfig, report: dict) -> ModelCard:
    """The card of a model.

    Args:
        config ([`ContinualConfig`]): What it learnt with and on.
        report (`dict`): Content of its `metrics.json`.

    Returns:
        `huggingface_hub.ModelCard`

    Example:

    ```py
    >>> from hf_clpeft.config import BackboneConfig, ContinualConfig
    >>> from hf_clpeft.hub import make_card
    >>> from hf_clpeft.methods import s_lora

    >>> config = ContinualConfig(s_lora(), BackboneConfig("google/vit-base-patch16-224-in21k", 224, "0f3c"))
    >>> card = make_card(config, {"stream": "pets", "summary": {}, "accuracy_matrix": [], "tasks": []})
    >>> card.data.library_name
    'hf-clpeft'

    ```
    """
    data = ModelCardData(
        library_name="hf-clpeft",
        # A folder on somebody's disk is nothing that a reader could follow.
        base_model=config.backbone.name_or_path if not Path(config.backbone.name_or_path).is_dir() else None,
        pipeline_tag="image-classification",
        tags=["continual-learning", "peft", config.method.name],
    )
    last_row = report["accuracy_matrix"][-1] if report["accuracy_matrix"] else []
    accuracy_of = dict(zip(report["tasks"], last_row, strict=True))
    rows = [
        f"| {task.name} | {_plain(task.title)} | {task.num_train_images:,} | {_percent(accuracy_of.get(task.name))} |"
        for task in config.tasks
    ]
    metrics = [f"| {name.replace('_', ' ')} | {_percent(value)} |" for name, value in report["summary"].items()]
    text = CARD.format(
        metadata=data.to_yaml(),
        method=config.method.name,
        stream=_plain(report["stream"]),
        num_tasks=len(config.tasks),
        experts=EXPERTS[config.method.experts].format(**vars(config.method)),
        backbone=Path(config.backbone.name_or_path).name if data.base_model is None else data.base_model,
        image_size=config.backbone.image_size,
        weight_hash=config.backbone.weight_hash[:12],
        peft=", ".join(f"{name}={value}" for name, value in config.method.peft.items()),
        head=config.method.head,
        metrics="\n".join(metrics),
        tasks="\n".join(rows),
    )
    return ModelCard(text)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _plain(text: str) -> str:
    """Text of strangers (class names, domains) that can neither break a table nor become HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'").replace("\n", " ")
