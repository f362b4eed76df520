"""``B``, the plain unit, with one thing changed at a time that alters its function: at once, in the
other mode, or after a later assignment.

Each must end fused and equal to eager, in outputs and gradients, or left alone with a true reason.
"""

from tests.support.mutations import children, computed, effects, modes, state, surroundings
from tests.support.mutations.base import CHANNELS, B, Mutation

MUTATIONS: dict[str, Mutation] = {
    **modes.MUTATIONS,
    **state.MUTATIONS,
    **surroundings.MUTATIONS,
    **effects.MUTATIONS,
    **children.MUTATIONS,
    **computed.MUTATIONS,
}

__all__ = ["CHANNELS", "MUTATIONS", "B", "Mutation"]
