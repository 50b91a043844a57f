"""Learning-rate schedules: pure functions from a step to a multiplier of the peak learning rate.

`step` counts the updates already made, so the first update uses step 0 and the last one steps - 1. Every schedule
climbs linearly for `warmup` updates, (step + 1) / warmup, and would reach `floor` at step == steps, one past the end:
no update is ever wasted on a multiplier of zero.
"""

import math


def warmup_stable_decay(step: int, *, steps: int, warmup: int, decay: int, floor: float) -> float:
    """Warmup, 1, then `decay` updates down to `floor` along 1 - sqrt (arXiv:2405.18392, section 4).

    The stable part does not know where it ends: a run may be lengthened on resume and nothing before changes.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - (steps - decay)) / decay if decay else 0.0
    return 1.0 if progress <= 0 else floor + (1 - floor) * (1 - math.sqrt(min(progress, 1.0)))


def cosine(step: int, *, steps: int, warmup: int, floor: float) -> float:
    """Warmup, then half a cosine from 1 down to `floor` (arXiv:1608.03983)."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
