"""The allowlist of PEFT configurations: techniques that work on a frozen backbone, with their options and bounds.

Whatever PEFT has besides would modify the backbone that all experts share, cannot be saved and loaded again, or lets a
config of a few bytes cost hours or gigabytes. Imports nothing heavy, not even PEFT.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .errors import ConfigError


LARGEST_RANK = 4096  # also the largest prompt length and block size
MOST_NAMES = 1000  # modules in a list, or in a mapping such as rank_pattern
MOST_WAYS = 1_000_000  # of matching a configuration's patterns against a name, in the worst case


class Rule(NamedTuple):
    """The values allowed for an option.

    Args:
        says (`str`): The rule in words.
        fits (callable): Whether a value is allowed.
    """

    says: str
    fits: Callable[[Any], bool]


def check_peft(arguments: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Validates an adapter's options against the allowlist, and drops those that are unset or without effect.

    Args:
        arguments (`dict`): `peft_type` and its options, from a user or from an untrusted `adapter_config.json`. `None`
            counts as unset.
        defaults (`dict`, *optional*): PEFT's own defaults, if PEFT is imported. Options outside the
            allowlist must equal them.

    Returns:
        `dict`: The options to use.

    Raises:
        [`ConfigError`]: The technique does not work here, an option is not allowed, or its value is out of bounds.

    Example:

    ```py
    >>> from hf_clpeft.config.adapters import check_peft

    >>> check_peft({"peft_type": "LORA", "r": 4, "bias": "none", "modules_to_save": None})
    {'peft_type': 'LORA', 'r': 4, 'bias': 'none'}
    >>> check_peft({"peft_type": "LORA", "r": 1, "bias": "all"})
    Traceback (most recent call last):
        ...
    hf_clpeft.config.errors.ConfigError: bias='all' trains biases of the backbone...

    ```
    """
    technique = arguments.get("peft_type")
    if not isinstance(technique, str):
        raise ConfigError("peft needs a 'peft_type', for example {'peft_type': 'LORA', 'r': 1}.")
    if technique not in TECHNIQUES:
        raise ConfigError(_refusal_of(technique))
    rules = {**_PROVENANCE, **TECHNIQUES[technique]}
    allowed = {}
    for option, value in arguments.items():
        if value is None or option in _WITHOUT_EFFECT:
            continue
        if option in rules:
            if not rules[option].fits(value):
                reason = _REASONS.get(option, f"must be {rules[option].says}.")
                raise ConfigError(f"{option}={_shown(value)} {reason}")
            if defaults is None or option in defaults:
                allowed[option] = value
            elif value:
                raise ConfigError(f"{option}={_shown(value)} needs a newer PEFT; try `pip install --upgrade peft`.")
        elif not _is_default(option, value, defaults):
            near = difflib.get_close_matches(str(option), [*rules, *(defaults or {})], n=1)
            hint = f" Do you mean {near[0]}?" if near and near[0] != option else ""
            reason = _REASONS.get(option, f"is no option of {technique} that an expert may have.{hint}")
            raise ConfigError(f"{_shown(option, quoted=False)}={_shown(value)} {reason}")
    patterns = [text for option in _PATTERNS for text in _patterns_in(allowed.get(option))]
    if sum(ways_to_match(pattern) for pattern in patterns) > MOST_WAYS:
        raise ConfigError(f"The patterns {_shown(patterns)} are too many, or could match in too many ways.")
    return allowed


