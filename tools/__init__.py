"""Commands that compare, measure, publish and verify; they run from a copy of the repository."""

import marsclf.__main__  # noqa: F401 (ends with a sentence on an older Python)
