"""Numbers gone wrong: a step is skipped as if it had not been, too many end the run, and can be taken again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_fixtures import metrics, run, weights

from sslvit.cli import main
from sslvit.models.dino import DINOModel
from sslvit.optim.guard import HostCopy
from sslvit.tasks import task_class
from sslvit.train.folder import RunFolder


def broken_at(monkeypatch: pytest.MonkeyPatch, name: str, is_broken: Callable[[int], bool], how: str) -> None:
    """Steps whose loss is nan, or infinite, or whose gradients alone are nan, or whose last rows hold such a pixel."""
    task = task_class(name)
    step = task.training_step

    def wrong(self, batch, batch_idx=0):
        if (
            how == "pixel"
            and is_broken(self.global_step)
            and batch.first_row + len(batch) == self.run.global_batch_size
        ):
            batch.views[0][-1, 0, 0, 0] = math.inf
        if how == "pixel":
            return step(self, batch, batch_idx)
        loss = step(self, batch, batch_idx)
        if not is_broken(self.global_step):
            return loss
        if how == "gradient":
            loss.register_hook(lambda gradient: gradient * math.nan)
            return loss
        return loss + (math.nan if how == "loss" else math.inf)

    monkeypatch.setattr(task, "training_step", wrong)


@pytest.mark.parametrize(
    ("recipe", "how", "changes"),
    [
        ("mae/digits", "loss", {}),
        ("mae/digits", "infinite", {"train.micro_batch_size": 4, "optim.clip_grad": 1.0}),
        ("dino/digits", "gradient", {}),
        ("dino/digits", "loss", {"train.micro_batch_size": 4, "optim.clip_grad": 1.0}),
        ("dino/digits", "pixel", {"train.micro_batch_size": 4, "task.batch_norm": True}),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, how: str, changes: dict
) -> None:
    """Weights, teacher, center, running statistics and moments after the skipped step are those before it."""
    changes = {"recipe": recipe, "train.keep_every": 1, "train.checkpoint_every": 1, **changes}
    broken_at(monkeypatch, recipe.split("/")[0], lambda step: step == 3, how)
    folder = run(shards, tmp_path / "run", **changes)
    before, after = (
        torch.load(folder.checkpoint.with_name(f"step-{step:08d}.ckpt"), weights_only=True) for step in (3, 4)
    )
    assert after["global_step"] == before["global_step"] + 1
    assert all(torch.equal(after["state_dict"][key], value) for key, value in before["state_dict"].items())
    assert str(after["optimizer_states"][0]["state"]) == str(before["optimizer_states"][0]["state"])
    lines = metrics(folder)
    assert [line.get("train/skipped_steps") for line in lines] == [None] * 3 + [1.0] * 4
    assert math.isnan(lines[3]["train/loss"]) == (how == "pixel")  # otherwise it went wrong after it was recorded
    assert all(math.isfinite(line["train/loss"]) for line in lines[4:])
    assert all(value.isfinite().all() for value in weights(folder).values())
    text = folder.metrics.read_text() + folder.health.read_text()
    assert "NaN" not in text  # no JSON
    assert "Infinity" not in text


def test_the_center_follows_the_outputs_of_steps_that_were_taken(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step moves it towards the mean of the teacher's outputs in its micro-batches; a skipped one does not."""
    task, outputs, centers = task_class("dino"), {}, {}
    targets, update = DINOModel.targets, task.optimizer_step

    def watched(self, given, temperature):
        outputs.setdefault(len(centers), []).append(given.flatten(0, 1).clone())
        return targets(self, given, temperature)

    def after(self, *given, **named):
        step = self.global_step
        update(self, *given, **named)
        centers[step] = self.model.center.clone()

    monkeypatch.setattr(DINOModel, "targets", watched)
    monkeypatch.setattr(task, "optimizer_step", after)
    broken_at(monkeypatch, "dino", lambda step: step == 2, "pixel")
    run(shards, tmp_path / "run", recipe="dino/digits", **{"train.micro_batch_size": 4, "task.center_momentum": 0.7})
    center = torch.zeros(12)
    assert sorted(centers) == list(range(7))
    for step in range(7):
        if step != 2:
            center = 0.7 * center + 0.3 * torch.cat(outputs[step]).mean(0)
        torch.testing.assert_close(centers[step], center, rtol=1e-5, atol=1e-7)


def test_too_many_in_a_row_end_the_run_and_can_be_taken_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        broken_at(patch, "mae", lambda step: step >= 4, "gradient")
        said = r"step 6: 2 steps in a row were not finite \(train.skip_limit\).*the last checkpoint: sslvit resume "
        with pytest.raises(RuntimeError, match=said):
            run(shards, tmp_path / "run", **{"train.skip_limit": 2, "train.micro_batch_size": 4, "train.keep_last": 2})
    folder = RunFolder(tmp_path / "run")
    about = json.loads((folder.incident / "incident.json").read_text())
    assert (about["step"], about["seed"]) == (6, 0)
    assert len(about["samples"]) == 2  # micro-batches
    assert about["not_finite"]
    assert [path.name for path in folder.incident.glob("*.ckpt")] == ["state.ckpt"]
    capsys.readouterr()
    assert main(["replay", str(folder.incident)]) == 0
    said = capsys.readouterr().out
    assert "step 6 of mae" in said
    assert said.count("finite in float32: the step fails in its own precision only") == 2
    kept = run(shards, tmp_path / "run", resume=True)  # from step 3, and the incident stays to be read
    assert len(kept.read_metrics()) == 7
    assert (folder.incident / "incident.json").exists()


