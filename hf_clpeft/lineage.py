"""Which models are one model going on, and which would overwrite another."""

from .config import ContinualConfig


def grown_from(config: ContinualConfig, earlier: ContinualConfig) -> bool:
    """Whether a model is an earlier one that has gone on learning, or unlearning, or has not changed since.

    Names of tasks and classes are the same in every run on the same data, so the hashes of files decide: those of the
    experts that are never trained again, or, where tasks share what they train, of all that was saved or loaded last.

    Args:
        config ([`ContinualConfig`]): Of the model, with the hashes of its files when it was last saved or loaded.
        earlier ([`ContinualConfig`]): Of the model that it may have been.

    Returns:
        `bool`

    Example:

    ```py
    >>> from hf_clpeft import ContinualModel, s_lora
    >>> from hf_clpeft.lineage import grown_from

    >>> ours = ContinualModel.from_pretrained("hf-clpeft/s-lora-digits").config
    >>> new = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora()).config
    >>> grown_from(ours, earlier=ours), grown_from(new, earlier=ours), grown_from(ours, earlier=new)
    (True, False, True)

    ```
    """
    if not earlier.tasks and not earlier.removed:
        return True  # it has learnt nothing that could be lost
    kept = [task for task in earlier.tasks if task.name not in config.removed]
    backbones = {(each.backbone.weight_hash, each.backbone.image_size) for each in (config, earlier)}
    if (
        len(backbones) > 1
        or earlier.method != config.method
        or kept != config.tasks[: len(kept)]
        or not set(earlier.removed) <= set(config.removed)
    ):
        return False
    files = earlier.files
    if earlier.method.experts == "per_task":
        experts = {f"experts/{task.name}" for task in kept}
        files = {path: digest for path, digest in files.items() if path.rpartition("/")[0] in experts}
    return files.items() <= config.files.items()
