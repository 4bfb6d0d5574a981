"""Numbers: stored predictions, metrics, calibration and the ledger of test scores."""
