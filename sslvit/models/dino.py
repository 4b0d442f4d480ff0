"""DINO: "Emerging Properties in Self-Supervised Vision Transformers" (Caron et al. 2021), section 3.

A student assigns every crop of an image to K prototypes by probabilities, a teacher only the two large crops; the
student learns to match, for each crop, the teacher's probabilities for the other ones. The teacher is a moving average
of the student. Two operations prevent collapse to the same output for every image: the teacher's outputs are centered
(so that no prototype dominates) and sharpened (so that they do not become uniform).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sslvit.models.backbone import Encoder, make_encoder, pooled
from sslvit.ranks import all_reduce_sum, logsumexp_over_ranks, world_size
from sslvit.settings import DINOSettings, EncoderSettings

GLOBAL_VIEWS = 2


class Prototypes(nn.Module):
    """A weight-normalized linear layer without bias: each row has a direction and a separate length."""

    def __init__(self, width: int, count: int, unit_length: bool) -> None:
        super().__init__()
        self.count = count
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not unit_length)
        self.weight_v = nn.Parameter(nn.Linear(width, count, bias=False).weight.detach())

    def forward(self, x: Float[Tensor, "b bottleneck"]) -> Float[Tensor, "b k"]:
        """Dot product of each vector and each unit direction, times the length of the row."""
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class DINOHead(nn.Module):
    """An MLP, an L2-normalized bottleneck, and the prototypes (section 3.1, "Network architecture"; appendix C).

    Args:
        width: Channels of an encoder token.
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
        assert settings.out_dim is not None
        self.last_layer = Prototypes(settings.bottleneck, settings.out_dim, settings.norm_last_layer)

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """Cosine of each image and each prototype (times the prototype's length), in at least float32."""
        projected = self.mlp(features)
        # float32: bf16 rounds a cosine to 1 part in 256, a tenth of a logit at a temperature of 0.04
        with torch.autocast(features.device.type, enabled=False):
            return self.last_layer(F.normalize(at_least_float32(projected), dim=1))


def at_least_float32(values: Tensor) -> Tensor:
    """Cast to float32, unless the values are float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def embed_views(encoder: Encoder, views: list[Tensor], path_noise: Tensor | None = None) -> Float[Tensor, "v b d"]:
    """One vector per image and view; adjacent views of the same size share a forward pass (section 3.1, "multi-crop").

    Args:
        encoder: student or teacher.
        views: each 'b c h w'.
        path_noise: uniform random numbers for stochastic depth, 'branches (v b)'.
    """
    b = len(views[0])
    features = []
    for start, stop in runs_of_one_size(views):
        noise = None if path_noise is None else path_noise[:, start * b : stop * b]
        features.append(pooled(encoder, torch.cat(views[start:stop]), noise))
    return rearrange(torch.cat(features), "(v b) d -> v b d", b=b)


def runs_of_one_size(views: list[Tensor]) -> list[tuple[int, int]]:
    """Runs of adjacent views with the same shape, as (first, one after the last)."""
    starts = [i for i, view in enumerate(views) if not i or view.shape != views[i - 1].shape]
    return list(zip(starts, [*starts[1:], len(views)], strict=True))


def center_and_sharpen(
    outputs: Float[Tensor, "v b k"], center: Float[Tensor, "k"], temperature: float | Tensor
) -> Float[Tensor, "v b k"]:
    """The teacher's probabilities: softmax of its centered outputs at a low temperature (equations 1 and 4)."""
    return ((outputs - center) / temperature).softmax(-1)


def sinkhorn_knopp(
    outputs: Float[Tensor, "v b k"], temperature: float | Tensor, iterations: int
) -> Float[Tensor, "v b k"]:
    """Probabilities that use each prototype equally over the global batch.

    Sinkhorn-Knopp as in SwAV (Caron et al. 2020, section 3.1) and DINOv2 (Oquab et al. 2024, section 4), in log space:
    a prototype with no probability on any image would otherwise lead to zero divided by zero.
    """
    log_probs = rearrange(outputs, "v b k -> (v b) k") / temperature
    images, prototypes = log_probs.shape[0] * world_size(), log_probs.shape[1]
    for _ in range(iterations):
        log_probs = log_probs - logsumexp_over_ranks(log_probs.logsumexp(0)) - math.log(prototypes)
        log_probs = log_probs - log_probs.logsumexp(1, keepdim=True) - math.log(images)
    return rearrange((log_probs + math.log(images)).exp(), "(v b) k -> v b k", v=len(outputs))


def dino_loss(targets: Float[Tensor, "t b k"], logits: Float[Tensor, "s b k"]) -> Float[Tensor, ""]:
    """Cross-entropy between teacher and student, averaged over images and all pairs of different views (equation 3).

    Args:
        targets: The teacher's probabilities for the first t views.
        logits: the student's logits, divided by its temperature.
    """
    t, s, b = len(targets), len(logits), targets.shape[1]
    # float32 even under autocast: a bf16 softmax over 65,536 prototypes loses its tail
    with torch.autocast(logits.device.type, enabled=False):
        # -sum(p log softmax(z)) = logsumexp(z) - sum(p z), as p sums to one. A sum of products over all pairs is a
        # product of sums, so neither log-probabilities nor pairs need to be materialized.
        logits = at_least_float32(logits)
        normalizers = logits.logsumexp(-1)  # s b
        agreement = (targets.sum(0) * logits.sum(0)).sum() - (targets * logits[:t]).sum()  # over all other views
        return (t * normalizers.sum() - normalizers[:t].sum() - agreement) / (b * (t * s - t))


