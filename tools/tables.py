"""The Markdown tables of README and model card, made from what lies in results/."""

import json

import numpy as np
import pandas as pd

from marsclf import paths
from marsclf.data import msl as data
from marsclf.evaluation import ledger, metrics
from marsclf.pipeline.presets import DEFAULT_PRESET, LADDERS

# What the Planetary Data System's imaging archive holds, as its Image Atlas states it.
ARCHIVE_IMAGES = 31_000_000
DOLLARS_A_CORE_HOUR = 0.05
MOST_BURSTS, MOST_CONFUSIONS = 15, 8  # rows of their tables


def headline(result: dict) -> str:
    """Return the result of a published run in one paragraph; first, if any, the mean over seeds."""
    test, seeds = result["splits"]["test"], ledger.seeds(result).values()
    low, high = test["accuracy_ci95"]
    of_run = f"{test['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}, over sols)"
    if len(seeds) > 1:
        accuracy = _mean_and_spread([figures["accuracy"] for figures in seeds], "{:.1%}")
        macro_f1 = _mean_and_spread([figures["macro_f1"] for figures in seeds], "{:.3f}")
        text = f"**{accuracy} of the test images right**, the mean of {len(seeds)} seeds, macro-F1 "
        text += f"{macro_f1}. The network that is published, seed {result['seed']}: {of_run}, "
    else:
        text = f"**{of_run} of the test images right**, macro-F1 {test['macro_f1']:.3f}, "
    right = _number(test["accuracy_at_0.9"], "{:.1%}")
    text += f"expected calibration error {test['ece']:.3f}; {test['coverage_at_0.9']:.1%} of the "
    text += f"images reach a confidence of 0.9, and of these {right} are right."
    return f"{text}\n"


def results_tables(published: dict[str, dict]) -> str:
    """Return two Markdown tables: accuracy beside other publications, and this project's runs."""
    head = ["Model", "Train", "Validation", "Test", "Macro-F1, test", "Remarks"]
    others = json.loads((paths.RESULTS / "published.json").read_text(encoding="utf-8"))
    compared = [head]
    for row in others:
        shares = [_number(row[split], "{:g} %") for split in data.SPLITS]
        macro_f1 = _number(row["macro_f1"], "{:g}")
        compared.append([f"[{row['source']}]({row['url']})", *shares, macro_f1, row["remarks"]])
    head = ["Preset", "Seed", "Test accuracy, 95 % interval", "Top-3", "ECE"]
    head += ["Shown at confidence 0.9", "Right among these", "Time", "Memory", "Hardware", "Commit"]
    runs = [head]
    for preset, result in published.items():
        splits, test, hardware = result["splits"], result["splits"]["test"], result["hardware"]
        shares = [_number(splits[split]["accuracy"], "**{:.1%}**") for split in data.SPLITS]
        link = f"[`{preset}`](results/{preset}/metrics.json)"
        macro_f1 = _number(test["macro_f1"], "**{:.3f}**")
        name = f"This repository, {link}, {result['backbone']}"
        remark = f"`make run PRESET={preset}`"
        accuracies = [seed["accuracy"] for seed in ledger.seeds(result).values()]
        if len(accuracies) > 1:
            mean = _mean_and_spread(accuracies, "{:.1%}")
            remark += f", seed {result['seed']}; {len(accuracies)} seeds: {mean} of test"
        if "val" in result["parameters"].get("learn_from", []):
            remark += "; learnt from validation too, as one would deploy it"
        if result["parameters"].get("self_training"):
            remark += "; transductive: it learnt from the test images, without their labels"
        compared.append([name, *shares, macro_f1, remark])
        shares = [_number(splits[split]["burst"]["accuracy"], "{:.1%}") for split in data.SPLITS]
        macro_f1 = _number(test["burst"]["macro_f1"], "{:.3f}")
        compared.append([f"{link}, one answer a burst", *shares, macro_f1, "the same run"])
        low, high = test["accuracy_ci95"]
        machine = f"{_cores(hardware)}, {hardware['memory_gb']:g} GB"
        row = [link, str(result["seed"]), f"{test['accuracy']:.1%} ({low:.1%} to {high:.1%})"]
        row += [f"{test['top3']:.1%}", f"{test['ece']:.3f}", f"{test['coverage_at_0.9']:.1%}"]
        row += [_number(test["accuracy_at_0.9"], "{:.1%}")]
        row += [
            f"{result['wall_s']['total'] / 60:.1f} min",
            f"{result['peak_rss_mb'] / 1000:.1f} GB",
        ]
        runs.append([*row, f"{machine}, {hardware['gpu'] or 'no GPU'}", result["commit"][:12]])
    return f"{_markdown(compared)}\n{_markdown(runs)}" if published else _markdown(compared)


