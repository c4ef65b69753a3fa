"""Calibrate: the cheapest attention per step, layer and head within an error budget.

:mod:`.api` the whole of it, :mod:`.pipeline` captures from a pipeline, :mod:`.candidates` what may
be chosen, :mod:`.errors` how far each is from dense attention on captured q, k, v, :mod:`.costs`
what it takes on this machine, :mod:`.choose` the choice, :mod:`.search` all of it over a folder of
captures, :mod:`.calibration` what comes out, :mod:`.pictures` and :mod:`.explain` what one sees.
"""

from .api import calibrate
from .calibration import Calibration
from .candidates import OWN, Candidate, candidates_for
from .choose import BUDGETS, Choice, Chooser, Prices
from .costs import CostModel, measure_costs

__all__ = [
    "BUDGETS",
    "OWN",
    "Calibration",
    "Candidate",
    "Choice",
    "Chooser",
    "CostModel",
    "Prices",
    "calibrate",
    "candidates_for",
    "measure_costs",
]
