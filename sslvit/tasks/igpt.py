"""iGPT: "Generative Pretraining from Pixels" (Chen et al. 2020), section 2.

An image is a sequence of palette colors, row by row. Autoregressive: the sequence is shifted right by a start token,
a causal encoder reads it, and its state at place i predicts pixel i, which it has not seen. BERT: some pixels are
hidden, and an encoder that looks both ways predicts them.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslvit.checkpoint import reject_overrides, split_checkpoint
from sslvit.compatibility import check_fits, load_strict
from sslvit.data.batch import Batch
from sslvit.environment import pick_device
from sslvit.layouts import openai_igpt as layout
from sslvit.layouts.unwrap import unwrap
from sslvit.models import ViTEncoder
from sslvit.settings import EncoderSettings, IGPTSettings, OptimSettings
from sslvit.settings.sample import SampleSettings
from sslvit.sharded_checkpoint import read_checkpoint
from sslvit.tasks.base import Task
from sslvit.tasks.sampling import complete
from sslvit.weight_files import read_torch_file

logger = logging.getLogger(__name__)

DRAWN = 2  # completions of each image in a run's pictures


def pixel_nll(
    logits: Float[Tensor, "b n colors"],
    colors: Int[Tensor, "b n"],
    is_counted: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of the pixels' colors, in nats per pixel.

    Chen et al. 2020, section 2.1, L_AR and L_BERT divided by the number of pixels that they sum over.

    Args:
        logits: of every color at every place.
        colors: palette index of every pixel.
        is_counted: True where a pixel counts; None for all.
    """
    # float32: a bf16 softmax over 512 colors loses its tail
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    error = F.cross_entropy(logits.flatten(0, 1), colors.flatten(), reduction="none").view_as(colors)
    if is_counted is None:
        return error.mean()
    return (error * is_counted).sum() / is_counted.sum()


def random_mask(noise: Float[Tensor, "b n"], hidden: int) -> Bool[Tensor, "b n"]:
    """True for the `hidden` pixels with the lowest noise.

    The paper hides each pixel with the same probability on its own; a fixed number makes every micro-batch weigh alike.
    """
    return noise.argsort(dim=1, stable=True).argsort(dim=1, stable=True) < hidden


class IGPT(Task):
    """Args: settings, then those of Task."""

    def __init__(self, settings: IGPTSettings, encoder: EncoderSettings, optim: OptimSettings, **run) -> None:
        check_encoder(settings, encoder)
        super().__init__(settings, encoder, optim, **run)
        self.pixels = encoder.grid[0] * encoder.grid[1]
        self.hidden = round(settings.mask_ratio * self.pixels)
        if settings.objective == "bert" and not 0 < self.hidden < self.pixels:
            raise ValueError(
                f"task.mask_ratio: {settings.mask_ratio} of {self.pixels} pixels hides {self.hidden}. Choose another."
            )
        self.head = nn.Linear(encoder.width, len(self.encoder.patch_embed.palette), bias=False)
        nn.init.zeros_(self.head.weight)  # as in the released code: at first all colors are alike

    def unused_parts(self) -> tuple[str, ...]:
        return ("fc_norm",) if self.settings.objective == "bert" else ("fc_norm", "mask_token")  # nothing is pooled

    def training_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        images = batch.views[0]  # b c h w
        colors = self.encoder.patch_embed.indices(images)  # b n
        is_hidden = self.draw_mask(batch)  # b n; None: nothing is hidden, and every pixel counts
        states = self.encoder(images, hidden=is_hidden, path_noise=self.path_noise(batch))  # b n d
        loss = pixel_nll(self.head(states), colors, is_hidden)
        self.record("loss", loss)
        self.record("bits", loss / math.log(2))
        self.watch(states.mean(1))
        return loss

    def draw_mask(self, batch: Batch) -> Bool[Tensor, "b n"] | None:
        if self.settings.objective == "autoregressive":
            return None
        return random_mask(self.uniform("mask", batch, self.pixels), self.hidden)

    # ---- pictures --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def figures(self, batch: Batch) -> dict[str, tuple[list[str], list[np.ndarray]]]:
        """Images from nothing and completed lower halves; with the BERT objective, hidden pixels filled in."""
        images = batch.views[0]
        self.to(pick_device())  # pixel after pixel of a large model would take the CPU an hour
        figures = self._figures(batch, images.to(pick_device()))
        self.to(images.device)
        return figures

    def _figures(self, batch: Batch, images: Float[Tensor, "b c h w"]) -> dict[str, tuple[list[str], list[np.ndarray]]]:
        colors = self.encoder.patch_embed.indices(images)  # b n
        if self.settings.objective == "bert":
            is_hidden = self.draw_mask(batch).to(images.device)
            likeliest = self.head(self.encoder(images, hidden=is_hidden)).argmax(2)
            filled = torch.where(is_hidden, likeliest, colors)
            rows = [self.shown(colors, ~is_hidden), self.shown(filled), self.shown(colors)]
            return {"filled": (["seen", "filled in", "original"], rows)}
        draw = SampleSettings(seed=self.seed)
        nothing = colors[:, :0]
        generated = complete(self.encoder, self.head, nothing.repeat(2, 1), draw).chunk(2)
        known = self.pixels // 2
        upper = colors[:, :known].repeat(DRAWN, 1)
        completed = complete(self.encoder, self.head, upper, draw).chunk(DRAWN)
        rows = completion_rows(self.encoder, colors, known, list(completed))
        return {"generated": ([""] * 2, [self.shown(part) for part in generated]), "completed": rows}

    def shown(self, colors: Int[Tensor, "b n"], is_seen: Bool[Tensor, "b n"] | None = None) -> np.ndarray:
        return shown(self.encoder, colors, is_seen)

    # ---- released weights ------------------------------------------------------------------------------------

    @classmethod
    def from_official(cls, path: str | Path, palette: str | Path | list[list[float]], heads: int | None = None) -> IGPT:
        """The released model from a file, with its output matrix.

        Args:
            path: transformers' weights, or the TensorFlow variables as arrays (.npz).
            palette: the released clusters: their file, or the colors; uniform for a model that was trained on that.
            heads: of attention; None for those of the released sizes.
        """
        return cls.from_state(unwrap(read_torch_file(Path(path)), str(path)).everything, heads, palette=palette)

    @classmethod
    def from_state(cls, state: dict[str, Tensor], heads: int | None = None, **changes) -> IGPT:
        """from_official, for a state dict in memory."""
        if not layout.recognize(set(state)):
            raise ValueError(f"not iGPT's weights ({', '.join(sorted(state)[:3])}, ...).")
        converted = layout.to_sslvit(state, heads, **changes)
        for note in converted.notes:
            logger.info(f"iGPT: {note}")
        if "head.weight" not in converted.extras:
            raise ValueError("this checkpoint has no output matrix (lm_head.weight or wtet), so it predicts no pixels.")
        return cls.from_parts(converted.settings, converted.encoder, converted.extras["head.weight"])

    @classmethod
    def from_parts(cls, settings: EncoderSettings, encoder: dict[str, Tensor], head: Tensor) -> IGPT:
        """A task of a trained encoder and output matrix, to sample from and to score, in evaluation mode."""
        check_fits(settings, encoder, "iGPT")
        task = cls(IGPTSettings(), settings, OptimSettings(), total_steps=1, steps_per_epoch=1, global_batch_size=256)
        load_strict(task.encoder, encoder, "iGPT")
        if head.shape != task.head.weight.shape:
            raise ValueError(f"iGPT: an output matrix of {tuple(head.shape)}, not {tuple(task.head.weight.shape)}.")
        task.head.load_state_dict({"weight": head})
        return task.eval()


