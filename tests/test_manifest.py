"""`--manifest FILE.csv`: pictures by a list instead of by folders."""

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import CliRunner
from test_imagefolder import folder

from sakd_cli.config.datasets import ImageFolderConfig
from sakd_cli.data.files import Files
from sakd_cli.errors import DataError
from sakd_cli.runs.images import Images, load_images

RUN = "--dataset imagefolder --set data.size=16 --set data.workers=0 --batch-size 10 --epochs 1 -q"


def listed(root: Path, columns: str, name: str = "list.csv") -> Path:
    """A list of all pictures below `root`, whose folders are part and class."""
    rows = []
    for path in sorted(root.glob("*/*/*.*")):
        part, label = path.parts[-3:-1]
        rows.append({"path": str(path.relative_to(root)), "label": label, "split": part, "note": "-"})
    with (root / name).open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, columns.split(","), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return root / name


def loaded(manifest: Path, **options: Any) -> Images:
    return load_images(ImageFolderConfig(manifest=manifest, size=16, validation=0.0, workers=0, **options))


def test_a_list_gives_the_same_data_set_as_its_folders(tmp_path: Path) -> None:
    folder(tmp_path, {"train": 4, "val": 2, "test": 3})
    one, other = (
        loaded(listed(tmp_path, "note,path,label,split")),
        load_images(ImageFolderConfig(root=tmp_path, size=16, validation=0.0, workers=0)),
    )
    assert one.dataset.classes == other.dataset.classes == ("ant", "bee", "cat")
    assert [len(part) for part in one.parts.values()] == [12, 6, 9]
    for ours, theirs in zip(one.parts.values(), other.parts.values(), strict=True):
        assert isinstance(ours.images, Files)
        assert isinstance(theirs.images, Files)
        assert (ours.images.paths, ours.images.names) == (theirs.images.paths, theirs.images.names)
        assert ours.labels.tolist() == theirs.labels.tolist()


def test_without_a_third_column_a_share_is_kept_for_testing(tmp_path: Path) -> None:
    folder(tmp_path, {"train": 8, "val": 2})
    images = loaded(listed(tmp_path, "path,label"), split=0.3)
    assert len(images.train) + len(images.dataset.test) == 30
    assert 3 <= len(images.dataset.test) <= 15


def test_the_split_is_the_same_however_the_places_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "here", {"train": 8, "val": 2})
    own = listed(tmp_path / "here", "path,label")
    (tmp_path / "lists").mkdir()
    rows = own.read_text(encoding="utf-8-sig").splitlines()
    for name, start in {"up": "../here/", "full": f"{tmp_path}/here/", "dots": "val/../"}.items():
        text = "\n".join([rows[0], *(start + row for row in rows[1:])])
        (tmp_path / "lists" / f"{name}.csv").write_text(text)
    monkeypatch.chdir(tmp_path / "here")

    def parts(manifest: str, root: str | None = None) -> list[tuple[str, ...]]:
        images = loaded(Path(manifest), root=root)
        return [part.images.names for part in images.parts.values() if isinstance(part.images, Files)]

    plain = parts("list.csv")
    assert len(plain) == 2
    ways = {"../here/list.csv": None, str(own): "../here", "../lists/full.csv": "../here", "../lists/dots.csv": "."}
    assert all(parts(manifest, root) == plain for manifest, root in ways.items())
    # From a list in another folder, names begin with the way there, and move with both.
    up = parts("../lists/up.csv")
    assert all(name.startswith("../here/") for names in up for name in names)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moved").mkdir()
    for name in ("here", "lists"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert parts("moved/lists/up.csv") == up


def test_whole_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    folder(tmp_path, {"train": 2, "val": 1}, tuple(map(str, range(11))))
    assert loaded(listed(tmp_path, "path,label,split")).dataset.classes == tuple(map(str, range(11)))


FAULTS = {
    "no,columns\n": "has no columns path and label",
    "path,label\n": "lists no picture",
    "path,label\nnowhere.png,ant\n": "list.csv:2: lists nowhere.png: no such file",
    "path,label\ntrain/ant/0.png,\n": "list.csv:2: has no label",
    "path,label\ntrain/ant/0.png,a\ntrain/ant/0.png,b\n": "list.csv:3: lists train/ant/0.png again, as line 2 does",
    "path,label,split\ntrain/ant/0.png,a,dev\n": "list.csv:2: is of the part 'dev', not train, val or test",
    "path,label,split\ntrain/ant/0.png,a\n": "list.csv:2: has no split (train, val or test)",
    "path,label\ntrain/ant/0.png,a, small\n": "list.csv:2: has more cells than there are columns ('small')",
    "path,label,split\ntrain/ant/0.png,a,train\n": "its column split has no test and no val",
    "path,label\ntrain/ant/0.png,a\nval/ant/0.png,a\n": "list.csv: has one class only",
    "path,label\n\udce9,a\n": "is no CSV in UTF-8",
}


@pytest.mark.parametrize("text", FAULTS)
def test_what_is_wrong_with_a_list_is_named_by_its_line(text: str, tmp_path: Path) -> None:
    folder(tmp_path, {"train": 2, "val": 1})
    (tmp_path / "list.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=re.escape(FAULTS[text])):
        loaded(tmp_path / "list.csv")


def test_a_list_is_checked_trained_on_and_scored_from_the_command_line(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", {"train": 6, "val": 3})
    listed(photos, "path,label,split").rename(tmp_path / "own.csv")
    cli = CliRunner(tmp_path)
    checked = cli.sakd("data", "check", "own.csv", "--data-root", "photos", "--json", "-q")
    assert (checked.code, [part["images"] for part in checked.document["parts"]]) == (0, [18, 9])
    fields = ["--manifest", "own.csv", "--data-root", "photos", *shlex.split(RUN)]
    result = cli.sakd("pretrain-teacher", "resnet8", *fields, "--run-dir", "run")
    assert result.code == 0, result.err
    own = cli.sakd("eval", "run", "--json", "-q", "--set", "timing_seconds=0").document
    assert own["images"] == 9
    listed(photos, "path,label", "all.csv")
    every = cli.sakd("eval", "run", "--manifest", "photos/all.csv", "--json", "-q", "--set", "timing_seconds=0")
    assert every.code == 0, every.err
    assert json.loads(every.out)["images"] == 27
    cli.assert_rejects(["pretrain-teacher", "resnet8", "--manifest", "own.csv"], 2, "imagefolder")
    # A list that is named counts from its own folder, whatever the run's was, and stands in what is told.
    rows = [f"photos/{row}" for row in (photos / "all.csv").read_text(encoding="utf-8-sig").split() if "ant" in row]
    (tmp_path / "ants.csv").write_text("\n".join(["path,label", *rows]))
    ants = cli.sakd("eval", "run", "--manifest", "ants.csv", "--json", "--set", "timing_seconds=0")
    assert ants.document["images"] == 9
    assert "ants.csv: has no image of bee, cat" in ants.err
    (tmp_path / "ants.csv").write_text("path,label\ngone.png,ant\n")
    cli.assert_rejects(["eval", "run", "--manifest", "ants.csv"], 3, "ants.csv:2: lists gone.png: no such file")