def ladder_table(published: dict[str, dict]) -> str:
    """Return a Markdown table: the rungs of each ladder that was run, and the default preset."""
    head = ["Recipe", "Train", "Validation", "Test", "Macro-F1, validation", "Macro-F1, test"]
    rows = [[*head, "Test, 95 % interval", "Minutes"]]

    def add(name: str, splits: dict, seconds: float) -> None:
        shares = [f"{splits[split]['accuracy']:.1%}" for split in data.SPLITS]
        scores = [f"{splits[split]['macro_f1']:.3f}" for split in ("val", "test")]
        low, high = splits["test"]["accuracy_ci95"]
        interval = f"{low:.1%} to {high:.1%}"
        rows.append([name, *shares, *scores, interval, f"{seconds / 60:.1f}"])

    for path in (paths.RESULTS / f"{ladder}.json" for ladder in LADDERS):
        result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rungs": {}}
        for number, rung in enumerate(result["rungs"].values()):
            name = f"+ {rung['name']}" if number else f"The original's, with {result['backbone']}"
            add(name, rung["splits"], rung["wall_s"])
    if DEFAULT_PRESET in published:
        run = published[DEFAULT_PRESET]
        name = f"Preset `{DEFAULT_PRESET}`, as published"
        add(name, run["splits"], run["wall_s"]["total"])
    if not (paths.RESULTS / "b7-reference.json").is_file():
        unmeasured = "the same with EfficientNetB7: `make run PRESET=b7-reference`"
        rows.append([unmeasured, *["not measured here"] * 3, *["–"] * 4])
    return _markdown(rows)


def b7_cost_line() -> str:
    """Return a sentence: what B7's features cost on the machine that measured it."""
    cost = json.loads((paths.RESULTS / "b7_cost.json").read_text(encoding="utf-8"))
    height, width = cost["sides"]
    hardware = cost["hardware"]
    return (
        f"At {width} × {height} pixels they take {cost['ms_an_image'] / 1000:.2f} s an image and "
        f"{cost['minutes_for_all']:.0f} minutes for one view of all images, in "
        f"{cost['peak_rss_mb'] / 1000:.1f} GB of memory (random weights of the scale of trained "
        f"ones, {cost['images']} images; `python -m marsclf b7-cost` at commit "
        f"{cost['commit'][:12]} on {_cores(hardware)}, {hardware['gpu'] or 'no GPU'}).\n"
    )


def b7_gpu_table(cost: dict | None) -> str:
    """Return as Markdown what both stages of B7 cost on a GPU; without a result, that it is open.

    Args:
        cost: as in results/b7_gpu_cost.json, which is not there until somebody measures it.
    """
    if cost is None:
        return (
            "On a GPU: **not measured**; `.venv/bin/python -m marsclf b7-cost` on a machine with "
            "one measures images a second and memory of both stages, and the time and price of "
            "the whole recipe.\n"
        )
    names = {"features": "features", "finetune": "training step"}
    batch_sizes = list(dict.fromkeys(record["batch"] for record in cost["speeds"]))
    rows = {("Stage", "Pixels", "Precision"): [f"Batch of {batch}" for batch in batch_sizes]}
    for record in cost["speeds"]:
        height, width = record["sides"]
        of = names[record["stage"]], f"{width} × {height}", record["precision"]
        rows.setdefault(of, []).append(_speed(record))
    products = [
        f"{rate:g} TFLOP/s in {name}" for name, rate in cost["matrix_product_tflop_a_s"].items()
    ]
    whole, hardware = cost["recipe"], cost["hardware"]
    price = "is not known, because its batches do not fit in memory"
    if whole["minutes"] is not None:
        price = (
            f"takes {whole['minutes']:.0f} minutes at most and {whole['dollars']:.2f} dollars, at "
            f"an assumed {whole['dollars_an_hour']:g} dollars an hour"
        )
    return (
        f"{_markdown([[*of, *cells] for of, cells in rows.items()])}\n"
        "Images a second (median), the most memory of the GPU in use, and the share of the rate of "
        f"a matrix product, {cost['matrix']} rows square: {', '.join(products)}. A training step "
        f"is of {', '.join(cost['blocks'])} and the head, {cost['accumulate']} batches long, from "
        "what the frozen blocks gave, and counts three times the forward pass of what learns.\n\n"
        f"The whole preset `b7` {price}: computed from {whole['features_images']:,} images through "
        f"the frozen network in batches of {whole['features_batch']} and "
        f"{whole['finetune_images']:,} through training in batches of {whole['finetune_batch']}; "
        "reading images, the head's training and compiling aside.\n\n"
        f"{cost['backbone']}, weights {cost['weights']}; {cost['backend']} on "
        f"{hardware['gpu'] or 'no GPU'}; `python -m marsclf b7-cost` at commit "
        f"{cost['commit'][:12]}.\n"
    )


