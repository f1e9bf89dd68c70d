"""Progress bars of the libraries underneath."""


def disable_progress_bars(transfers: bool = True) -> None:
    """Lets data sets load, models load and files travel in silence.

    Args:
        transfers (`bool`, *optional*, defaults to `True`): Disable those of down- and uploads, too.

    Example:

    ```py
    >>> from hf_clpeft.training.progress import disable_progress_bars

    >>> disable_progress_bars()

    ```
    """
    import datasets
    import huggingface_hub.utils
    from transformers.utils import logging

    datasets.disable_progress_bars()
    if transfers:
        huggingface_hub.utils.disable_progress_bars()
    logging.disable_progress_bar()
