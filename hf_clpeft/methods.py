"""The methods by name. A method is a preset of one configuration, never a class of its own."""

from dataclasses import replace

from .config import MethodConfig


def s_lora(r: int = 1, k: int | str = 5, head: str = "auto", route_layer: int | None = None, **lora) -> MethodConfig:
    """S-LoRA: S-Prompts (arXiv 2207.12819) with LoRA in place of prompts; section 3 of arXiv 2406.03216.

    Not to be mistaken for the LLM serving system of the same name (arXiv 2311.03285).

    Args:
        r (`int`, *optional*, defaults to 1): Rank.
        k (`int` or `"auto"`, *optional*, defaults to 5): Prototypes per task.
        head (`str`, *optional*, defaults to `"auto"`): See [`MethodConfig`].
        route_layer (`int`, *optional*): See [`MethodConfig`].
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
    return MethodConfig("s_lora", _lora(r, lora), k=k, head=head, route_layer=route_layer)


def s_lora_pp(
    r: int = 1, k: int | str = 5, head: str = "auto", route_layer: int | None = None, **lora
) -> MethodConfig:
    """S-LoRA++: S-LoRA whose query features are taken with the first task's expert; arXiv 2406.03216.

    Args:
        r, k, head, route_layer, lora: As for [`s_lora`].

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import s_lora_pp

    >>> s_lora_pp().query_with_first_expert
    True

    ```
    """
    return replace(s_lora(r, k, head, route_layer, **lora), name="s_lora_pp", query_with_first_expert=True)


def s_prompts(
    prompt_length: int = 10, k: int | str = 5, head: str = "auto", route_layer: int | None = None
) -> MethodConfig:
    """S-Prompts: one prompt per task, chosen by the nearest prototype; arXiv 2207.12819.

    Args:
        prompt_length (`int`, *optional*, defaults to 10): Tokens behind [CLS].
        k (`int` or `"auto"`, *optional*, defaults to 5): Prototypes per task.
        head (`str`, *optional*, defaults to `"auto"`): See [`MethodConfig`].
        route_layer (`int`, *optional*): See [`MethodConfig`].

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import s_prompts

    >>> s_prompts().peft
    {'peft_type': 'PROMPT_TUNING', 'num_virtual_tokens': 10}

    ```
    """
    return MethodConfig("s_prompts", _prompt(prompt_length), k=k, head=head, route_layer=route_layer)


def s_prompts_pp(
    prompt_length: int = 10, k: int | str = 5, head: str = "auto", route_layer: int | None = None
) -> MethodConfig:
    """S-Prompts++: S-Prompts whose query features are taken with the first task's prompt; arXiv 2406.03216.

    Args:
        prompt_length, k, head, route_layer: As for [`s_prompts`].

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import s_prompts_pp

    >>> s_prompts_pp().query_with_first_expert
    True

    ```
    """
    options = s_prompts(prompt_length, k, head, route_layer)
    return replace(options, name="s_prompts_pp", query_with_first_expert=True)


def l2l(
    r: int = 1, pool_size: int = 10, top_n: int = 5, pull: float = 0.5, route_layer: int | None = None, **lora
) -> MethodConfig:
    """L2L: L2P with LoRA in place of prompts; section 3 of arXiv 2406.03216.

    Args:
        r (`int`, *optional*, defaults to 1): Rank of each LoRA module.
        pool_size (`int`, *optional*, defaults to 10): Experts in the pool.
        top_n (`int`, *optional*, defaults to 5): Experts that an image selects; their updates are summed.
        pull (`float`, *optional*, defaults to 0.5): Weight of the loss that pulls selected keys towards queries.
        route_layer (`int`, *optional*): See [`MethodConfig`].
        lora: Further arguments of `peft.LoraConfig`.

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import l2l

    >>> l2l().experts, l2l().readout
    ('pool', 'cls')

    ```
    """
    pool = {"experts": "pool", "pool_size": pool_size, "top_n": top_n, "pull": pull, "route_layer": route_layer}
    return MethodConfig("l2l", _lora(r, lora), **pool)


def l2p(
    prompt_length: int = 5, pool_size: int = 10, top_n: int = 5, pull: float = 0.5, route_layer: int | None = None
) -> MethodConfig:
    """L2P: a pool of prompts shared by all tasks; arXiv 2112.08654. Classifies the mean of the prompts' outputs.

    Args:
        prompt_length (`int`, *optional*, defaults to 5): Tokens of each prompt.
        pool_size (`int`, *optional*, defaults to 10): Prompts in the pool.
        top_n (`int`, *optional*, defaults to 5): Prompts that an image selects; they stand one after another.
        pull (`float`, *optional*, defaults to 0.5): Weight of the loss that pulls selected keys towards queries.
        route_layer (`int`, *optional*): See [`MethodConfig`].

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import l2p

    >>> l2p().experts, l2p().readout
    ('pool', 'prompts')

    ```
    """
    pool = {"experts": "pool", "pool_size": pool_size, "top_n": top_n, "pull": pull, "route_layer": route_layer}
    return MethodConfig("l2p", _prompt(prompt_length), **pool, readout="prompts")


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

    >>> sequential_lora().experts
    'single'

    ```
    """
    return MethodConfig("sequential_lora", _lora(r, lora), experts="single", head="shared", mask_logits=False)


def _lora(r: int, further: dict) -> dict:
    return {"peft_type": "LORA", "r": r, "lora_alpha": r, **further}


def _prompt(length: int) -> dict:
    return {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": length}


METHODS = {
    "s_lora": s_lora,
    "s_lora_pp": s_lora_pp,
    "s_prompts": s_prompts,
    "s_prompts_pp": s_prompts_pp,
    "l2l": l2l,
    "l2p": l2p,
    "sequential_lora": sequential_lora,
}
