"""`sslvit bench`: a table of encoders x protocols per data set, which resumes without repeating finished cells."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sslvit.api import finetune, for_labels
from sslvit.checkpoint import fingerprint, load_encoder
from sslvit.environment import pick_device, shortened_by
from sslvit.evaluate.cache import FeatureCache
from sslvit.evaluate.encoders import open_encoder
from sslvit.evaluate.features import FeatureExtractor
from sslvit.evaluate.labeled import open_labeled
from sslvit.evaluate.linear import FIXED_L2
from sslvit.evaluate.probe import PAPER_RULE, score, untrained
from sslvit.evaluate.protocols import ProbeContext, check_readouts
from sslvit.evaluate.scores import Scores, columns_of, format_score, format_table, independent
from sslvit.evaluate.sources import LabeledSet, RawPixels, Source, frozen
from sslvit.files import brief, printable, remove_stale_temporaries, write_atomically
from sslvit.locks import lock_folder
from sslvit.messages import for_python
from sslvit.models import Encoder
from sslvit.models.resize import check_resizable
from sslvit.reports.bench_tables import Measurement, write_tables
from sslvit.results import Result
from sslvit.settings import SupervisedSettings
from sslvit.settings.bench import (
    PIXELS,
    BenchSettings,
    FinetuneColumn,
    ProbeColumn,
    SplitSettings,
    check_sources,
    load_bench,
)
from sslvit.settings.load import load_recipe
from sslvit.stopping import check_one_process
from sslvit.train.backbones import refuse_transformer_keys
from sslvit.train.folder import RunFolder, read_json

logger = logging.getLogger(__name__)

FORMAT = 2  # incremented when a change makes stored results invalid
MARK = "bench.json"


@dataclass
class Cell:
    """One measurement.

    Args:
        values: Scores in percent; several if labels were sampled several times.
        seconds: Time taken, including passes through the encoder unless its features were cached.
        about: Details needed to report the score.
        key: Hash of everything that determines the result.
    """

    values: list[float]
    seconds: float
    about: dict[str, Any]
    key: str = ""


@dataclass
class Entry:
    """One of the measured sources of a row: an encoder with one seed.

    Args:
        encoder: Makes the encoder; None for raw pixels.
        path: The encoder from which fine-tuning starts; None for raw pixels.
        is_scratch: Whether fine-tuning starts from random weights in the architecture of `path`.
        seed: Seed of everything random.
    """

    encoder: Callable[[], Encoder] | None
    path: str | None
    is_scratch: bool
    seed: int


class BenchRun:
    """A run of one bench."""

    def __init__(self, settings: BenchSettings) -> None:
        assert settings.out is not None  # filled in from the name of the bench
        self.settings, self.folder = settings, Path(settings.out)
        self.device = pick_device(settings.device)
        # validate everything here, before the first pass over the data
        trained = {name: [load_encoder(path) for path in paths] for name, paths in settings.encoders.items()}
        self.encoders = {name: [open_encoder(one, size=settings.size) for one in of] for name, of in trained.items()}
        for name, (first, *others) in self.encoders.items():
            if any(other.settings != first.settings for other in others):
                raise ValueError(
                    f"encoders.{name}: its runs are of different architectures. Give each a row of its own."
                )
        channels = sorted({encoder.settings.channels for encoders in self.encoders.values() for encoder in encoders})
        if len(channels) > 1:
            raise ValueError(f"encoders: they take images of {channels} channels. Compare them one kind at a time.")
        self.sets: dict[str, tuple[LabeledSet, LabeledSet]] = {}
        probes = [column for column in settings.columns.values() if isinstance(column, ProbeColumn)]
        for name, split in settings.data.items():
            for probe in probes or [ProbeColumn()]:
                train, val = open_labeled(probe.settings(split, allow_same_data=settings.allow_same_data))
            limit = settings.max_unreadable_fraction
            self.sets[name] = LabeledSet(train, channels[0], None, limit), LabeledSet(val, channels[0], None, limit)
        for encoders in self.encoders.values():
            for probe in probes:
                for encoder in encoders:
                    check_readouts(frozen(encoder), probe.settings(SplitSettings("", "")))
        tuned = {f"columns.{name}": one for name, one in settings.columns.items() if isinstance(one, FinetuneColumn)}
        if "scratch" in settings.baselines and not tuned:
            tuned["scratch"] = settings.scratch
        for where, column in tuned.items():
            for encoder in (one for of in trained.values() for one in of):
                self.check_finetuning(where, column, encoder)
        cache = FeatureCache(self.folder / "features")
        self.extractor = FeatureExtractor(settings.batch, settings.workers, cache)

    def check_finetuning(self, where: str, column: FinetuneColumn, encoder: Encoder) -> None:
        """Refuse a recipe or a change with which fine-tuning could not run."""
        start = for_labels(encoder.settings)
        try:
            recipe = load_recipe(column.config, column.changes, start)
            refuse_transformer_keys(recipe.encoder, column.changes)
            check_resizable(start, recipe.encoder)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not isinstance(recipe.task, SupervisedSettings):
            raise ValueError(f"{where}.config: {column.config} does not train with labels.")
        if recipe.train.ranks > 1:
            raise ValueError(f"{where}.train.devices: a bench trains on one device.")
        fewest = min(len(train.index) for train, _ in self.sets.values())
        batch = recipe.data.batch_for(fewest, recipe.task.usual.batch)
        if batch > fewest:
            raise ValueError(f"{where}: data.global_batch_size {batch}, but there are {fewest} training images.")

    def run(self) -> BenchTables:
        """Fill the tables cell by cell."""
        tables: dict[str, Scores] = {}
        results: list[Measurement] = []
        files: list[Path] = []
        for data in self.settings.data:
            tables[data] = {}
            for row, entries in self.rows(data).items():
                tables[data][row] = {}
                for column in self.settings.columns:
                    found = [self.cell(data, row, column, entry) for entry in entries]
                    cells = [cell for cell in found if cell is not None]
                    if cells:
                        values = tables[data][row][column] = independent([cell.values for cell in cells])
                        seconds, key = sum(cell.seconds for cell in cells), "+".join(cell.key for cell in cells)
                        results.append(Measurement(data, row, column, values, seconds, key, cells[0].about))
                # write after each row, so that the tables can be read while the rest is measured
                files = write_tables(self.settings, self.sets, tables, results)
        return BenchTables(self.folder, tables, files)

    def claim(self) -> None:
        """Claim the locked folder, if it is empty or that of the same bench; refuse any other folder."""
        mark = self.folder / MARK
        remove_stale_temporaries(mark)
        found = [path for path in self.folder.iterdir() if path.name != ".lock"]
        if any(path.name != "cells" or any(path.iterdir()) for path in found):
            if not mark.exists():
                raise ValueError(f"{self.folder}: in use, and not by a bench (no {MARK}). Choose another --out.")
            earlier, name = read_json(mark), self.settings.name
            if earlier is None:
                raise ValueError(
                    f'{mark}: damaged. Write {{"name": {json.dumps(name)}}} into it to resume this bench, or choose '
                    "another --out."
                )
            if earlier.get("name") != name:
                raise ValueError(
                    f"{self.folder}: holds the tables of another bench ({brief(earlier.get('name'))}). Choose another "
                    "--out."
                )
        (self.folder / "cells").mkdir(exist_ok=True)
        write_atomically(mark, json.dumps(asdict(self.settings), indent=1) + "\n")

    # ---- rows ------------------------------------------------------------------------------------------------

    def rows(self, data: str) -> dict[str, list[Entry]]:
        """Rows of the table: raw pixels, untrained networks, networks trained from scratch, and the encoders."""
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
                    Entry(partial(untrained, encoder, seed), path, True, seed) for seed in seeds
                ]
            if "scratch" in settings.baselines:
                rows[f"{title} from scratch with labels"] = [
                    Entry(partial(self.trained_from_scratch, data, path, seed), path, True, seed) for seed in seeds
                ]
        for name, encoders in self.encoders.items():
            rows[name] = [
                Entry(partial(lambda one: one, encoder), path, False, seed)
                for encoder, path in zip(encoders, settings.encoders[name], strict=True)
                for seed in (seeds if len(encoders) == 1 else seeds[:1])
            ]
        return rows

    def trained_from_scratch(self, data: str, path: str, seed: int) -> Encoder:
        """The encoder of `path` after training from random weights with the labels of a data set."""
        columns = [column for column in self.settings.columns.values() if isinstance(column, FinetuneColumn)]
        folder, _ = self.finetuned(data, columns[0] if columns else self.settings.scratch, path, True, seed)
        return open_encoder(folder, size=self.settings.size)

    # ---- cells -----------------------------------------------------------------------------------------------

    def cell(self, data: str, row: str, column: str, entry: Entry) -> Cell | None:
        """Load a measurement from the folder or make it now; None for fine-tuning on raw pixels."""
        wanted = self.settings.columns[column]
        if isinstance(wanted, FinetuneColumn):
            return None if entry.path is None else self.finetune_cell(data, wanted, entry, entry.path)
        encoder = None if entry.encoder is None else entry.encoder().to(self.device)
        first = next(iter(self.encoders.values()))[0].settings
        source: Source = RawPixels(first, self.device) if encoder is None else frozen(encoder, self.settings.precision)
        train, val = self.sets[data]
        identity = {
            "source": source.fingerprint(), "input": asdict(source.settings), "column": asdict(wanted),
            "train": _labeled_fingerprint(train), "val": _labeled_fingerprint(val), "seed": entry.seed,
            "batch": self.settings.batch, "device": self.device.split(":")[0],
            "precision": source.precision,
        }  # fmt: skip
        key = _key(identity | shortened_by())
        file = self.folder / "cells" / f"{key}.json"
        found = read_json(file)  # None if there is none, or it is damaged
        if found is not None:
            return Cell(found["values"], found["seconds"], found["about"], key)
        logger.info(printable(f"{data}: {row}: {column}"))
        start = time.monotonic()
        values, about = self.probe(ProbeContext(source, train, val, self.extractor, self.device), wanted, entry.seed)
        cell = Cell(values, time.monotonic() - start, about, key)
        if not train.unreadable and not val.unreadable:
            write_atomically(file, json.dumps({**asdict(cell), "identity": identity}, indent=1, default=str) + "\n")
        return cell

    def probe(self, context: ProbeContext, column: ProbeColumn, seed: int) -> tuple[list[float], dict[str, Any]]:
        """Score frozen features for one column; returns the scores and the details needed to report them."""
        scores, found, _ = score(context, column.settings(SplitSettings("", "")), seed)
        by_paper = scores.pop(PAPER_RULE, None)
        (values,) = scores.values()
        view = {"view": context.source.settings.crop_in_words}
        if column.kind != "linear":
            about = asdict(column) | view
            del about["protocol"]  # only for linear probes
            if found.get("fixed l2"):
                about["l2"] = FIXED_L2
            return values, about
        about = ({} if "fraction" in found["linear"] else view) | found["linear"]
        if by_paper is not None:
            about |= {"score by the paper's choice, selected on the reported images": by_paper[0]}
        return values, about

    def finetune_cell(self, data: str, wanted: FinetuneColumn, entry: Entry, start_from: str) -> Cell:
        """Accuracy of a fine-tuning run, which is run now unless it has finished before."""
        path, key = self.finetuned(data, wanted, start_from, entry.is_scratch, entry.seed)
        folder = RunFolder(path)
        scores = json.loads(folder.scores.read_text())
        start = "random weights" if entry.is_scratch else start_from
        about = {"config": wanted.config, **wanted.changes, "started from": start, "run": str(path)}
        if scores.get("unreadable"):
            about["unreadable reported images"] = scores["unreadable"]
        return Cell([scores["top1"]], _training_seconds(folder), about, key)

    def finetuned(self, data: str, wanted: FinetuneColumn, path: str, is_scratch: bool, seed: int) -> tuple[Path, str]:
        """Start or resume a fine-tuning run unless it has finished; returns its folder and the key of its inputs."""
        encoder = load_encoder(path)
        recipe = asdict(load_recipe(wanted.config, wanted.changes, for_labels(encoder.settings)))
        train, val = (_labeled_fingerprint(labeled) for labeled in self.sets[data])
        key = _key(
            {"start": None if is_scratch else fingerprint(encoder), "recipe": recipe, "seed": seed, "train": train,
             "val": val, "device": self.device.split(":")[0], **shortened_by()}
        )  # fmt: skip
        folder = RunFolder(self.folder / "finetune" / key)
        if not (folder.scores.exists() and (folder.encoder / "encoder.json").exists()):  # the last things written
            if not folder.checkpoint.exists():
                shutil.rmtree(folder.path, ignore_errors=True)
            start = "from scratch" if is_scratch else f"from {path}"
            logger.info(printable(f"{data}: training with labels, {start}"))
            split = self.settings.data[data]
            accelerator = "cpu" if self.device == "cpu" else "gpu"
            changes: dict[str, Any] = {**wanted.changes, "seed": seed, "train.accelerator": accelerator}
            changes["task.allow_same_data"] = self.settings.allow_same_data
            finetune(
                path, split.train, split.val, wanted.config, folder.path, is_scratch, resume=folder.checkpoint.exists(),
                **changes,
            )  # fmt: skip
        return folder.path, key


@dataclass(repr=False)
class BenchTables(Result):
    """The tables of a bench.

    Args:
        folder: Folder of the bench and all its results.
        tables: Data set -> row -> column -> scores in percent, one for each run, seed or draw of labels.
        files: report.html, table.md, table.csv and table.json.
    """

    folder: Path
    tables: dict[str, Scores]
    files: list[Path]

    def text(self) -> str:
        """The tables and the paths of the files."""
        tables = [f"{printable(data)}\n\n{format_table(rows)}\n" for data, rows in self.tables.items()]
        return "\n".join([*tables, *(f"  {file}" for file in self.files)])

    def to_dict(self) -> dict[str, Any]:
        """Every measurement with its cost and settings, and the bench's own settings."""
        return json.loads((self.folder / "table.json").read_text())

    def cells(self) -> tuple[Sequence[object], Iterable[Sequence[object]]]:
        """All tables as one, with the data set in the first column."""
        columns = list(dict.fromkeys(column for rows in self.tables.values() for column in columns_of(rows)))
        lines = (
            [data, row, *(format_score(of.get(column)) for column in columns)]
            for data, rows in self.tables.items()
            for row, of in rows.items()
        )
        return ["data", "", *columns], lines


