"""Prompt tuning for vision transformers, with one prompt for the batch or one for every image.

PEFT requires word embeddings, which a vision transformer lacks. Here the prompt tokens are inserted after [CLS] in
the output of the backbone's embedding layer; configuration, embedding and file format are those of PEFT.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, PromptEmbedding, PromptTuningConfig

from ..backbones import Backbone
from .calls import active_call, attach_hook
from .table import ExpertTable


if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDINGS = "embeddings"  # the layer in whose output a prompt is inserted


def insert_prompt(tokens: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Inserts a prompt after [CLS].

    Args:
        tokens (`torch.Tensor` of shape `(batch, tokens, hidden_size)`): Output of the embedding layer.
        prompt (`torch.Tensor` of shape `(length, hidden_size)` or `(batch, length, hidden_size)`): One for the batch,
            or one for every image.

    Returns:
        `torch.Tensor` of shape `(batch, tokens + length, hidden_size)`.
    """
    prompt = prompt.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
    return torch.cat([tokens[:, :1], prompt, tokens[:, 1:]], dim=1)


class PromptTunedVisionModel(PeftModel):
    """A `PeftModel` that inserts trainable tokens after [CLS] of a vision transformer.

    Prompt tokens have no position embedding. Their outputs also follow [CLS]:
    `last_hidden_state[:, 1:1 + num_virtual_tokens]`.

    Args:
        model (`transformers.PreTrainedModel`): A vision transformer with an `embeddings` layer whose output starts
            with [CLS].
        peft_config (`PromptTuningConfig`): `num_virtual_tokens` and, optionally, `token_dim`.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the prompt.
        kwargs: As for `peft.PeftModel`.

    Source: section 3 of arXiv 2406.03216; tokens after [CLS] as in S-Prompts (arXiv 2207.12819).

    Example:

    ```py
    >>> import torch
    >>> from peft import PromptTuningConfig
    >>> from hf_clpeft.backbones import load_backbone
    >>> from hf_clpeft.experts import PromptTunedVisionModel

    >>> backbone = load_backbone("hf-clpeft/vit-tiny-glyphs")
    >>> model = PromptTunedVisionModel(backbone.model, PromptTuningConfig(num_virtual_tokens=4))
    >>> model(pixel_values=torch.zeros(1, 3, 32, 32)).last_hidden_state.shape[1]
    21

    ```
    """

    base_model: "PreTrainedModel"

    def __init__(
        self,
        model: "PreTrainedModel",
        peft_config: PromptTuningConfig,
        adapter_name: str = "default",
        **kwargs: Any,
    ):
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self._attach()

    def _setup_prompt_encoder(self, adapter_name: str) -> None:
        config: Any = self.peft_config[adapter_name]  # fields differ from class to class
        config.num_transformer_submodules = 1
        if not hasattr(self, "prompt_encoder"):
            self.prompt_encoder = torch.nn.ModuleDict()
            self.prompt_tokens = {}
        self.base_model.requires_grad_(False)
        encoder = self._make_encoder(config)
        self.prompt_encoder[adapter_name] = encoder.to(self.base_model.device)
        self.prompt_tokens[adapter_name] = torch.arange(config.num_virtual_tokens)

    def _make_encoder(self, config: Any) -> torch.nn.Module:
        encoder = PromptEmbedding(config, word_embeddings=None)
        # Same scale as the initialisation of the backbone's tokens; unit variance would dominate the patches.
        torch.nn.init.normal_(encoder.embedding.weight, std=0.02)
        return encoder

    def _attach(self) -> None:
        self._hook = self.base_model.get_submodule(EMBEDDINGS).register_forward_hook(self._insert_prompt)

    def _insert_prompt(self, module: torch.nn.Module, inputs: tuple, tokens: torch.Tensor) -> torch.Tensor | None:
        if self._adapters_disabled:
            return None
        encoder: Any = self.prompt_encoder[self.active_adapter]
        return insert_prompt(tokens, encoder.embedding.weight)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context manager: runs the backbone without the prompt. PEFT's own version expects a language model."""
        was_disabled, self._adapters_disabled = self._adapters_disabled, True
        try:
            yield
        finally:
            self._adapters_disabled = was_disabled

    def unload(self) -> torch.nn.Module:
        """Removes the prompt and returns the unchanged backbone."""
        self._hook.remove()
        return self.base_model


class TokenTable(ExpertTable):
    """Base of tables of virtual tokens, as PEFT saves them; those selected for an image are concatenated."""

    def tokens(self, config: Any, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        """Virtual tokens of shape `(length, width)`, and the scale, which is always 1, after a check of shapes."""
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        expected = {"prompt_embeddings": (config.num_virtual_tokens, self.rows.shape[1])}
        if shapes != expected:
            raise ValueError(f"its tensors are {shapes} and should be {expected}.")
        return tensors["prompt_embeddings"], 1.0

    def unpack(self, components: torch.Tensor) -> dict[str, torch.Tensor]:
        """Inverse of `pack`."""
        return {"prompt_embeddings": components}

    def tokens_of(self, selection: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """The tokens selected for each image, of `rows` or, by default, of the table."""
        return (self.rows if rows is None else rows)[self.components(selection)]

    def form_for(self, selection: torch.Tensor, requested: str) -> str:
        """Always gathered; grouped if requested, or if experts and thus sequences differ in length."""
        return "gathered" if self.uniform and requested != "grouped" else "grouped"


class PromptTable(TokenTable):
    """Prompts as tokens; those selected for an image are concatenated and inserted after [CLS].

    Args:
        backbone ([`Backbone`]): The frozen model. A hook on its embedding layer does nothing outside
            [`~PromptTable.selected`] and in other threads.

    Source: L2P, arXiv 2112.08654.
    """

    def __init__(self, backbone: Backbone):
        super().__init__(backbone.hidden_size, backbone.device)
        attach_hook(backbone.model.get_submodule(EMBEDDINGS), EMBEDDINGS)

    def pack(self, config: PromptTuningConfig, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        """Converts a prompt to tokens; arguments as for [`LoraTable.pack`].

        Returns:
            `torch.Tensor` of shape `(length, hidden_size)`, and the scale, which is always 1.

        Raises:
            `ValueError`: It is not a prompt for this backbone.
        """
        if not config.is_prompt_learning:
            raise ValueError(f"it is {config.peft_type}, not a prompt.")
        return self.tokens(config, tensors)

    def selected(
        self, selection: torch.Tensor, form: str, dtype: torch.dtype, rows: torch.Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Context manager: the backbone inserts every image's own prompts.

        Args:
            selection (integer `torch.Tensor` of shape `(batch,)` or `(batch, N)`): Prompts of each image.
            form (`str`): `"gathered"`, the only supported form.
            dtype (`torch.dtype`): Compute dtype of the backbone.
            rows (`torch.Tensor`, *optional*): Taken in place of `self.rows`.
        """
        return active_call(_Inserting(self.tokens_of(selection, rows).to(dtype)))


class _Inserting:
    """A [`Call`] that inserts a prompt per image, of shape `(batch, length, hidden_size)`."""

    def __init__(self, prompt: torch.Tensor):
        self.prompt = prompt

    def update(self, key: str, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """Inserts the prompts in the output of the embedding layer."""
        return insert_prompt(output, self.prompt) if key == EMBEDDINGS else None
