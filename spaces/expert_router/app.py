"""Which expert takes a picture, and why.

Settings, all optional:

- `CL_REPO_ID`, `CL_REVISION`: the model and its branch, tag or commit; default: the digits that come with hf_clpeft
- `CL_BACKBONE`: repo id of its backbone, if it was trained with one in a local folder
- `HF_TOKEN`, a secret: a token that may read these, if they are private
- `ALLOW_TEACHING=1`: let visitors teach new classes, each on a model of their own

Pictures in a folder `examples` beside this file are offered to visitors who have none at hand.
"""

import os
from pathlib import Path

from hf_clpeft.backbones.bundled import DIGITS_MODEL
from hf_clpeft.demo import launch_options
from hf_clpeft.demo.setup import build_or_explain


demo = build_or_explain(
    os.environ.get("CL_REPO_ID") or DIGITS_MODEL,
    revision=os.environ.get("CL_REVISION") or None,
    backbone=os.environ.get("CL_BACKBONE") or None,
    examples=sorted(Path(__file__).with_name("examples").glob("*.*")) or None,
    teaching=os.environ.get("ALLOW_TEACHING") == "1",
)

if __name__ == "__main__":
    demo.launch(**launch_options())
