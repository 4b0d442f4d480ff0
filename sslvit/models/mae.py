"""Masked autoencoder: "Masked Autoencoders Are Scalable Vision Learners" (He et al. 2022), section 3.

The encoder sees only the visible patches; a lightweight decoder gets its tokens, with a learned mask token at every
hidden position, and predicts the pixels of the hidden patches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslvit.models.encoder import ViTEncoder
from sslvit.models.hog import hog_patches, hog_size
from sslvit.models.positions import sincos_2d, sincos_table, table_on_grid
from sslvit.models.tokens import gather_tokens
from sslvit.models.transformer import Block, run_block
from sslvit.settings import EncoderSettings, MAESettings


def patchify(images: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b n pixels"]:
    """Cut images into patches, row by row, each flattened as (row, column, channel) like the decoder's outputs."""
    return rearrange(images, "b c (rows p) (cols q) -> b (rows cols) (p q c)", p=patch, q=patch)


def unpatchify(patches: Float[Tensor, "b n pixels"], patch: int, grid: tuple[int, int]) -> Float[Tensor, "b c h w"]:
    """The inverse of patchify."""
    return rearrange(
        patches, "b (rows cols) (p q c) -> b c (rows p) (cols q)", rows=grid[0], cols=grid[1], p=patch, q=patch
    )


def num_visible(patches: int, mask_ratio: float) -> int:
    """Number of visible patches, rounded down with the same arithmetic as the released code."""
    return int(patches * (1 - mask_ratio))


def random_masking(noise: Float[Tensor, "b n"], visible: int) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b m"]]:
    """Indices of the `visible` patches with the lowest noise, and of the hidden ones, both in the order of noise."""
    order = noise.argsort(dim=1, stable=True)
    return order[:, :visible], order[:, visible:]


def mask_of(hidden: Int[Tensor, "b m"], patches: int) -> Bool[Tensor, "b n"]:
    """A mask over all patches, True for the hidden ones."""
    mask = torch.zeros(hidden.shape[0], patches, dtype=torch.bool, device=hidden.device)
    return mask.scatter_(1, hidden, True)


def normalize_patches(patches: Float[Tensor, "b n pixels"]) -> Float[Tensor, "b n pixels"]:
    """Normalize each patch by its mean and unbiased variance plus 1e-6 (section 3, "Reconstruction target")."""
    mean, variance = patches.mean(2, keepdim=True), patches.var(2, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def patch_mse(predicted: Float[Tensor, "b m pixels"], target: Float[Tensor, "b m pixels"]) -> Float[Tensor, ""]:
    """Mean squared error of hidden patches, in at least float32 (section 3, "Reconstruction target")."""
    kind = torch.promote_types(predicted.dtype, torch.float32)
    return (predicted.to(kind) - target.to(kind)).square().mean()


class MAELoss(NamedTuple):
    """The result of one forward pass of an MAEModel.

    Attributes:
        loss: Mean squared error of the hidden patches; with HOG targets, the weighted sum of both errors.
        features: Mean of the encoder's tokens, 'b d'.
    """

    loss: Tensor
    features: Tensor


class Prediction(NamedTuple):
    """The decoder's predictions for patches.

    Attributes:
        pixels: 'b m pixels', each patch flattened as (row, column, channel).
        hog: Histograms of oriented gradients, 'b m k', if MAESettings.hog_weight is set.
    """

    pixels: Tensor
    hog: Tensor | None


class MAEDecoder(nn.Module):
    """A narrow transformer over all patches (section 3, "MAE decoder"), used in pretraining only.

    Args:
        encoder: settings of the encoder.
        settings: width, depth, heads and MLP ratio of the decoder.
    """

    pos_embed: Tensor

    def __init__(self, encoder: EncoderSettings, settings: MAESettings) -> None:
        super().__init__()
        width, self.prefix, self.grid = settings.decoder_width, encoder.prefix, encoder.grid
        self.recompute = encoder.activation_checkpointing
        plain = EncoderSettings(
            width=width, depth=settings.decoder_depth, heads=settings.decoder_heads, norm_eps=encoder.norm_eps,
            mlp_ratio=settings.decoder_mlp_ratio or encoder.mlp_ratio,
        )  # fmt: skip
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_table(sincos_2d(encoder.grid, width), self.prefix))
        self.blocks = nn.ModuleList(Block(plain) for _ in range(settings.decoder_depth))
        self.norm = nn.LayerNorm(width, eps=encoder.norm_eps)
        self.pred = nn.Linear(width, encoder.patch**2 * encoder.channels)
        self.hog = nn.Linear(width, hog_size(encoder.patch, encoder.channels)) if settings.hog_weight else None
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():  # appendix A.1, as encoder.init: xavier
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self, latent: Float[Tensor, "b t d"], visible: Int[Tensor, "b k"], grid: tuple[int, int] | None = None,
        wanted: Int[Tensor, "b m"] | None = None,
    ) -> Prediction:  # fmt: skip
        """Predictions for the wanted patches; for None, for all patches, row by row.

        The grid may differ from the encoder's own.
        """
        tokens = self.embed(latent)  # b (prefix + k) w
        prefix, seen = tokens[:, : self.prefix], tokens[:, self.prefix :]
        positions = self.positions(grid or self.grid)  # 1 (prefix + n) w
        patches = self.mask_token.to(tokens.dtype).expand(len(tokens), positions.shape[1] - self.prefix, -1)
        patches = patches.scatter(1, visible[:, :, None].expand_as(seen), seen)  # b n w
        tokens = torch.cat([prefix, patches], 1) + positions
        if wanted is None:
            wanted = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
        for number, block in enumerate(self.blocks, start=1):
            assert isinstance(block, Block)
            last = wanted + self.prefix if number == len(self.blocks) else None  # spares the last MLP all other tokens
            tokens = run_block(block, tokens, recompute=self.recompute, wanted=last)
        tokens = self.norm(tokens)
        return Prediction(self.pred(tokens), None if self.hog is None else self.hog(tokens))

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 t d"]:
        """The position table of the encoder's grid, resampled to other grids."""
        return torch.cat(table_on_grid(self.pos_embed, self.prefix, self.grid, grid))[None]