@for_python
def bench(config: str | Path, **changes: Any) -> BenchTables:
    """Fill a table of encoders x protocols x data sets, or resume where it stopped.

    Args:
        config: YAML file, or the name of one included in sslvit, such as cifar10.
        changes: Settings of the bench, such as out="runs/bench", encoders={"MAE": ["runs/mae-0", "runs/mae-1"]} or
            seeds=3; they override the file's.

    Returns:
        The tables and their files.

    Raises:
        ValueError: The settings are invalid, or the folder is in use.
        FileNotFoundError: The file, an encoder or the shards do not exist.

    Example:
        made = sslvit.bench("cifar10", encoders={"MAE": "runs/mae"}, baselines=["pixels"], device="cpu")
        print(made.tables["cifar10"]["MAE"]["linear (logreg)"])
    """
    settings = load_bench(config, {key: _as_text(value) for key, value in changes.items()})
    check_sources(settings)
    check_one_process("bench")
    run = BenchRun(settings)
    with lock_folder(run.folder, "run this bench"):
        run.claim()
        return run.run()


def _as_text(value: Any) -> Any:
    """Convert paths and run folders in settings to text."""
    if isinstance(value, dict):
        return {key: _as_text(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_text(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _training_seconds(folder: RunFolder) -> float:
    """Total time of a run's training steps, over all its resumes."""
    seconds, step = 0.0, 0.0
    batch = folder.read_config()["data"]["global_batch_size"]
    for line in folder.read_metrics():
        seconds += (line["step"] - step) * batch / line["time/images_per_second"]
        step = line["step"]
    return seconds


def _labeled_fingerprint(data: LabeledSet) -> str:
    """Short digest of a data set's shards and of its labels, since the same shards may be indexed with other labels."""
    return hashlib.sha256(data.index.fingerprint().encode() + data.labels.numpy().tobytes()).hexdigest()[:16]


def _key(identity: dict[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
