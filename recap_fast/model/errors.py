"""What is raised where a model cannot be used."""

from __future__ import annotations

from recap_fast.types import UserError


class ModelError(UserError):
    """A model that cannot be loaded or trained here."""
