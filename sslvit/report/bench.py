"""`sslvit bench`: encoders x protocols x data sets -> one table per data set and one page; what is done stays done."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sslvit.api import finetune, for_labels
from sslvit.checkpoint import fingerprint, load_encoder
from sslvit.environment import pick_device
from sslvit.evaluate.cache import FeatureCache
from sslvit.evaluate.features import Pass
from sslvit.evaluate.probe import few_labels, neighbours, open_labelled, untrained
from sslvit.evaluate.protocols import Bench, linear_probe, places_of
from sslvit.evaluate.scores import Draws, columns_of, format_table, interval, markdown_table, mean, sampling_interval
from sslvit.evaluate.sources import FrozenEncoder, LabelledSet, RawPixels, Source
from sslvit.figures import bars
from sslvit.models import ViTEncoder
from sslvit.report.page import write_page
from sslvit.settings import SupervisedSettings
from sslvit.settings.bench import BenchSettings, FinetuneColumn, ProbeColumn, SplitSettings
from sslvit.settings.load import load_recipe

FORMAT = 1  # raised when the same cell would mean another number
MARK = "bench.json"
PIXELS = "raw pixels"


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
                indices = open_labelled(column.settings(split))
            self.sets[name] = tuple(LabelledSet(index, kinds.copy().pop()) for index in indices)
        for encoders in self.encoders.values():
            for column in settings.columns.values():
                if isinstance(column, ProbeColumn):
                    places_of(FrozenEncoder(encoders[0]), column.settings(SplitSettings("", "")))
        for name, column in {**settings.columns, "scratch": settings.scratch}.items():
            if isinstance(column, FinetuneColumn):
                self.check_finetuning(name, column)
        cache = FeatureCache(self.folder / "features")
        self.reading = Pass(settings.batch, settings.workers, cache)

    def check_finetuning(self, name: str, column: FinetuneColumn) -> None:
        """Refuse a recipe or a change that no fine-tuning could run with."""
        for encoders in self.encoders.values():
            try:
                recipe = load_recipe(column.config, column.changes, for_labels(encoders[0].settings))
            except ValueError as error:
                raise ValueError(f"columns.{name}: {error}") from error
            if not isinstance(recipe.task, SupervisedSettings):
                raise ValueError(f"columns.{name}.config: {column.config} does not train with labels.")
            if recipe.train.devices * recipe.train.nodes > 1:
                raise ValueError(f"columns.{name}.train.devices: a bench trains on one device.")

    def run(self) -> dict[str, Path]:
        """Fill the tables cell by cell; returns what was written."""
        self._claim()
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
                    per_entry = [cell.values for cell in found]
                    values = per_entry[0] if len(per_entry) == 1 else [mean(values) for values in per_entry]
                    tables[data][row][column] = values
                    cells.append(
                        {"data": data, "row": row, "column": column, "mean": mean(values), "interval": interval(values),
                         "values": values, "seconds": sum(cell.seconds for cell in found),
                         "key": "+".join(cell.key for cell in found), "about": found[0].about}
                    )  # fmt: skip
                self.write(tables, cells)  # what is there can be read while the rest is made
        return self.write(tables, cells)

    def _claim(self) -> None:
        """Go on in a folder of a bench, or make a new one; nothing else is touched."""
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / MARK).exists():
            raise ValueError(f"{self.folder}: in use, and not by a bench (no {MARK}). Choose another --out.")
        (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        (self.folder / MARK).write_text(json.dumps(asdict(self.settings), indent=1) + "\n")

    # ---- rows ------------------------------------------------------------------------------------------------

    def rows(self, data: str) -> dict[str, list[Entry]]:
        """Raw pixels, then the networks untrained, trained with labels from scratch, and as they were given."""
        settings = self.settings
        seeds = range(settings.seed, settings.seed + settings.seeds)
        rows: dict[str, list[Entry]] = {}
        if "pixels" in settings.baselines:
            rows[PIXELS] = [Entry(None, None, False, settings.seed)]
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
        return load_encoder(self.finetuned(data, columns[0] if columns else self.settings.scratch, path, True, seed))

    # ---- cells -----------------------------------------------------------------------------------------------

    def cell(self, data: str, row: str, column: str, entry: Entry) -> Cell | None:
        """A measurement, done now or before; None where there is none to do."""
        wanted = self.settings.columns[column]
        if isinstance(wanted, FinetuneColumn):
            return None if entry.path is None else self.finetune_cell(data, row, column, wanted, entry)
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
            identity, f"{data}: {row}: {column}", lambda: self.probed(source, train, val, wanted, entry.seed)
        )

    def probed(
        self, source: Source, train: LabelledSet, val: LabelledSet, column: ProbeColumn, seed: int
    ) -> tuple[list[float], dict[str, Any]]:
        bench = Bench(source, train, val, len(train.index.classes), self.reading, self.device)
        settings = column.settings(SplitSettings("", ""))
        if column.kind == "linear":
            result = linear_probe(bench, settings, seed)
            return [result.score], result.about
        places = places_of(source, settings)
        features = [bench.of(data, places) for data in (train, val)]
        made = few_labels(*features, bench, settings, seed) if column.kind == "few" else neighbours(
            *features, bench, settings
        )  # fmt: skip
        (values,) = made.values()
        return values, asdict(column)

    def finetune_cell(self, data: str, row: str, column: str, wanted: FinetuneColumn, entry: Entry) -> Cell:
        train, val = self.sets[data]
        identity = self._finetune_identity(wanted, entry.path, entry.is_scratch, entry.seed) | {
            "train": train.index.fingerprint(), "val": val.index.fingerprint(),
        }  # fmt: skip

        def measure() -> tuple[list[float], dict[str, Any]]:
            folder = self.finetuned(data, wanted, entry.path, entry.is_scratch, entry.seed)
            scores = json.loads((folder / "scores.json").read_text())
            return [scores["top1"]], asdict(wanted) | {"run": str(folder), "scratch": entry.is_scratch}

        return self.kept(identity, f"{data}: {row}: {column}", measure)

    def _finetune_identity(self, wanted: FinetuneColumn, path: str, is_scratch: bool, seed: int) -> dict[str, Any]:
        encoder = load_encoder(path)
        start = asdict(encoder.settings) if is_scratch else fingerprint(encoder)
        return {"start": start, "scratch": is_scratch, "column": asdict(wanted), "seed": seed}

    def finetuned(self, data: str, wanted: FinetuneColumn, path: str, is_scratch: bool, seed: int) -> Path:
        """The run folder of a fine-tuning, made now, gone on with, or finished before."""
        identity = self._finetune_identity(wanted, path, is_scratch, seed) | {"data": data}
        folder = self.folder / "finetune" / _key(identity)
        if (folder / "scores.json").exists():
            return folder
        is_begun = (folder / "checkpoints" / "last.ckpt").exists()
        if not is_begun:
            shutil.rmtree(folder, ignore_errors=True)
        split = self.settings.data[data]
        finetune(
            path, split.train, split.val, wanted.config, folder, is_scratch, resume=is_begun,
            **wanted.changes, seed=seed, **{"train.accelerator": "cpu" if self.device == "cpu" else "gpu"},
        )  # fmt: skip
        return folder

    def kept(self, identity: dict[str, Any], title: str, measure: Callable[[], tuple[list[float], dict]]) -> Cell:
        """The cell of this identity: from its file, or measured and written there."""
        key = _key(identity)
        file = self.folder / "cells" / f"{key}.json"
        if file.exists():
            found = json.loads(file.read_text())
            return Cell(found["values"], found["seconds"], found["about"], key)
        print(title, flush=True)
        start = time.monotonic()
        values, about = measure()
        cell = Cell(values, time.monotonic() - start, about, key)
        part = file.with_suffix(".part")
        part.write_text(json.dumps({**asdict(cell), "identity": identity}, indent=1, default=str) + "\n")
        os.replace(part, file)
        return cell

    # ---- tables ----------------------------------------------------------------------------------------------

    def write(self, tables: dict[str, Draws], cells: list[dict[str, Any]]) -> dict[str, Path]:
        """Markdown, CSV, JSON and the page."""
        markdown, content = [], []
        for data, rows in tables.items():
            images = len(self.sets[data][1].index)
            note = (
                f"Right answers in percent on {images:,} images of {self.settings.data[data].val}; heads and "
                f"fine-tuning on {len(self.sets[data][0].index):,} of {self.settings.data[data].train}. ± is half the "
                "95 % interval over draws, seeds or runs; one percentage of so many images is uncertain by up to "
                f"± {sampling_interval(images):.1f} by that alone. The reported images choose nothing."
            )
            markdown += [f"## {data}", "", markdown_table(rows), "", note, ""]
            content += [("heading", data), ("table", rows), ("text", note)]
            full = {row: {c: mean(v) for c, v in scores.items()} for row, scores in rows.items()}
            if all(columns_of(rows)) and full:
                picture = bars(self.folder / f"{data}.png", full, "right answers, %", data)
                content.append(("picture", picture, "The same as bars."))
        spent: dict[str, float] = {}
        for cell in {cell["key"]: cell for cell in cells}.values():  # rows may share one
            spent[cell["column"]] = spent.get(cell["column"], 0.0) + cell["seconds"]
        cost = "Minutes of each column: " + "; ".join(f"{column} {s / 60:.1f}" for column, s in spent.items()) + "."
        markdown += [cost, ""]
        content += [("heading", "Cost and settings"), ("text", cost)]
        for cell in cells:
            said = "; ".join(f"{key} {value}" for key, value in cell["about"].items())
            content.append(("text", f"{cell['data']}, {cell['row']}, {cell['column']}: {said}."))
        lines = io.StringIO()
        writer = csv.DictWriter(lines, ["data", "row", "column", "mean", "interval", "values", "seconds"])
        writer.writeheader()
        for cell in cells:
            writer.writerow({key: cell[key] for key in writer.fieldnames} | {"values": len(cell["values"])})
        files = {
            "table.md": "\n".join(markdown), "table.csv": lines.getvalue(),
            "table.json": json.dumps({"cells": cells, "settings": asdict(self.settings)}, indent=1) + "\n",
        }  # fmt: skip
        for name, text in files.items():
            (self.folder / name).write_text(text)
        page = write_page(self.folder / "report.html", "sslvit bench", content)
        return {"page": page, **{name: self.folder / name for name in files}}


def bench(settings: BenchSettings) -> dict[str, Path]:
    """Run a bench, or go on with it, and print its tables."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("bench: runs in one process. Start it without torchrun.")
    run = BenchRun(replace(settings))
    files = run.run()
    print()
    content = json.loads(files["table.json"].read_text())
    for data in settings.data:
        rows: Draws = {}
        for cell in content["cells"]:
            if cell["data"] == data:
                rows.setdefault(cell["row"], {})[cell["column"]] = cell["values"]
        print(f"{data}\n\n{format_table(rows)}\n")
    for file in files.values():
        print(f"  {file}")
    return files


def _key(identity: dict[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
