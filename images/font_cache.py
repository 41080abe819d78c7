"""Give matplotlib the font cache that was made with the image.

Runs at every start of the image's Python (through a ``.pth`` file). matplotlib insists on a cache folder it can
write, which on a read-only root is a fresh tmpfs: without the copy its first import scans all fonts again.
"""

import os
import sys


def _provide() -> None:
    target = os.environ.get("MPLCONFIGDIR")
    source = os.path.join(sys.prefix, "share", "matplotlib-cache")
    if not target or target == source or os.path.lexists(target):
        return
    try:
        names = os.listdir(source)
        os.mkdir(target, 0o700)
        for name in names:
            with open(os.path.join(source, name), "rb") as original, open(os.path.join(target, name), "xb") as copy:
                copy.write(original.read())
    except OSError:
        return  # only speed is lost: matplotlib makes its own


_provide()
