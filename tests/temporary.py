"""Where tests write."""

import os
import tempfile


ROOMY = 8 << 30  # bytes; the tests need a tenth of them


def write_to_memory():
    """Tests write thousands of small files, and models wait until theirs are on the disk: there need not be one."""
    place = "/dev/shm"
    if "TMPDIR" not in os.environ and os.path.isdir(place):
        status = os.statvfs(place)
        if status.f_bavail * status.f_frsize > ROOMY and not status.f_flag & (os.ST_NOEXEC | os.ST_RDONLY):
            os.environ["TMPDIR"], tempfile.tempdir = place, None
