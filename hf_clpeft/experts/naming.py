"""Converts adapters that were trained before transformers renamed the layers of their backbone."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ..backbones import Backbone
from .expert import Expert, ExpertError, make_peft_model


PREFIX = "base_model.model."  # of layer names in PEFT files


def rename_old_keys(expert: Expert, backbone: Backbone) -> Expert:
    """Renames the keys of an expert to the layer names of the installed version of transformers.

    It uses the conversion mapping that transformers applies to old checkpoints. Unknown keys are kept, and raise an
    error when the expert is loaded.

    Args:
        expert ([`Expert`]): Expert to convert, which may have been trained with a classifier around the backbone.
        backbone ([`Backbone`]): The frozen model, without an adapter on it.

    Returns:
        [`Expert`]: The same object if no key is renamed.

    Raises:
        [`ExpertError`]: Two tensors would get the same key.

    Example:

    ```py
    >>> from dataclasses import replace
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.experts.expert import Expert, make_peft_config, make_peft_model
    >>> from hf_clpeft.experts.naming import rename_old_keys

    >>> backbone = load_backbone("hf-clpeft/vit-tiny-glyphs")
    >>> peft_model = make_peft_model(backbone, make_peft_config({"peft_type": "LORA", "r": 1}, backbone))
    >>> expert = Expert.from_peft_model("task-000", peft_model)
    >>> _ = peft_model.unload()
    >>> rename_old_keys(expert, backbone) is expert
    True
    >>> layer = "base_model.model.vit.encoder.layer.0.attention.attention.query"  # before transformers 5.9
    >>> old = replace(expert, tensors={f"{layer}.lora_A.weight": next(iter(expert.tensors.values()))})
    >>> list(rename_old_keys(old, backbone).tensors)
    ['base_model.model.layers.0.attention.q_proj.lora_A.weight']

    ```
    """
    return renamer_for(backbone)(expert)


def renamer_for(backbone: Backbone) -> Callable[[Expert], Expert]:
    """[`rename_old_keys`] as a function of the expert alone, which is faster for thousands of experts."""
    mapping = get_model_conversion_mapping(backbone.model, add_legacy=False)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    named: set[str] = set()  # keys that need no new names; most experts have those of the one before

    def rename(expert: Expert) -> Expert:
        nonlocal named
        if expert.tensors.keys() == named:
            return expert
        renamed = _renamed(expert, backbone, renamings)
        named = set(expert.tensors) if renamed is expert else named
        return renamed

    return rename


def _renamed(expert: Expert, backbone: Backbone, renamings: list[WeightRenaming]) -> Expert:
    wrapper = backbone.model.base_model_prefix
    unwrapped = [_unwrap(key, wrapper, backbone) for key in expert.tensors]
    keys = [_rename(key, renamings) for key in unwrapped]
    if keys == list(expert.tensors):
        return expert
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ExpertError(f"Expert {expert.name!r} has two tensors for {twice}.")

    # Names of the modules when the expert was trained, which the patterns in its configuration refer to.
    old_names = {name: name for name, _ in backbone.model.named_modules() if name}
    if keys != unwrapped:
        # The reverse of a renaming is a renaming, although it is annotated more generally.
        backwards = [cast(WeightRenaming, renaming.reverse_transform()) for renaming in reversed(renamings)]
        old_names = {name: rename_source_key(name, backwards, [])[0] for name in old_names}
    if unwrapped != list(expert.tensors):
        old_names = {name: f"{wrapper}.{old_name}" for name, old_name in old_names.items()}
    config = _rename_targets(expert.config, old_names)
    return Expert(expert.name, config, dict(zip(keys, expert.tensors.values(), strict=True)))


def migrate_adapter(source_folder: str | Path, output_folder: str | Path, backbone: Backbone) -> list[tuple[str, str]]:
    """Converts a PEFT adapter to the installed version of transformers, and checks that it loads completely.

    Args:
        source_folder (`str` or `Path`): Contains `adapter_config.json` and `adapter_model.safetensors`.
        output_folder (`str` or `Path`): Another folder, created if needed.
        backbone ([`Backbone`]): The model that the adapter was trained on, without an adapter.

    Returns:
        `list[tuple[str, str]]`: Old and new key of every renamed tensor.

    Raises:
        [`ExpertError`]: The adapter does not fit the backbone, both folders are the same, or the output folder has
            an adapter. Nothing is written then.

    Example:

    ```py
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.experts.expert import Expert, make_peft_config, make_peft_model
    >>> from hf_clpeft.experts.naming import migrate_adapter

    >>> backbone = load_backbone("hf-clpeft/vit-tiny-glyphs")
    >>> peft_model = make_peft_model(backbone, make_peft_config({"peft_type": "LORA", "r": 1}, backbone))
    >>> Expert.from_peft_model("task-000", peft_model).save("adapter")
    >>> _ = peft_model.unload()
    >>> migrate_adapter("adapter", "migrated", backbone)  # nothing in it is old
    []

    ```
    """
    if Path(source_folder).resolve() == Path(output_folder).resolve():
        # Tensors may be memory-mapped from the file that would be overwritten.
        raise ExpertError(f"{source_folder} cannot be migrated in place; pass another output folder.")
    if Path(output_folder, SAFETENSORS_WEIGHTS_NAME).exists():
        raise ExpertError(
            f"{output_folder} already has an adapter, which would be overwritten; pass another output folder."
        )
    old = Expert.load(Path(source_folder).name, source_folder)
    new = rename_old_keys(old, backbone)
    try:
        new.check_fits(backbone)
        peft_model = make_peft_model(backbone, new.config)
    except ValueError as error:
        raise ExpertError(f"Expert {old.name!r} does not fit the backbone: {error}") from error
    try:
        new.copy_to(peft_model)
    finally:
        peft_model.unload()
    new.save(output_folder)
    return [(key, new_key) for key, new_key in zip(old.tensors, new.tensors, strict=True) if key != new_key]


def _unwrap(key: str, wrapper: str, backbone: Backbone) -> str:
    """Removes the attribute name of the backbone, such as `vit` in an image classifier, from a key."""
    is_wrapped = key.startswith(f"{PREFIX}{wrapper}.") and not hasattr(backbone.model, wrapper)
    return PREFIX + key.removeprefix(f"{PREFIX}{wrapper}.") if is_wrapped else key


def _rename(key: str, renamings: list[WeightRenaming]) -> str:
    # PEFT's prefix is removed first, as patterns may be anchored at the start of a name.
    if not key.startswith(PREFIX):
        return key
    return PREFIX + rename_source_key(key.removeprefix(PREFIX), renamings, [])[0]


def _rename_targets(config: PeftConfig, old_names: dict[str, str]) -> PeftConfig:
    """A copy of a configuration that targets the same modules by their new names.

    Patterns are resolved on the old names rather than rewritten: `dense`, for example, maps to three new names.
    """
    targets = [name for name, old_name in old_names.items() if check_target_module_exists(config, old_name)]
    if not targets:
        return config  # the targets have been renamed already
    renamed: Any = copy.copy(config)  # fields differ from class to class
    suffixes = {name.rpartition(".")[-1] for name in targets}
    matching = [name for name in old_names if name.rpartition(".")[-1] in suffixes]
    renamed.target_modules = suffixes if matching == targets else set(targets)
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(renamed, field):
            setattr(renamed, field, None)  # resolved in the targets
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(renamed, field, None)
        if pattern:
            keys = {name: get_pattern_key(pattern, old_names[name]) for name in targets}
            setattr(renamed, field, {name: pattern[key] for name, key in keys.items() if key in pattern})
    return renamed
