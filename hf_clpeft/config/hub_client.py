"""The client of the Hub, made in one place, so that all requests name this library as their user agent."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from huggingface_hub import HfApi


def hub_client(token: str | bool | None = None) -> "HfApi":
    """A client of the Hub.

    Args:
        token (`str` or `bool`, *optional*): Access token; default: the one saved by `hf auth login`.

    Example:

    ```py
    >>> from hf_clpeft.config.hub_client import hub_client

    >>> hub_client().library_name
    'hf-clpeft'

    ```
    """
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="hf-clpeft")
