"""Learning: cached features, the two stages of fine-tuning, and the check on later sols."""
