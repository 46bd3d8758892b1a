"""Whether a method can be used for a pair of networks, found out by building it, before anything is trained"""

import torch

from sakd_cli.config.routers import AlwaysConfig
from sakd_cli.config.run import DistillConfig
from sakd_cli.errors import UsageError
from sakd_cli.models.staged import StagedModel
from sakd_cli.models.table import create
from sakd_cli.tasks.build import assemble

SIDE, CLASSES, IMAGES = 32, 100, 200  # of every data set; of a network that is thrown away; enough to draw from


class Workbench:
    """Builds pairs of networks, each network once."""

    def __init__(self) -> None:
        self._networks: dict[tuple[str, str], StagedModel] = {}

    def refusal(self, config: DistillConfig) -> str | None:
        """Why these words cannot be; None where they can."""
        words = config.model_copy(update={"router": AlwaysConfig()})
        student, teacher = self._network("student", config.student), self._network("teacher", config.teacher.source)
        try:
            assemble(words, student, teacher.requires_grad_(False).eval(), SIDE, torch.arange(IMAGES) % CLASSES)
        except UsageError as error:
            return error.message
        return None

    def _network(self, role: str, name: str) -> StagedModel:
        if (role, name) not in self._networks:
            self._networks[role, name] = create(name, CLASSES)
        return self._networks[role, name]
