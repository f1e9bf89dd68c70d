"""The methods by name. A method is a preset of one configuration, never a class of its own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..config.adapters import LARGEST_RANK
from ..config.errors import ConfigError
from ..config.model import MethodConfig


Layers = int | list[int] | None


def s_lora(
    r: int = 1,
    k: int | str = 5,
    head: str = "auto",
    route_layer: Layers = None,
    router: str = "prototypes",
    **lora: Any,
) -> MethodConfig:
    """S-LoRA: S-Prompts (arXiv 2207.12819) with LoRA in place of prompts; section 3 of arXiv 2406.03216.

    Not to be mistaken for the LLM serving system of the same name (arXiv 2311.03285).

    Args:
        r (`int`, *optional*, defaults to 1): Rank.
        k (`int` or `"auto"`, *optional*, defaults to 5): Prototypes per task.
        head, route_layer, router (*optional*): See [`MethodConfig`].
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
    return MethodConfig("s_lora", _lora(r, lora), k=k, head=head, route_layer=route_layer, router=router)


def s_lora_pp(
    r: int = 1,
    k: int | str = 5,
    head: str = "auto",
    route_layer: Layers = None,
    router: str = "prototypes",
    **lora: Any,
) -> MethodConfig:
    """S-LoRA++: S-LoRA whose query features are taken with the first task's expert; arXiv 2406.03216.

    Args:
        r, k, head, route_layer, router, lora: As for [`s_lora`].

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import s_lora_pp

    >>> s_lora_pp().query_with_first_expert
    True

    ```
    """
    return replace(s_lora(r, k, head, route_layer, router, **lora), name="s_lora_pp", query_with_first_expert=True)


def s_prompts(
    prompt_length: int = 10,
    k: int | str = 5,
    head: str = "auto",
    route_layer: Layers = None,
    router: str = "prototypes",
) -> MethodConfig:
    """S-Prompts: one prompt per task, chosen by the nearest prototype; arXiv 2207.12819.

    Args:
        prompt_length (`int`, *optional*, defaults to 10): Tokens behind [CLS].
        k (`int` or `"auto"`, *optional*, defaults to 5): Prototypes per task.
        head, route_layer, router (*optional*): See [`MethodConfig`].

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import s_prompts

    >>> s_prompts().peft
    {'peft_type': 'PROMPT_TUNING', 'num_virtual_tokens': 10}

    ```
    """
    options: dict[str, Any] = {"k": k, "head": head, "route_layer": route_layer, "router": router}
    return MethodConfig("s_prompts", _prompt(prompt_length), **options)


def s_prompts_pp(
    prompt_length: int = 10,
    k: int | str = 5,
    head: str = "auto",
    route_layer: Layers = None,
    router: str = "prototypes",
) -> MethodConfig:
    """S-Prompts++: S-Prompts whose query features are taken with the first task's prompt; arXiv 2406.03216.

    Args:
        prompt_length, k, head, route_layer, router: As for [`s_prompts`].

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import s_prompts_pp

    >>> s_prompts_pp().query_with_first_expert
    True

    ```
    """
    options = s_prompts(prompt_length, k, head, route_layer, router)
    return replace(options, name="s_prompts_pp", query_with_first_expert=True)


