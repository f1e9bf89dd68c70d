"""A saved expert: a PEFT configuration and the state dict of its adapter."""

import copy
import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..backbones import Backbone
from ..backbones.probe import to_meta
from ..config.adapters import check_peft
from ..config.checks import parse_json, read_small
from ..config.errors import ConfigError, HfClpeftError
from .prefix import PrefixConfig, PrefixTunedVisionModel, layers_of
from .prompts import PromptTunedVisionModel


ADAPTER = "default"  # the adapter name used in PEFT models; it is not saved
LARGEST_FILE = 4 * 2**30  # bytes; rank 64 on all layers of a ViT-H needs a tenth
MOST_TENSORS = 20_000
DTYPES = {"F64", "F32", "F16", "BF16"}
SHIRA_INDICES = ".shira_indices"  # weights that SHiRA trains: the only integer tensors in an expert


class ExpertError(HfClpeftError, ValueError):
    """An expert that cannot be used. Experts are never loaded partially.

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
    """A trained PEFT adapter of a backbone.

    Args:
        name (`str`): Name of its task.
        config (`peft.PeftConfig`): PEFT's configuration.
        tensors (`dict[str, torch.Tensor]`): State dict as PEFT saves it, on the CPU.

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
        """Number of trained parameters."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, the same for equal experts of different models."""
        ordered = {key: self.tensors[key].contiguous() for key in sorted(self.tensors)}
        return hashlib.sha256(save(ordered)).hexdigest()

    @classmethod
    def from_peft_model(cls, name: str, peft_model: PeftModel) -> "Expert":
        """Copies the adapter out of a PEFT model."""
        # PEFT's check of the embeddings queries the Hub, and a vision backbone has no vocabulary to check.
        tensors = get_peft_model_state_dict(peft_model, adapter_name=ADAPTER, save_embedding_layers=False)
        tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        return cls(name, peft_model.peft_config[ADAPTER], tensors)

    def copy_to(self, peft_model: PeftModel) -> None:
        """Loads the adapter into a PEFT model that was built from an equal configuration.

        Raises:
            [`ExpertError`]: There are missing or unexpected keys, or shapes differ.
        """
        self._check_keys(peft_model)
        try:
            set_peft_model_state_dict(peft_model, self.tensors, adapter_name=ADAPTER)
        except (RuntimeError, KeyError) as error:
            raise ExpertError(f"Expert {self.name!r} does not fit the backbone: {error}") from error

    def check_fits(self, backbone: Backbone) -> None:
        """Checks that the adapter fits, on a copy of the backbone on the meta device, before allocating memory.

        Raises:
            [`ExpertError`]: As for [`~Expert.copy_to`]; or PEFT cannot use the configuration on this backbone.
        """
        config: Any = self.config
        if config.is_prompt_learning:
            width = backbone.hidden_size
            if config.peft_type == PeftType.PREFIX_TUNING:
                width *= 2 * len(_check_prefix(config, backbone))
            self._check_shapes({"prompt_embeddings": (config.num_virtual_tokens, width)})
            return
        if config.peft_type == "SHIRA":  # PEFT bounds its size by that of the backbone
            self._check_shira_indices(backbone)
            return
        model, config = to_meta(backbone.model), copy.deepcopy(config)
        # BOFT reads values of its own tensors while it is attached.
        device = nullcontext() if config.peft_type == "BOFT" else torch.device("meta")
        with device, _as_expert_error(backbone, config):
            self._check_keys(PeftModel(model, config, adapter_name=ADAPTER))

    def _check_shira_indices(self, backbone: Backbone) -> None:
        layers = dict(backbone.model.named_modules())
        for key, tensor in self.tensors.items():
            layer: Any = layers.get(key.removeprefix("base_model.model.").removesuffix(SHIRA_INDICES))
            if not key.endswith(SHIRA_INDICES) or layer is None:
                continue  # an unexpected key, reported later
            size = torch.tensor(layer.weight.shape)[:, None]
            if tensor.shape[:1] != size.shape[:1] or not ((tensor >= 0) & (tensor < size)).all():
                raise ExpertError(
                    f"Expert {self.name!r} does not fit the backbone: {key} is out of range for a layer of shape "
                    f"{tuple(layer.weight.shape)}."
                )

    def _check_keys(self, peft_model: PeftModel) -> None:
        wanted = get_peft_model_state_dict(peft_model, adapter_name=ADAPTER, save_embedding_layers=False)
        self._check_shapes({key: tuple(tensor.shape) for key, tensor in wanted.items()})

    def _check_shapes(self, wanted: dict[str, tuple[int, ...]]) -> None:
        unexpected, missing = sorted(self.tensors.keys() - wanted), sorted(wanted.keys() - self.tensors)
        if unexpected or missing:
            raise ExpertError(
                f"Expert {self.name!r} does not fit the backbone: {len(unexpected)} unexpected keys "
                f"{unexpected[:2]} and {len(missing)} missing keys {missing[:2]}. Was it trained on another backbone, "
                "or before transformers 5.9 renamed the projections of ViT?"
            )
        for key, shape in wanted.items():
            if tuple(self.tensors[key].shape) != shape:
                raise ExpertError(
                    f"Expert {self.name!r} does not fit the backbone: {key} has shape "
                    f"{tuple(self.tensors[key].shape)} and should have {shape} according to its {CONFIG_NAME}."
                )

    def save(self, folder: str | Path) -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors`, as PEFT does."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Written by Python, as errors of safetensors do not tell that the disk is full.
        Path(folder, SAFETENSORS_WEIGHTS_NAME).write_bytes(save(self.tensors, metadata={"format": "pt"}))
        config = copy.copy(self.config)
        config.inference_mode = True  # as in files saved by PEFT
        for field, value in vars(config).items():
            if isinstance(value, set):  # whose order differs between processes
                setattr(config, field, sorted(value))
        config.save_pretrained(str(folder))

    @classmethod
    def load(cls, name: str, folder: str | Path) -> "Expert":
        """Loads an expert saved by [`~Expert.save`] or by PEFT.

        Raises:
            [`ExpertError`]: A file is missing or damaged, or a tensor is not finite.
        """
        path, described = Path(folder, SAFETENSORS_WEIGHTS_NAME), Path(folder, CONFIG_NAME)
        for file in (described, path):
            if not file.is_file():
                raise ExpertError(f"Expert {name!r} lacks the file {file}.")
        try:
            names = _read_header(path)
            config = _read_config(described, names)
            loaded = load(path.read_bytes())  # faster than mapping thousands of small files
        except SafetensorError as error:
            raise ExpertError(f"{path} is damaged: {error}") from error
        tensors = {name: loaded[name] for name in names}  # in the order of the file
        if tensors and not _is_finite(torch.cat([tensor.flatten() for tensor in tensors.values()])):
            broken = [key for key, tensor in tensors.items() if not _is_finite(tensor)]
            if broken:  # and not only the sum of all
                raise ExpertError(f"{path} has values that are not finite in {broken[0]}.")
        config.inference_mode = False
        return cls(name, config, tensors)


def _is_finite(tensor: torch.Tensor) -> bool:
    """A sum is finite if all values are; in float64, that of float32 does not overflow."""
    return math.isfinite(tensor.sum(dtype=torch.float64))


def _read_header(path: Path) -> list[str]:
    """Reads the names of the tensors of a file, and checks sizes and dtypes."""
    if path.stat().st_size > LARGEST_FILE:
        raise ExpertError(f"{path} has {path.stat().st_size:,} bytes; the limit is {LARGEST_FILE:,}.")
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if len(names) > MOST_TENSORS or any(len(name) > 512 for name in names):
            raise ExpertError(f"{path} has {len(names):,} tensors, or one with too long a name; it is not an expert.")
        dtypes = {name: file.get_slice(name).get_dtype() for name in names}
    for name, dtype in dtypes.items():
        if dtype not in DTYPES and not (name.endswith(SHIRA_INDICES) and dtype == "I32"):
            raise ExpertError(f"{path} has {dtype} in {name}; an expert has float32, float16 or bfloat16 tensors.")
    return names


def _read_config(path: Path, names: list[str]) -> PeftConfig:
    """Reads and validates an `adapter_config.json`, given the names of the tensors saved with it."""
    try:
        config = copy.copy(_parse_config(read_small(path), path.name, tuple(names)))
    except Exception as error:  # on tampered files, PEFT may raise anything, even RecursionError
        raise ExpertError(f"{path} cannot be used: {error}") from error
    for field, value in vars(config).items():
        if isinstance(value, dict | list | set):
            setattr(config, field, value.copy())
    return config


@lru_cache(maxsize=4)
def _parse_config(text: bytes, name: str, names: tuple[str, ...]) -> PeftConfig:
    """Thousands of experts usually have one configuration. It must not be modified."""
    values = parse_json(text, name)
    whole = values.get("modules_to_save")
    if isinstance(whole, list) and not any(f".{module}." in name for module in whole for name in names):
        # Usually the classifier it was trained with, which is not in the file.
        values["modules_to_save"] = None
    return _make_config(values)


def _make_config(values: dict) -> Any:
    technique = values.get("peft_type")
    kinds: dict[Any, Any] = {**PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.PREFIX_TUNING: PrefixConfig}
    kind = kinds.get(technique) if isinstance(technique, str) else None
    if kind is None:
        check_peft(values)
        raise ConfigError(f"peft_type={technique!r} needs a newer PEFT; try `pip install --upgrade peft`.")
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(kind)
    }
    return kind(**check_peft(values, defaults))


def make_peft_config(arguments: dict, backbone: Backbone, layers: Sequence[int] | None = None) -> PeftConfig:
    """Creates the PEFT configuration of a new expert.

    Args:
        arguments (`dict`): `peft_type` and the arguments of that configuration.
        backbone ([`Backbone`]): Provides default `target_modules`, and the name of the base model to save.
        layers (sequence of `int`, *optional*): Layers that it adapts, from 1. Default: all.

    Returns:
        `peft.PeftConfig`

    Raises:
        [`ExpertError`]: The technique is not supported, cannot be limited to some layers, or an argument is unknown
            or out of range; see [`~hf_clpeft.config.adapters.check_peft`].
        [`BackboneError`]: The backbone has no layers to choose among.

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
        config = _make_config(arguments)
    except ConfigError as error:
        raise ExpertError(str(error)) from error
    except Exception as error:
        raise ExpertError(f"PEFT cannot create a configuration from {arguments}: {error}") from error
    config.base_model_name_or_path = backbone.config.name_or_path
    config.revision = backbone.config.revision
    if not config.is_prompt_learning and getattr(config, "target_modules", None) is None:
        config.target_modules = set(backbone.find_query_value())
    if layers is not None:
        _limit(config, backbone, layers)
    return config


def _limit(config: Any, backbone: Backbone, layers: Sequence[int]) -> None:
    """Limits an adapter to some layers, from 1."""
    if config.peft_type == PeftType.PREFIX_TUNING:
        config.layers_to_transform, config.num_layers = [number - 1 for number in layers], len(layers)
    elif config.is_prompt_learning:
        raise ExpertError("Prompts go through all layers; expert_layers needs LoRA, prefixes, or the like.")
    elif isinstance(config.target_modules, str):
        raise ExpertError(
            f"target_modules={config.target_modules!r} chooses modules by a pattern, and expert_layers chooses among "
            "names: give a list of names, for example ['q_proj', 'v_proj'], or put the layers into the pattern."
        )
    else:  # by full names, as PEFT's layers_to_transform finds no layers in a model without a head
        config.target_modules = set(backbone.names_in(layers, config.target_modules))
        if getattr(config, "feedforward_modules", None):  # of IA3, and among these
            config.feedforward_modules = set(backbone.names_in(layers, config.feedforward_modules))


def make_peft_model(backbone: Backbone, config: PeftConfig) -> PeftModel:
    """Attaches a new adapter to the backbone. All but prompts modify the backbone in place until unloaded.

    Args:
        backbone ([`Backbone`]): The frozen model.
        config (`peft.PeftConfig`): Configuration of the adapter.

    Returns:
        `peft.PeftModel`

    Raises:
        [`BackboneError`]: The backbone does not support prompts, or prefixes.
        [`ExpertError`]: PEFT cannot use the configuration on this backbone.
    """
    make: type[PeftModel] = PeftModel
    if config.peft_type == PeftType.PREFIX_TUNING:
        backbone.check_prefixes()
        _check_prefix(config, backbone)  # before it allocates memory
        make = PrefixTunedVisionModel
    elif config.is_prompt_learning:
        backbone.check_prompts()
        make = PromptTunedVisionModel
    weights = dict(backbone.model.named_parameters())
    with _as_expert_error(backbone, config):
        peft_model = make(backbone.model, config, adapter_name=ADAPTER)
    trained = [name for name, weight in weights.items() if weight.requires_grad]
    if trained:
        raise ExpertError(_CHANGED_MESSAGE.format(f"This {PeftType(config.peft_type).value} adapter", trained[0]))
    return peft_model


def _check_prefix(config: Any, backbone: Backbone) -> list[int]:
    """The layers with a prefix; raises [`ExpertError`] unless they are layers of the backbone, and of its width."""
    try:
        layers = layers_of(config, backbone.num_layers)
    except ValueError as error:
        raise ExpertError(f"A prefix does not fit {backbone.config.name_or_path}: {error}") from error
    if config.token_dim not in (None, backbone.hidden_size):
        raise ExpertError(
            f"A prefix does not fit {backbone.config.name_or_path}: token_dim={config.token_dim}, and the backbone's "
            f"is {backbone.hidden_size}."
        )
    return layers


_CHANGED_MESSAGE = "{} changes {} of the frozen backbone, which all experts share. Load the model again without it."


class Seal:
    """Checksums of a model's weights, which detect any change to them.

    Args:
        model (`torch.nn.Module`): A frozen model, without an adapter.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.experts.expert import Seal

    >>> model = torch.nn.Linear(2, 2).requires_grad_(False)
    >>> seal = Seal(model)
    >>> model.bias[0] += 1
    >>> seal.check("Somebody")
    Traceback (most recent call last):
        ...
    hf_clpeft.experts.expert.ExpertError: Somebody changes bias of the frozen backbone, which all experts share...

    ```
    """

    def __init__(self, model: torch.nn.Module):
        # Looked up by module, as moving to another device replaces the tensors.
        self._tensors = {
            f"{path}.{name}".lstrip("."): (module, name)
            for path, module in model.named_modules()
            for name, weight in [*module._parameters.items(), *module._buffers.items()]
            if weight is not None
        }
        self._checksums = self._checksum()

    def check(self, who: str) -> None:
        """Raises [`ExpertError`] if a weight has changed. Weights whose dtype has changed are not compared."""
        for name, found in self._checksum().items():
            if found != self._checksums[name] and found[0] == self._checksums[name][0]:
                raise ExpertError(_CHANGED_MESSAGE.format(who, name))

    def _checksum(self) -> dict[str, tuple[torch.dtype, int]]:
        """Integer sums of the bits of each weight, which do not depend on order or device."""
        weights = {path: getattr(module, name).detach() for path, (module, name) in self._tensors.items()}
        # Read together, so that a GPU is waited for once.
        sums = torch.stack([_sum_of_bits(weight) for weight in weights.values()]).tolist()
        return {path: (weight.dtype, found) for (path, weight), found in zip(weights.items(), sums, strict=True)}


def _sum_of_bits(weight: torch.Tensor) -> torch.Tensor:
    if is_traceable_wrapper_subclass(weight):  # quantised: integers and scales
        inner, _ = weight.__tensor_flatten__()
        return torch.stack([_sum_of_bits(getattr(weight, name)) for name in inner]).sum()
    flat = weight.flatten()
    bits = (flat if flat.data_ptr() % 8 == 0 else flat.clone()).view(torch.uint8)
    whole = len(bits) // 8 * 8
    return bits[:whole].view(torch.int64).sum() + bits[whole:].sum(dtype=torch.int64)


@contextmanager
def _as_expert_error(backbone: Backbone, config: PeftConfig) -> Iterator[None]:
    """Converts errors of PEFT while it attaches an adapter to [`ExpertError`]."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # used by PEFT
        try:
            yield
        except ExpertError:
            raise
        except Exception as error:
            raise ExpertError(
                f"PEFT cannot attach a {PeftType(config.peft_type).value} adapter to {backbone.config.name_or_path} "
                f"({error!r}). Check the method's peft, or the adapter's adapter_config.json."
            ) from error
