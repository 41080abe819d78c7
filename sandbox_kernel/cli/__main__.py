"""``python -m sandbox_kernel.cli``."""

from sandbox_kernel.cli import main

main()
