"""How many views an image gets, how often each is drawn, and which images judge a recipe."""

import numpy as np
import pandas as pd

IMAGES_PER_CLASS = 40  # that judge a recipe


def view_counts(labels: np.ndarray | pd.Series, views: int, views_rare: int) -> np.ndarray:
    """Return how many random views each training image gets (n,): the rarer its class, the more.

    The most common class gets `views` per image. Others get up to `views_rare`, in proportion to
    the square root of how much rarer they are.
    """
    sizes = np.bincount(labels)[labels]
    rarity = np.sqrt(sizes.max() / sizes)
    return np.clip(np.round(views * rarity), views, views_rare).astype(int)


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Return a weight for each example (n,), such that all classes count the same."""
    return np.bincount(labels)[labels] ** -1.0


def draw_shares(
    rows: pd.DataFrame, counts: np.ndarray, balance: float, burst_balance: float
) -> np.ndarray:
    """Return how often each view is drawn, as shares that add up to 1.

    `rows` are images, with columns label and sequence, of `counts` (rows,) views each. A class of n
    views gets a share of n ** (1 - balance): with 1 all classes are drawn equally often, with 0 all
    views. `burst_balance` is the same for the bursts of a class: images of one class and one
    sequence show one scene within minutes, so more of them add little.
    """
    labels = rows["label"].to_numpy().repeat(counts)
    bursts = rows.groupby(["label", "sequence"]).ngroup().to_numpy().repeat(counts)
    within = np.bincount(bursts)[bursts] ** -float(burst_balance)
    within /= np.bincount(labels, weights=within)[labels]
    shares = within * np.bincount(labels)[labels] ** (1 - float(balance))
    return shares / shares.sum()


def spread_over_groups(rows: pd.DataFrame) -> pd.DataFrame:
    """Return at most IMAGES_PER_CLASS rows of each class, of as many groups (sols) as possible."""
    order = rows.sample(frac=1, random_state=0)
    turn = order.groupby(["label", "group"]).cumcount()
    order = order.assign(turn=turn).sort_values("turn", kind="stable").drop(columns="turn")
    return order.groupby("label").head(IMAGES_PER_CLASS).sort_values("path")
