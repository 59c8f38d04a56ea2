"""What is published with a run: its card and its report page."""

from dpsynth.release.card import FACTS, card
from dpsynth.release.page import Overlays, overlays, page

__all__ = ["FACTS", "Overlays", "card", "overlays", "page"]
