"""What a session costs beside a bare ipykernel. Run ``make bench``, or ``python -m benchmarks --help``."""