def _speed(record: dict) -> str:
    if record["outcome"] != "measured":
        return record["outcome"]
    memory = _number(record["peak_memory_mb"] and record["peak_memory_mb"] / 1000, "{:.1f} GB")
    share = f"{record['share_of_matrix_product']:.0%}"
    return f"{record['images_a_s']['median']:.4g}, {memory}, {share}"


def seeds_table(published: dict[str, dict]) -> str:
    """Return a Markdown table: mean and standard deviation over the seeds in the ledger."""
    names = {
        "accuracy": "{:.1%}",
        "macro_f1": "{:.3f}",
        "ece": "{:.3f}",
        "burst_accuracy": "{:.1%}",
    }
    head = ["Preset", "Seeds", "Test accuracy", "Macro-F1", "ECE", "Accuracy, one answer a burst"]
    rows = [head]
    for preset, result in published.items():
        seeds = ledger.seeds(result)
        row = [f"`{preset}`", ", ".join(sorted(seeds, key=int))]
        for name, form in names.items():
            row.append(_mean_and_spread([figures[name] for figures in seeds.values()], form))
        rows.append(row)
    return _markdown(rows)


def per_class_table(predictions: pd.DataFrame) -> str:
    """Return a Markdown table of each class's support, recall, precision and F1 in test."""
    rows = [["Class", "Test images", "Recall", "Precision", "F1"]]
    classes = metrics.per_class(predictions[predictions["split"] == "test"])
    for row in classes[classes["support"] > 0].itertuples():
        shares = [f"{row.recall:.1%}", f"{row.precision:.1%}", f"{row.f1:.3f}"]
        rows.append([row.class_name, str(row.support), *shares])
    return _markdown(rows)


def bursts_table(predictions: pd.DataFrame) -> str:
    """Return a Markdown table of the bursts of test with the most errors."""
    head = ["Sol", "Camera", "Sequence", "True", "Said", "Errors", "Confidence"]
    rows = [[*head, "Of the true class", "By eye"]]
    bursts = metrics.errors_by_burst(predictions[predictions["split"] == "test"])
    for row in metrics.by_eye(bursts.head(MOST_BURSTS)).itertuples():
        names = [str(row.sol), row.camera, row.sequence, row.true, row.said, str(row.errors)]
        rows.append([*names, f"{row.confidence:.2f}", f"{row.of_true:.2f}", row.verdict])
    return _markdown(rows)


def verdicts_table(predictions: pd.DataFrame) -> str:
    """Return a Markdown table: what the errors of test look like by eye, and how many do."""
    mistakes = metrics.by_eye(metrics.errors(predictions[predictions["split"] == "test"]))
    rows = [["By eye", "Errors", "Of all errors", "Bursts and classes"]]
    for verdict, those in sorted(mistakes.groupby("verdict"), key=lambda each: -len(each[1])):
        share = f"{len(those) / len(mistakes):.1%}"
        bursts = those[["sequence", "true"]].drop_duplicates()
        rows.append([verdict, str(len(those)), share, str(len(bursts))])
    return _markdown(rows)


