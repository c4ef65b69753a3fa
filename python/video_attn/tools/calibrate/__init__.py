"""Calibrate: the cheapest attention per step, layer and head within an error budget.

:mod:`.candidates` what may be chosen, :mod:`.errors` how far each is from dense attention on
captured q, k, v, :mod:`.costs` what it takes on this machine, :mod:`.choose` the choice,
:mod:`.search` all of it over a folder of captures, :mod:`.pictures` what one looks at.
"""

from .candidates import Candidate, candidates_for
from .choose import BUDGETS, Choice, choose
from .costs import CostModel, measure_costs
from .search import Calibration, calibrate

__all__ = [
    "BUDGETS",
    "Calibration",
    "Candidate",
    "Choice",
    "CostModel",
    "calibrate",
    "candidates_for",
    "choose",
    "measure_costs",
]
