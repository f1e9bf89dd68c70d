"""Which expert takes a picture, and why.

Settings, all optional:

- `CL_REPO_ID`, `CL_REVISION`: the model and its branch, tag or commit; default: the digits that come with hf_clpeft
- `ALLOW_TEACHING=1`: let visitors teach new classes, each on a model of their own

Pictures in a folder `examples` beside this file are offered to visitors who have none at hand.
"""

import os
from pathlib import Path

from hf_clpeft.backbones.bundled import DIGITS_MODEL
from hf_clpeft.demo import LAUNCH, build_demo


demo = build_demo(
    os.environ.get("CL_REPO_ID") or DIGITS_MODEL,
    revision=os.environ.get("CL_REVISION"),
    examples=sorted(Path(__file__).with_name("examples").glob("*.*")) or None,
    teaching=os.environ.get("ALLOW_TEACHING") == "1",
)

if __name__ == "__main__":
    demo.launch(**LAUNCH)