class MAEModel(nn.Module):
    """An encoder of the visible patches and a lightweight decoder (figure 1).

    Args:
        settings: Masking, target and decoder.
        encoder: The encoder's architecture and input.

    Raises:
        ValueError: An encoder that cannot process a subset of patches, or a ratio that leaves all or none visible.
    """

    def __init__(self, settings: MAESettings, encoder: EncoderSettings) -> None:
        super().__init__()
        check_encoder(settings, encoder)
        self.settings = settings
        self.encoder = ViTEncoder(encoder)
        self.decoder = MAEDecoder(encoder, settings)

    def loss(
        self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"], path_noise: Tensor | None = None
    ) -> MAELoss:
        """The reconstruction error of the hidden patches.

        Args:
            images: Normalized pixels.
            noise: One random number per patch; the patches with the lowest stay visible.
            path_noise: Uniform random numbers for stochastic depth, 'branches b'.
        """
        visible, hidden = self.mask(noise)  # b k, b m
        latent = self.encoder(images, visible, path_noise=path_noise)  # b t d
        predicted: Prediction = self.decoder(latent, visible, self.grid_of(images), hidden)
        target = self.target(gather_tokens(patchify(images, self.encoder.settings.patch), hidden))  # b m pixels
        loss = patch_mse(predicted.pixels, target)
        if predicted.hog is not None:
            target = gather_tokens(hog_patches(images, self.encoder.settings.patch), hidden)  # b m k
            loss = loss + self.settings.hog_weight * patch_mse(predicted.hog, target)
        return MAELoss(loss, latent.mean(1))

    def target_moments(
        self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"]
    ) -> Float[Tensor, "3 pixels"]:
        """The mean patch, and the hidden patches' mean and mean square, for the error of predicting the mean patch."""
        target = self.target(patchify(images, self.encoder.settings.patch))  # b n pixels
        if self.settings.hog_weight:  # both targets in one tensor, scaled so that its mean squared error is the loss
            hog, pixels = hog_patches(images, self.encoder.settings.patch), target.shape[2]
            hog = hog * (self.settings.hog_weight * pixels / hog.shape[2]) ** 0.5
            target = torch.cat([target, hog], 2) * (1 + hog.shape[2] / pixels) ** 0.5
        hidden = gather_tokens(target, self.mask(noise)[1])  # b m pixels
        return torch.stack([target.mean((0, 1)), hidden.mean((0, 1)), hidden.square().mean((0, 1))])

    def mask(self, noise: Float[Tensor, "b n"]) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b m"]]:
        """Indices of the visible and of the hidden patches."""
        return random_masking(noise, num_visible(noise.shape[1], self.settings.mask_ratio))

    def target(self, patches: Float[Tensor, "b m pixels"]) -> Float[Tensor, "b m pixels"]:
        """The decoder's training target for these patches (section 3, "Reconstruction target")."""
        return normalize_patches(patches) if self.settings.target == "normalized" else patches

    def grid_of(self, images: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.encoder.settings.grid_of(*images.shape[2:])

    @torch.no_grad()
    def reconstruct(
        self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b 1 h w"]]:
        """Images with predicted hidden patches, and a mask that is 1 where patches were hidden.

        Visible pixels are copied from the input. With a normalized target, the network predicts each patch relative to
        its own mean and standard deviation, which are taken from the image itself.
        """
        visible, hidden = self.mask(noise)
        predicted = self.decoder(self.encoder(images, visible), visible, self.grid_of(images)).pixels
        is_hidden = mask_of(hidden, noise.shape[1])
        patch = self.encoder.settings.patch
        patches = patchify(images, patch)
        if self.settings.target == "normalized":
            deviation = (patches.var(2, keepdim=True) + 1e-6).sqrt()
            predicted = predicted * deviation + patches.mean(2, keepdim=True)
        filled = torch.where(is_hidden[:, :, None], predicted, patches)
        grid = self.grid_of(images)
        area = is_hidden[:, :, None].float().expand(-1, -1, patch**2)
        return unpatchify(filled, patch, grid), unpatchify(area, patch, grid)


def check_encoder(settings: MAESettings, encoder: EncoderSettings) -> None:
    """Raise ValueError for an encoder that MAE cannot train."""
    if encoder.causal or encoder.tokens != "patch":
        raise ValueError(
            "MAE shows the encoder a few patches alone, in any order: it can neither be causal nor have tokens "
            f"that see beyond their patch (here causal: {str(encoder.causal).lower()}, tokens: {encoder.tokens}). "
            "Set encoder.causal to false and encoder.tokens to patch (see configs/mae/)."
        )
    if encoder.pooling == "attention":
        raise ValueError(
            "MAE trains without labels, so an attention pool would stay random. Set encoder.pooling to class or mean."
        )
    patches = encoder.grid[0] * encoder.grid[1]
    visible = num_visible(patches, settings.mask_ratio)
    if not 0 < visible < patches:
        raise ValueError(
            f"task.mask_ratio: {settings.mask_ratio} of {patches} patches leaves {visible} visible. "
            "Choose another ratio, or a smaller patch."
        )
