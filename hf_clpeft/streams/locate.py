"""Locates a data set and its splits: in memory, in a folder, or on the Hub."""

import glob
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.config import HF_DATASETS_CACHE
from datasets.data_files import get_data_patterns
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config.hub_client import hub_client
from ..config.hub_errors import CLIENT_ERRORS, HfHubHTTPError, RepositoryNotFoundError, answer_in_words
from ..config.text import get_logger
from .folders import SPLIT_WORDS, PictureFolder, find_metadata, find_pictures, holds_data, is_picture, list_files
from .source import ImageSource, StreamError


logger = get_logger(__name__)

AnyDataset: TypeAlias = str | Path | Dataset | IterableDataset | DatasetDict | IterableDatasetDict
README = "README.md"
TIMEOUT = 10  # seconds to wait for an answer to whether there is a data set
NOT_HERE = "There is no such folder here."
TEST_WORDS = ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev")


@dataclass
class LocatedDataset:
    """A located data set whose splits can be opened.

    Args:
        name (`str`): Name for error messages.
        splits (`list[str]`): Names of its splits.
        open (callable): Opens a split by name, streamed or not.
        reopen (callable, *optional*): Streams a split by name with only some `columns` or the rows that pass
            `filters`; for Parquet files only.
    """

    name: str
    splits: list[str]
    open: Callable[[str, bool], Dataset | IterableDataset]
    reopen: Callable[..., IterableDataset] | None = None

    @property
    def test_splits(self) -> list[str]:
        """Candidate test splits, in order of preference."""
        rank = {word: number for number, word in enumerate(TEST_WORDS)}
        return sorted((split for split in self.splits if split.lower() in rank), key=lambda split: rank[split.lower()])

    def source(self, split: str, streaming: bool = False, **columns: Any) -> ImageSource:
        """Opens one split.

        Args:
            split (`str`): Its name, or a slice or sum of splits in the syntax of `datasets`.
            streaming (`bool`, *optional*, defaults to `False`): Stream rows instead of downloading the data set.
            columns: `image_column`, `label_column`, `domain_column`.

        Raises:
            [`StreamError`]: It cannot be opened, or has no image and label columns.
        """
        with _as_stream_error(f"Data set {self.name!r}, split {split!r}"):
            rows = self.open(split, streaming)
        reopen = partial(self.reopen, split) if self.reopen is not None and streaming else None
        return ImageSource(rows, self.name, split, **columns, reopen=reopen)


def locate_dataset(
    dataset: AnyDataset, name: str | None = None, revision: str | None = None, named: Collection[str] = ()
) -> LocatedDataset:
    """Locates a data set: on the Hub, in a folder, or in memory.

    Args:
        dataset (`str`, `Path`, `Dataset`, `DatasetDict` or iterable ones): Hub id, folder or loaded data set.
        name (`str`, *optional*): Configuration of the data set.
        revision (`str`, *optional*): Commit of the data set's repo.
        named (collection of `str`, *optional*): Splits requested by the user.

    Raises:
        [`StreamError`]: It does not exist or cannot be read.

    Example:

    ```py
    >>> from datasets import Dataset, DatasetDict
    >>> from hf_clpeft.streams.locate import locate_dataset

    >>> splits = DatasetDict(train=Dataset.from_dict({}), valid=Dataset.from_dict({}))
    >>> locate_dataset(splits).test_splits
    ['valid']

    ```
    """
    if isinstance(dataset, Dataset | IterableDataset):
        return _in_memory(type(dataset).__name__, {"train": dataset})
    if isinstance(dataset, Mapping):
        return _in_memory(type(dataset).__name__, {str(split): rows for split, rows in dataset.items()})
    if not isinstance(dataset, str | Path):
        raise StreamError(
            f"A {type(dataset).__name__} is not a data set: pass a Hub id, a folder, or a `datasets."
            "Dataset` or `DatasetDict`, created for example with `Dataset.from_dict` or `Dataset.from_pandas`."
        )
    folder = Path(dataset).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise StreamError(
                f"{str(dataset)!r} is a file. Pass the folder of images or Parquet files that contains it."
            )
        _check_id(str(dataset), revision)
        return _on_hub(str(dataset), name, revision, named)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        with _as_stream_error(f"Data set {str(dataset)!r}"):
            return locate_dataset(load_from_disk(folder))
    return _in_folder(folder, str(dataset), name, named)


