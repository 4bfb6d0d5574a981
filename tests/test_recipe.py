"""The steps of a recipe: what learns, what stays, and that the parts remain one network."""

from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

from marsclf.data.msl import Dataset
from marsclf.errors import MarsclfError
from marsclf.images.decode import read_rgb
from marsclf.images.views import WHOLE_IMAGE, Augmentation, Condition, fit_view
from marsclf.pipeline.presets import parameters_of
from marsclf.training import recipe
from marsclf.training.features import view_loader
from marsclf.training.recipe import Learnt, Recipe
from marsclf.training.stages import build_head, join

SMALL = {
    "image_size": 32,
    "augmentation": {"rotation": 90, "zoom": 0.5, "flip": True},
    "views": 1,
    "views_rare": 3,
    "head_hidden": 0,
    "head_epochs": 2,
    "finetune_blocks": ["block6", "top"],
    "finetune_epochs": 2,
    "finetune_batch_size": 8,
    "test_zooms": [1.0],
}


def make_recipe(**changed: object) -> Recipe:
    return Recipe.of(parameters_of("laptop") | SMALL | changed)


def learn(how: Recipe, dataset: Dataset, folder: Path) -> tuple[Learnt, pd.DataFrame]:
    """Learn from a few images; return that and the rows of validation."""
    index = dataset.index
    train = index[index["split"] == "train"].iloc[::8].head(24)
    validation = index[index["split"] == "val"].iloc[::8].head(10)
    found = recipe.learn(how, dataset.root, train, validation, folder, folder / "cache")
    return found, validation


