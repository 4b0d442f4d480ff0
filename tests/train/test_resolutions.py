"""Small images first, large ones at the end: data.resolutions in turn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_fixtures import BERT, RECIPES, TINY, run, same

import sslvit
from sslvit.data.loader import Resolutions
from sslvit.models import ViTEncoder
from sslvit.run_plan import RunPlan
from sslvit.settings import DataSettings
from sslvit.settings.load import load_recipe
from sslvit.tasks import task_class
from sslvit.train import timed_steps
from sslvit.train.forecast import forecast, mfu_per_throughput, plan_step
from sslvit.train.timed_steps import TimedSteps, time_run

IN_TURN = {"data.resolutions": [4, 8], "data.resolution_fractions": [0.7, 0.3]}


def sides_in(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """The side of the main views of each step that a task takes from now on."""
    found: list[int] = []
    task = task_class(name)
    step = task.training_step

    def noted(self, batch, batch_idx=0):
        found.append(batch.views[0].shape[-1])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(task, "training_step", noted)
    return found


@pytest.mark.parametrize(
    ("recipe", "changes"), [("mae/digits", {}), ("dino/digits", {}), ("igpt/digits", {}), ("igpt/digits", BERT)]
)
def test_each_side_comes_in_its_share_of_the_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, changes: dict
) -> None:
    found = sides_in(monkeypatch, recipe.split("/")[0])
    changes = IN_TURN | changes | {"encoder.pos_embed": "rotary_2d"}
    whole = run(shards, tmp_path / "whole", recipe=recipe, **changes)
    assert found == [4] * 5 + [8] * 2
    assert sslvit.load_encoder(whole).settings.image_size == [8, 8]
    found.clear()
    run(shards, tmp_path / "long", recipe=recipe, **changes | {"train.steps": 10, "train.keep_every": 3})
    assert found == [4] * 7 + [8] * 3


def test_a_resume_goes_on_with_the_side_of_its_step(shards: Path, tmp_path: Path) -> None:
    settings = IN_TURN | {"train.keep_every": 3}
    whole = run(shards, tmp_path / "whole", **settings)
    branch = sslvit.branch(whole, tmp_path / "branch", step=3)
    assert same(sslvit.resume(branch), whole)


def test_the_steps_at_which_sides_end() -> None:
    run_plan = RunPlan(10, 5, 8, seed=3)
    plan = Resolutions.of(DataSettings(resolutions=[16, 24, 32], resolution_fractions=[0.5, 0.3, 0.2]), run_plan)
    assert plan is not None
    assert [plan.size_at(step)[0] for step in range(12)] == [16] * 5 + [24] * 3 + [32] * 4
    sampled = Resolutions.of(DataSettings(resolutions=[16, 24, 32]), run_plan)
    assert sampled is not None
    assert {sampled.size_at(step)[1] for step in range(20)} == {16, 24, 32}
    assert Resolutions.of(DataSettings(), run_plan) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"resolution_fractions": [1.0]},
            r"data.resolution_fractions: \[1.0\] must be one fraction of the run for each of",
        ),
        ({"resolutions": [8, 4], "resolution_fractions": [1.0]}, "must be one fraction of the run for each of"),
        ({"resolutions": [8, 4], "resolution_fractions": [0.5, 0.4]}, r"\[0.5, 0.4\] must be positive and sum to 1"),
        ({"resolutions": [8, 4], "resolution_fractions": [1.5, -0.5]}, "must be positive and sum to 1"),
    ],
)
def test_shares_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSettings(**settings)


def test_a_pixel_encoder_with_rotary_positions_sees_other_sizes_as_parts_of_its_own() -> None:
    """Coordinates of a small image span the range of the large one, so a model of small images starts well."""
    settings = load_recipe("igpt/digits", RECIPES["igpt/digits"] | {"encoder.pos_embed": "rotary_2d"}).encoder
    encoder = ViTEncoder(settings).eval()
    cos, sin = encoder._rotation((4, 4), None, torch.device("cpu"))
    own_cos, own_sin = encoder._rotation((8, 8), None, torch.device("cpu"))
    # between the two pixels that a pixel of half the resolution covers, the angle is the mean of theirs
    angles, own = torch.atan2(sin, cos)[0, 0, :2], torch.atan2(own_sin, own_cos)[0, 0, :4]
    torch.testing.assert_close(angles[:, -1], own[:, -1].view(2, 2).mean(1))
    assert encoder(torch.rand(2, 1, 4, 4)).shape == (2, 16, settings.width)


def test_work_and_time_of_a_run_are_means_over_its_resolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    def flops(**changes: object) -> int:
        return forecast(plan_step(load_recipe("mae/digits", TINY | changes), 100)).flops_per_image

    mean = 0.7 * flops(**{"encoder.image_size": 4}) + 0.3 * flops()
    assert flops(**IN_TURN) == pytest.approx(mean, rel=1e-3)
    assert flops(**{"data.resolutions": [4, 8]}) == pytest.approx(
        (flops(**{"encoder.image_size": 4}) + flops()) / 2, rel=1e-3
    )
    times = {4: 1.0, 8: 5.0}
    asked = []

    def timed(settings, run, steps: int, log_every: int = 1) -> TimedSteps:
        (side,) = settings.data.resolutions
        asked.append((side, steps, settings.data.resolution_fractions))
        return TimedSteps(steps, run.global_batch_size, times[side], 0.5, 10 * side, "cpu")

    monkeypatch.setattr(timed_steps, "time_steps", timed)
    found = time_run(load_recipe("mae/digits", TINY | IN_TURN), RunPlan(7, 7, 8), 20)
    assert asked == [(4, 14, None), (8, 6, None)]
    assert (found.seconds_per_step, found.steps, found.waiting, found.memory) == (pytest.approx(2.2), 20, 0.5, 80)


def test_the_utilization_of_a_run_whose_images_grow_is_not_said() -> None:
    """The work of an image is not one number then."""

    class Images(list):
        classes = None

    def found(**changes: object) -> float | None:
        return mfu_per_throughput(
            load_recipe("mae/digits", TINY | {"train.peak_tflops": 1.0} | changes), Images(range(100))
        )

    assert found(**IN_TURN) is None
    assert found() is not None


def test_memory_is_that_of_the_largest_side() -> None:
    def peak(**changes: object) -> int:
        return forecast(plan_step(load_recipe("mae/digits", TINY | changes), 100)).peak

    assert peak(**IN_TURN) == peak() > peak(**{"data.resolutions": [4]})
