"""Downloads the files that a model is loaded from, and no others."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backbones.bundled import did_you_mean
from ..config.checks import LARGEST_JSON
from ..config.errors import ConfigError
from ..config.hub_client import hub_client
from ..config.hub_errors import HfHubHTTPError, HubError, RevisionResolutionError, explained, transferring
from ..config.model import CONFIG_NAME, ContinualConfig
from ..config.text import get_logger
from ..reports.report import METRICS_NAME
from ..storage.files import check_names
from ..storage.pictures import check_listed, check_size


if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = get_logger(__name__)


def find_model(repo_id: str, token: str | None = None) -> str | None:
    """Full repo id of a model on the Hub; `None` if there is no such repo, or no model in it.

    Args:
        repo_id (`str`): Repo id; its namespace defaults to the token's owner.
        token (`str`, *optional*): Access token of the Hub; default: the one saved by `hf auth login`.

    Raises:
        [`HubError`]: The Hub cannot be reached or denies the request.
    """
    api = hub_client(token)
    with explained("look for", repo_id):
        repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        return repo_id if api.file_exists(repo_id, CONFIG_NAME) else None


def fetch_config(
    repo_id: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Downloads `config.json` and `metrics.json` of a model, without its weights.

    The revision is resolved to a commit once, so that all files come from the same one. Cached files are not requested
    again; offline, only the cache is used.

    Args:
        repo_id (`str`): Repo id on the Hub.
        revision (`str`, *optional*): Branch, tag or commit.
        token (`str` or `bool`, *optional*): Access token of the Hub; default: the one saved by `hf auth login`.
        cache_dir (`str` or `Path`, *optional*): Cache folder; default: that of `huggingface_hub`.
        local_files_only (`bool`, *optional*, defaults to `False`): Use the cache only.

    Returns:
        `Path`: The folder in the cache.

    Raises:
        [`HubError`]: The repo or revision does not exist or cannot be reached.
        [`ConfigError`]: The repo holds no hf_clpeft model, an incomplete one, or files that are not safe to read.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    api = hub_client(token)
    with _suggesting(repo_id), explained("load", repo_id, revision):
        commit = _resolve(api, repo_id, revision, cache_dir, local_files_only)
        cached = try_to_load_from_cache(repo_id, CONFIG_NAME, cache_dir=cache_dir, revision=commit)
        if isinstance(cached, str):
            return Path(cached).parent
        if local_files_only:
            raise HubError(f"Cannot load {repo_id}: {CONFIG_NAME} is not in the cache, and local_files_only=True.")
        api.repo_info(repo_id, revision=commit)  # fails fast offline; listing retries for 23 s
        sizes = {
            entry.path: entry.size
            for entry in api.list_repo_tree(repo_id, recursive=True, revision=commit)
            if hasattr(entry, "size")
        }
        if CONFIG_NAME not in sizes:
            raise ConfigError(f"{repo_id} holds no {CONFIG_NAME}, so it is no hf_clpeft model.")
        for name, size in sizes.items():
            if name.endswith(".json") and size > LARGEST_JSON:
                raise ConfigError(f"{repo_id} holds {name} with {size:,} bytes; at most {LARGEST_JSON:,} are read.")
        where: dict[str, Any] = {"cache_dir": cache_dir, "revision": commit, "token": token}
        with transferring():
            if METRICS_NAME in sizes:
                hf_hub_download(repo_id, METRICS_NAME, **where)
            folder = Path(hf_hub_download(repo_id, CONFIG_NAME, **where)).parent
    try:
        config = ContinualConfig.load(folder)
        check_names(list(sizes), config, repo_id)
        check_listed(config.files)
        for name in config.files:
            if name not in sizes:
                raise ConfigError(f"{repo_id} lacks the file {name}, so the model is incomplete.")
            check_size(name, sizes[name])
    except ConfigError:
        (folder / CONFIG_NAME).unlink(missing_ok=True)  # else the next call takes it from the cache unchecked
        raise
    return folder


@contextmanager
def _suggesting(repo_id: str) -> Iterator[None]:
    """For what is nowhere: what may be meant, and no request for what cannot be the id of a model."""
    try:
        if "/" not in repo_id:
            raise HubError(f"Cannot load {repo_id}: there is no such folder, and a repo on the Hub reads OWNER/NAME.")
        yield
    except HubError as error:
        hint = did_you_mean(repo_id)
        if not hint:
            raise
        raise HubError(f"{error}{hint}", error.transient) from error.__cause__


def _resolve(
    api: "HfApi", repo_id: str, revision: str | None, cache_dir: str | Path | None, local_files_only: bool
) -> str:
    """Commit of a revision; from the cache if the Hub cannot be reached or its rate limit is hit."""
    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    try:
        return api.resolve_revision(repo_id, local_files_only=local_files_only, **where).resolved
    except HfHubHTTPError as error:
        if error.response.status_code != 429:
            raise
        try:
            commit = api.resolve_revision(repo_id, local_files_only=True, **where).resolved
        except RevisionResolutionError:
            raise error from None
        logger.warning("The Hub's rate limit is reached (429): %s is taken from the cache.", repo_id)
        return commit


def fetch_model(repo_id: str, revision: str | None = None, **hub_options: Any) -> Path:
    """Downloads the files that a model is loaded from.

    Args:
        repo_id (`str`): Repo id on the Hub.
        revision (`str`, *optional*): Branch, tag or commit.
        hub_options: `token`, `cache_dir`, `local_files_only`; as for [`fetch_config`], whose errors it raises.

    Returns:
        `Path`: The folder in the cache.
    """
    from huggingface_hub import snapshot_download

    folder = fetch_config(repo_id, revision, **hub_options)
    names = ContinualConfig.load(folder).files
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and hub_options.get("local_files_only"):
        raise HubError(f"Cannot load {repo_id}: only a part of it is in the cache, and local_files_only=True.")
    if missing:
        commit = folder.name
        with explained("load", repo_id, revision):
            hub_client(hub_options.get("token")).repo_info(repo_id, revision=commit)  # fails fast, as above
            with transferring():
                snapshot_download(repo_id, revision=commit, allow_patterns=missing, **hub_options)
    return folder