def ways_to_match(pattern: str) -> int:
    """An upper bound of the steps in which a regular expression can backtrack on a module's name.

    Patterns that could take exponential time are refused: groups may not repeat, and there are no backreferences. A
    plain name is a pattern, too.

    Raises:
        [`ConfigError`]: It is not a regular expression, or has more than names, character classes, `|`, and `*`, `+`,
            `?` or `{}` after a single character, or `?` after a group.

    Example:

    ```py
    >>> from hf_clpeft.config.adapters import ways_to_match

    >>> ways_to_match(r"layers\\.[0-5]\\.attention\\.(q|v)_proj") < 1000
    True
    >>> ways_to_match("(a+)+")
    Traceback (most recent call last):
        ...
    hf_clpeft.config.errors.ConfigError: The pattern '(a+)+' repeats a group, which can take exponential time...

    ```
    """
    stars, factor, position, before = 1, 1, 0, ""  # PEFT prepends .* to most
    alternatives = [1]
    while position < len(pattern):
        token = _TOKEN.match(pattern, position) if len(pattern) <= 500 else None
        if token is None or (token.lastgroup == "repeat" and before not in ("char", "close")):
            raise ConfigError(
                f"The pattern {_shown(pattern)} is too long, or has more in it than names, [classes], (groups|or), . "
                "* + ? {}."
            )
        kind, position = str(token.lastgroup), token.end()
        if kind == "repeat" and token.group() in ("?", "??"):
            factor *= 2
        elif kind == "repeat" and before == "close":
            raise ConfigError(
                f"The pattern {_shown(pattern)} repeats a group, which can take exponential time; repeat characters."
            )
        elif kind == "repeat":
            stars += 1
        elif kind == "or":
            alternatives[-1] += 1
        elif kind == "open":
            alternatives.append(1)
        elif kind == "close" and len(alternatives) > 1:
            factor *= alternatives.pop()
        before = kind
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"The pattern {_shown(pattern)} is not a regular expression: {error}.") from error
    return math.comb(64 + stars, stars) * factor * alternatives[0]  # names have about 64 characters


_TOKEN = re.compile(
    r"(?P<open>\((\?:)?)|(?P<close>\))|(?P<or>\|)|(?P<repeat>([*+?]|\{\d{0,3}(,\d{0,3})?\})\??)"
    r"|(?P<char>\\[dw.]|\[\^?([\w.-]|\\[dw.-])+\]|[\w.-])|(?P<edge>[\^$])"
)


def _refusal_of(technique: str) -> str:
    for techniques, reason in _UNSUPPORTED.items():
        if technique in techniques:
            return f"{technique} {reason}"
    near = difflib.get_close_matches(technique.upper(), TECHNIQUES, n=1)
    hint = f"Do you mean {near[0]}?" if near else f"Choose one of {', '.join(TECHNIQUES)}."
    return f"peft_type={_shown(technique)} is none of the PEFT techniques that work here. {hint}"


def _is_default(option: str, value: Any, defaults: Mapping[str, Any] | None) -> bool:
    """Whether an option outside the allowlist is at its default."""
    if defaults is not None and option in defaults:
        return bool(value == defaults[option]) or (not value and not defaults[option])
    return value is False or (isinstance(value, list | dict | str) and not value)


def _shown(value: Any, quoted: bool = True) -> str:
    text = repr(value) if quoted else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _patterns_in(value: Any) -> list[str]:
    """The patterns in a checked option; the names in a list are compared literally by PEFT."""
    return [value] if isinstance(value, str) else [*value] if isinstance(value, dict) else []


# Rules


def _whole(low: int, high: int) -> Rule:
    return Rule(f"a whole number from {low:,} to {high:,}", lambda v: type(v) is int and low <= v <= high)


def _number(low: float, high: float) -> Rule:
    return Rule(f"a number from {low:,} to {high:,}", lambda v: type(v) in (int, float) and low <= v <= high)


def _one_of(*values: Any) -> Rule:
    return Rule(f"one of {', '.join(map(repr, values))}", lambda v: any(type(v) is type(c) and v == c for c in values))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.-]{1,256}", value) is not None


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple | set) and len(value) <= MOST_NAMES and all(map(_is_name, value))


def _for_each(rule: Rule) -> Rule:
    def fits(value: Any) -> bool:
        if not isinstance(value, dict) or len(value) > MOST_NAMES:
            return False
        return all(isinstance(name, str) and rule.fits(inner) for name, inner in value.items())

    return Rule(f"a mapping of up to {MOST_NAMES:,} modules, each to {rule.says}", fits)


