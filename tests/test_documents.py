"""Documents: closed, without float noise, and read back as what they are or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SCHEMAS
from pydantic import ValidationError

from sakd_cli.documents.base import Part, rounded
from sakd_cli.documents.table import DOCUMENTS
from sakd_cli.documents.training import Summary
from sakd_cli.errors import UsageError
from sakd_cli.files import read_document


class Sample(Part):
    """Anything."""

    class_: str
    seed: int
    values: list[float | None]


def test_a_number_has_no_noise_and_a_count_is_exact() -> None:
    found = Sample(class_="cat", seed=2**63 - 1, values=[45.800000000000004, 1 / 3, 1.23456789012e-17, None])
    expected = {"class": "cat", "seed": 2**63 - 1, "values": [45.8, 0.333333333, 1.23456789e-17, None]}
    assert found.plain() == expected
    assert rounded({"a": (0.1 + 0.2, True, "0.30000000000000004")}) == {"a": (0.3, True, "0.30000000000000004")}


@pytest.mark.parametrize("change", [{"more": 1}, {"seed": None}, {"values": [float("nan")]}, {"class": 3}])
def test_another_shape_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Sample.model_validate({"class": "cat", "seed": 1, "values": []} | change)


def test_every_document_has_a_schema_of_its_own_and_is_closed() -> None:
    assert len(SCHEMAS) == len(DOCUMENTS)
    for kind in DOCUMENTS.values():
        assert kind.model_config["extra"] == "forbid"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "sakd.summary/1"}', "[" * 100_000, "\xff"])
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=r"summary\.json: missing or damaged"):
        read_document(path, Summary)


def test_a_key_of_another_kind_is_not_read(tmp_path: Path, distilled: dict[str, Any]) -> None:
    path = tmp_path / "summary.json"
    good = distilled
    path.write_text(json.dumps(good))
    assert read_document(path, Summary).plain() == good
    for key, value in {"epochs": "1", "seconds": True, "last": {}, "device": 1}.items():
        path.write_text(json.dumps(good | {key: value}))
        with pytest.raises(UsageError, match="missing or damaged"):
            read_document(path, Summary)
