"""DINO, self-distillation with no labels (Caron et al. 2021), as a Lightning module; the model is in models/dino.py."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from sslvit.data.batch import Batch
from sslvit.models import Encoder
from sslvit.models.dino import DINOLosses, DINOModel
from sslvit.optim import cosine, ema_update
from sslvit.results import decimals
from sslvit.settings import DINOSettings, EncoderSettings
from sslvit.tasks.base import StepOutput, Task
from sslvit.tasks.symptoms import MIN_IMAGES, STUCK_FRACTION, Symptom, feature_symptoms, lr_in_words

EVEN_FRACTION = 0.98  # fraction of the maximal entropy ln K above which the teacher's output counts as uniform
MAX_PROTOTYPE_FRACTION = 0.9  # fraction of images in one prototype above which the teacher counts as collapsed


class DINO(Task):
    """A student learns the output of a teacher, its moving average, on other crops; arguments as for Task."""

    settings_class: ClassVar = DINOSettings
    view_kinds: ClassVar[tuple[str, ...]] = ("multi_crop",)
    loss_shows_learning: ClassVar[bool] = False  # its target, the teacher, changes too
    twice_at_peak: ClassVar[bool] = True
    needs_tokens: ClassVar[str | None] = None
    settings: DINOSettings
    model: DINOModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.health_grace_steps = max(self.health_grace_steps, self.frozen_steps)

    def make_model(self, encoder: EncoderSettings) -> DINOModel:
        """Student, teacher, their heads and the center."""
        return DINOModel(self.settings, encoder)

    @property
    def trained_encoder(self) -> Encoder:
        """The teacher, which is better than the student throughout training (section 5.2)."""
        return self.model.teacher

    def compute(self, batch: Batch, step: int) -> StepOutput:
        """The cross-entropy of all pairs of views, plus KoLeo if configured."""
        views = batch.views  # v times b c h w, the global ones first
        # a tensor, so that a compiled loss is not recompiled for every temperature
        teacher_temp = torch.full((), self.teacher_temp_at(step), dtype=views[0].dtype, device=views[0].device)
        losses: DINOLosses = self.loss_fn(views, teacher_temp, self.path_noise(batch, step, len(views)))
        objective, metrics = losses.loss, {"loss": losses.loss}
        if losses.koleo is not None:
            objective, metrics["koleo"] = losses.loss + self.settings.koleo * losses.koleo, losses.koleo
        return StepOutput(objective, metrics, losses.features, losses.probs)

    def after_update(self, step: int, skip: Tensor) -> None:
        """Update the teacher and the center, once per optimizer step, for any number of micro-batches."""
        momentum = self.momentum_at(step)
        ema_update(self.model.teacher, self.model.encoder, momentum, skip)
        ema_update(self.model.teacher_head, self.model.head, momentum, skip)
        self.model.update_center(skip)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """As in Task; the prototypes are frozen in the first steps."""
        super().configure_gradient_clipping(*args, **kwargs)
        if self.global_step < self.frozen_steps:
            for parameter in self.model.head.last_layer.parameters():
                parameter.grad = None  # so that the optimizer skips it, including moments and weight decay

    @property
    def frozen_steps(self) -> int:
        """Number of updates with frozen prototypes: at most a quarter of the run, in case it is very short."""
        steps = round(self.settings.freeze_last_layer * self.run.steps_per_epoch)
        return min(steps, self.run.total_steps // 4)

    # ---- schedules -------------------------------------------------------------------------------------------

    def momentum_at(self, step: int) -> float:
        """Momentum of the teacher at update number `step` (section 3.1, "Teacher network")."""
        momentum = self.settings.momentum
        assert momentum is not None
        return cosine(step, momentum, self.settings.final_momentum, self.run.total_steps)

    def teacher_temp_at(self, step: int) -> float:
        """The teacher's temperature, which rises epoch by epoch (section 3.2, "Implementation details")."""
        first, last = self.settings.warmup_teacher_temp, self.settings.teacher_temp
        warmup = self.settings.warmup_teacher_temp_epochs
        assert last is not None
        assert warmup is not None
        if step >= warmup * self.run.steps_per_epoch:
            return last
        epoch = step // self.run.steps_per_epoch
        return first + (last - first) * min(epoch / max(warmup - 1, 1), 1)

    # ---- health ----------------------------------------------------------------------------------------------

    def symptoms(self, measures: dict[str, float]) -> list[Symptom]:
        """A uniform teacher, one prototype for all images, a student that does not learn, or features of low rank."""
        lr = lr_in_words(self.optim)
        entropy, loss, share = (measures[key] for key in ("teacher_entropy", "loss", "largest_prototype_share"))
        most = entropy + measures["teacher_uniform_kl"]  # ln K
        prototypes = f"ln {math.exp(most):.0f} = {most:.3f}"
        if entropy > EVEN_FRACTION * most:
            seen = (
                f"the teacher spreads each image evenly over all prototypes (entropy {entropy:.3f} of at most "
                f"{prototypes}, loss {decimals(loss, 3)})"
            )
            return [Symptom("even", seen, self.settings.suggestion("even", lr))]
        if abs(loss - most) < STUCK_FRACTION * most:
            seen = f"the loss sits at {prototypes}: the student says the same of every prototype"
            return [Symptom("stuck", seen, f"Change {lr}: lower it, or raise it if it is far below a recipe's.")]
        if measures["images"] >= MIN_IMAGES and share > MAX_PROTOTYPE_FRACTION:
            seen = f"the teacher gives {share:.0%} of the images to one prototype (entropy {entropy:.2f})"
            return [Symptom("one prototype", seen, self.settings.suggestion("one prototype", lr))]
        return feature_symptoms(measures, self.optim)

    def start_from(self, start: Encoder, source: str) -> None:
        """As in Task; the teacher starts from the same weights."""
        super().start_from(start, source)
        self.model.teacher.load_state_dict(self.model.encoder.state_dict())
