"""One to four ranks with up to three loader processes each: every sample once, in the order that one process reads."""

from __future__ import annotations

import json
from itertools import product

from children import ranks, sslvit
from material import Workshop
from run_fixtures import read_keys
from trials import Part, Trial

from sslvit.train.folder import RunFolder

STEPS = {"train.steps": 12, "data.global_batch_size": 8, "data.memory_limit_mb": 0, "data.ledger": True}
WAYS = [way for way in product((1, 2, 4), range(4)) if way != (1, 0)]  # three ranks do not divide a batch of 8
BATCH_OF_THREE = {"data.global_batch_size": 9}


def parts(workshop: Workshop) -> list[Part]:
    ways = [*WAYS, *((3, workers) for workers in range(4))]
    return [
        Part("ledger", "1 to 4 ranks with 0 to 3 workers each read every sample once, in the same order",
             lambda trial: read_side_by_side(trial, workshop, ways), len(ways)),
    ]  # fmt: skip


def read_side_by_side(trial: Trial, workshop: Workshop, ways: list[tuple[int, int]]) -> None:
    count, workers = ways[int(trial.name.rpartition("-")[2]) * 7 % len(ways)]  # few trials see many and few ranks
    options = STEPS | (BATCH_OF_THREE if count == 3 else {})
    alone = read_alone(workshop, options)
    out = RunFolder(trial.folder / "run")
    options |= {"data.workers": workers, "train.devices": count}
    children = ranks(workshop.pretrain("mae", out.path, **options), count, trial.folder / "logs")
    codes = [child.wait() for child in children]
    name = f"{count} ranks with {workers} workers"
    if not trial.expect(set(codes) == {0}, f"{name}: exit codes {codes}: {children[0].text()[-300:]}"):
        return
    trial.expect(read_keys(out) == read_keys(alone), f"{name} read other samples, or in another order")
    ledgers = [json.loads(run.ledger.read_text()) for run in (out, alone)]
    trial.expect(ledgers[0] == ledgers[1], f"{name}: ledger.json {ledgers[0]}, alone {ledgers[1]}")
    for epoch, keys in read_keys(out).items():
        trial.expect(len(keys) == len(set(keys)), f"{name}: a sample twice in epoch {epoch}")


def read_alone(workshop: Workshop, options: dict) -> RunFolder:
    """The same run in one process; made once."""
    out = RunFolder(workshop.folder / f"alone-{options['data.global_batch_size']}")
    if not (out.encoder / "encoder.json").exists():
        child = sslvit(workshop.log, *workshop.pretrain("mae", out.path, **options | {"data.workers": 0}))
        if child.wait() != 0:
            raise RuntimeError(f"a run alone ended with {child.code}: {child.last_line()}")
    return out
