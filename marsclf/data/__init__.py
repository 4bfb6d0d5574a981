"""What is labeled: the index of the images, their names, the download and generated sample data."""
