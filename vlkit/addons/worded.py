"""Edits of the text tower that hold for one template only: they bring it along."""

from abc import abstractmethod
from dataclasses import dataclass

from vlkit.addons.base import TowerEdit


@dataclass(frozen=True)
class WordedEdit(TowerEdit):
    """An edit learned with one template: zero-shot weights under it are made with that one."""

    @property
    @abstractmethod
    def template(self) -> str:
        """With one `{}`."""
