"""Conditional VAE over discrete columns (Kingma & Welling 2014; TVAE, Xu et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpsynth.checks import check_count, check_positive
from dpsynth.codec import Layout
from dpsynth.models.base import Generator
from dpsynth.networks import Mlp, column_log_likelihood, columns_at
from dpsynth.randomness import FleetRng

__all__ = ["Vae"]


class Vae(Generator):
    """p(x|y) = ∫ N(z; 0, I) Π_j p(x_j|z, y) dz with a Gaussian encoder.

    Encoder and decoder are one private network: both see the rows, so both are clipped jointly.
    Rows are sampled from the decoder's distributions, never by their mode.

    Args:
        hidden: Widths of the hidden layers.
        latent: Dimension of z.
        draws: z draws a record, averaged inside its one clipped contribution.
        beta: Weight of the KL term.
    """

    family = "vae"
    suits = (
        "Where a latent code of a row is wanted. On Adult as near to the rows as autoregressive, "
        "not nearer."
    )
    clip = 8.0

    def __init__(
        self,
        layout: Layout,
        runs: int,
        *,
        hidden: Sequence[int] = (128, 128),
        latent: int = 16,
        draws: int = 2,
        beta: float = 1.0,
        lr: float | Sequence[float] = 2e-3,
        **common: Any,
    ) -> None:
        super().__init__(layout, runs, lr=lr, **common)
        check_count("latent", latent)
        check_count("draws", draws)
        check_positive("beta", beta)
        self.latent, self.draws, self.beta = latent, draws, beta
        encoder = Mlp(runs, [layout.width, *hidden, 2 * latent])
        decoder = Mlp(runs, [latent + layout.groups, *hidden, layout.width])
        self.network = nn.ModuleDict({"encoder": encoder, "decoder": decoder})

    def reset(self, rng: FleetRng) -> None:
        self._part("encoder").reset(rng, "encoder", fan=self.layout.columns)
        self._part("decoder").reset(rng, "decoder")

    def _part(self, name: str) -> Mlp:
        part = self.network.get_submodule(name)
        assert isinstance(part, Mlp)
        return part

    def decode(self, z: Tensor, group: Tensor, component: Tensor) -> Tensor:
        """Logits (..., W) of latents (runs, rows, [draws,] latent), targets and components (runs,
        rows)."""
        target, start = self.group_one_hot(group), self.offset(component)
        if z.dim() == 4:
            target, start = target[:, :, None], start[:, :, None]
        features = torch.cat([z, target.expand(*z.shape[:-1], -1)], dim=-1)
        return start + self._part("decoder")(features)

    def record_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        """−ELBO, with K latent draws."""
        group = self.layout.group_of(codes)
        stats = self._part("encoder")(self.layout.one_hot(codes, self.prior_logits.dtype))
        mean, log_var = stats.chunk(2, dim=-1)
        log_var = log_var.clamp(-8, 8)
        noise = rng.normal(codes.shape[1], self.draws, self.latent)
        z = mean[:, :, None] + (0.5 * log_var).exp()[:, :, None] * noise
        logits = self.decode(z, group, self.component_of(codes, rng))
        fit = column_log_likelihood(logits, codes[:, :, None], self.layout.levels)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(-1)
        return self.beta * kl - fit.sum(-1).mean(-1)

    @property
    def signal_names(self) -> tuple[str, ...]:
        return ("iwae", "reconstruction", "-kl")

    def signal_losses(self, codes: Tensor, rng: FleetRng, draws: int) -> Tensor:
        """−log (1/K) Σ_k p(x, z_k)/q(z_k|x) (IWAE, Burda et al. 2016, eq. 8), the mean of
        −log p(x|z_k), and −KL(q(z|x) ‖ N(0, I)), from K noises (runs, batch, 3).

        The code of a member lies farther from the prior: that is where it is remembered.
        """
        group = self.layout.group_of(codes)
        stats = self._part("encoder")(self.layout.one_hot(codes, self.prior_logits.dtype))
        mean, log_var = stats.chunk(2, dim=-1)
        log_var = log_var.clamp(-8, 8)
        component = self.component_of(codes, None)
        fits, weights = [], []
        for noise in rng.normal(draws, self.latent)[0].to(mean):
            z = mean + (0.5 * log_var).exp() * noise
            made = self.decode(z, group, component)
            fit = column_log_likelihood(made, codes, self.layout.levels).sum(-1)
            # log N(z; 0, I) − log N(z; mean, var): the constants cancel.
            gap = 0.5 * (noise.square() + log_var - z.square()).sum(-1)
            fits.append(fit)
            weights.append(fit + gap)
        bound = torch.stack(weights).logsumexp(0) - math.log(draws)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(-1)
        return torch.stack([-bound, -torch.stack(fits).mean(0), -kl], dim=-1)

    def draw(
        self,
        component: Tensor,
        group: Tensor,
        draws: Tensor,
        rng: FleetRng,
        given: Mapping[int, int],
    ) -> Tensor:
        logits = self.decode(rng.normal(group.shape[1], self.latent), group, component)
        return columns_at(self.reconciled(logits, component, group), self.layout.levels, draws)
