"""Pixels: decoding image files, and making the views that a network sees."""
