"""Recipes: typed settings of one training run, read from YAML and the command line.

Invariant: whatever is wrong with a recipe is an `InputError` of one line that names the key or value and the remedy,
and what `load` returns are plain dataclasses.
"""

from mmspec.recipe.checks import check
from mmspec.recipe.nodes import (
    DROP_RULES,
    FORMATS,
    Data,
    DeepSpeedNode,
    HeadNode,
    Instruction,
    Lora,
    Optim,
    PolicyNode,
    Recipe,
    Run,
    Source,
    TargetNode,
)
from mmspec.recipe.reading import head_kinds, import_head, load, read_yaml
from mmspec.recipe.settings import build_config, typed_config

__all__ = [
    "DROP_RULES",
    "FORMATS",
    "Data",
    "DeepSpeedNode",
    "HeadNode",
    "Instruction",
    "Lora",
    "Optim",
    "PolicyNode",
    "Recipe",
    "Run",
    "Source",
    "TargetNode",
    "build_config",
    "check",
    "head_kinds",
    "import_head",
    "load",
    "read_yaml",
    "typed_config",
]