def koleo_loss(features: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Negative mean log distance of each image to its nearest neighbor in the batch, on the unit sphere.

    Based on the Kozachenko-Leonenko entropy estimator (Sablayrolles et al. 2019, section 3.3; DINOv2, section 4).
    """
    with torch.autocast(features.device.type, enabled=False):
        directions = F.normalize(at_least_float32(features), dim=1, eps=1e-8)
        with torch.no_grad():
            similarity = (directions @ directions.T).fill_diagonal_(-1)
            nearest = similarity.argmax(1)
        distance = F.pairwise_distance(directions, directions[nearest], eps=1e-8)
        return -(distance + 1e-8).log().mean()


class DINOLosses(NamedTuple):
    """The result of one forward pass of a DINOModel.

    Attributes:
        loss: Cross-entropy over all pairs of different views (equation 3).
        koleo: KoLeo loss summed over the student's global views, unweighted; None if it is not used.
        features: The teacher's features of the first global view, 'b d'.
        probs: The teacher's probabilities of that view, 'b k'.
    """

    loss: Tensor
    koleo: Tensor | None
    features: Tensor
    probs: Tensor


class DINOModel(nn.Module):
    """A student and its teacher, each an encoder with a head, and the center of the teacher's outputs (figure 2).

    Args:
        settings: Heads, temperatures and centering; no key may be null (see `DINOSettings.fitted`).
        encoder: The encoder's architecture and input.

    Raises:
        ValueError: An encoder for one image size only, or settings that are still null.
    """

    center: Tensor
    output_sum: Tensor
    output_rows: Tensor

    def __init__(self, settings: DINOSettings, encoder: EncoderSettings) -> None:
        super().__init__()
        if encoder.tokens == "pixel":
            raise ValueError(
                "DINO shows the encoder crops of several sizes, and a pixel sequence is tied to one. "
                "Set encoder.tokens to patch (see configs/dino/)."
            )
        if open_keys := [f"task.{key}" for key, value in vars(settings).items() if value is None]:
            raise ValueError(f"{', '.join(open_keys)}: still null. Call DINOSettings.fitted first.")
        self.settings = settings
        self.encoder = make_encoder(encoder)
        self.teacher = make_encoder(EncoderSettings(**{**vars(encoder), "drop_path": 0.0, "dropout": 0.0}))
        self.head = DINOHead(self.encoder.width, settings)
        self.teacher_head = DINOHead(self.encoder.width, settings)
        self.register_buffer("center", torch.zeros(self.head.last_layer.count))
        self.register_buffer("output_sum", torch.zeros(self.head.last_layer.count), persistent=False)
        self.register_buffer("output_rows", torch.zeros(()), persistent=False)  # number of summed outputs
        self.teacher.load_state_dict(self.encoder.state_dict())  # the teacher starts as a copy of the student
        self.teacher_head.load_state_dict(self.head.state_dict())
        self.teacher.requires_grad_(False)
        self.teacher_head.requires_grad_(False)

    def loss(self, views: list[Tensor], teacher_temp: float | Tensor, path_noise: Tensor | None = None) -> DINOLosses:
        """The student's cross-entropy for each view with the teacher's probabilities for the other views as targets.

        In training mode, the teacher's outputs are summed up for the next `update_center`.

        Args:
            views: Each 'b c h w', the two global ones first.
            teacher_temp: Temperature of the teacher's softmax at this step.
            path_noise: Uniform random numbers for the student's stochastic depth, 'branches (v b)'.
        """
        with torch.no_grad():
            teacher_features = embed_views(self.teacher, views[:GLOBAL_VIEWS])  # 2 b d
            targets = self.targets(apply_head(self.teacher_head, teacher_features), teacher_temp)  # 2 b k
        features = embed_views(self.encoder, views, path_noise)  # v b d
        logits = apply_head(self.head, features) / self.settings.student_temp  # v b k
        loss = dino_loss(targets, logits)
        koleo = None
        if self.settings.koleo:
            koleo = torch.stack([koleo_loss(view) for view in features[:GLOBAL_VIEWS]]).sum()
        return DINOLosses(loss, koleo, teacher_features[0], targets[0])

    def targets(self, outputs: Float[Tensor, "v b k"], teacher_temp: float | Tensor) -> Float[Tensor, "v b k"]:
        """The teacher's probabilities, with the center from earlier steps."""
        if self.settings.centering == "sinkhorn":
            return sinkhorn_knopp(outputs, teacher_temp, self.settings.sinkhorn_iterations)
        if self.training:
            self.output_sum += outputs.sum((0, 1))
            self.output_rows += outputs.shape[0] * outputs.shape[1]
        return center_and_sharpen(outputs, self.center, teacher_temp)

    @torch.no_grad()
    def update_center(self, skip: Tensor) -> None:
        """Move the center toward the mean output of all micro-batches and ranks since the last update (equation 4).

        Args:
            skip: 1 to leave the center unchanged, else 0; a tensor on the device.
        """
        if self.settings.centering == "sinkhorn":
            return
        mean = all_reduce_sum(self.output_sum) / (self.output_rows * world_size())
        moved = self.center.lerp(mean, 1 - self.settings.center_momentum)
        self.center.copy_(torch.where(skip.bool(), self.center, moved))
        self.output_sum.zero_()
        self.output_rows.zero_()


def apply_head(head: DINOHead, features: Float[Tensor, "v b d"]) -> Float[Tensor, "v b k"]:
    """Apply the head to all views at once."""
    return rearrange(head(rearrange(features, "v b d -> (v b) d")), "(v b) k -> v b k", v=len(features))
