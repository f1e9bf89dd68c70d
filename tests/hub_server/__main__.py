"""Serves a Hub until it is interrupted."""

import argparse
import threading

from . import serve


parser = argparse.ArgumentParser(prog="python -m hub_server", description=__doc__)
parser.add_argument("--port", type=int, default=8765)
with serve(port=parser.parse_args().port) as hub:
    print(f"HF_ENDPOINT={hub.url}, tokens: {', '.join(hub.users)}", flush=True)
    threading.Event().wait()
