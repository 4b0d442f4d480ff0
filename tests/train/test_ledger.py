"""What could not be read is counted over ranks, resumes and repetitions, and ends the run above its limit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import distributed

from sslvit.train.callbacks.ledger import Ledger
from sslvit.train.folder import RunFolder

PLAN = SimpleNamespace(global_batch_size=50, steps_per_epoch=10, dropped_per_epoch=7)


def make_ledger(folder: Path, images: int, limit: float, step: int) -> Ledger:
    ledger = Ledger(RunFolder(folder), range(images), PLAN, limit)
    ledger.step = step
    return ledger


def bad(*times: int) -> dict[str, dict]:
    return {f"k{n}": {"key": f"k{n}", "reason": f"reason {n % 2}", "times": count} for n, count in enumerate(times)}


def test_bad_samples_of_all_ranks_and_of_earlier_parts_are_added_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = make_ledger(tmp_path, 1000, 0.5, 3)
    ledger.load_state_dict(bad(1, 4))
    for reasons in ({"k0": "reason 0"}, {"k0": "reason 0", "k2": "reason 0"}, {}):
        ledger.on_micro_batch(SimpleNamespace(global_rank=0), SimpleNamespace(unreadable=reasons))
    assert {key: entry["times"] for key, entry in ledger.exchange().items()} == {"k0": 3, "k1": 4, "k2": 1}

    def gather(shares, own):
        shares[:] = [own, bad(10, 0, 20)]

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    ledger.before_checkpoint(SimpleNamespace())
    merged = ledger.state_dict()
    assert {key: entry["times"] for key, entry in merged.items()} == {"k0": 13, "k1": 4, "k2": 21}
    ledger.save(SimpleNamespace(is_global_zero=True, global_step=25))
    content = json.loads((tmp_path / "ledger.json").read_text())
    about = {key: value for key, value in content.items() if key != "unreadable"}
    assert about == {"samples_read": 1250, "dropped_per_epoch": 7, "epochs_finished": 2,
                     "unreadable_by_reason": {"reason 0": 2, "reason 1": 1}}  # fmt: skip


@pytest.mark.parametrize(
    ("images", "limit", "step", "times", "stops"),
    [
        (1000, 0.01, 9, [1] * 10, False),  # of the images
        (1000, 0.01, 9, [1] * 11, True),
        (10, 0.01, 9, [3], False),  # one is always allowed
        (10, 0.01, 9, [3, 1], True),
        (10, 0.0, 9, [1], True),  # unless none is
        (10**6, 0.1, 20, [99], False),  # of what was read: 1,000 images at step 20
        (10**6, 0.1, 20, [50, 50], False),
        (10**6, 0.1, 20, [50, 51], True),
        (10**6, 0.01, 20, [50, 49], False),  # fewer than 100 rows say nothing
    ],
)
def test_a_run_ends_above_the_limit_of_images_or_of_what_was_read(
    tmp_path: Path, images: int, limit: float, step: int, times: list[int], stops: bool
) -> None:
    ledger = make_ledger(tmp_path, images, limit, step)
    ledger.load_state_dict(bad(*times))
    trainer = SimpleNamespace(is_global_zero=True, global_step=step, world_size=1)
    if not stops:
        ledger.on_step(trainer, None)
        return
    with pytest.raises(
        RuntimeError, match=f"{len(times)} unreadable samples are more than data.max_unreadable_fraction"
    ):
        ledger.on_step(trainer, None)


def test_several_ranks_count_together_every_fifty_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    monkeypatch.setattr(Ledger, "check", lambda self, trainer: counted.append(self.step))
    for ranks in (1, 2):
        ledger = make_ledger(tmp_path, 10, 0.1, 0)
        for ledger.step in range(1, 151):
            ledger.on_step(SimpleNamespace(world_size=ranks), None)
        assert counted == (list(range(1, 151)) if ranks == 1 else [50, 100, 150])
        counted.clear()
