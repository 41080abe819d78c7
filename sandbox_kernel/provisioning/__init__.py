"""Kernels launched elsewhere: jupyter_client provisioners, the engine, the image.

The only room that imports an engine's client (``docker``).
"""
