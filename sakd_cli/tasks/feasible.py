"""Distillations built from words alone, with random weights: whether they can be, and what they would cost"""

import torch

from sakd_cli.config.networks import find_network
from sakd_cli.config.routers import AlwaysConfig, RandomConfig, RandomMatchedConfig
from sakd_cli.config.training import DistillConfig
from sakd_cli.engine.runtime import pick_device
from sakd_cli.errors import UsageError
from sakd_cli.models.cost import cost
from sakd_cli.models.staged import StagedModel
from sakd_cli.models.table import create
from sakd_cli.runs.build import assemble
from sakd_cli.tasks.distill import DistillTask

ENOUGH = 200  # images for a method to draw from


class Workbench:
    """Builds tasks to be thrown away, of networks that are made once and shared."""

    def __init__(self, side: int = 32, classes: int = 100, images: int = ENOUGH) -> None:
        self.side, self.classes, self.images = side, classes, images
        self._networks: dict[tuple[str, str, str], StagedModel] = {}
        self._macs: dict[str, int] = {}

    def refusal(self, config: DistillConfig) -> str | None:
        """Why these words cannot be; None where they can."""
        try:
            self.task(config.model_copy(update={"router": AlwaysConfig(), "device": "cpu"}))
        except UsageError as error:
            return error.message
        return None

    def task(self, config: DistillConfig) -> DistillTask:
        """The task on its device; coins that would match a run's rates are fair ones. UsageError where it cannot be."""
        if isinstance(config.router, RandomMatchedConfig):
            config = config.model_copy(update={"router": RandomConfig()})
        student = self.network("student", config.student, config.device)
        teacher = self.network("teacher", find_network(config.teacher.source).name, config.device)
        labels = torch.arange(self.images) % self.classes
        task = assemble(config, student, teacher.requires_grad_(False).eval(), self.side, labels)
        return task.to(pick_device(config.device)).train()

    def network(self, role: str, name: str, device: str) -> StagedModel:
        """A network with random weights, one for each role."""
        key = role, name, device
        if key not in self._networks:
            self._networks[key] = create(name, self.classes, self.side).to(pick_device(device))
        return self._networks[key]

    def macs(self, name: str) -> int:
        """Multiply-accumulates of a network for one image."""
        if name not in self._macs:
            self._macs[name] = cost(self.network("counted", name, "cpu"), self.side).macs
        return self._macs[name]
