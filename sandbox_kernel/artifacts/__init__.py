"""Artifacts: the observer sees files appear, the intake takes their bytes, the store keeps bytes and records."""
