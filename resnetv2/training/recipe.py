"""Recipes: YAML files that map options to values, some of which come with the library."""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError
from .fields import nearest, show

# A recipe is a page of text; a longer file is something else, and is not read to its end.
_LONGEST = 2**20


def recipe_names() -> list[str]:
    """The recipes that come with the library."""
    folder = resources.files(__package__) / "recipes"
    suffix = ".yaml"
    return sorted(
        file.name.removesuffix(suffix) for file in folder.iterdir() if file.name.endswith(suffix)
    )


def read_recipe(recipe: str | Path) -> tuple[dict[Any, Any], str]:
    """The options of a recipe, unchecked, and its name for messages.

    Args:
        recipe: one of ``recipe_names``, or the path of a file that ends in .yaml or .yml.

    Raises:
        InputError: no such recipe, or a file that is no YAML mapping.
    """
    if not isinstance(recipe, (str, Path)):
        raise InputError(f"recipe must be a name or a path, got {show(recipe)}")
    names = recipe_names()
    if str(recipe) in names:
        resource = resources.files(__package__) / "recipes" / f"{recipe}.yaml"
        name = f"recipe {recipe}"
        return _parsed(resource.read_text(encoding="utf-8"), name), name
    if not isinstance(recipe, Path) and not recipe.lower().endswith((".yaml", ".yml")):
        raise InputError(
            f"unknown recipe {show(recipe)}: choose from {', '.join(names)}, or give the path of "
            f"a .yaml file{nearest(recipe, names)}"
        )
    name = str(recipe) if str(recipe).isprintable() else repr(str(recipe))
    return _parsed(_text(Path(recipe), name), name), name


def _text(recipe: Path, name: str) -> str:
    try:
        path = recipe.expanduser()
        if not path.exists():
            raise InputError(f"no recipe at {name}")
        if not path.is_file():
            raise InputError(f"{name} is not a file: a recipe is a YAML file of options")
        with path.open("rb") as file:
            content = file.read(_LONGEST + 1)
    # RuntimeError: the home folder of a user that there is not.
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the recipe {name}: {reason}") from error
    if len(content) > _LONGEST:
        raise InputError(f"{name} is longer than 1 MiB: a recipe is a YAML file of options")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not a text file: a recipe is YAML in UTF-8") from error


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which by itself takes the last of two values for one key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{show(key.value)} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parsed(text: str, name: str) -> dict[Any, Any]:
    try:
        options = yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join((error.problem or error.context or "").split())
        raise InputError(f"{name} is not valid YAML{place}: {problem}") from error
    except yaml.reader.ReaderError as error:
        raise InputError(f"{name} is not a text file: {error.reason}") from error
    # SafeLoader converts dates and numbers that look right and are not, and recurses into lists.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{name} is not valid YAML: {reason}") from error
    if not isinstance(options, dict):
        found = "nothing" if options is None else show(options)
        raise InputError(
            f"{name}: expected a line for each option, such as epochs: 10, got {found}"
        )
    return options
