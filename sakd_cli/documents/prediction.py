"""What `sakd predict --json` prints."""

from typing import Literal

from sakd_cli.documents.base import Document, Number, Part


class ClassProbability(Part):
    """A class and its softmax probability, 0 to 1."""

    class_: str
    probability: float


class Prediction(Part):
    """One picture: its classes, the likeliest first; none, and the reason, where it could not be read.

    exit: of residual students the stage, from 0, after which the image left; null without such students.
    """

    file: str
    classes: list[ClassProbability]
    exit: int | None = None
    error: str | None = None


class Predictions(Document):
    """`sakd predict NETWORK PATH... --json`; failed: pictures that could not be read; seconds: with reading them."""

    schema_: Literal["sakd.predict/1"] = "sakd.predict/1"
    weights: str
    sha256: str
    network: str
    dataset: str
    device: str
    images: int
    failed: int
    seconds: float
    images_per_second: Number
    predictions: list[Prediction]