def l2l(
    r: int = 1, pool_size: int = 10, top_n: int = 5, pull: float = 0.5, route_layer: Layers = None, **lora: Any
) -> MethodConfig:
    """L2L: L2P with LoRA in place of prompts; section 3 of arXiv 2406.03216.

    Args:
        r (`int`, *optional*, defaults to 1): Rank of each LoRA module.
        pool_size (`int`, *optional*, defaults to 10): Experts in the pool.
        top_n (`int`, *optional*, defaults to 5): Experts that an image selects; their updates are summed.
        pull (`float`, *optional*, defaults to 0.5): Weight of the loss that pulls selected keys towards queries.
        route_layer (`int` or `list[int]`, *optional*): See [`MethodConfig`].
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
    pool: dict[str, Any] = {
        "experts": "pool",
        "pool_size": pool_size,
        "top_n": top_n,
        "pull": pull,
        "route_layer": route_layer,
    }
    return MethodConfig("l2l", _lora(r, lora), **pool)


def l2p(
    prompt_length: int = 5, pool_size: int = 10, top_n: int = 5, pull: float = 0.5, route_layer: Layers = None
) -> MethodConfig:
    """L2P: a pool of prompts shared by all tasks; arXiv 2112.08654. Classifies the mean of the prompts' outputs.

    Args:
        prompt_length (`int`, *optional*, defaults to 5): Tokens of each prompt.
        pool_size (`int`, *optional*, defaults to 10): Prompts in the pool.
        top_n (`int`, *optional*, defaults to 5): Prompts that an image selects; they stand one after another.
        pull (`float`, *optional*, defaults to 0.5): Weight of the loss that pulls selected keys towards queries.
        route_layer (`int` or `list[int]`, *optional*): See [`MethodConfig`].

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import l2p

    >>> l2p().experts, l2p().readout
    ('pool', 'prompts')

    ```
    """
    pool: dict[str, Any] = {
        "experts": "pool",
        "pool_size": pool_size,
        "top_n": top_n,
        "pull": pull,
        "route_layer": route_layer,
    }
    return MethodConfig("l2p", _prompt(prompt_length), **pool, readout="prompts")


def sequential_lora(r: int = 1, **lora: Any) -> MethodConfig:
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


def s_lora_mix(r: int = 1, mix: int = 3, route_layer: Layers = None, **lora: Any) -> MethodConfig:
    """S-LoRA-Mix: a Gaussian router, on query features of two depths, and several experts judge every image.

    Query features are taken with the first task's expert, behind the last two layers unless `route_layer` says others.
    [`GaussianRouter`] finds the likeliest tasks; the experts of the first `mix` judge the image in one pass through
    the bank, and their log-probabilities are added to the router's class scores: see [`hf_clpeft.methods.mixing`].

    Args:
        r (`int`, *optional*, defaults to 1): Rank.
        mix (`int`, *optional*, defaults to 3): Experts that judge an image.
        route_layer (`int` or `list[int]`, *optional*): Default: the last two.
        lora: As for [`s_lora`].

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import s_lora_mix

    >>> s_lora_mix().router, s_lora_mix().classifier
    ('gaussian', 'both')

    ```
    """
    options: dict[str, Any] = {"query_with_first_expert": True, "router": "gaussian", "classifier": "both", "mix": mix}
    layers = [-2, -1] if route_layer is None else route_layer
    # An expert judges among its own classes alone.
    return MethodConfig("s_lora_mix", _lora(r, lora), head="per_task", route_layer=layers, **options)


def ncm(route_layer: Layers = None) -> MethodConfig:
    """Control: nearest class mean on the frozen features, by cosine; SimpleCIL, arXiv 2303.07338. Trains nothing.

    Args:
        route_layer (`int` or `list[int]`, *optional*): See [`MethodConfig`].

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import ncm

    >>> ncm().experts, ncm().classifier
    ('none', 'router')

    ```
    """
    return _closed_form("ncm", "class_means", route_layer)


def slda(route_layer: Layers = None) -> MethodConfig:
    """Control: linear discriminant analysis of frozen features, task by task; arXiv 1909.01520.

    Args:
        route_layer (`int` or `list[int]`, *optional*): See [`MethodConfig`].

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import slda

    >>> slda().router
    'gaussian'

    ```
    """
    return _closed_form("slda", "gaussian", route_layer)


def ranpac(projection_size: int = 10_000, route_layer: Layers = None) -> MethodConfig:
    """Control: ridge regression on random projections of the frozen features; RanPAC without PEFT, arXiv 2307.02251.

    Args:
        projection_size (`int`, *optional*, defaults to 10,000): Random features; the model keeps their square.
        route_layer (`int` or `list[int]`, *optional*): See [`MethodConfig`].

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import ranpac

    >>> ranpac().projection_size
    10000

    ```
    """
    return replace(_closed_form("ranpac", "ridge", route_layer), projection_size=projection_size)


def ranpac_first(r: int = 1, projection_size: int = 10_000, route_layer: Layers = None, **lora: Any) -> MethodConfig:
    """Control: RanPAC on features with the first task's expert, as its authors have it; arXiv 2307.02251.

    Args:
        r (`int`, *optional*, defaults to 1): Rank of that expert.
        projection_size, route_layer: As for [`ranpac`].
        lora: As for [`s_lora`].

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import ranpac_first

    >>> ranpac_first().experts
    'first'

    ```
    """
    options: dict[str, Any] = {
        "projection_size": projection_size,
        "route_layer": route_layer,
        "query_with_first_expert": True,
    }
    return MethodConfig(
        "ranpac_first", _lora(r, lora), experts="first", router="ridge", classifier="router", **options
    )


def linear_probe() -> MethodConfig:
    """Control: a linear classifier on frozen features, fitted to the images of all tasks at once.

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import linear_probe

    >>> linear_probe().joint
    True

    ```
    """
    return MethodConfig("linear_probe", {}, experts="none", joint=True, head="shared", mask_logits=False)


def joint_lora(r: int = 1, **lora: Any) -> MethodConfig:
    """The ceiling: one LoRA adapter and one head, trained on the images of all tasks at once.

    Args:
        r (`int`, *optional*, defaults to 1): Rank.
        lora: Further arguments of `peft.LoraConfig`.

    Returns:
        [`MethodConfig`]

    Example:

    ```py
    >>> from hf_clpeft import joint_lora

    >>> joint_lora().experts
    'single'

    ```
    """
    return replace(sequential_lora(r, **lora), name="joint_lora", joint=True)


def _closed_form(name: str, router: str, route_layer: Layers) -> MethodConfig:
    return MethodConfig(name, {}, experts="none", router=router, classifier="router", route_layer=route_layer)


def _lora(r: int, further: dict) -> dict:
    _check_size("r", r)
    return {"peft_type": "LORA", "r": r, "lora_alpha": r, **further}


def _prompt(length: int) -> dict:
    _check_size("prompt_length", length)
    return {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": length}


def _check_size(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_RANK:
        raise ConfigError(f"{name}={value!r} must be a whole number from 1 to {LARGEST_RANK:,}.")


METHODS: dict[str, Callable[..., MethodConfig]] = {
    "s_lora": s_lora,
    "s_lora_pp": s_lora_pp,
    "s_prompts": s_prompts,
    "s_prompts_pp": s_prompts_pp,
    "l2l": l2l,
    "l2p": l2p,
    "s_lora_mix": s_lora_mix,
    "sequential_lora": sequential_lora,
    "joint_lora": joint_lora,
    "ncm": ncm,
    "slda": slda,
    "ranpac": ranpac,
    "ranpac_first": ranpac_first,
    "linear_probe": linear_probe,
}
