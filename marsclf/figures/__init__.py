"""Charts of the data and the results, image galleries, and notebook controls."""
