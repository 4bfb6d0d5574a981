"""A recipe: the parameters that determine a trained network."""

from dataclasses import dataclass, fields

from marsclf.errors import MarsclfError
from marsclf.images.views import Augmentation, check_zooms
from marsclf.networks.specs import BLOCKS, input_size_of


@dataclass(frozen=True)
class Recipe:
    """The parameters of notebook 02, which explains them. Raises MarsclfError for unusable ones."""

    backbone: str
    image_size: int | None
    mixed_precision: bool
    seed: int
    augmentation: dict
    views: int
    views_rare: int
    balance: float
    burst_balance: float
    label_smoothing: float
    weight_decay: float
    head_hidden: int
    head_dropout: float
    head_epochs: int
    head_batch_size: int
    head_learning_rate: float
    head_patience: int
    finetune_blocks: list[str]
    finetune_epochs: int
    finetune_batch_size: int
    finetune_learning_rate: float
    finetune_patience: int
    finetune_ema: float
    ensemble: list[int]
    test_zooms: list[float]
    temperature: float | None

    @property
    def trained_blocks(self) -> list[str]:
        """The blocks of the backbone that the second stage trains."""
        return self.finetune_blocks if self.finetune_epochs else []

    def __post_init__(self) -> None:
        trained = ("head", "finetune") if self.finetune_epochs else ("head",)
        settings = ("epochs", "batch_size", "learning_rate", "patience")
        positive = [f"{stage}_{name}" for stage in trained for name in settings]
        known = [field.name for field in fields(Augmentation)]
        for names, is_usable, rule in (
            (["seed", "head_hidden", "weight_decay"], lambda x: x >= 0, "0 or more"),
            (positive, lambda x: x > 0, "above 0"),
            (["views"], lambda x: 1 <= x <= self.views_rare, "from 1 to views_rare"),
            (["head_dropout", "finetune_ema"], lambda x: 0 <= x < 1, "at least 0 and below 1"),
            (["label_smoothing"], lambda x: 0 <= x <= 1, "from 0 to 1"),
            (["temperature"], lambda x: x is None or x > 0, "None or above 0"),
            (["ensemble"], lambda x: all(type(seed) is int for seed in x), "a list of seeds"),
            (["finetune_blocks"], set(BLOCKS).issuperset, f"a list of {', '.join(BLOCKS)}"),
            (["augmentation"], set(known).issuperset, f"a mapping of {', '.join(known)}"),
        ):
            for name in names:
                if not is_usable(getattr(self, name)):
                    raise MarsclfError(f"{name} is {getattr(self, name)}; it must be {rule}.")
        input_size_of(self.backbone)
        check_zooms(self.test_zooms)
        Augmentation(**self.augmentation)