def drift_table(predictions: pd.DataFrame) -> str:
    """Return a Markdown table of accuracy and calibration over the sols of test."""
    rows = [["Sols", "Test images", "Accuracy", "Mean confidence", "ECE"]]
    periods = metrics.calibration_over_sols(predictions[predictions["split"] == "test"])
    for row in periods.itertuples():
        sols = f"{row.first_sol} to {row.last_sol}"
        shares = [f"{row.accuracy:.1%}", f"{row.confidence:.1%}", f"{row.ece:.3f}"]
        rows.append([sols, str(row.images), *shares])
    return _markdown(rows)


def confusions_table(predictions: pd.DataFrame) -> str:
    """Return a Markdown table of the commonest errors in test."""
    rows = [["True", "Said", "Test images", "Of the true class"]]
    test = predictions[predictions["split"] == "test"]
    for row in metrics.commonest_confusions(test, MOST_CONFUSIONS).to_dict("records"):
        rows.append([row["true"], row["predicted"], str(row["count"]), f"{row['share']:.1%}"])
    return _markdown(rows)


def first_result(bench: dict) -> str:
    """Return how long the first run takes, and another one, in one sentence."""
    hardware, run = bench["hardware"], bench["run"]
    cold, warm = (run[name]["wall_s"]["command"] for name in ("cold", "warm"))
    return (
        f"With the environment made and the images there, `make run` takes {_duration(cold)}, and "
        f"{_duration(warm)} the next time, when all is cached (measured by `make bench` on "
        f"{_cores(hardware)}, {hardware['gpu'] or 'no GPU'}).\n"
    )


def selection_table() -> str:
    """Return a Markdown table of the recipes that were compared, best first."""
    table = pd.read_csv(paths.RESULTS / ledger.SELECTION)
    first, last = table.columns.get_loc("criterion"), table.columns.get_loc("log loss")
    shown = list(table.columns[first:last])  # the folds and the conditions
    names = [name.capitalize() for name in (*shown, "log loss", "minutes", "commit")]
    rows = [["Changed in the preset", *names]]
    for row in table.sort_values("criterion", ascending=False).to_dict("records"):
        settings = json.loads(row["settings"])
        changed = ", ".join(f"{name} {json.dumps(value)}" for name, value in settings.items())
        shares = [f"{row[name]:.1%}" for name in shown]
        loss = _number(None if pd.isna(row["log loss"]) else row["log loss"], "{:.3f}")
        what = f"`{row['preset']}`: {changed or 'nothing'}"
        rows.append([what, *shares, loss, f"{row['wall_s'] / 60:.0f}", row["commit"][:12]])
    return _markdown(rows)


def adjustments_table(adjusted: dict) -> str:
    """Return a Markdown table of what each adjustment would have done in validation."""
    rows = [["Adjustment", "Accuracy", "Mean class recall", "Macro-F1"]]
    for name, found in adjusted["scores"].items():
        shares = [f"{found['accuracy']:.1%}", f"{found['mean_recall']:.1%}"]
        rows.append([name, *shares, f"{found['macro_f1']:.3f}"])
    run = adjusted["run"]
    note = (
        f"Predictions of `{run['preset']}`, seed {run['seed']}, at commit {run['commit'][:12]} for "
        f"the {adjusted['images']:,} validation images; `make adjust` at commit "
        f"{adjusted['commit'][:12]}."
    )
    return f"{_markdown(rows)}\n{note}\n"


def archive_table(result: dict) -> str:
    """Return the benchmark's rate as Markdown, and what it makes of the images of an archive."""
    size, cores = result["classification"][-1], result["hardware"]["cores"]
    images = result["images"]["ms_an_image"]
    zooms = len(size.get("zooms", [1.0]))  # a benchmark that names none looked once
    loading = images["decode"]["median"] + zooms * images["whole_image"]["median"]
    fitting = f"fitting at {zooms} zooms" if zooms > 1 else "fitting"
    hours = ARCHIVE_IMAGES / (size["images_a_s"] / cores) / 3600
    rows = [
        ["What", "How much", "Where from"],
        [
            f"the local engine, {cores} cores, browse images about 256 pixels wide",
            f"{size['images_a_s']:.0f} images a second, {size['peak_rss_mb']} MB",
            f"[bench.json](../results/bench.json), `classification`, {size['images']:,} images",
        ],
        ["a core's time for an image", f"{1000 * cores / size['images_a_s']:.1f} ms", "the same"],
        [f"of it decoding and {fitting}", f"{loading:.2f} ms", "the same file, `images`"],
        [
            f"{ARCHIVE_IMAGES / 1e6:.0f} million such images",
            f"{hours:.0f} core-hours",
            "computed from the first row",
        ],
        ["on 64 cores", f"{hours / 64:.1f} hours", "computed, if it scales evenly"],
        [
            "cost",
            f"{hours * DOLLARS_A_CORE_HOUR:.1f} dollars",
            f"computed, at an assumed {DOLLARS_A_CORE_HOUR} dollars a core-hour; storage and "
            "traffic aside",
        ],
    ]
    return _markdown(rows)


