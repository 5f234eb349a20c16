"""Labelled results and their files: one way to build a Dataset, one to save it, one to load it.

``docs/schema.md`` says which dims, variables and attributes each result has, and what a file looks like.
"""

from fisherlens.results.build import SCHEMA_VERSION, make_dataset
from fisherlens.results.files import load, save
from fisherlens.results.seal import require_writable

__all__ = ["SCHEMA_VERSION", "load", "make_dataset", "require_writable", "save"]
