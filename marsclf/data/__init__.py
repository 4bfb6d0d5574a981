"""The labeled images: their names, the checked index, the download, and generated sample data."""