def test_a_run_that_breaks_before_its_first_checkpoint_names_none_to_go_on_from(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_at(monkeypatch, "mae", lambda step: True, "loss")
    with pytest.raises(RuntimeError, match="step 2: .*start anew with --overwrite: there is no checkpoint from before"):
        run(shards, tmp_path / "run", **{"train.skip_limit": 2})


def test_what_is_replayed_is_the_step_that_was_skipped(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its images, masks and dropout: the losses of its micro-batches come out as they were in the run."""
    losses, task = {}, task_class("mae")
    step = task.training_step

    def watched(self, batch, batch_idx=0):
        loss = step(self, batch, batch_idx)
        losses.setdefault(self.global_step, []).append(float(loss.detach()))
        return loss

    options = {"train.skip_limit": 2, "train.micro_batch_size": 4, "data.ledger": True, "encoder.dropout": 0.2}
    with monkeypatch.context() as patch:
        patch.setattr(task, "training_step", watched)
        broken_at(patch, "mae", lambda step: step >= 4, "gradient")
        with pytest.raises(RuntimeError, match="step 6: 2 steps in a row"):
            run(shards, tmp_path / "run", **options)
    folder = RunFolder(tmp_path / "run")
    capsys.readouterr()
    assert main(["replay", str(folder.incident)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "loss in float32" in line]
    again = [float(line.split("loss in float32: ")[1].split()[0]) for line in said]
    assert again == pytest.approx(losses[5], rel=1e-4)
    assert losses[5] != pytest.approx(losses[4], rel=1e-3)
    about = json.loads((folder.incident / "incident.json").read_text())
    read = [json.loads(line) for line in (folder.samples / "rank-00000.jsonl").read_text().splitlines()]
    # a line that is written after a step's last micro-batch has the number of the steps that are done
    assert [key for part in about["samples"] for key in part] == [line["key"] for line in read][5 * 8 : 6 * 8]


def test_now_and_then_does_not_end_the_run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_at(monkeypatch, "mae", lambda step: step % 2 == 1, "loss")
    folder = run(shards, tmp_path / "run", **{"train.skip_limit": 2})
    assert metrics(folder)[-1]["train/skipped_steps"] == 3
    assert not folder.incident.exists()


def test_what_a_device_finishes_late_is_counted_as_if_it_were_at_hand(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the checkpoint of its step and in the line of its step; and too many in a row end the run at the same step."""
    monkeypatch.setattr(HostCopy, "is_here", False)
    with monkeypatch.context() as patch:
        broken_at(patch, "mae", lambda step: step in (1, 3), "loss")
        folder = run(shards, tmp_path / "run", **{"train.log_every": 4, "train.keep_every": 3})
    checkpoint = torch.load(folder.checkpoint.with_name("step-00000003.ckpt"), weights_only=True)
    assert checkpoint["callbacks"]["Incidents"] == {"skipped": 1, "in_a_row": 0}
    assert [(line["step"], line["train/skipped_steps"]) for line in metrics(folder)] == [(4, 2), (7, 2)]
    broken_at(monkeypatch, "mae", lambda step: step >= 2, "loss")
    rare = {"train.log_every": 100, "train.checkpoint_every": 100, "train.skip_limit": 2}
    with pytest.raises(RuntimeError, match="step 4: 2 steps in a row"):
        run(shards, tmp_path / "ended", **rare)


def test_the_count_goes_on_after_a_resume(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_at(monkeypatch, "mae", lambda step: step in (1, 5), "loss")
    whole = run(shards, tmp_path / "whole")
    run(shards, tmp_path / "cut", **{"train.steps": 4})
    assert metrics(run(shards, tmp_path / "cut", resume=True, **{"train.steps": 7}))[-1]["train/skipped_steps"] == 2
    assert metrics(whole)[-1]["train/skipped_steps"] == 2


def test_a_replay_names_the_part_and_the_image(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A weight that overflows, and a pixel that is not a number."""
    with monkeypatch.context() as patch:
        broken_at(patch, "mae", lambda step: step >= 4, "loss")
        with pytest.raises(RuntimeError, match="sslvit replay"):
            run(shards, tmp_path / "run", **{"train.skip_limit": 1})
    folder = RunFolder(tmp_path / "run").incident
    state = torch.load(folder / "state.ckpt", weights_only=True)
    state["state_dict"]["model.encoder.blocks.0.mlp.fc1.weight"][0] = 3e38
    torch.save(state, folder / "state.ckpt")
    capsys.readouterr()
    assert main(["replay", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "first output that is not finite: model.encoder.blocks.0.mlp.fc1 (Linear)" in said
    assert "gives a gradient that is not finite" in said
    state["state_dict"]["model.encoder.blocks.0.mlp.fc1.weight"][0] = math.nan
    torch.save(state, folder / "state.ckpt")
    main(["replay", str(folder)])
    assert (
        "weights that are not finite before the step: model.encoder.blocks.0.mlp.fc1.weight" in capsys.readouterr().out
    )


def test_what_is_no_incident_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["replay", str(tmp_path)]) == 1
    assert "no incident.json there" in capsys.readouterr().err
    (tmp_path / "incident.json").write_text("{")
    assert main(["replay", str(tmp_path)]) == 1
    assert "incident.json: damaged" in capsys.readouterr().err
