"""A Hugging Face Hub in memory, on 127.0.0.1, for tests that use the unmodified `huggingface_hub` client.

Repositories have real commits, refs and LFS objects, and refusals are those of the Hub. It hands out tokens of Xet,
but stores nothing by it, and it has no discussions or pagination. Tests start one with [`serve`]. To try one by hand,
run `python -m hub_server --port 8765` in `tests/` and set `HF_ENDPOINT=http://127.0.0.1:8765` and
`HF_HUB_DISABLE_XET=1`.

`huggingface_hub` reads `HF_ENDPOINT` when it is imported, and the address is known only once the server runs. So
nothing here may import it, except within functions.
"""

from .cards import check_card
from .hub import Hub, User
from .repo import Commit, File, HubError, Repo
from .serving import Fault, serve


__all__ = ["Commit", "Fault", "File", "Hub", "HubError", "Repo", "User", "check_card", "serve"]
