"""Shared set-up: shapes and types are checked at run time in every test."""

from jaxtyping import install_import_hook

install_import_hook("centralflow", "beartype.beartype").__enter__()
