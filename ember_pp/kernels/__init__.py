"""The operations of the model: ``Ops``, made by ``make_ops`` for a device."""

from ember_pp.kernels.ops import Ops, make_ops
from ember_pp.kernels.paged_rows import PagedRows
from ember_pp.kernels.rope_rows import RopeRows

__all__ = ["Ops", "PagedRows", "RopeRows", "make_ops"]
