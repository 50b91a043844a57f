"""One file = one mixer = one name: `isotach.mixers.NAME` holds the mixer called NAME.

Other packages add mixers through the entry point group `isotach.mixers`; nothing is registered by hand.
"""

import inspect
import pkgutil
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from isotach.config import nearest
from isotach.errors import UserError
from isotach.nn.mixer import Mixer


@cache
def names() -> tuple[str, ...]:
    """Every mixer's name, sorted."""
    own = {module.name for module in pkgutil.iter_modules(__path__)}
    return tuple(sorted(own | {entry.name for entry in entry_points(group="isotach.mixers")}))


@cache
def find(name: str) -> type[Mixer]:
    """The mixer called `name`; UserError names the nearest one where there is none."""
    if name not in names():
        raise UserError(f"mixer {name!r} is not known; {nearest(name, names())}")
    for entry in entry_points(group="isotach.mixers", name=name):
        found: type[Mixer] = entry.load()
        return found
    module = import_module(f"{__name__}.{name}")
    (mixer,) = (
        item
        for item in vars(module).values()
        if inspect.isclass(item) and issubclass(item, Mixer) and item.__module__ == module.__name__
    )
    return mixer
