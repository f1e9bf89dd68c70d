"""Makes a Space of the demo: `python spaces/publish.py me/expert-router`.

The wheel of this checkout is uploaded with the app, and the Space installs it from there. Once the package is on PyPI,
`--published` keeps the line of `expert_router/requirements.txt`. Needs a token: `hf auth login`.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, constants


HERE = Path(__file__).parent


def prepare(repo_id: str, folder: Path, published: bool) -> None:
    """Fills a folder with everything that the Space needs."""
    shutil.copytree(HERE / "expert_router", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    if published:
        return
    build = ["wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(HERE.parent)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    (wheel,) = folder.glob("*.whl")
    # A Space sees only this file while it installs what it asks for, so the wheel beside it needs an address.
    address = f"{constants.ENDPOINT}/spaces/{repo_id}/resolve/main/{wheel.name}"
    (folder / "requirements.txt").write_text(f"hf-clpeft[demo] @ {address}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo_id", help="of the Space; created, public, if there is none")
    parser.add_argument("--published", action="store_true", help="install the package from PyPI")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(args.repo_id, Path(folder), args.published)
        HfApi().create_repo(args.repo_id, repo_type="space", space_sdk="gradio", exist_ok=True)
        HfApi().upload_folder(repo_id=args.repo_id, repo_type="space", folder_path=folder)
    print(f"{constants.ENDPOINT}/spaces/{args.repo_id}")


if __name__ == "__main__":
    main()
