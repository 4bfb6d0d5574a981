"""The one exception that a user's mistake or a missing resource raises."""


class MarsclfError(Exception):
    """Says in one sentence what is wrong, where, and how to fix it."""
