"""Every experiment of ResNet V2 (He et al. 2016) as a function, one file each.

    from resnetv2.studies import depth
    print(depth(depth=(20, 50)))

`STUDIES` has them by the names of `resnetv2 study NAME`, in the order of the page. The functions
stand here under the names of the modules that they come from.
"""

from resnetv2.studies.activations import activations
from resnetv2.studies.architecture import architecture
from resnetv2.studies.block import block
from resnetv2.studies.bn_position import bn_position
from resnetv2.studies.depth import depth
from resnetv2.studies.gradients import gradients
from resnetv2.studies.harness import Study, StudyOptions
from resnetv2.studies.hybrid import hybrid
from resnetv2.studies.identity import identity
from resnetv2.studies.norms import norms
from resnetv2.studies.ordering import ordering
from resnetv2.studies.recipe import recipe
from resnetv2.studies.results import Result, Table
from resnetv2.studies.shortcuts import shortcuts
from resnetv2.studies.versions import versions

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
