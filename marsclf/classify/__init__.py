"""Classifying images: the classifier, its file, and the command `predict`."""
