"""The methods by name. A method is a preset of one configuration, never a class of its own."""

from .config import MethodConfig


def s_lora(r: int = 1, k: int = 5, head: str = "auto", **lora) -> MethodConfig:
    """S-LoRA: S-Prompts (arXiv 2207.12819) with LoRA in place of prompts; section 3 of arXiv 2406.03216.

    Not to be mistaken for the LLM serving system of the same name (arXiv 2311.03285).

    Args:
        r (`int`, *optional*, defaults to 1): Rank.
        k (`int`, *optional*, defaults to 5): Prototypes per task.
        head (`str`, *optional*, defaults to `"auto"`): See [`MethodConfig`].
        lora: Further arguments of `peft.LoraConfig`. `lora_alpha` is `r` unless given, so that updates are unscaled.

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import s_lora

    >>> s_lora(r=4).peft
    {'peft_type': 'LORA', 'r': 4, 'lora_alpha': 4}

    ```
    """
    return MethodConfig("s_lora", {"peft_type": "LORA", "r": r, "lora_alpha": r, **lora}, k=k, head=head)


def s_prompts(prompt_length: int = 10, k: int = 5, head: str = "auto") -> MethodConfig:
    """S-Prompts: one prompt per task, chosen by the nearest prototype; arXiv 2207.12819.

    Args:
        prompt_length (`int`, *optional*, defaults to 10): Tokens behind [CLS].
        k (`int`, *optional*, defaults to 5): Prototypes per task.
        head (`str`, *optional*, defaults to `"auto"`): See [`MethodConfig`].

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import s_prompts

    >>> s_prompts().peft
    {'peft_type': 'PROMPT_TUNING', 'num_virtual_tokens': 10}

    ```
    """
    return MethodConfig(
        "s_prompts", {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": prompt_length}, k=k, head=head
    )


def sequential_lora(r: int = 1, **lora) -> MethodConfig:
    """The forgetting floor: one LoRA adapter and one head, fine-tuned on every task in turn, nothing masked.

    Args:
        r (`int`, *optional*, defaults to 1): Rank.
        lora: Further arguments of `peft.LoraConfig`.

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import sequential_lora

    >>> sequential_lora().expert_per_task
    False

    ```
    """
    peft = {"peft_type": "LORA", "r": r, "lora_alpha": r, **lora}
    return MethodConfig("sequential_lora", peft, k=1, head="shared", expert_per_task=False, mask_logits=False)


METHODS = {"s_lora": s_lora, "s_prompts": s_prompts, "sequential_lora": sequential_lora}
