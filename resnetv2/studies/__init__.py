"""Every experiment of ResNet V2 (He et al. 2016) as a function, one file each.

    from resnetv2.studies import depth
    print(depth(depth=(20, 50)))

`STUDIES` has them by the names of `resnetv2 study NAME`, in the order of the page.
"""

from resnetv2.studies.harness import Study, StudyOptions
from resnetv2.studies.results import Result, Table

__all__ = ["STUDIES", "Result", "Study", "StudyOptions", "Table"]

STUDIES: dict[str, Study] = {}
