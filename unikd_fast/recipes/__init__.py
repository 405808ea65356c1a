"""The experiments of the papers by name, and the tables that are made of them.

`recipe` is the configuration of one experiment; `unikd reproduce` runs the cells of a table and keeps the ledger.
"""

from unikd_fast.recipes.experiments import recipe, recipe_names

__all__ = ["recipe", "recipe_names"]
