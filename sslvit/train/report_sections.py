"""The sections of a run's page: what ran, scores, curves, pictures, time, data, exports and settings.

Each section takes the files of runs by name and returns parts of a page; none if no run has content for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

import numpy as np

from sslvit.evaluate.scores import read_decimals, read_scores, scored_data
from sslvit.files import counted
from sslvit.pages.charts import breakdown_chart, line_chart
from sslvit.pages.page import figure_row, heading, is_plain, picture, table, text, text_rows
from sslvit.results import decimals
from sslvit.settings.encoder import OF_A_BACKBONE
from sslvit.settings.load import by_dotted_key, from_keywords
from sslvit.settings.run import RunSettings
from sslvit.train.folder import BRANCHED_FROM, RunFolder, read_json
from sslvit.train.runs import summarize, value_in

# title of a chart -> label of its values, and the metrics that it may show; those of one chart have one unit
CHARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Loss": ("loss", ("train/loss", "val/loss")),
    "Accuracy while training": ("top-1 accuracy (%)", ("probe/linear", "probe/knn", "train/top1", "val/top1")),
    "Learning rate": ("learning rate", ("lr",)),
    "Gradient norm": ("norm", ("train/grad_norm",)),
    "Effective rank of the features (RankMe)": ("effective rank", ("health/rankme", "probe/rankme")),
    "Feature standard deviation": ("standard deviation", ("health/feature_std", "probe/feature_std")),
    "Entropy of the teacher": ("nats", ("health/teacher_entropy", "health/teacher_uniform_kl")),
    "Speed": ("images/s", ("time/images_per_second",)),
}  # fmt: skip
PHASES = ("data", "forward", "backward", "communication", "optimizer")
CAPTIONS = {
    "views": "What training is fed: views of some images.",
    "reconstruction": "Input, what the encoder sees (hidden patches gray), and the reconstruction.",
    "neighbors": "Images, and those whose features are nearest.",
    "attention": "Attention of the class token to each patch in the last block, head by head.",
    "attention_larger": "The same at twice the training resolution.",
    "patches": "The first three principal components of the patches' features as red, green and blue.",
    "generated": "Sampled unconditionally, pixel by pixel.",
    "completed": "Given the upper half, the lower one sampled twice; below, the original.",
    "layers": "The linear probe at each depth.",
    "distance": "Mean attention distance of each head of each block.",
    "field": "Receptive field of the middle patch.",
}
PLOTTED_AS_CHARTS = ("loss",)  # pictures that the charts of a page show as well
MAX_REASONS = 10


class RunFiles:
    """The content of a run's files, each read once.

    Args:
        folder: Folder of the run.
        state: State to show instead of the one in the files; None to show that.

    Attributes:
        config: Settings of the run.
        summary: Its entry in `sslvit runs`.
        history: Metric -> one number for each logged step, NaN where there is none.
    """

    def __init__(self, folder: RunFolder, state: str | None) -> None:
        self.folder, self.config, summary = folder, folder.read_config(), summarize(folder)
        self.summary = replace(summary, state=state or summary.state)
        by_dotted_key(self.config)  # refuses keys that are not text
        self.history = folder.history()


Named = Mapping[str, RunFiles]


def facts(named: Named) -> list[str]:
    """A column for each run: what it trained, where, how long, and how it went."""
    columns = [_facts_of(files) for files in named.values()]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [[key, *(column.get(key, "–") for column in columns)] for key in keys]
    messages = []
    for name, files in named.items():
        messages += [text(f"{name}: {one}") for one in _events_of(files)]
    return [text_rows(["", *named], rows), *messages]


def _events_of(files: RunFiles) -> list[str]:
    """What went wrong in a run: the messages of its health check, and the last step that was not finite."""
    said = value_in(read_json(files.folder.health), "messages")
    found = [value_in(one, "message") for one in said] if isinstance(said, list) else []
    incident = files.folder.incident
    step = value_in(read_json(incident / "incident.json"), "step")
    if isinstance(step, int):
        found.append(f"step {step:,} was not finite and was skipped; to see why: sslvit replay {incident}")
    return [one for one in found if isinstance(one, str)]


def _facts_of(files: RunFiles) -> dict[str, object]:
    folder, run, history = files.folder, files.summary, files.history
    data = value_in(read_json(folder.encoder / "encoder.json"), "provenance.data")
    images = value_in(data, "samples")
    made = [one for one in folder.made_by() if isinstance(one, dict)]
    first = made[0] if made else {}
    branches = [f"{one[BRANCHED_FROM]}, step {one.get('step')}" for one in made if BRANCHED_FROM in one]
    resumed = len(made) - len(branches) - 1
    versions = first.get("versions")
    speeds = history.get("time/images_per_second", np.array([]))
    speeds = speeds[np.isfinite(speeds)]
    epochs = history.get("epoch", np.array([]))
    batch = value_in(files.config, "data.global_batch_size")
    facts: dict[str, object] = {
        "task": run.task, "state": run.state, "page written": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "health": run.health, "data": run.data,
        "images": f"{images:,}" if isinstance(images, int) else None,
        "data fingerprint": value_in(data, "fingerprint"),
        "encoder": run.backbone or (
            None if run.width is None or run.depth is None else f"{counted(run.depth, 'block')} of width {run.width}"
        ),
        "steps": f"{run.steps:,} of {run.total_steps:,}" if run.total_steps else f"{run.steps:,}",
        "images seen": f"{run.steps * batch:,}" if isinstance(batch, int) else None,
        "epochs": f"{epochs[-1]:.1f}" if len(epochs) else None,
        "training time": None if run.hours is None else _duration(run.hours),
        "images/s": f"{float(np.median(speeds)):,.0f} (median)" if len(speeds) else None,
        "final loss": None if run.loss is None else decimals(run.loss),
        "started": first.get("date"), "host": first.get("host"), "command": first.get("command"),
        "branched from": branches[-1] if branches else None,
        "resumed": counted(resumed, "time") if resumed > 0 else None,
        "software": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else None,
        "commit": value_in(first, "commits.sslvit"),
    }  # fmt: skip
    return {key: value for key, value in facts.items() if value is not None}


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return counted(round(3600 * hours), "second")
    return f"{60 * hours:.1f} minutes" if hours < 1.5 else f"{hours:.1f} hours"


def settings(named: Named) -> list[str]:
    """Settings that differ from the defaults; those in which several runs differ are highlighted."""
    of_runs = {name: _used_settings(files) for name, files in named.items()}
    defaults = [_defaults(files.config) for files in named.values()]
    keys = list(dict.fromkeys(key for settings in of_runs.values() for key in settings))
    rows: list[list[str]] = []
    changed: list[int] = []
    for key in keys:
        values = [settings.get(key, "–") for settings in of_runs.values()]
        differ = len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1
        usual = [of.get(key, "–") for of in defaults]
        if key == "out" or (values == usual and not differ):
            continue
        if differ:
            changed.append(len(rows))
        alike = len({_value(value) for value in usual}) == 1
        rows.append([key, *map(_value, values), _value(usual[0]) if alike else "by task"])
    said = " Rows in which the runs differ stand out." if len(named) > 1 else ""
    return [
        heading("Settings"),
        text(f"Those that are not the defaults of this task and view, after every null was resolved.{said}"),
        text_rows(["", *named, "default"], rows, changed),
    ]


def _used_settings(files: RunFiles) -> dict[str, Any]:
    """Settings by dotted key, without those of the vision transformer for another network."""
    found = by_dotted_key(files.config)
    if files.summary.backbone is None:
        return found
    return {
        key: value for key, value in found.items()
        if not key.startswith("encoder.") or key.removeprefix("encoder.") in OF_A_BACKBONE
    }  # fmt: skip


def _defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Default settings of a run with the same task and view."""
    said = {key: value_in(config, key) for key in ("task.name", "data.view.kind")}
    known = {key: value for key, value in said.items() if isinstance(value, str)}
    try:
        return by_dotted_key(asdict(from_keywords(RunSettings, {"data.shards": "-"} | known)))
    except (ValueError, TypeError):  # a task or a view from outside the package
        return {}


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and len(value) < 5:
        return f"[{', '.join(map(_value, value))}]"
    made = value if isinstance(value, str) else json.dumps(value, default=str)
    return made if len(made) <= 200 else f"{made[:200]}..."


