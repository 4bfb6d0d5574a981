"""Data sets of labeled images: their checks, index and splits, the download, sample data."""
