"""Generator families by name."""

from dpsynth.models.autoregressive import Autoregressive
from dpsynth.models.base import Generator
from dpsynth.models.diffusion import Diffusion
from dpsynth.models.gan import Gan
from dpsynth.models.vae import Vae

__all__ = ["Autoregressive", "Diffusion", "Gan", "Generator", "Vae"]
