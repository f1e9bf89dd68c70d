"""Progress bars of other libraries."""


def disable_progress_bars(transfers: bool = True) -> None:
    """Disables the progress bars of datasets, transformers and huggingface_hub.

    Args:
        transfers (`bool`, *optional*, defaults to `True`): Also disable those of uploads and downloads.

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
