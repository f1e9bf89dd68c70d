"""Prompt tuning on vision transformers, which PEFT itself does not build.

PEFT looks for word embeddings to prepend prompts to, and a vision transformer has none. Here the prompt tokens are
inserted behind [CLS] in the output of the backbone's embedding layer; configuration, embedding and files stay PEFT's.
"""

from contextlib import contextmanager

import torch
from peft import PeftModel, PromptEmbedding, PromptTuningConfig


class PromptTunedVisionModel(PeftModel):
    """A `PeftModel` that inserts trainable tokens behind [CLS] of a vision transformer.

    Prompt tokens get no position embedding. The output has them behind [CLS] too:
    `last_hidden_state[:, 1:1 + num_virtual_tokens]`.

    Args:
        model (`transformers.PreTrainedModel`): A vision transformer with an `embeddings` layer whose output starts
            with [CLS].
        peft_config (`PromptTuningConfig`): `num_virtual_tokens` and, optionally, `token_dim`.
        adapter_name (`str`, *optional*, defaults to `"default"`): Name of the prompt.
        kwargs: As for `peft.PeftModel`.

    Source: section 3 of arXiv 2406.03216; tokens behind [CLS] as in S-Prompts (arXiv 2207.12819).

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

    def __init__(self, model, peft_config: PromptTuningConfig, adapter_name: str = "default", **kwargs):
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self._hook = model.embeddings.register_forward_hook(self._insert_prompt)

    def _setup_prompt_encoder(self, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        config.num_transformer_submodules = 1
        if not hasattr(self, "prompt_encoder"):
            self.prompt_encoder = torch.nn.ModuleDict()
            self.prompt_tokens = {}
        self.base_model.requires_grad_(False)
        encoder = PromptEmbedding(config, word_embeddings=None)
        # As small as the backbone's own tokens are when it is initialised; unit normal noise would drown the patches.
        torch.nn.init.normal_(encoder.embedding.weight, std=0.02)
        self.prompt_encoder[adapter_name] = encoder.to(self.base_model.device)
        self.prompt_tokens[adapter_name] = torch.arange(config.num_virtual_tokens)

    def _insert_prompt(self, module, inputs, tokens: torch.Tensor) -> torch.Tensor | None:
        if self._adapters_disabled:
            return None
        prompt = self.prompt_encoder[self.active_adapter].embedding.weight
        prompt = prompt.to(tokens.dtype).expand(len(tokens), -1, -1)
        return torch.cat([tokens[:, :1], prompt, tokens[:, 1:]], dim=1)

    @contextmanager
    def disable_adapter(self):
        """Runs the backbone without the prompt inside this context. PEFT's own version expects a language model."""
        was_disabled, self._adapters_disabled = self._adapters_disabled, True
        try:
            yield
        finally:
            self._adapters_disabled = was_disabled

    def unload(self) -> torch.nn.Module:
        """Takes the prompt off again and returns the backbone as it was."""
        self._hook.remove()
        return self.base_model
