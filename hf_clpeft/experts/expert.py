"""An expert at rest: a PEFT configuration and the tensors PEFT saves for it."""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_config, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..backbones import Backbone
from ..checks import read_json
from ..errors import HfClpeftError
from .prompts import PromptTunedVisionModel


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ADAPTER = "default"  # the only adapter name we give PEFT; it is not part of any file


class ExpertError(HfClpeftError, ValueError):
    """An expert that cannot be used whole. It is never used in part.

    Example:

    ```py
    >>> from hf_clpeft import Expert, ExpertError

    >>> try:
    ...     Expert.load("task-000", "nowhere")
    ... except ExpertError as error:
    ...     print(error)
    Expert 'task-000' lacks the file nowhere/adapter_config.json.

    ```
    """


@dataclass(frozen=True)
class Expert:
    """One trained PEFT adapter of a backbone.

    Args:
        name (`str`): Name of its task.
        config (`peft.PeftConfig`): PEFT's configuration.
        tensors (`dict[str, torch.Tensor]`): PEFT's own file content, on the CPU.

    Example:

    ```py
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.experts.expert import Expert, make_peft_config, make_peft_model

    >>> backbone = load_backbone("hf-clpeft/vit-tiny-glyphs")
    >>> peft_model = make_peft_model(backbone, make_peft_config({"peft_type": "LORA", "r": 2}, backbone))
    >>> expert = Expert.from_peft_model("task-000", peft_model)
    >>> expert.num_parameters == 2 * 2 * 2 * backbone.hidden_size * backbone.model.config.num_hidden_layers
    True

    ```
    """

    name: str
    config: PeftConfig
    tensors: dict[str, torch.Tensor]

    @property
    def num_parameters(self) -> int:
        """How many numbers were trained."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @classmethod
    def from_peft_model(cls, name: str, peft_model: PeftModel) -> "Expert":
        """Copies the adapter out of a PEFT model."""
        # The embedding check of PEFT asks the Hub, and a vision backbone has no vocabulary that could have grown.
        tensors = get_peft_model_state_dict(peft_model, adapter_name=ADAPTER, save_embedding_layers=False)
        tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        return cls(name, peft_model.peft_config[ADAPTER], tensors)

    def copy_to(self, peft_model: PeftModel) -> None:
        """Copies the adapter into a PEFT model that was built from an equal configuration.

        Raises:
            [`ExpertError`]: A tensor has no home, a home gets no tensor, or shapes differ.
        """
        try:
            result: Any = set_peft_model_state_dict(peft_model, self.tensors, adapter_name=ADAPTER)
        except (RuntimeError, KeyError) as error:
            raise ExpertError(f"Expert {self.name!r} does not fit the backbone: {error}") from error
        homeless = [key for key in result.unexpected_keys if key != "prompt_embeddings"]
        expected = get_peft_model_state_dict(peft_model, adapter_name=ADAPTER, save_embedding_layers=False)
        untrained = sorted(set(expected) - set(self.tensors))
        if homeless or untrained:
            raise ExpertError(
                f"Expert {self.name!r} does not fit the backbone: {len(homeless)} tensors have no home "
                f"{homeless[:2]} and {len(untrained)} places got no tensor {untrained[:2]}. Was it trained on another "
                "backbone, or before transformers 5.9 renamed the projections of ViT?"
            )

    def save(self, folder: str | Path) -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors`, as PEFT does."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Written by Python, whose errors say that a disk is full.
        Path(folder, SAFETENSORS_WEIGHTS_NAME).write_bytes(save(self.tensors, metadata={"format": "pt"}))
        config = copy.copy(self.config)
        config.inference_mode = True  # as PEFT marks what it saves
        for field, value in vars(config).items():
            if isinstance(value, set):  # whose order would change from one process to the next
                setattr(config, field, sorted(value))
        config.save_pretrained(str(folder))

    @classmethod
    def load(cls, name: str, folder: str | Path) -> "Expert":
        """Reads what [`~Expert.save`] or PEFT wrote.

        Raises:
            [`ExpertError`]: A file is missing or damaged, or a tensor is not finite.
        """
        for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            if not Path(folder, file).is_file():
                raise ExpertError(f"Expert {name!r} lacks the file {Path(folder, file)}.")
        try:
            tensors = load_file(Path(folder, SAFETENSORS_WEIGHTS_NAME))
        except SafetensorError as error:
            raise ExpertError(f"{Path(folder, SAFETENSORS_WEIGHTS_NAME)} is damaged: {error}") from error
        broken = [key for key, t in tensors.items() if not (t.dtype in DTYPES and torch.isfinite(t).all())]
        if broken:
            raise ExpertError(
                f"{Path(folder, SAFETENSORS_WEIGHTS_NAME)} has values that are no finite numbers in {broken[0]}."
            )
        try:
            read_json(Path(folder, CONFIG_NAME))
            config = PeftConfig.from_pretrained(str(folder))
        except Exception as error:  # PEFT raises anything, even RecursionError, on what somebody has tampered with
            raise ExpertError(f"{Path(folder, CONFIG_NAME)} cannot be used: {error}") from error
        for field, value in vars(config).items():
            if isinstance(value, set | list) and len({type(item) for item in value}) > 1:
                raise ExpertError(f"{Path(folder, CONFIG_NAME)} cannot be used: {field} mixes types, {list(value)}.")
        config.inference_mode = False
        return cls(name, config, tensors)


def make_peft_config(arguments: dict, backbone: Backbone) -> PeftConfig:
    """PEFT's configuration of a new expert.

    Args:
        arguments (`dict`): `peft_type` and the arguments of that configuration.
        backbone ([`Backbone`]): Gives left-out `target_modules`, and the name to save as the base model.

    Returns:
        `peft.PeftConfig`

    Raises:
        [`ExpertError`]: PEFT knows no such type or argument.

    Example:

    ```py
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.experts.expert import make_peft_config

    >>> config = make_peft_config({"peft_type": "LORA", "r": 1}, load_backbone("hf-clpeft/vit-tiny-glyphs"))
    >>> sorted(config.target_modules)
    ['q_proj', 'v_proj']

    ```
    """
    try:
        config: Any = get_peft_config(dict(arguments))  # fields differ from class to class
    except Exception as error:
        raise ExpertError(f"PEFT cannot make a configuration of {arguments}: {error}") from error
    config.base_model_name_or_path = backbone.config.name_or_path
    config.revision = backbone.config.revision
    if not config.is_prompt_learning and getattr(config, "target_modules", None) is None:
        config.target_modules = set(backbone.find_query_value())
    return config


def make_peft_model(backbone: Backbone, config: PeftConfig) -> PeftModel:
    """Puts a fresh adapter on the backbone. Adapters other than prompts change the backbone in place until unloaded.

    Args:
        backbone ([`Backbone`]): The frozen model.
        config (`peft.PeftConfig`): What to put on it.

    Returns:
        `peft.PeftModel`

    Raises:
        [`BackboneError`]: A prompt has no place in this backbone.
        [`ExpertError`]: PEFT cannot use the configuration on this backbone.
    """
    if config.is_prompt_learning:
        backbone.check_prompts()
    make: type[PeftModel] = PromptTunedVisionModel if config.is_prompt_learning else PeftModel
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # asked by PEFT, not us
        try:
            return make(backbone.model, config, adapter_name=ADAPTER)
        except Exception as error:
            raise ExpertError(
                f"PEFT cannot put a {config.peft_type} adapter on {backbone.config.name_or_path} ({error!r}). Check "
                "the method's peft, or the adapter's adapter_config.json."
            ) from error
