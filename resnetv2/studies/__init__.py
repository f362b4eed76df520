"""Every experiment of ResNet V2 (He et al. 2016) as a function, one file each.

    from resnetv2.studies import depth
    print(depth(depth=(20, 50)))

`STUDIES` has them by the names of `resnetv2 study NAME`, in the order of the page. The functions
stand here under the names of the modules that they come from.
"""

from .activations import activations
from .architecture import architecture
from .block import block
from .bn_position import bn_position
from .depth import depth
from .gradients import gradients
from .harness import Study, StudyOptions
from .hybrid import hybrid
from .identity import identity
from .norms import norms
from .ordering import ordering
from .recipe import recipe
from .results import Result, Table
from .shortcuts import shortcuts
from .versions import versions

STUDIES: dict[str, Study] = {
    each.name: each
    for each in (
        architecture,
        block,
        depth,
        versions,
        ordering,
        shortcuts,
        bn_position,
        identity,
        gradients,
        norms,
        activations,
        hybrid,
        recipe,
    )
}

__all__ = [
    "STUDIES",
    "Result",
    "Study",
    "StudyOptions",
    "Table",
    "activations",
    "architecture",
    "block",
    "bn_position",
    "depth",
    "gradients",
    "hybrid",
    "identity",
    "norms",
    "ordering",
    "recipe",
    "shortcuts",
    "versions",
]
