"""New images: the trained classifier, its file, and the table it writes, here or on Ray."""