def _check_id(name: str, revision: str | None) -> None:
    """Raises an error at once for what cannot be on the Hub: `datasets` would try for half a minute."""
    path = name.startswith((".", "/", "~")) or name.count("/") > 1
    try:
        validate_repo_id(name)
    except HFValidationError:
        path = True
    if path:
        raise StreamError(f"There is no folder {name!r}, and it is not a valid Hub id.")
    kept = (f"{HF_DATASETS_CACHE}/{name}", f"{constants.HF_HUB_CACHE}/datasets--{name}")
    if "/" in name or any(map(os.path.isdir, kept)):
        return
    try:  # a few data sets of old have an id without a slash
        hub_client().dataset_info(name, revision=revision, timeout=TIMEOUT)
    except GatedRepoError:
        return
    except RepositoryNotFoundError as error:
        raise StreamError(f"{name!r} is neither a folder of images nor a data set on the Hub. {NOT_HERE}") from error
    except HfHubHTTPError:  # which is explained where the data set is asked for
        return
    except (*CLIENT_ERRORS, ConnectionError, TimeoutError) as error:
        reason = f"the Hub cannot be asked for a data set of this name ({type(error).__name__})"
        raise StreamError(f"There is no folder {name!r} here, and {reason}.") from error


def load_source(
    dataset: AnyDataset,
    split: str,
    name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    **columns: Any,
) -> ImageSource:
    """Opens one split of a data set: a Hub id, a folder of Parquet files, an ImageFolder, or a loaded data set.

    Args:
        dataset (`str`, `Path`, `Dataset`, `DatasetDict` or iterable ones): Hub id, folder or loaded data set.
        split (`str`): Name of the split.
        name (`str`, *optional*): Configuration of the data set.
        revision (`str`, *optional*): Commit of the data set's repo.
        streaming (`bool`, *optional*, defaults to `False`): Stream rows instead of downloading the data set.
        columns: `image_column`, `label_column`, `domain_column`.

    Returns:
        [`ImageSource`]

    Example:

    ```py
    >>> from datasets import Dataset, DatasetDict
    >>> from PIL import Image
    >>> from hf_clpeft.streams.locate import load_source

    >>> rows = {"image": [Image.new("RGB", (8, 8))] * 2, "label": [0, 1]}
    >>> load_source(DatasetDict(train=Dataset.from_dict(rows)), "train").title
    "data set 'DatasetDict', split 'train'"

    ```
    """
    return locate_dataset(dataset, name, revision, [split]).source(split, streaming, **columns)


def _in_memory(name: str, splits: Mapping[str, Any]) -> LocatedDataset:
    def open_split(split: str, streaming: bool) -> Dataset | IterableDataset:
        if split not in splits:
            raise StreamError(f"The data set has no split {split!r}; its splits are {list(splits)}.")
        return splits[split]

    wrong = next((split for split, rows in splits.items() if not isinstance(rows, Dataset | IterableDataset)), None)
    if wrong is not None:
        raise StreamError(f"Split {wrong!r} is a {type(splits[wrong]).__name__}, not a `datasets.Dataset`.")
    return LocatedDataset(name, list(splits), open_split)


def _in_folder(folder: Path, name: str, config: str | None, named: Collection[str]) -> LocatedDataset:
    files = list_files(folder)
    pictures = any(map(is_picture, files))
    metadata, configured = find_metadata(files), _has_configs(folder / README)
    if metadata and not configured and not holds_data(set(files) - set(metadata)):
        return _from_library(name, "imagefolder", data_files=_split_metadata(folder, metadata))[0]
    if pictures and not metadata and not configured and not holds_data(files):
        return _of_pictures(name, find_pictures(str(folder), files, named))
    if all(file.endswith("/") for file in files):
        raise StreamError(
            f"The folder {name!r} is empty: put the pictures of each class into a folder with its name, "
            f"{name}/robin/1.jpg."
        )
    path = str(folder)
    options: dict[str, Any] = {"config": config}
    if glob.has_magic(path):  # `datasets` would expand it as a pattern
        place = glob.escape(str(folder.resolve()))
        with _as_stream_error(f"Data set {name!r}"):
            patterns = get_data_patterns(place)
        options = {"data_files": {split: [f"{place}/{one}" for one in found] for split, found in patterns.items()}}
        path = "parquet"
    opened, builder = _from_library(name, path, **options)
    if isinstance(builder, ImageFolder) and pictures and not metadata and not configured:
        return _of_pictures(name, find_pictures(str(folder), files, named))
    return opened


def _split_metadata(folder: Path, metadata: list[str]) -> dict[str, list[str]]:
    """File patterns by split, if all folders with metadata are below folders named like splits; else one `train`."""
    splits: dict[str, list[str]] = {}
    for path in metadata:
        above = path.split("/")[:-1]
        depth = next((i for i, part in enumerate(above, start=1) if part.lower() in SPLIT_WORDS), None)
        if depth is None:
            return {"train": [f"{glob.escape(str(folder.resolve()))}/**"]}
        pattern = glob.escape(str(folder.resolve().joinpath(*above[:depth]))) + "/**"
        patterns = splits.setdefault(SPLIT_WORDS[above[depth - 1].lower()], [])
        patterns += [pattern] if pattern not in patterns else []
    return splits


