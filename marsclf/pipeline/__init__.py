"""Headless runs: presets, and papermill runs of the notebooks."""
