"""Factored keys and values kept and read as the other growing memories are."""

from isotach.ops.backends import register
from isotach.ops.factored import Factored
from isotach.ops.torch.history import growing

register(Factored, "torch")(growing)
