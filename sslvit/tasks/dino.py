"""DINO: "Emerging Properties in Self-Supervised Vision Transformers" (Caron et al. 2021), section 3.

A student network names every crop of an image, the teacher the two large ones, by shares of K prototypes; the
student learns to say of each crop what the teacher says of the other ones. The teacher is a moving average of the
student. Two forces keep it from saying the same of every image: its outputs are centered (no prototype wins
everywhere) and sharpened (not all prototypes win equally).
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sslvit.data.batch import Batch
from sslvit.data.views import runs_of_one_size
from sslvit.layouts import dino as layout
from sslvit.models import ViTEncoder
from sslvit.optim import cosine, ema_update, warmup_cosine
from sslvit.ranks import all_reduce_sum, logsumexp_over_ranks, world_size
from sslvit.settings import DINOSettings, EncoderSettings, OptimSettings
from sslvit.tasks.base import Task
from sslvit.weight_files import read_torch_file

GLOBAL_VIEWS = 2


class Prototypes(nn.Module):
    """A linear map without bias whose rows have a direction and a length of their own (weight normalization)."""

    def __init__(self, width: int, count: int, unit_length: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not unit_length)
        self.weight_v = nn.Parameter(nn.Linear(width, count, bias=False).weight.detach())

    def forward(self, x: Float[Tensor, "b bottleneck"]) -> Float[Tensor, "b k"]:
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class DINOHead(nn.Module):
    """MLP, a bottleneck of length one, and the prototypes (section 3.2, "Network architecture"; appendix C).

    Args:
        width: of the encoder.
        settings: layers, widths and prototypes.
    """

    def __init__(self, width: int, settings: DINOSettings) -> None:
        super().__init__()
        widths = [width] + [settings.head_width] * (settings.head_layers - 1) + [settings.bottleneck]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths), start=1):
            layers.append(nn.Linear(before, after))
            if i < settings.head_layers:
                layers += [nn.BatchNorm1d(after)] * settings.batch_norm + [nn.GELU()]
        self.mlp = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = Prototypes(settings.bottleneck, settings.out_dim, settings.norm_last_layer)

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """Cosine of each image and each prototype (times the prototype's length), at least in float32."""
        projected = self.mlp(features)
        # float32: in bf16 a cosine is known to 1 part in 256, which a temperature of 0.04 makes a tenth of a logit
        with torch.autocast(features.device.type, enabled=False):
            return self.last_layer(F.normalize(in_full(projected), dim=1))


def in_full(values: Tensor) -> Tensor:
    """In float32, or float64 where they are so already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def embed_views(encoder: ViTEncoder, views: list[Tensor], path_noise: Tensor | None = None) -> Float[Tensor, "v b d"]:
    """One vector per image and view; neighboring views of one size share a forward pass (section 3.1, "multi-crop").

    Args:
        encoder: student or teacher.
        views: each 'b c h w'.
        path_noise: for stochastic depth, 'branches (v b)'.
    """
    b = len(views[0])
    features = []
    for start, stop in runs_of_one_size(views):
        noise = None if path_noise is None else path_noise[:, start * b : stop * b]
        features.append(encoder.pool(encoder(torch.cat(views[start:stop]), path_noise=noise)))
    return rearrange(torch.cat(features), "(v b) d -> v b d", b=b)


def center_and_sharpen(
    outputs: Float[Tensor, "v b k"], center: Float[Tensor, "k"], temperature: float
) -> Float[Tensor, "v b k"]:
    """The teacher's shares: softmax of its centered outputs at a low temperature (equations 1 and 4)."""
    return ((outputs - center) / temperature).softmax(-1)


def sinkhorn_shares(outputs: Float[Tensor, "v b k"], temperature: float, iterations: int) -> Float[Tensor, "v b k"]:
    """Shares of which each prototype gets equally much over the batch of all ranks.

    Sinkhorn-Knopp as in SwAV (Caron et al. 2020, section 3.1) and DINOv2 (Oquab et al. 2024, section 4), on
    logarithms: a prototype that no image likes would otherwise divide zero by zero.
    """
    log_shares = rearrange(outputs, "v b k -> (v b) k") / temperature
    images, prototypes = log_shares.shape[0] * world_size(), log_shares.shape[1]
    for _ in range(iterations):
        log_shares = log_shares - logsumexp_over_ranks(log_shares.logsumexp(0)) - math.log(prototypes)
        log_shares = log_shares - log_shares.logsumexp(1, keepdim=True) - math.log(images)
    return rearrange((log_shares + math.log(images)).exp(), "(v b) k -> v b k", v=len(outputs))


def dino_loss(targets: Float[Tensor, "t b k"], logits: Float[Tensor, "s b k"]) -> Float[Tensor, ""]:
    """Mean over images and over all pairs of two different views: one named by the teacher, one by the student.

    Equation 3.

    Args:
        targets: the teacher's shares of the first t views.
        logits: the student's, over its temperature.
    """
    t, s, b = len(targets), len(logits), targets.shape[1]
    # float32 also under autocast: a bf16 softmax over 65,536 prototypes loses its tail
    with torch.autocast(logits.device.type, enabled=False):
        each = -torch.einsum("tbk,sbk->ts", targets, in_full(logits).log_softmax(-1)) / b  # t s
        is_other = 1 - torch.eye(t, s, dtype=each.dtype, device=each.device)
        return (each * is_other).sum() / (t * s - t)


def koleo(features: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Minus the mean logarithm of each image's distance to its nearest neighbor in the batch, on the unit sphere.

    Kozachenko-Leonenko's estimate of entropy (Sablayrolles et al. 2019, section 3.3; DINOv2, section 4).
    """
    with torch.autocast(features.device.type, enabled=False):
        directions = F.normalize(in_full(features), dim=1, eps=1e-8)
        with torch.no_grad():
            similarity = (directions @ directions.T).fill_diagonal_(-1)
            nearest = similarity.argmax(1)
        distance = F.pairwise_distance(directions, directions[nearest], eps=1e-8)
        return -(distance + 1e-8).log().mean()


class DINO(Task):
    """Args: settings, then those of Task."""

    view_kinds = ("multi_crop",)

    def __init__(self, settings: DINOSettings, encoder: EncoderSettings, optim: OptimSettings, **run) -> None:
        if encoder.tokens == "pixel":
            raise ValueError(
                "DINO shows the encoder crops of several sizes, and a pixel sequence is tied to one. "
                "Set encoder.tokens to patch (see configs/dino/)."
            )
        open_keys = [f"task.{key}" for key, value in vars(settings).items() if value is None]
        if open_keys:
            raise ValueError(f"{', '.join(open_keys)}: still null. Call DINOSettings.fitted first.")
        super().__init__(settings, encoder, optim, **run)
        self.teacher = ViTEncoder(EncoderSettings(**{**vars(encoder), "drop_path": 0.0, "dropout": 0.0}))
        self.head = DINOHead(encoder.width, settings)
        self.teacher_head = DINOHead(encoder.width, settings)
        self.register_buffer("center", torch.zeros(settings.out_dim))
        self.register_buffer("outputs_seen", torch.zeros(settings.out_dim), persistent=False)
        self.rows_seen = 0
        for teacher, student in ((self.teacher, self.encoder), (self.teacher_head, self.head)):
            teacher.load_state_dict(student.state_dict())
            teacher.requires_grad_(False)
        self.young_until = max(self.young_until, self.frozen_steps)

    @property
    def trained_encoder(self) -> ViTEncoder:
        """The teacher: it is the better of the two throughout training (section 5.2)."""
        return self.teacher

    def training_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        views = batch.views  # v times b c h w, the global ones first
        with torch.no_grad():
            seen = embed_views(self.teacher, views[:GLOBAL_VIEWS])  # 2 b d
            targets = self.targets(self.each(self.teacher_head, seen))  # 2 b k
        features = embed_views(self.encoder, views, self.path_noise(batch, len(views)))  # v b d
        logits = self.each(self.head, features) / self.settings.student_temp  # v b k
        loss = dino_loss(targets, logits)
        self.record("loss", loss)
        self.watch(seen[0], targets[0])
        return loss + self.spread(features)

    def each(self, head: DINOHead, features: Float[Tensor, "v b d"]) -> Float[Tensor, "v b k"]:
        """The head's outputs of all views at once."""
        return rearrange(head(rearrange(features, "v b d -> (v b) d")), "(v b) k -> v b k", v=len(features))

    def targets(self, outputs: Float[Tensor, "v b k"]) -> Float[Tensor, "v b k"]:
        """The teacher's shares under the center of earlier steps; these outputs count for the next one."""
        settings, temperature = self.settings, self.temperature_at(self.global_step)
        if settings.centering == "sinkhorn":
            return sinkhorn_shares(outputs, temperature, settings.sinkhorn_iterations)
        self.outputs_seen += outputs.sum((0, 1))
        self.rows_seen += outputs.shape[0] * outputs.shape[1]
        return center_and_sharpen(outputs, self.center, temperature)

    def spread(self, features: Float[Tensor, "v b d"]) -> Tensor | float:
        """KoLeo of the student's global views, where it is wanted."""
        if not self.settings.koleo:
            return 0.0
        terms = [koleo(view) for view in features[:GLOBAL_VIEWS]]
        self.record("koleo", sum(terms))
        return self.settings.koleo * sum(terms)

    # ---- once per update, however many micro-batches it has ----------------------------------------------------

    def optimizer_step(self, *args, **kwargs) -> None:
        step = self.global_step
        super().optimizer_step(*args, **kwargs)
        if self.is_skipped:  # outputs_seen is a buffer, and as before the step
            self.rows_seen = 0
            return
        momentum = self.momentum_at(step)
        ema_update(self.teacher, self.encoder, momentum)
        ema_update(self.teacher_head, self.head, momentum)
        self.move_center()

    def move_center(self) -> None:
        """Towards the mean output of all micro-batches and ranks since the last update (equation 4)."""
        if not self.rows_seen:
            return
        mean = all_reduce_sum(self.outputs_seen) / (self.rows_seen * world_size())
        self.center.lerp_(mean, 1 - self.settings.center_momentum)
        self.outputs_seen.zero_()
        self.rows_seen = 0

    def configure_gradient_clipping(self, *args, **kwargs) -> None:
        super().configure_gradient_clipping(*args, **kwargs)
        if self.global_step < self.frozen_steps:
            for parameter in self.head.last_layer.parameters():
                parameter.grad = None  # the optimizer passes it by, moments and decay included

    @property
    def frozen_steps(self) -> int:
        """Updates in which the prototypes stay; a run that is shorter than its recipe gives them a quarter at most."""
        return min(round(self.settings.freeze_last_layer * self.steps_per_epoch), self.total_steps // 4)

    def lr_at(self, step: int) -> float:
        return warmup_cosine(
            step, self.peak_lr, self.optim.min_lr, self.warmup_steps, self.total_steps, twice_at_peak=True
        )

    def momentum_at(self, step: int) -> float:
        """Share of the teacher that stays at the update number `step` (section 3.1, "Teacher network")."""
        return cosine(step, self.settings.momentum, self.settings.final_momentum, self.total_steps)

    def temperature_at(self, step: int) -> float:
        """The teacher's temperature, which rises epoch by epoch (section 3.2, "Implementation details")."""
        first, last = self.settings.warmup_teacher_temp, self.settings.teacher_temp
        warmup = self.settings.warmup_teacher_temp_epochs
        if step >= warmup * self.steps_per_epoch:
            return last
        epoch = step // self.steps_per_epoch
        return first + (last - first) * min(epoch / max(warmup - 1, 1), 1)

    # ---- other people's weights ------------------------------------------------------------------------------

    def start_from(self, start: ViTEncoder, source: str) -> None:
        super().start_from(start, source)
        self.teacher.load_state_dict(self.encoder.state_dict())

    @classmethod
    def from_official(cls, path: str, heads: int, **settings) -> DINO:
        """The released full checkpoint (student, teacher and their heads) as a task.

        Args:
            path: a file with both networks in it (..._full_checkpoint.pth).
            heads: attention heads of the encoder; the file does not say them.
            settings: other fields of DINOSettings.

        Raises:
            ValueError: the file does not hold both networks with their heads.
        """
        content = read_torch_file(Path(path))
        if not {"student", "teacher"} <= content.keys():
            raise ValueError(f"{path}: holds no student and teacher; DINO.from_official needs a full checkpoint.")
        task = cls.from_state(content["student"], content["teacher"], heads, **settings)
        if "dino_loss" in content:
            task.center.copy_(content["dino_loss"]["center"].flatten())
        return task

    @classmethod
    def from_state(cls, student: dict[str, Tensor], teacher: dict[str, Tensor], heads: int, **settings) -> DINO:
        """from_official, for state dicts in memory."""
        networks = {"": layout.to_sslvit(student, heads), "teacher": layout.to_sslvit(teacher, heads)}
        shape = layout.head_shape(networks[""].extras)
        task = cls(
            DINOSettings(**{**shape, **settings}).fitted(1, 256, 1), networks[""].settings, OptimSettings(),
            total_steps=1, steps_per_epoch=1, global_batch_size=256,
        )  # fmt: skip
        for prefix, network in networks.items():
            encoder, head = (task.teacher, task.teacher_head) if prefix else (task.encoder, task.head)
            encoder.load_state_dict(network.encoder)
            head.load_state_dict({key.removeprefix("head."): value for key, value in network.extras.items()})
        return task
