"""`hf-clpeft info`: tasks, method and metrics of a model, without downloading its weights."""

from pathlib import Path
from typing import Any

from .common import AsJson, Repo, Token, show


def info(repo: Repo, as_json: AsJson = False, token: Token = None) -> None:
    """Show the tasks, method, backbone and metrics of a model."""
    from ..backbones.bundled import bundled_folder
    from ..config.repos import split_revision
    from ..config.text import percent
    from ..hub.download import fetch_config
    from ..methods import METHODS
    from ..reports.card import read_made
    from ..storage.files import as_saved

    folder = bundled_folder(repo) or Path(repo)
    folder = as_saved(folder) if folder.is_dir() else fetch_config(*split_revision(repo), token=token)
    config, report = read_made(folder)
    options = {name: value for name, value in config.method.to_dict().items() if name != "name"}
    known = config.method.name in METHODS
    tasks = []
    for i, task in enumerate(config.tasks):
        row = {"task": task.name, "classes or domain": task.title, "images": task.num_train_images}
        if report is not None:
            row["when learnt"] = percent(report.accuracy_matrix[i][i])
            row["now"] = percent(report.accuracy_matrix[-1][i])
        tasks.append(row)
    summary: dict[str, Any] = {
        "method": config.method.name,
        "method is at hand": known,
        "options": options,
        "backbone": config.backbone.name_or_path,
        "backbone revision": config.backbone.revision,
        "weight hash": config.backbone.weight_hash,
        "image size": config.backbone.image_size,
        "classes": len(config.classes),
        "unlearnt": config.removed,
        "license": config.license,
    }
    measured = report.summary() if report is not None else {}
    if as_json:
        show({**summary, "classes": config.classes, "tasks": tasks, "metrics": measured}, as_json=True)
        return
    del summary["method is at hand"]
    if not known:
        summary["method"] += ", which is not at hand: import the file that defines it to load the model"
    summary["options"] = ", ".join(f"{name} = {value}" for name, value in options.items()) or "none"
    show({**summary, **{name.replace("_", " "): percent(value) for name, value in measured.items()}}, as_json=False)
    print()
    show(tasks, as_json=False, title=f"{len(tasks)} task{'s' * (len(tasks) != 1)}")
