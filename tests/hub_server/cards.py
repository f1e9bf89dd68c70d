"""What the Hub says of the metadata of a README."""

import math
import re
from collections.abc import Iterator

import yaml


LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsl-1.0 cc cc-by-2.0
    cc-by-3.0 cc-by-4.0 cc-by-nc-4.0 cc-by-nc-nd-4.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0
    cdla-permissive-2.0 creativeml-openrail-m ecl-2.0 epl-2.0 eupl-1.1 gemma gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1
    lgpl-3.0 llama2 llama3 llama3.1 llama3.2 mit mpl-2.0 ms-pl odbl openrail openrail++ osl-3.0 other pddl unknown
    unlicense wtfpl zlib
""".split()
METRIC = {"type": str, "value": int | float | str}
RESULT = {"task": {"type": str}, "dataset": {"type": str, "name": str}, "metrics": [METRIC]}
CARD = {  # what the metadata of a card must look like, besides `license` and `base_model`; any of it may be missing
    **{"datasets": [str], "tags": [str], "library_name": str, "pipeline_tag": str},
    "model-index": [{"name": str, "results": [RESULT]}],
}
YAML_BLOCK = re.compile(r"\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")


def read_card(content: str) -> dict:
    block = YAML_BLOCK.match(content)
    try:
        card = (yaml.safe_load(block[1]) if block else None) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"YAML of the card cannot be read: {error}") from error
    if not isinstance(card, dict):
        raise ValueError("YAML of the card must be a mapping")
    return card


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the metadata in the text of a README.md, much like the Hub's."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        card = read_card(content)
    except ValueError as error:
        return [str(error)], []
    if not card:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [error for key in CARD.keys() & card.keys() for error in _mismatches(card[key], CARD[key], key)]
    for name in listed(card, "license"):
        if name not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(LICENSES)}], not "{name}"')
    for base_model in listed(card, "base_model"):
        try:
            validate_repo_id(base_model)
        except HFValidationError:
            errors.append(f'"base_model" with value "{base_model}" is not valid. Use a model id from the Hub.')
    return sorted(errors), []


def listed(card: dict, key: str) -> list:
    values = card.get(key, [])
    return values if isinstance(values, list) else [values]


def _mismatches(value: object, form, where: str) -> Iterator[str]:
    """What is wrong with a value, where the form is a type, a list with the form of elements, or a dict of forms."""
    if isinstance(form, dict) and isinstance(value, dict):
        for key, part in form.items():
            if key in value:
                yield from _mismatches(value[key], part, f"{where}.{key}")
            else:
                yield f'"{where}.{key}" is required'
    elif isinstance(form, list) and isinstance(value, list):
        for number, element in enumerate(value):
            yield from _mismatches(element, form[0], f"{where}[{number}]")
    elif isinstance(form, dict | list):
        yield f'"{where}" must be {"an object" if isinstance(form, dict) else "an array"}'
    elif not isinstance(value, form) or isinstance(value, bool) or (type(value) is float and not math.isfinite(value)):
        yield f'"{where}" must be {"a string" if form is str else "a number or a string"}'
