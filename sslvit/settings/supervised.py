"""Fine-tuning, and training from scratch with labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sslvit.files import expand_path
from sslvit.settings.choices import check_bounds, checked
from sslvit.settings.task import TaskSettings


@dataclass
@checked("task.")
class SupervisedSettings(TaskSettings):
    """A linear head on the pooled tokens; all weights move. The defaults are MAE's for ViT-B (He et al. 2022, A.1)."""

    name: Literal["supervised"] = "supervised"
    """Name of the task."""
    classes: int | None = None
    """Number of classes; null for as many as the shards name."""
    val: str | None = None
    """Labeled validation shards, which are never used to choose anything."""
    allow_same_data: bool = False
    """Take the images that are trained on for validation, whose scores say nothing of other images."""
    validate_every: int | None = None
    """Steps between two validations, rounded up to lines of metrics.jsonl; null for the last step alone, whose accuracy
    is the reported one.
    """
    smoothing: float = 0.1
    """Label smoothing (Szegedy et al. 2016)."""
    mixup: float = 0.8
    """Alpha of mixup (Zhang et al. 2018); 0 for none."""
    cutmix: float = 1.0
    """Alpha of CutMix (Yun et al. 2019); 0 for none. Where both are given, each batch uses one of them at random."""
    erase: float = 0.25
    """Probability of random erasing: a random box is filled with noise (Zhong et al. 2020)."""

    def __post_init__(self) -> None:
        self.val = self.val and expand_path(self.val)
        check_bounds(self, "task.", "2 or more", "classes")
        check_bounds(self, "task.", "1 or more", "validate_every")
        check_bounds(self, "task.", "in [0, 1]", "smoothing", "erase")
        check_bounds(self, "task.", "0 or more", "mixup", "cutmix")

    def check_micro_batch(self, micro: int) -> None:
        """Raise ValueError where there is no second image to mix with."""
        if micro < 2 and (self.mixup or self.cutmix):
            raise ValueError(
                "task.mixup and task.cutmix mix images of one micro-batch: 1 is too few. Raise it, or set them to 0."
            )

    def fitted(
        self, images: int, global_batch_size: int, total_steps: int, classes: int | None = None
    ) -> SupervisedSettings:
        """The same with the number of classes that the data has; ValueError where there are no labels, or others."""
        if classes is None:
            raise ValueError(
                "--train: supervised training needs labels, and these images have none. Pack them from one folder per "
                "class, or from a list with a column label: sslvit shards pack LIST.csv SHARDS"
            )
        if self.classes is not None and self.classes != classes:
            raise ValueError(f"task.classes: {self.classes}, but the data has {classes}. Leave it out.")
        return replace(self, classes=classes)
