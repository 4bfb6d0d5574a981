"""Commands that compare, measure, publish and verify; they run from a copy of the repository."""