def scores(named: Named) -> list[str]:
    """Tables of the JSON files of scores in the run folders, as `sslvit probe RUN -o RUN/probe.json` writes them."""
    made = []
    for name, files in named.items():
        for file in sorted(files.folder.path.glob("*.json")):
            content = read_json(file) if is_plain(file) else None
            if content is None:
                continue
            if file == files.folder.scores and isinstance(content.get("top1"), float):
                made.append(text(f"{name}, {file.name}: {files.folder.scores_in_words()}"))
            elif rows := read_scores(content.get("draws")) or read_scores(content.get("rows")):
                (data, count), decimals = scored_data(content), read_decimals(content)
                what = "top-1 accuracy (%)" if value_in(content, "about.probed") is not None else "scores"
                what = what if decimals is None else "measures"
                on = f" on {count:,} images of {data}" if isinstance(count, int) else ""
                made += [text(f"{name}, {file.name}: {what}{on}"), table(rows, decimals)]
    return [heading("Scores"), *made] if made else []


def curves(named: Named) -> list[str]:
    """A chart for each kind of metric that a run has."""
    histories = {name: files.history for name, files in named.items()}
    made = []
    for title, (label, metrics) in CHARTS.items():
        lines = {}
        present = [metric for metric in metrics if any(metric in history for history in histories.values())]
        for name, history in histories.items():
            for metric in present:
                if metric in history:
                    name_of_line = metric if len(named) == 1 else f"{name}, {metric}" if len(present) > 1 else name
                    lines[name_of_line] = history["step"].tolist(), history[metric].tolist()
        made.append(line_chart(title, lines, "step", label))
    return [heading("Curves"), *made] if any(made) else []


