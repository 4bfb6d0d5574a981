"""Pictures: charts of data and results, and the widgets of the notebooks."""