@pytest.fixture(scope="module")
def learnt(sample_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("recipe")
    return *learn(make_recipe(), sample_dataset, folder), folder


def test_the_named_blocks_and_the_head_alone_change(learnt) -> None:
    found, _, folder = learnt
    assert [(record["stage"], record["epoch"]) for record in found.history] == [
        ("head", 1),
        ("head", 2),
        ("finetune", 1),
        ("finetune", 2),
    ]
    assert set(found.wall_s) == {"features", "head", "finetune"}
    fresh = {weights.path: weights.numpy() for weights in recipe.build(make_recipe()).whole.weights}
    norms = {
        weights.path
        for layer in found.network.whole.layers
        if isinstance(layer, keras.layers.BatchNormalization)
        for weights in layer.weights
    }
    assert any(path.startswith("block6") for path in norms)
    for weights in found.network.whole.weights:
        same = np.array_equal(weights.numpy(), fresh[weights.path])
        named = weights.path.startswith(("block6", "top_"))
        assert same != (named and weights.path not in norms), weights.path
    head = build_head(1280, 0, 0.4)
    head.load_weights(folder / "head.best.weights.h5")
    for now, after_stage_1 in zip(found.head.get_weights(), head.get_weights(), strict=True):
        assert (now != after_stage_1).any()


def test_the_parts_answer_as_the_whole_network_does(learnt, sample_dataset: Dataset) -> None:
    found, rows, folder = learnt
    root = sample_dataset.root
    whole = join(found.network.whole, found.head)

    def expected(*conditions: Condition) -> np.ndarray:
        images = [read_rgb(root / path) for path in rows["path"]]
        views = [np.stack([fit_view(image, 32, c) for image in images]) for c in conditions]
        product = np.prod([whole.predict_on_batch(each) for each in views], axis=0)
        roots = product ** (1 / len(views))
        return roots / roots.sum(axis=1, keepdims=True)

    def answer(how: Recipe, *condition: Condition) -> np.ndarray:
        member = found._replace(recipe=how)
        return recipe.predict([member], root, rows, folder / "cache", *condition)

    np.testing.assert_allclose(answer(make_recipe()), expected(WHOLE_IMAGE), atol=1e-4)
    twice = answer(make_recipe(test_zooms=[1.0, 0.5]), Condition(zoom=2.0, turn=90))
    both = Condition(zoom=2.0, turn=90), Condition(zoom=1.0, turn=90)
    np.testing.assert_allclose(twice, expected(*both), atol=1e-4)


def test_the_answers_of_members_are_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant:
        def read(self) -> np.ndarray:
            return np.array([self.value] * 3)

    def pass_on(_: object, classifier: list[float], cache: Path) -> Constant:
        constant = Constant()
        constant.value = classifier
        return constant

    monkeypatch.setattr(recipe, "embed_images", lambda *_: None)
    monkeypatch.setattr(recipe, "pass_on", pass_on)
    network = recipe.Network(None, None, None)
    answers = [0.9, 0.1], [0.5, 0.5]
    members = [Learnt(make_recipe(), network, None, value, [], {}) for value in answers]
    found = recipe.predict(members, Path("images"), pd.DataFrame({"path": "abc"}, range(3)))
    # The roots of 0.45 and 0.05, three to one.
    np.testing.assert_allclose(found, [[0.75, 0.25]] * 3)


def test_the_best_epoch_is_kept(learnt, sample_dataset: Dataset) -> None:
    found, rows, _ = learnt
    load = view_loader((32, 32), Augmentation(**SMALL["augmentation"]), 0)
    root = sample_dataset.root
    views = [load((root / row.path, row.sha256, 0)) for row in rows.itertuples()]
    probabilities = join(found.network.whole, found.head).predict_on_batch(np.stack(views))
    labels = rows["label"].to_numpy()
    # Each class counts the same, however many images it has; 0.1 of each target is spread.
    targets = 0.9 * np.eye(25)[labels] + 0.1 / 25
    each = -(targets * np.log(probabilities)).sum(axis=1)
    loss = np.mean([each[labels == label].mean() for label in np.unique(labels)])
    best = min(found.history[2:], key=lambda record: record["val_loss"])
    assert best["val_loss"] == pytest.approx(loss, abs=5e-3)
    accuracy = np.mean(probabilities.argmax(axis=1) == labels)
    assert best["val_accuracy"] == pytest.approx(accuracy, abs=1e-5)


def test_an_equal_recipe_goes_on_and_another_starts_anew(
    learnt, sample_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _, folder = learnt
    begun = []

    def fit(*_: object, **__: object) -> None:
        begun.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.Model, "fit", fit)
    again, _ = learn(make_recipe(), sample_dataset, folder)
    assert again.history == found.history and not begun
    for one, other in zip(
        again.network.whole.get_weights(), found.network.whole.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(KeyboardInterrupt):
        learn(make_recipe(augmentation={"zoom": 0.6}), sample_dataset, folder)


def test_a_recipe_without_a_second_stage(sample_dataset: Dataset, tmp_path: Path) -> None:
    found, _ = learn(make_recipe(finetune_epochs=0), sample_dataset, tmp_path)
    assert found.classifier is found.head and found.network.upper is None
    assert [record["stage"] for record in found.history] == ["head", "head"]
    fresh = recipe.build(make_recipe()).whole
    for one, other in zip(found.network.whole.get_weights(), fresh.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_members_of_an_ensemble() -> None:
    how = make_recipe()
    assert how.members([]) == [how]
    first, second = how.members([{"seed": 1}, {"image_size": 64, "test_zooms": [0.5]}])
    assert (first.seed, first.image_size) == (1, 32)
    assert (second.seed, second.image_size, second.test_zooms) == (how.seed, 64, [0.5])
    with pytest.raises(MarsclfError, match="ensemble: no recipe has 'sede'; it has backbone, "):
        how.members([{"seed": 1}, {"sede": 2}])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"self_training": -0.1}, "self_training is -0.1; it is a share of the images, 0 to 1"),
        ({"self_training": 1.1}, "self_training is 1.1; it is a share"),
        ({"test_zooms": []}, r"test_zooms is \[\]; it must hold 1 to 16 zooms, each from 0.1 to"),
        ({"test_zooms": [1.0, 20]}, r"test_zooms is \[1.0, 20\]"),
        ({"test_zooms": [1.0] * 17}, "test_zooms is"),
    ],
)
def test_a_recipe_is_refused_before_anything_is_learnt(changed: dict, message: str) -> None:
    with pytest.raises(MarsclfError, match=message):
        make_recipe(**changed)


