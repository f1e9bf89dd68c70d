"""Progress bars of the libraries underneath."""


def disable_progress_bars() -> None:
    """Lets data sets load, models load and files travel in silence.

    Example:

    ```py
    >>> from hf_clpeft.progress import disable_progress_bars

    >>> disable_progress_bars()

    ```
    """
    import datasets
    import huggingface_hub.utils
    from transformers.utils import logging

    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    logging.disable_progress_bar()