def times(named: Named) -> list[str]:
    """Where a step's time goes, on average over the run."""
    rows = {}
    for name, files in named.items():
        history = files.history
        seconds = {phase: history[f"time/{phase}"] for phase in PHASES if f"time/{phase}" in history}
        means = {phase: float(np.nanmean(of)) * 1000 for phase, of in seconds.items() if np.isfinite(of).any()}
        if means:
            rows[name] = {phase: value for phase, value in means.items() if value > 0}
    chart = breakdown_chart("Time of a step", rows, "ms")
    return [heading("Where the time goes"), chart] if chart else []


def ledgers(named: Named) -> list[str]:
    """How many images were read, and which were left out for what reason."""
    made = []
    for name, files in named.items():
        found = read_json(files.folder.ledger)
        if found is None or not isinstance(found.get("samples_read"), int):
            continue
        epochs, dropped = (
            value if isinstance(value := found.get(key), int) else 0 for key in ("epochs_finished", "dropped_per_epoch")
        )
        reasons = found.get("unreadable_by_reason")
        unreadable = reasons.items() if isinstance(reasons, dict) else ()
        left = "; ".join(f"{count} x {reason}" for reason, count in list(unreadable)[:MAX_REASONS])
        made.append(
            text(
                f"{name}: {found['samples_read']:,} images read, {epochs:,} epochs finished, "
                f"{dropped:,} images dropped in each. Unreadable: {left or 'none'}."
            )
        )
    return [heading("Data that was read"), *made] if made else []


def exports(named: Named) -> list[str]:
    """Verdicts of the exports in the run folders."""
    made = []
    for name, files in named.items():
        path = files.folder.path
        for file in sorted([*path.glob("*/verdict.json"), *path.glob("*/*/verdict.json")]):
            if is_plain(file) and (found := read_json(file)) is not None:
                inside = file.parent.relative_to(path)
                said = "; ".join(
                    f"{key} {value}" for key, value in found.items() if isinstance(value, (str, float, int))
                )
                made.append(text(f"{name}, {inside}: {said}"))
    return [heading("Exports"), *made] if made else []


def pictures(named: Named) -> list[str]:
    """The figures of the run folders, those of one kind side by side."""
    files = {
        name: {file.stem: file for file in sorted(files.folder.figures.glob("*.png"))} for name, files in named.items()
    }
    kinds = list(dict.fromkeys(kind for of in files.values() for kind in of if kind not in PLOTTED_AS_CHARTS))
    kinds.sort(key=lambda kind: (list(CAPTIONS).index(kind) if kind in CAPTIONS else len(CAPTIONS), kind))
    made = []
    for kind in kinds:
        caption = CAPTIONS.get(kind, f"{kind}.png")
        found = [
            picture(of[kind], caption if len(named) == 1 else f"{name}: {caption}")
            for name, of in files.items()
            if kind in of
        ]
        made.append(found[0] if len(found) == 1 else figure_row(found))
    return [heading("Pictures"), *made] if made else []


SECTIONS = (facts, scores, curves, pictures, times, ledgers, exports, settings)  # in the order of a page