def test_nothing_learns_from_the_labels_of_test() -> None:
    index = pd.DataFrame({"split": ["train", "val", "test"], "label": [0, 1, 2]})
    assert recipe.learning_rows(index, ["train"])["label"].tolist() == [0]
    assert recipe.learning_rows(index, ["train", "val"])["label"].tolist() == [0, 1]
    for splits in ([], ["test"], ["train", "test"], ["train", "vla"]):
        with pytest.raises(MarsclfError, match=r"learn_from is .*; it must be \['train'\] or"):
            recipe.learning_rows(index, splits)


def test_mixed_precision_is_of_the_backbone_and_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    how = make_recipe(mixed_precision=True)
    assert recipe.build(how).whole.output.dtype == "float32"
    monkeypatch.setattr(recipe, "has_gpu", lambda: True)
    network = recipe.build(how)
    assert network.whole.output.dtype == "bfloat16"
    assert {weight.dtype for weight in network.whole.weights} == {"float32"}
    classifier = join(network.upper, build_head(1280, 0, 0.0))
    assert classifier.output.dtype == "float32"
    features = np.ones((2, *network.upper.input_shape[1:]), np.float32)
    np.testing.assert_allclose(classifier.predict_on_batch(features).sum(axis=1), 1, atol=1e-5)


def test_batches_accumulate_in_the_second_stage_alone() -> None:
    how = make_recipe(finetune_accumulate=4)
    assert how.schedule("head", 100).accumulate == 1
    assert how.schedule("finetune", 100).accumulate == 4


def test_pseudo_labels_are_the_networks_own_for_what_it_is_surest_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    confidence, said = [0.5, 0.9, 0.7, 0.8, 0.6], [3, 1, 4, 1, 5]
    rows = pd.DataFrame({"path": list("abcde"), "label": 24, "class_name": "wheel"}, range(10, 15))

    def predict(members: object, root: Path, images: pd.DataFrame, cache: Path) -> np.ndarray:
        assert not {"label", "class_name"} & set(images.columns)
        probabilities = np.zeros((5, 25))
        probabilities[range(5), said] = confidence
        return probabilities

    monkeypatch.setattr(recipe, "predict", predict)
    found = recipe.pseudo_labels([], Path("images"), rows, 0.6)
    assert found["path"].tolist() == ["b", "c", "d"]
    assert found["label"].tolist() == [1, 4, 1]
    assert len(recipe.pseudo_labels([], Path("images"), rows, 1)) == 5


def test_self_training_learns_again_with_the_images_to_be_predicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def learn(how: Recipe, root: Path, train: pd.DataFrame, *rest: object) -> str:
        _, folder, _ = rest
        asked.append((how.seed, train["label"].tolist(), str(folder)))
        return f"learnt {len(asked)}"

    def predict(members: list[str], *_: object) -> np.ndarray:
        assert members == ["learnt 1", "learnt 2"]
        return np.eye(25)[[7, 8]]

    monkeypatch.setattr(recipe, "learn", learn)
    monkeypatch.setattr(recipe, "predict", predict)
    train = pd.DataFrame({"path": ["a"], "label": [0], "class_name": ["apxs"]})
    later = train.iloc[[0, 0]].assign(path=["b", "c"])

    def learn_all(share: float) -> list[str]:
        members = make_recipe(self_training=share).members([{"seed": 0}, {"seed": 1}])
        return recipe.learn_all(members, Path("images"), train, train, later, Path("run"))

    assert learn_all(0.0) == ["learnt 1", "learnt 2"]
    assert asked == [(0, [0], "run/0"), (1, [0], "run/1")]
    asked.clear()
    assert learn_all(1.0) == ["learnt 3", "learnt 4"]
    again = [(seed, [0, 7, 8], f"run/self_training/{seed}") for seed in (0, 1)]
    assert asked[2:] == again
