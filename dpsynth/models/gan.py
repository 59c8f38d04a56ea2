"""Conditional GAN with many discriminator steps a generator step (Bie et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsynth.checks import check_count, check_positive
from dpsynth.codec import Layout
from dpsynth.models.base import Generator
from dpsynth.networks import Mlp, columns_at, sample_columns
from dpsynth.randomness import FleetRng

__all__ = ["Gan"]


class Gan(Generator):
    """Only the discriminator sees rows, so only its steps are private; the generator learns from
    the discriminator (post-processing).

    Each record is paired with fakes of its own target level on a draws axis, one loss and one
    clipped contribution a record.

    Args:
        hidden: Widths of the hidden layers of both networks.
        latent: Dimension of the generator's noise.
        fakes: Fakes paired with each record.
        ladder: Discriminator steps a generator step.
        public_batch: Rows of one generator step.
        temperature: Of the straight-through Gumbel softmax (Jang et al. 2017).
        generator_lr: Learning rate of the generator, one for all runs or one each.
        decay: Weight decay of the discriminator (decoupled), which bounds its scale.
        anchor: Weight of the generator's penalty for drifting from the noisy tables.
    """

    family = "gan"
    suits = (
        "Where the generator must be free to be of any kind or size, since its critic alone sees "
        "rows. Under privacy it stays close to the mixture that it starts from."
    )
    own = frozenset({"lr", "generator_lr"})
    clip = 1.0

    def __init__(
        self,
        layout: Layout,
        runs: int,
        *,
        hidden: Sequence[int] = (128, 128),
        latent: int = 32,
        fakes: int = 2,
        ladder: int = 2,
        public_batch: int = 512,
        temperature: float = 0.7,
        generator_lr: float | Sequence[float] = 2e-3,
        decay: float = 0.1,
        anchor: float = 10.0,
        lr: float | Sequence[float] = 3e-3,
        **common: Any,
    ) -> None:
        super().__init__(layout, runs, lr=lr, **common)
        counts = {"latent": latent, "fakes": fakes, "ladder": ladder, "public_batch": public_batch}
        for name, value in counts.items():
            check_count(name, value)
        check_positive("temperature", temperature)
        for name, value in {"decay": decay, "anchor": anchor}.items():
            if value != 0:  # 0 turns either off
                check_positive(name, value)
        self.latent, self.fakes, self.ladder = latent, fakes, ladder
        self.public_batch, self.temperature = public_batch, temperature
        self.generator_lr = self.per_run("generator_lr", generator_lr)
        self.weight_decay = decay
        self.anchor = anchor
        self.network = Mlp(runs, [layout.width, *hidden, 1])
        self.generator = Mlp(runs, [latent + layout.groups, *hidden, layout.width])

    def reset(self, rng: FleetRng) -> None:
        assert isinstance(self.network, Mlp)
        self.network.reset(rng, "discriminator", fan=self.layout.columns, zero=False)
        self.generator.reset(rng, "generator")

    def averaged(self) -> Mlp:
        return self.generator

    def configure_optimizers(self) -> Any:
        critic = self.adam(self.network, self.lr, betas=(0.5, 0.99), weight_decay=self.weight_decay)
        maker = self.adam(self.generator, self.generator_lr, betas=(0.5, 0.99))
        return [critic, maker]

    def logits(self, z: Tensor, group: Tensor, component: Tensor) -> Tensor:
        """Logits (runs, rows, W) of noise (runs, rows, latent), targets and components (runs,
        rows)."""
        features = torch.cat([z, self.group_one_hot(group)], dim=-1)
        return self.offset(component) + self.generator(features)

    def record_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        """softplus(−D(x)) + mean_k softplus(D(fake_k)): the logistic GAN loss (Goodfellow 2014)."""
        dtype, records = self.prior_logits.dtype, codes.shape[1]
        group = self.layout.group_of(codes)
        with torch.no_grad():
            many = group.repeat_interleave(self.fakes, dim=1)
            noise = rng.normal(records * self.fakes, self.latent)
            made = self.logits(noise, many, self.components_given(many, rng))
            fakes = self.with_target(sample_columns(made, self.layout.levels, rng), many)
            fakes = fakes.unflatten(1, (records, self.fakes))
            both = torch.cat([codes[:, :, None], fakes], dim=2)
        verdict = self.network(self.layout.one_hot(both, dtype)).squeeze(-1)
        return F.softplus(-verdict[..., 0]) + F.softplus(verdict[..., 1:]).mean(-1)

    def attack_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        """−D(x): a discriminator knows what it was shown (LOGAN, Hayes et al. 2019)."""
        return -self.network(self.layout.one_hot(codes, self.prior_logits.dtype)).squeeze(-1)

    @property
    def signal_names(self) -> tuple[str, ...]:
        return ("critic",)

    @property
    def public_every(self) -> int:
        return self.ladder

    def public_step(self, rng: FleetRng) -> None:
        """One generator step against the discriminator (touches no rows)."""
        component, group = self.draw_components(self.public_batch, rng, None)
        logits = self.logits(rng.normal(self.public_batch, self.latent), group, component)
        verdict = self.network(self._straight_through(logits, group, rng)).squeeze(-1)
        loss = F.softplus(-verdict).mean(-1) + self.anchor * self._drift(logits, group)
        weights = list(self.generator.parameters())
        for weight, gradient in zip(weights, torch.autograd.grad(loss.sum(), weights), strict=True):
            weight.grad = gradient
        self._optimizers[1].step()
        self._optimizers[1].zero_grad(set_to_none=True)

    def _drift(self, logits: Tensor, group: Tensor) -> Tensor:
        """How far the batch's columns, given the target, are from the noisy tables (runs,):
        Σ_y p(y) Σ_j KL(table_j(·|y) ‖ mean softmax_j(·|y)). Reads measurements, not rows."""
        member = self.group_one_hot(group)
        blocks = logits.split(list(self.layout.levels), dim=-1)
        soft = torch.cat([block.softmax(-1) for block in blocks], dim=-1)
        share = member.mT @ soft / member.sum(1)[..., None].clamp_min(1.0)
        table = self.given_logits.exp()
        gap = table * (self.given_logits.clamp_min(-30) - share.clamp_min(1e-9).log())
        return (self.prior_logits.softmax(-1) * gap.sum(-1)).sum(-1)

    def _straight_through(self, logits: Tensor, group: Tensor, rng: FleetRng) -> Tensor:
        """One-hot rows whose gradient is that of the tempered softmax."""
        noisy = (logits + rng.gumbel(*logits.shape[1:])) / self.temperature
        blocks = []
        for j, block in enumerate(noisy.split(list(self.layout.levels), dim=-1)):
            if j == self.layout.target:
                blocks.append(self.group_one_hot(group))
                continue
            soft = block.softmax(-1)
            hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
            blocks.append(hard + soft - soft.detach())
        return torch.cat(blocks, dim=-1)

    def draw(
        self,
        component: Tensor,
        group: Tensor,
        draws: Tensor,
        rng: FleetRng,
        given: Mapping[int, int],
    ) -> Tensor:
        logits = self.logits(rng.normal(group.shape[1], self.latent), group, component)
        return columns_at(self.reconciled(logits, component, group), self.layout.levels, draws)