def _has_configs(readme: Path) -> bool:
    """Whether the data set card maps files to splits with `configs`."""
    from huggingface_hub import DatasetCard

    try:
        return bool(readme.is_file() and DatasetCard.load(readme).data.get("configs"))
    except ValueError:  # no card, or an invalid one
        return False


def _of_pictures(name: str, found: PictureFolder, download: Callable[[], str] | None = None) -> LocatedDataset:
    """An ImageFolder; that of a repo is downloaded on first access."""

    def open_split(split: str, streaming: bool) -> Dataset | IterableDataset:
        here = found if download is None or streaming else replace(found, root=download())
        return here.open(split, streaming)

    return LocatedDataset(name, list(found.splits), open_split)


def _from_library(name: str, path: str, config: str | None = None, **options: Any) -> tuple[LocatedDataset, Any]:
    """Locates a data set with `datasets`, and returns the builder as well."""
    options["name"] = config
    with _as_stream_error(f"Data set {name!r}", NOT_HERE if "revision" in options else ""):
        builder: Any = load_dataset_builder(path, **options)
    splits = [str(split) for split in builder.info.splits or builder.config.data_files or ()]

    def open_split(split: str, streaming: bool, **parts: Any) -> Any:
        return load_dataset(path, split=split, streaming=streaming, **options, **parts)

    reopen = partial(open_split, streaming=True) if isinstance(builder, Parquet) else None
    return LocatedDataset(name, splits, open_split, reopen), builder


def _on_hub(repo: str, config: str | None, revision: str | None, named: Collection[str]) -> LocatedDataset:
    try:
        located, builder = _from_library(repo, repo, config, revision=revision)
    except StreamError as error:
        if isinstance(error.__cause__, DatasetNotFoundError):
            raise
        if isinstance(error.__cause__, ConnectionError | HfHubHTTPError):
            return _kept_pictures(repo, revision, named, error)
        found = _pictures_on_hub(repo, revision, named)  # next to files of a type that `datasets` prefers
        if found is None:
            raise
        return found
    return located if isinstance(builder, Parquet) else _pictures_on_hub(repo, revision, named) or located


def _kept_pictures(repo: str, revision: str | None, named: Collection[str], error: StreamError) -> LocatedDataset:
    """The cached images of a repo, for when the Hub cannot be reached."""
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True))
    except (OSError, ValueError):
        raise error from error.__cause__
    if not any(map(is_picture, list_files(folder))):
        raise error from error.__cause__
    logger.warning("%s Using the images in the local cache.", error)
    return _in_folder(folder, repo, None, named)


def _pictures_on_hub(repo: str, revision: str | None, named: Collection[str]) -> LocatedDataset | None:
    """The images of a repo in class folders, if it has no metadata, data files or `configs`."""
    with _as_stream_error(f"Data set {repo!r}"):
        info = hub_client().dataset_info(repo, revision=revision)
        files = [sibling.rfilename for sibling in info.siblings or ()]
        pictures = [file for file in files if is_picture(file)]
        if not pictures or find_metadata(files) or holds_data(files):
            return None
        settings: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
        if README in files and _has_configs(Path(hf_hub_download(repo, README, **settings))):
            return None
    settings["allow_patterns"] = sorted({f"*{os.path.splitext(file)[1]}" for file in pictures})
    found = find_pictures(f"hf://datasets/{repo}@{info.sha}", files, named)
    return _of_pictures(repo, found, partial(snapshot_download, repo, **settings))


@contextmanager
def _as_stream_error(what: str, more: str = "") -> Iterator[None]:
    """Converts errors of the libraries to a one-line [`StreamError`], and adds what else is to be said."""
    try:
        yield
    except StreamError:
        raise
    except (DatasetsError, HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".") + "."
        if isinstance(error, HfHubHTTPError) and not isinstance(error, RepositoryNotFoundError):
            reason = answer_in_words(error)
        if "is a gated dataset" in reason:
            reason += " Accept its terms on its page on the Hub, and log in with `hf auth login`."
        if isinstance(error, ConnectionError):
            reason += " If it has been downloaded before, set HF_HUB_OFFLINE=1."
        reason += f" {more}" * bool(more)
        if isinstance(error, FileNotFoundError) and "doesn't exist" in reason and "Revision" not in reason:
            raise StreamError(f"{what} is neither a folder of images nor a data set on the Hub: {reason}") from error
        raise StreamError(f"{what} cannot be loaded: {reason}") from error
