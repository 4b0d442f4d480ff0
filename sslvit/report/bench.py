"""`sslvit bench`: encoders x protocols x data sets -> one table per data set and one page; what is done stays done."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sslvit.api import finetune, for_labels
from sslvit.checkpoint import fingerprint, load_encoder
from sslvit.environment import pick_device
from sslvit.evaluate.cache import FeatureCache
from sslvit.evaluate.features import Pass
from sslvit.evaluate.probe import few_labels, neighbors, open_labeled, untrained
from sslvit.evaluate.protocols import Bench, check_places, linear_probe, places_of
from sslvit.evaluate.scores import (
    Draws,
    columns_of,
    format_table,
    independent,
    interval,
    markdown_table,
    markdown_text,
    mean,
    sampling_interval,
    spreadsheet_cell,
)
from sslvit.evaluate.sources import FrozenEncoder, LabeledSet, RawPixels, Source
from sslvit.figures import bars
from sslvit.files import printable, remove_stale_parts, to_json, write_atomically
from sslvit.models import ViTEncoder
from sslvit.models.resize import check_resizable
from sslvit.report.page import write_page
from sslvit.settings import SupervisedSettings
from sslvit.settings.bench import PIXELS, BenchSettings, FinetuneColumn, ProbeColumn, SplitSettings
from sslvit.settings.load import load_recipe
from sslvit.train.folder import RunFolder

logger = logging.getLogger(__name__)

FORMAT = 2  # raised when the same cell would mean another number
MARK = "bench.json"


@dataclass
class Cell:
    """One measurement.

    Args:
        values: scores in percent; several where labels were drawn several times.
        seconds: that it took, passes through the encoder included unless they were in the cache.
        about: what is needed to quote it.
        key: of what decides it.
    """

    values: list[float]
    seconds: float
    about: dict[str, Any]
    key: str = ""


@dataclass
class Entry:
    """One source of a row: an encoder under one seed.

    Args:
        encoder: gives it; None for raw pixels.
        path: what a fine-tuning starts from; None where there is nothing to start from.
        is_scratch: fine-tuning starts from random weights of the architecture behind `path`.
        seed: of all chance.
    """

    encoder: Callable[[], ViTEncoder] | None
    path: str | None
    is_scratch: bool
    seed: int


class BenchRun:
    """Everything of one bench.

    Args:
        settings: what is compared.
    """

    def __init__(self, settings: BenchSettings) -> None:
        self.settings, self.folder = settings, Path(settings.out)
        self.device = pick_device(settings.device)
        # everything that can be refused is refused here, before the first pass
        self.encoders = {name: [load_encoder(path) for path in paths] for name, paths in settings.encoders.items()}
        for name, (first, *others) in self.encoders.items():
            if any(other.settings != first.settings for other in others):
                raise ValueError(
                    f"encoders.{name}: its runs are of different architectures. Give each a row of its own."
                )
        kinds = {encoder.settings.channels for encoders in self.encoders.values() for encoder in encoders}
        if len(kinds) > 1:
            raise ValueError(
                f"encoders: they take images of {sorted(kinds)} channels. Compare them one kind at a time."
            )
        self.sets = {}
        for name, split in settings.data.items():
            probes = [column for column in settings.columns.values() if isinstance(column, ProbeColumn)] or [
                ProbeColumn()
            ]
            for column in probes:
                indices = open_labeled(column.settings(split))
            limit = settings.max_unreadable_fraction
            self.sets[name] = tuple(LabeledSet(index, kinds.copy().pop(), None, limit) for index in indices)
        for encoders in self.encoders.values():
            for column in settings.columns.values():
                for encoder in encoders if isinstance(column, ProbeColumn) else []:
                    check_places(FrozenEncoder(encoder), column.settings(SplitSettings("", "")))
        trained = {f"columns.{name}": column for name, column in settings.columns.items()}
        if "scratch" in settings.baselines and not any(isinstance(one, FinetuneColumn) for one in trained.values()):
            trained["scratch"] = settings.scratch
        for where, column in trained.items():
            if isinstance(column, FinetuneColumn):
                self.check_finetuning(where, column)
        cache = FeatureCache(self.folder / "features")
        self.reading = Pass(settings.batch, settings.workers, cache)

    def check_finetuning(self, where: str, column: FinetuneColumn) -> None:
        """Refuse a recipe or a change that no fine-tuning could run with."""
        for encoders in self.encoders.values():
            for encoder in encoders:
                start = for_labels(encoder.settings)
                try:
                    recipe = load_recipe(column.config, column.changes, start)
                    check_resizable(start, recipe.encoder)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from error
                if not isinstance(recipe.task, SupervisedSettings):
                    raise ValueError(f"{where}.config: {column.config} does not train with labels.")
                if recipe.train.devices * recipe.train.nodes > 1:
                    raise ValueError(f"{where}.train.devices: a bench trains on one device.")
                fewest = min(len(train.index) for train, _ in self.sets.values())
                batch = recipe.data.fitted(fewest).global_batch_size
                if batch > fewest:
                    raise ValueError(
                        f"{where}: data.global_batch_size {batch}, but there are {fewest} training images."
                    )

    def run(self) -> dict[str, Path]:
        """Fill the tables cell by cell; returns what was written."""
        tables: dict[str, Draws] = {}
        cells: list[dict[str, Any]] = []
        for data in self.settings.data:
            tables[data] = {}
            for row, entries in self.rows(data).items():
                tables[data][row] = {}
                for column in self.settings.columns:
                    found = [self.cell(data, row, column, entry) for entry in entries]
                    found = [cell for cell in found if cell is not None]
                    if not found:
                        continue
                    values = independent([cell.values for cell in found])
                    tables[data][row][column] = values
                    cells.append(
                        {"data": data, "row": row, "column": column, "mean": mean(values), "interval": interval(values),
                         "values": values, "seconds": sum(cell.seconds for cell in found),
                         "key": "+".join(cell.key for cell in found), "about": found[0].about}
                    )  # fmt: skip
                self.write(tables, cells)  # what is there can be read while the rest is made
        return self.write(tables, cells)

    def claim(self) -> None:
        """Go on in a folder of a bench, or make a new one; nothing else is touched."""
        remove_stale_parts(self.folder / MARK)
        if self.folder.exists() and any(path.name != "cells" or any(path.iterdir()) for path in self.folder.iterdir()):
            if not (self.folder / MARK).exists():
                raise ValueError(f"{self.folder}: in use, and not by a bench (no {MARK}). Choose another --out.")
            earlier = json.loads((self.folder / MARK).read_text()).get("name")
            if earlier != self.settings.name:
                raise ValueError(f"{self.folder}: holds the tables of another bench ({earlier}). Choose another --out.")
        (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / MARK, json.dumps(asdict(self.settings), indent=1) + "\n")

    # ---- rows ------------------------------------------------------------------------------------------------

    def rows(self, data: str) -> dict[str, list[Entry]]:
        """Raw pixels, then the networks untrained, trained with labels from scratch, and as they were given."""
        settings = self.settings
        seeds = range(settings.seed, settings.seed + settings.seeds)
        rows: dict[str, list[Entry]] = {}
        if "pixels" in settings.baselines:
            rows[PIXELS] = [Entry(None, None, False, seed) for seed in seeds]
        kinds: dict[str, list[str]] = {}
        for name, (first, *_) in self.encoders.items():
            kinds.setdefault(json.dumps(asdict(first.settings), sort_keys=True), []).append(name)
        for names in kinds.values():
            encoder, path = self.encoders[names[0]][0], settings.encoders[names[0]][0]
            title = ", ".join(names)
            if "untrained" in settings.baselines:
                rows[f"{title} untrained"] = [
                    Entry(lambda seed=seed, encoder=encoder: untrained(encoder, seed), path, True, seed)
                    for seed in seeds
                ]
            if "scratch" in settings.baselines:
                rows[f"{title} from scratch with labels"] = [
                    Entry(lambda seed=seed, path=path: self.trained_from_scratch(data, path, seed), path, True, seed)
                    for seed in seeds
                ]
        for name, encoders in self.encoders.items():
            rows[name] = [
                Entry(lambda encoder=encoder: encoder, path, False, seed)
                for encoder, path in zip(encoders, settings.encoders[name], strict=True)
                for seed in (seeds if len(encoders) == 1 else seeds[:1])
            ]
        return rows

    def trained_from_scratch(self, data: str, path: str, seed: int) -> ViTEncoder:
        columns = [column for column in self.settings.columns.values() if isinstance(column, FinetuneColumn)]
        folder, _ = self.finetuned(data, columns[0] if columns else self.settings.scratch, path, True, seed)
        return load_encoder(folder)

    # ---- cells -----------------------------------------------------------------------------------------------

    def cell(self, data: str, row: str, column: str, entry: Entry) -> Cell | None:
        """A measurement, done now or before; None where there is none to do."""
        wanted = self.settings.columns[column]
        if isinstance(wanted, FinetuneColumn):
            return None if entry.path is None else self.finetune_cell(data, wanted, entry)
        encoder = None if entry.encoder is None else entry.encoder().to(self.device)
        first = next(iter(self.encoders.values()))[0].settings
        source: Source = RawPixels(first) if encoder is None else FrozenEncoder(encoder)
        train, val = self.sets[data]
        identity = {
            "source": source.fingerprint(), "input": asdict(source.settings), "column": asdict(wanted),
            "train": train.index.fingerprint(), "val": val.index.fingerprint(), "seed": entry.seed,
            "batch": self.settings.batch, "device": self.device.split(":")[0],
        }  # fmt: skip
        return self.kept(
            identity, f"{data}: {row}: {column}", lambda: self.probed(source, train, val, wanted, entry.seed), data
        )

    def probed(
        self, source: Source, train: LabeledSet, val: LabeledSet, column: ProbeColumn, seed: int
    ) -> tuple[list[float], dict[str, Any]]:
        bench = Bench(source, train, val, len(train.index.classes), self.reading, self.device)
        settings = column.settings(SplitSettings("", ""))
        if column.kind == "linear":
            result = linear_probe(bench, settings, seed)
            about = ({} if "fraction" in result.about else {"view": source.settings.crop_in_words}) | result.about
            if result.held_out is not None:
                about |= {"right answers on training images held out": result.held_out}
            if result.paper_rule is not None:
                about |= {"score by the paper's choice, made on the reported images": result.paper_rule}
            return [result.score], about
        places = places_of(source, settings)
        features = [bench.of(data, places) for data in (train, val)]
        made = few_labels(*features, bench, settings, seed) if column.kind == "few" else neighbors(
            *features, bench, settings
        )  # fmt: skip
        (values,) = made.values()
        about = asdict(column) | {"view": source.settings.crop_in_words}
        del about["protocol"]  # of linear probes
        return values, about

    def finetune_cell(self, data: str, wanted: FinetuneColumn, entry: Entry) -> Cell:
        path, key = self.finetuned(data, wanted, entry.path, entry.is_scratch, entry.seed)
        folder = RunFolder(path)
        scores = json.loads(folder.scores.read_text())
        start = "random weights" if entry.is_scratch else entry.path
        about = {"config": wanted.config, **wanted.changes, "started from": start, "run": str(path)}
        if scores.get("unreadable"):
            about["reported images that could not be read"] = scores["unreadable"]
        return Cell([scores["top1"]], _training_seconds(folder), about, key)

    def finetuned(self, data: str, wanted: FinetuneColumn, path: str, is_scratch: bool, seed: int) -> tuple[Path, str]:
        """The run folder of a fine-tuning, made now, gone on with or finished before; and the key of all behind it."""
        encoder = load_encoder(path)
        recipe = asdict(load_recipe(wanted.config, wanted.changes, for_labels(encoder.settings)))
        train, val = (part.index.fingerprint() for part in self.sets[data])
        key = _key(
            {"start": None if is_scratch else fingerprint(encoder), "recipe": recipe, "seed": seed, "train": train,
             "val": val, "device": self.device.split(":")[0]}
        )  # fmt: skip
        folder = RunFolder(self.folder / "finetune" / key)
        if not (folder.scores.exists() and (folder.encoder / "encoder.json").exists()):  # the last things written
            if not folder.checkpoint.exists():
                shutil.rmtree(folder.path, ignore_errors=True)
            start = "from scratch" if is_scratch else f"from {path}"
            logger.info(printable(f"{data}: training with labels, {start}"))
            split = self.settings.data[data]
            finetune(
                path, split.train, split.val, wanted.config, folder.path, is_scratch, resume=folder.checkpoint.exists(),
                **wanted.changes, seed=seed, **{"train.accelerator": "cpu" if self.device == "cpu" else "gpu"},
            )  # fmt: skip
        return folder.path, key

    def kept(
        self, identity: dict[str, Any], title: str, measure: Callable[[], tuple[list[float], dict]], data: str
    ) -> Cell:
        """The cell of this identity: from its file, or measured and, if all images could be read, written there."""
        key = _key(identity)
        file = self.folder / "cells" / f"{key}.json"
        if file.exists():
            found = json.loads(file.read_text())
            return Cell(found["values"], found["seconds"], found["about"], key)
        logger.info(printable(title))
        start = time.monotonic()
        values, about = measure()
        cell = Cell(values, time.monotonic() - start, about, key)
        if not any(part.unreadable for part in self.sets[data]):
            write_atomically(file, json.dumps({**asdict(cell), "identity": identity}, indent=1, default=str) + "\n")
        return cell

    # ---- tables ----------------------------------------------------------------------------------------------

    def write(self, tables: dict[str, Draws], cells: list[dict[str, Any]]) -> dict[str, Path]:
        """Markdown, CSV, JSON and the page."""
        markdown, content = [], []
        for data, rows in tables.items():
            train, val = self.sets[data]
            note = (
                f"Right answers in percent on {val.count_in_words} of {self.settings.data[data].val}; heads and "
                f"fine-tuning on {train.count_in_words} of {self.settings.data[data].train}. ± is half the 95 % "
                "interval of a mean over runs, seeds or, with one seed, draws of labels; one percentage of so many "
                f"images is uncertain by up to ± {sampling_interval(val.images):.1f} by that alone. The reported "
                "images choose nothing."
            )
            markdown += [f"## {markdown_text(data)}", "", markdown_table(rows), "", markdown_text(note), ""]
            content += [("heading", data), ("table", rows), ("text", note)]
            full = {row: {c: mean(v) for c, v in scores.items()} for row, scores in rows.items()}
            if columns_of(rows):
                picture = bars(self.folder / f"{printable(data)}.png", full, "right answers, %", data)
                content.append(("picture", picture, "The same as bars."))
        spent: dict[str, float] = {}
        for cell in {cell["key"]: cell for cell in cells}.values():  # rows may share one
            spent[cell["column"]] = spent.get(cell["column"], 0.0) + cell["seconds"]
        cost = "Minutes of each column: " + "; ".join(f"{column} {s / 60:.1f}" for column, s in spent.items()) + "."
        said = [
            f"{name}: the paper chose on the images that it reports ({column.protocol.chosen_by_paper}); not so here."
            for name, column in self.settings.columns.items()
            if isinstance(column, ProbeColumn) and column.kind == "linear" and column.protocol.chosen_by_paper
        ]
        markdown += [line for text in [*said, cost] for line in (markdown_text(text), "")]
        content += [("heading", "Cost and settings"), *(("text", text) for text in [*said, cost])]
        for cell in cells:
            settings = "; ".join(f"{key} {value}" for key, value in cell["about"].items())
            content.append(("text", f"{cell['data']}, {cell['row']}, {cell['column']}: {settings}."))
        lines = io.StringIO()
        # quoted: where a semicolon separates cells, one in a name must not begin another
        writer = csv.writer(lines, quoting=csv.QUOTE_NONNUMERIC)
        titles = ["data", "row", "column", "mean", "interval", "values", "seconds"]
        writer.writerow(titles)
        for cell in cells:
            line = {key: cell[key] for key in titles} | {"values": len(cell["values"])}
            writer.writerow([spreadsheet_cell(value) for value in line.values()])
        files = {
            "table.md": "\n".join(markdown), "table.csv": lines.getvalue(),
            "table.json": to_json({"cells": cells, "settings": asdict(self.settings)}, indent=1) + "\n",
        }  # fmt: skip
        for name, text in files.items():
            write_atomically(self.folder / name, text)
        page = write_page(self.folder / "report.html", "sslvit bench", content)
        return {"page": page, **{name: self.folder / name for name in files}}


def bench(settings: BenchSettings) -> dict[str, Path]:
    """Run a bench, or go on with it, and print its tables."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("bench: runs in one process. Start it without torchrun.")
    run = BenchRun(settings)
    run.claim()
    try:
        with FileLock(run.folder / ".lock", timeout=0):
            files = run.run()
    except Timeout:
        raise ValueError(
            f"{run.folder}: another process runs this bench. Wait for it, or choose another --out."
        ) from None
    logger.info("")
    content = json.loads(files["table.json"].read_text())
    for data in settings.data:
        rows: Draws = {}
        for cell in content["cells"]:
            if cell["data"] == data:
                rows.setdefault(cell["row"], {})[cell["column"]] = cell["values"]
        logger.info(f"{printable(data)}\n\n{format_table(rows)}\n")
    for file in files.values():
        logger.info(f"  {file}")
    return files


def _training_seconds(folder: RunFolder) -> float:
    """That the steps of a run took, over all parts of it that were gone on with."""
    seconds, step = 0.0, 0
    batch = folder.read_config()["data"]["global_batch_size"]
    for line in folder.read_metrics():
        seconds += (line["step"] - step) * batch / line["images_per_second"]
        step = line["step"]
    return seconds


def _key(identity: dict[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