def _mean_and_spread(values: list[float], form: str) -> str:
    spread = f" ± {form.format(np.std(values, ddof=1))}" if len(values) > 1 else ""
    return form.format(np.mean(values)) + spread


def _cores(hardware: dict) -> str:
    """Return the processor and how many cores of it a run was given."""
    count = hardware["cores"]
    return f"{count} {'core' if count == 1 else 'cores'} of {hardware['cpu']}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} minutes"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"


def cost_table(result: dict) -> str:
    """Return the benchmark as Markdown: what was measured, the median, smallest and largest."""
    network, training, run = result["network"], result["training"], result["run"]
    hardware = result["hardware"]
    rows = [["Measured", "Median", "Least to most"]]

    def row(what: str, values: dict[str, float], form: str) -> None:
        low, high = (form.format(values[name]) for name in ("min", "max"))
        rows.append([what, form.format(values["median"]), f"{low} to {high}"])

    times = network["ms_an_image"]
    row("Lite0 at 224 pixels, the engine", times["engine"], "{:.1f} ms an image")
    row("the same, `model.predict` in batches of 32", times["keras_predict"], "{:.1f} ms an image")
    row("the same, `predict_on_batch` one by one", times["keras_one_by_one"], "{:.1f} ms an image")
    row("engine against `model.predict`", network["engine_against_keras_predict"], "{:.2f} times")
    row(
        "the most that this machine's matrix product allows",
        network["largest_possible_against_keras_predict"],
        "{:.2f} times",
    )
    row("engine against one by one", network["engine_against_keras_one_by_one"], "{:.2f} times")
    row("matrix product, 2048 x 2048", network["matrix_product_gflop_a_s"], "{:.0f} GFLOP/s")
    row("the engine's share of it", network["engine_share_of_ceiling"], "{:.0%}")
    for name, what in {
        "decode": "decoding, one thread",
        "whole_image": "fitting a whole image, one thread",
        "random_view": "a random view, one thread",
    }.items():
        row(what, result["images"]["ms_an_image"][name], "{:.2f} ms")
    pixels, first = training["image_size"], training["blocks"][0]
    for name, what in {
        "all_blocks_224": "training step, all blocks at 224 pixels",
        "all_blocks": f"training step, all blocks at {pixels} pixels",
        "preset_blocks": f"training step, {first} and up at {pixels} pixels",
        "preset_blocks_stored": "the same, from stored features of the frozen blocks",
    }.items():
        row(what, training["ms_an_image"][name], "{:.1f} ms an image")
    reference = result["reference"]["ms_an_image"]
    row("the reference's way to predict", reference["reference"], "{:.1f} ms an image")
    row("this library's, same network and size", reference["library"], "{:.1f} ms an image")
    for size in result["classification"]:
        what = f"classifying {size['images']:,} images"
        cost = f"{size['seconds']:.1f} s, {size['peak_rss_mb']} MB"
        rows.append([what, cost, f"{size['images_a_s']:.0f} images a second"])
    start = result["start"]
    row("`marsclf predict` for one image, the first time", start["first_s"], "{:.1f} s")
    row("the same again", start["again_s"], "{:.1f} s")
    for name, what in {
        "cold": "`make run`, nothing cached",
        "warm": "`make run` again",
        "head_cold": "`make run PRESET=laptop-head`, nothing of it cached",
        "head_warm_another_head": "the same again with another head",
    }.items():
        cost = f"{_duration(run[name]['wall_s']['command'])}, {run[name]['peak_rss_mb']} MB"
        rows.append([what, cost, "one run"])
    note = (
        f"{_cores(hardware)}, {hardware['gpu'] or 'no GPU'}; medians of "
        f"{result['repeats']} turns; `make bench` at commit {result['commit'][:12]}."
    )
    return f"{_markdown(rows)}\n{note}\n"