def _are_layers(value: Any) -> bool:
    numbers = value if isinstance(value, list | tuple) else [value]
    return len(numbers) <= MOST_NAMES and all(type(number) is int and 0 <= number < MOST_NAMES for number in numbers)


def _are_rising(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and _are_layers(value) and value == sorted(set(value))


_TEXT = Rule("a string", lambda v: isinstance(v, str) and len(v) <= 4096)
_TRUTH = Rule("True or False", lambda v: isinstance(v, bool))
_MODULES = Rule(
    f"a list of up to {MOST_NAMES:,} names of modules, a pattern for their names, or 'all-linear'",
    lambda v: isinstance(v, str) or _are_names(v),
)
_RANK, _SIZE = _whole(1, LARGEST_RANK), _whole(0, LARGEST_RANK)
_FACTOR, _SHARE, _COUNT, _SEED = _number(0, 1e6), _number(0, 1), _whole(1, 10_000_000), _whole(0, 2**32 - 1)

_PROVENANCE = {
    "peft_type": _TEXT,
    "peft_version": _TEXT,
    "task_type": _TEXT,
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "inference_mode": _TRUTH,
}
# Without effect on a vision model, or without the option that they depend on.
_WITHOUT_EFFECT = {"auto_mapping", "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"}
_PATTERNS = (
    "target_modules",
    "exclude_modules",
    "feedforward_modules",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "lambda_pattern",
)

_ON_LAYERS = {
    "target_modules": _MODULES,
    "exclude_modules": _MODULES,
    "layers_to_transform": Rule("the index of a layer, or a list of them", _are_layers),
    "layers_pattern": Rule("a name or pattern", lambda v: isinstance(v, str) or (_are_names(v) and len(v) <= 10)),
    "bias": _one_of("none"),
    "init_weights": _TRUTH,
}
_LORA = {
    **_ON_LAYERS,
    "r": _RANK,
    "lora_alpha": _FACTOR,
    "lora_dropout": _SHARE,
    "use_rslora": _TRUTH,
    "init_lora_weights": _one_of(True, False, "gaussian", "orthogonal"),
}
_LYCORIS = {
    **_ON_LAYERS,
    "r": _RANK,
    "alpha": _FACTOR,
    "rank_dropout": _SHARE,
    "module_dropout": _SHARE,
    "use_effective_conv2d": _TRUTH,
    "rank_pattern": _for_each(_RANK),
    "alpha_pattern": _for_each(_FACTOR),
}
_PROJECTED = {**_ON_LAYERS, "r": _RANK, "projection_prng_key": _SEED, "save_projection": _TRUTH}

TECHNIQUES: dict[str, dict[str, Rule]] = {
    "LORA": {
        **_LORA,
        "use_dora": _TRUTH,
        "lora_bias": _TRUTH,
        "rank_pattern": _for_each(_RANK),
        "alpha_pattern": _for_each(_FACTOR),
    },
    "PROMPT_TUNING": {
        "num_virtual_tokens": _RANK,
        "token_dim": _whole(1, 65536),
        "num_transformer_submodules": _SIZE,
        "num_attention_heads": _SIZE,
        "num_layers": _SIZE,
        "prompt_tuning_init": _one_of("RANDOM"),
    },
    "PREFIX_TUNING": {
        "num_virtual_tokens": _RANK,
        "layers_to_transform": Rule("a list of rising indices of layers", _are_rising),
        "token_dim": _whole(1, 65536),
        "num_transformer_submodules": _SIZE,
        "num_attention_heads": _SIZE,
        "num_layers": _whole(1, MOST_NAMES),
        "encoder_hidden_size": _whole(1, 65536),  # without prefix_projection, without effect
        "init_weights": _one_of("zero"),
    },
    "ADALORA": {
        **_LORA,
        "init_r": _RANK,
        "target_r": _RANK,
        "tinit": _whole(0, 10**9),
        "tfinal": _whole(0, 10**9),
        "deltaT": _whole(1, 10**9),
        "total_step": _whole(1, 10**9),
        "beta1": _SHARE,
        "beta2": _SHARE,
        "orth_reg_weight": _FACTOR,
    },
    "BEFT": _ON_LAYERS,
    "BOFT": {
        **_ON_LAYERS,
        "boft_block_size": _SIZE,
        "boft_block_num": _SIZE,
        "boft_n_butterfly_factor": _whole(1, 8),
        "boft_dropout": _SHARE,
    },
    "C3A": {
        **_ON_LAYERS,
        "block_size": _RANK,
        "init_weights": _one_of(True, False, "gaussian", "kaiming_uniform", "xavier_uniform"),
    },
    "DEFT": {
        **_ON_LAYERS,
        "r": _RANK,
        "decomposition_method": _one_of("relu", "qr"),
        "init_scale": _FACTOR,
        "alpha": _whole(0, 10**6),
        "para": _TRUTH,
        "deft_dropout": _SHARE,
    },
    "DELORA": {
        **_ON_LAYERS,
        "r": _RANK,
        "delora_lambda": _FACTOR,
        "module_dropout": _SHARE,
        "rank_pattern": _for_each(_RANK),
        "lambda_pattern": _for_each(_FACTOR),
    },
    "FOURIERFT": {**_ON_LAYERS, "n_frequency": _COUNT, "scaling": _FACTOR, "random_loc_seed": _SEED},
    "GLORA": {
        **_ON_LAYERS,
        "r": _RANK,
        "config_A_B": _one_of("lora", "vector", "constant", "none"),
        "config_C": _one_of("lora", "vector", "none"),
        "config_D_E": _one_of("vector", "constant", "none"),
    },
    "GRALORA": {
        **_ON_LAYERS,
        "r": _RANK,
        "hybrid_r": _SIZE,
        "alpha": _FACTOR,
        "gralora_dropout": _SHARE,
        "gralora_k": _RANK,
    },
    "HIRA": {**_ON_LAYERS, "r": _RANK, "hira_dropout": _SHARE, "rank_pattern": _for_each(_RANK)},
    "HRA": {**_ON_LAYERS, "r": _RANK, "apply_GS": _TRUTH},
    "IA3": {**_ON_LAYERS, "feedforward_modules": _MODULES, "init_ia3_weights": _TRUTH},
    "LILY": {**_ON_LAYERS, "r": _RANK, "stride_A": _RANK, "num_B": _RANK, "scaling": _FACTOR},
    "LN_TUNING": _ON_LAYERS,
    "LOHA": _LYCORIS,
    "LOKR": {
        **_LYCORIS,
        "decompose_both": _TRUTH,
        "decompose_factor": _whole(-1, LARGEST_RANK),
        "rank_dropout_scale": _TRUTH,
    },
    "MISS": {
        **_ON_LAYERS,
        "r": _RANK,
        "miss_dropout": _SHARE,
        "mini_r": _RANK,
        "init_weights": _one_of(True, False, "bat"),
    },
    "OFT": {
        **_ON_LAYERS,
        "r": _SIZE,
        "oft_block_size": _SIZE,
        "module_dropout": _SHARE,
        "coft": _TRUTH,
        "eps": _SHARE,
        "block_share": _TRUTH,
        "use_cayley_neumann": _TRUTH,
        "num_cayley_neumann_terms": _whole(1, 100),
    },
    "PEANUT": {
        **_ON_LAYERS,
        "r": _RANK,
        "depth": _whole(0, 16),
        "act_fn": _one_of("relu", "gelu", "silu", "tanh", "sigmoid"),
        "scaling": _FACTOR,
    },
    "PSOFT": {
        **_ON_LAYERS,
        "r": _RANK,
        "psoft_alpha": _FACTOR,
        "psoft_dropout": _SHARE,
        "psoft_svd": _one_of("full", "lowrank"),
        "psoft_svd_lowrank_niter": _whole(1, 100),
        "random_seed": _SEED,
        "psoft_orth": _TRUTH,
        "psoft_mag_a": _TRUTH,
        "psoft_mag_b": _TRUTH,
        "use_cayley_neumann": _TRUTH,
        "num_cayley_neumann_terms": _whole(1, 100),
        "cayley_neumann_eps": _SHARE,
    },
    "RANDLORA": {
        **_PROJECTED,
        "sparse": _TRUTH,
        "very_sparse": _TRUTH,
        "randlora_dropout": _SHARE,
        "randlora_alpha": _FACTOR,
    },
    "ROAD": {**_ON_LAYERS, "variant": _one_of("road_1", "road_2", "road_4"), "group_size": _RANK},
    "SHIRA": {**_ON_LAYERS, "r": _RANK, "mask_type": _one_of("random"), "random_seed": _SEED},
    "TINYLORA": {
        **_ON_LAYERS,
        "r": _RANK,
        "u": _RANK,
        "weight_tying": _SHARE,
        "projection_seed": _SEED,
        "save_projection": _TRUTH,
        "init_v_bound": _FACTOR,
        "tinylora_dropout": _SHARE,
    },
    "VBLORA": {
        **_ON_LAYERS,
        "r": _RANK,
        "num_vectors": _COUNT,
        "vector_length": _COUNT,
        "topk": _RANK,
        "vblora_dropout": _SHARE,
        "init_vector_bank_bound": _FACTOR,
        "init_logits_std": _FACTOR,
    },
    "VERA": {**_PROJECTED, "vera_dropout": _SHARE, "d_initial": _FACTOR},
    "WAVEFT": {
        **_ON_LAYERS,
        "n_frequency": _COUNT,
        "scaling": _FACTOR,
        "wavelet_family": Rule("the name of a wavelet", lambda v: _is_name(v) and len(v) <= 16),
        "use_idwt": _TRUTH,
        "random_loc_seed": _SEED,
        "proportional_parameters": _TRUTH,
    },
}
"""The PEFT techniques that work here, each with the options that an expert may have."""

_UNSUPPORTED = {
    ("P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT"): (
        "is made for language models, and does not work on a vision backbone. Choose PROMPT_TUNING, PREFIX_TUNING or "
        "LORA."
    ),
    ("TRAINABLE_TOKENS",): "trains word embeddings, which a vision backbone does not have. Choose LORA.",
    ("SUPERTUNING", "FROD"): (
        "trains single weights and saves their indices as integer tensors, which are not loaded here. Choose LORA or "
        "SHIRA."
    ),
    ("XLORA", "POLY", "SHADOW"): (
        "needs more than an image as input: other adapters, a task id, or a second model. Choose LORA."
    ),
    ("OSF", "ADAMSS", "UNILORA"): (
        "decomposes the backbone's weights, or cannot be validated before it allocates memory. Choose LORA or PSOFT."
    ),
    ("PVERA",): "samples at random, so that predictions are not reproducible. Choose VERA.",
}
_REASONS = {
    "bias": "trains biases of the backbone, which all experts share; leave it out.",
    "init_lora_weights": (
        "modifies weights of the backbone, which all experts share; leave it out, or choose one of True, False, "
        "'gaussian', 'orthogonal'."
    ),
    "modules_to_save": "trains whole modules, which would replace the backbone's for all experts; leave it out.",
    "layer_replication": "rebuilds the backbone, which all experts share; leave it out.",
    "target_parameters": "adapts weights outside of layers, which cannot be detached again; use target_modules.",
    "trainable_token_indices": "trains word embeddings, which a vision backbone does not have; leave it out.",
    "prefix_projection": "trains a network of which PEFT saves only what it gives; leave it out.",
    "loftq_config": "quantises the backbone, which all experts share; leave it out.",
}
