"""`dfa.json` of a run: how the method DFA mixes the blocks of the teacher's stages"""

from typing import Any, ClassVar, Literal

from sakd_cli.documents.base import Document, Part


class MixtureGroup(Part):
    """One stage of the teacher. alpha: the weight of each of its blocks, in order; positions: which blocks, from 1.

    largest: position of the block with the largest weight; entropy: of the weights, in nats.
    """

    exact: ClassVar[frozenset[str]] = frozenset({"alpha", "beta"})  # a run can begin with them
    index: int
    name: str
    blocks: int
    positions: list[int]
    beta: list[float] | None
    alpha: list[float]
    largest: int
    entropy: float


class Mixtures(Document):
    """The mixtures and where they come from. search: the settings of the search, null where there was none."""

    exact: ClassVar[frozenset[str]] = frozenset({"search"})
    schema_: Literal["sakd.dfa/1"] = "sakd.dfa/1"
    sakd: str
    weights: str
    teacher: str
    dataset: str
    norm: str
    distance: str
    seed: int
    search: dict[str, Any] | None
    groups: list[MixtureGroup]
