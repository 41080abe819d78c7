"""What runs INSIDE the kernel's container: standard library, IPython and ipykernel only (Python 3.9+).

Mounted read-only at ``/opt/sandbox-kernel``; nothing here imports the rest of the package, nor the other way round.
"""