def load_igpt(source: str | Path, heads: int | None = None, **changes) -> IGPT:
    """A model of pixels with its output matrix, from a run folder, its checkpoint, or a released file.

    Args:
        source: where it is.
        heads: of a released file.
        changes: settings that a released file does not say; `palette` must be among them.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it was not trained by iGPT to predict the next pixel, or a released file's palette is not given.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
        if not path.exists():
            raise FileNotFoundError(
                f"{source}: no checkpoints/last.ckpt there. An encoder alone cannot predict pixels: "
                "give the run folder or the checkpoint."
            )
    content = read_checkpoint(path)
    if "sslvit" not in content:
        weights = unwrap(content, str(path)).everything
        if layout.recognize(set(weights)) and "palette" not in changes:
            raise ValueError(f"{source}: a released file does not hold its colors. Give --palette FILE (or uniform).")
        return IGPT.from_state(weights, heads, **changes)
    if changes or heads:
        reject_overrides(str(source), ({"heads": heads} if heads else {}) | changes)
    settings, encoder, others = split_checkpoint(content, path)
    if settings.tokens != "pixel" or not settings.causal or "head.weight" not in others:
        raise ValueError(f"{source}: not trained by iGPT to predict the next pixel, so nothing can be sampled from it.")
    return IGPT.from_parts(settings, encoder, others["head.weight"])


def check_encoder(settings: IGPTSettings, encoder: EncoderSettings) -> None:
    """Raise ValueError where the objective cannot be learned by such an encoder."""
    if encoder.tokens != "pixel":
        raise ValueError(
            f"iGPT predicts colors of pixels, but this encoder's tokens are {encoder.tokens}. "
            "Set encoder.tokens to pixel (see configs/igpt/)."
        )
    if settings.objective == "autoregressive" and not encoder.causal:
        raise ValueError(
            "iGPT predicts each pixel from earlier ones, but this encoder attends both ways. "
            "Set encoder.causal to true (see configs/igpt/), or task.objective to bert."
        )
    if settings.objective == "bert" and (encoder.causal or not encoder.mask_token):
        raise ValueError(
            "task.objective: bert predicts hidden pixels from all others. "
            "Set encoder.causal to false and encoder.mask_token to true."
        )
    if encoder.pooling == "attention":
        raise ValueError(
            "iGPT trains without labels, so an attention pool would stay random. Set encoder.pooling to mean."
        )


def completion_rows(
    encoder: ViTEncoder, colors: Int[Tensor, "b n"], known: int, completed: list[Int[Tensor, "b n"]]
) -> tuple[list[str], list[np.ndarray]]:
    """Input, completions and original, as titles and rows of images."""
    is_seen = (torch.arange(colors.shape[1], device=colors.device) < known).expand_as(colors)
    titles = ["input", *[f"completion {number + 1}" for number in range(len(completed))], "original"]
    rows = [shown(encoder, colors, is_seen), *(shown(encoder, part) for part in completed), shown(encoder, colors)]
    return titles, rows


def shown(encoder: ViTEncoder, colors: Int[Tensor, "b n"], is_seen: Bool[Tensor, "b n"] | None = None) -> np.ndarray:
    """Palette indices as images 'b c h w' in [0, 1]; gray where a pixel is not seen."""
    pixels, grid = encoder.patch_embed, encoder.settings.grid
    images = pixels.images_of(colors, grid) * pixels.std + pixels.mean
    if is_seen is not None:
        images = torch.where(is_seen.unflatten(1, grid)[:, None], images, torch.full_like(images, 0.5))
    return images.clamp(0, 1).cpu().numpy()
