"""Pages made from templates: one file each, without scripts or network."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


def template(path: Path, **filters: object) -> Template:
    """A template, with everything escaped and no name left undefined.

    Args:
        path: of the file; it may include those beside it.
        filters: by name.
    """
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(path.name)
