"""The operations of the model: ``Ops``, made by ``make_ops`` for a device."""

from ember_pp.kernels.ops import Ops, make_ops
from ember_pp.kernels.paged_rows import PagedRows
from ember_pp.kernels.rope_rows import RopeRows
from ember_pp.kernels.step_state import PlanWords, StepState

__all__ = ["Ops", "PagedRows", "PlanWords", "RopeRows", "StepState", "make_ops"]
