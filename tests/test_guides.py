"""README and guides: every command and every Python block in them runs, and every option, key and link is there."""

import contextlib
import io
import math
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from conftest import CliRunner, Result
from fork_server import ForkServer
from generated_guides import GENERATED, GUIDES, ROOT, generated
from PIL import Image
from test_sweep import ForkExecutor

from sakd_cli.cli import guide
from sakd_cli.cli.app import app
from sakd_cli.config.base import Config
from sakd_cli.config.datasets import DATASETS
from sakd_cli.config.methods import METHODS
from sakd_cli.config.networks import find_network
from sakd_cli.config.routers import ROUTERS
from sakd_cli.config.training import DistillConfig, PretrainConfig
from sakd_cli.errors import UsageError

PAGES = [ROOT / "README.md", *sorted(GUIDES.glob("*.md"))]
SETUP = """python3 -m venv .venv && .venv/bin/pip install -q . && .venv/bin/sakd distill --preset quickstart
python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/python -m pytest -n auto --dist loadfile
"""
FEW = "--set data.train=40 --set data.test=20 --set data.size=16 --set data.limit=null"
SHORT = "--set train.milestones=null --epochs 1 --batch-size 12 --quiet"
# What makes each command small enough to be run here; what is not named runs as it stands.
SMALLER = {
    "distill": f"{FEW} {SHORT}",
    "pretrain-teacher": f"{FEW} {SHORT}",
    "sweep": f"{FEW} --set data.name=shapes --pairs resnet8:resnet8 --dry-run --measure 0",
    "bench": "--teacher resnet8 --student resnet8 --rounds 1 --batch-size 4",
}
FEWER = {"--seeds": "1", "--pairs": "resnet8:resnet8", "--routers": "always,random"}
NAMED = ("--teacher", "--student", "--student-friendly")  # options that name a network
# Options of other programs that a page mentions.
OTHERS = {
    "python -m pytest": {"--kills", "--dist"},
    "torchrun": {"--nproc-per-node", "--max-restarts"},
    "ruff check": {"--fix"},
    "RepDistiller": {"--distill", "--path_t", "--model_s", "--kd_T", "--hint_layer"},
    "its schedule": {"--learning_rate", "--lr_decay_epochs", "--weight_decay"},
}


class Block(NamedTuple):
    """A fenced block, and what the hidden comment in front of it says about its test.

    `parse, REASON`   its commands are parsed and their settings resolved, but not carried out
    `file NAME`       it is a file of that name, which the commands behind it use
    """

    language: str
    text: str
    note: str

    @property
    def commands(self) -> list[list[str]]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [shlex.split(line, comments=True) for line in lines if line and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"(?:<!-- test: (.*?) -->\n)?```(\w*)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [Block(language, text, note) for note, language, text in found]


def parsed(arguments: list[str]) -> typer.Context:
    """The command's own parser on its own arguments; fails where an option is not there or has another form."""
    group: Any = typer.main.get_command(app)
    context = None
    while hasattr(group, "commands"):
        name, *arguments = arguments
        group, context = group.commands[name], group.make_context(name, [], parent=context, resilient_parsing=True)
    made: typer.Context = group.make_context(group.name, list(arguments), parent=context)
    return made


def settings_of(context: typer.Context) -> list[str]:
    """The part of a training command that is its settings, as `sakd config show` takes it."""
    known = {option.name for option in typer.main.get_command(app).commands["config"].commands["show"].params}
    task = {"distill": "distill", "pretrain-teacher": "pretrain"}[context.command.name or ""]
    tokens = ["--task", task]
    for option in context.command.params:
        given = context.get_parameter_source(option.name)
        if option.name not in known or given is None or given.name != "COMMANDLINE":
            continue
        value = context.params[option.name]
        name = "--model" if option.name == "model" else max(option.opts, key=len)
        for one in value if isinstance(value, list | tuple) else [value]:
            tokens += [name] if one is True else [name, str(getattr(one, "value", one))]
    return tokens


def small(arguments: list[str]) -> list[str]:
    """The same command on networks and images so few that it takes a second."""
    command, *rest = arguments
    if command not in SMALLER or ("--resume" in rest and "auto" not in rest):
        return arguments
    made = [command]
    for before, word in zip([command, *rest], rest, strict=False):
        if before in FEWER:
            word = FEWER[before]
        elif before in (*NAMED, "pretrain-teacher"):
            with contextlib.suppress(UsageError):  # a run directory stays as it is
                find_network(word)
                word = word if ":" in word or "/" in word else "resnet8"
        made.append(word)
    if command == "distill":
        made += [] if "--teacher" in made else ["--teacher", "resnet8"]
        made += [] if "--student" in made else ["--student", "resnet8"]
    if command in ("distill", "pretrain-teacher") and "imagefolder" not in made:
        made += ["--dataset", "shapes"]
    added = shlex.split(SMALLER[command])
    if "--residual-students" in made:
        added += ["--set", "residual.max_cost=9"]
    if command == "sweep" and "--methods" not in made:
        added += ["--methods", "fitnet"]
    if "imagefolder" in made:
        added = [*added[4:]]
    return made + added


def photos(folder: Path) -> None:
    """Own images, as the guide has them; no two are the same."""
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for k in range(24):
                colour = 10 * k, 100 * number, 100 * (split == "val")
                Image.new("RGB", (40, 40), colour).save(folder / split / name / f"{k}.png")
    rows = [f"{path.relative_to(folder.parent)},{path.parts[-2]}" for path in sorted(folder.glob("*/*/*.png"))]
    for name in ("photos.csv", "other.csv"):
        (folder.parent / name).write_text("\n".join(["path,label", *rows]))


@pytest.fixture(scope="module")
def prepared(cli: CliRunner, distilled: dict[str, Any]) -> Path:
    """A folder with a trained teacher, the runs A and B, and a folder of pictures."""
    for name in ("A", "B"):
        shutil.copytree(cli.path / distilled["run"], cli.path / "runs" / name)
    photos(cli.path / "photos")
    return cli.path


def expanded(tokens: list[str], folder: Path) -> list[str]:
    """As a shell does with `*`."""
    found = [sorted(str(p.relative_to(folder)) for p in folder.glob(w)) if "*" in w else [w] for w in tokens]
    return [word for several in found for word in several]


def carried_out(cli: CliRunner, block: Block) -> None:
    for tokens in block.commands:
        settings = dict(word.split("=", 1) for word in tokens if re.match(r"[A-Z_]+=", word))
        program, *arguments = tokens[len(settings) :]
        if program == "python" or program == "pip" or program.endswith("pip"):
            check_other_program([program, *arguments])
            continue
        if program == "torchrun":
            arguments = arguments[arguments.index("sakd_cli") + 1 :]
        else:
            assert program == "sakd", f"what runs `{' '.join(tokens)}`?"
        context = parsed(arguments)
        if context.command.name in ("distill", "pretrain-teacher") and "--resume" not in arguments:
            result = cli.sakd("config", "show", *settings_of(context), **settings)
            assert result.code == 0, f"{' '.join(tokens)}: {result.err}"
        if not block.note.startswith("parse, "):
            result = cli.sakd(*expanded(small(arguments), cli.path), **settings)
            assert result.code == 0, f"{' '.join(tokens)}: {result.err}"


def check_other_program(tokens: list[str]) -> None:
    """`python FILE` or `-m pytest FILE`, and `pip install 'sakd[EXTRA]'`: the file and the extra are there."""
    if tokens[0] == "python":
        assert all((ROOT / word).is_file() for word in tokens if word.endswith(".py"))
        return
    assert tokens[:2] == ["pip", "install"], tokens


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(
    prepared: Path, fork_server: ForkServer, tmp_path: Path, page: Path, monkeypatch: Any
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(prepared, folder)
    forks = ForkExecutor(fork_server.at(folder))
    monkeypatch.setattr("sakd_cli.sweep.carry_out.executor_of", lambda *given: forks)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("sakd_cli.evaluation.speed.SETTLED", math.inf)  # the first times will do
    runner, names, out = CliRunner(folder), {}, io.StringIO()
    for block in blocks(page):
        if block.text == SETUP:
            continue  # .ci/run carries it out, word for word
        assert block.note.split(",")[0].split(" ")[0] in ("", "parse", "file"), block.note
        if block.note.startswith("file "):
            (folder / block.note.removeprefix("file ")).write_text(block.text, encoding="utf-8")
        elif block.language == "bash":
            carried_out(runner, block)
        elif block.language == "python" and page.stem != "extending":  # those: test_additions.py
            with contextlib.redirect_stdout(out):
                exec(re.sub(r'("data.(?:train|test)": )\d+', r"\g<1>40", block.text), names)
    if page.stem == "python":
        first, calibration, spots = out.getvalue().splitlines()[:3]
        assert first.startswith(str(names["run"].path))
        assert 0 <= float(calibration) <= 100
        assert [name for name, _ in eval(spots)] == ["stage2", "logits"]


def test_what_is_not_carried_out_says_why_and_is_little() -> None:
    notes = [block.note for page in PAGES for block in blocks(page) if block.note.startswith("parse")]
    assert all(len(note) > len("parse, since") for note in notes)
    commands = [
        tokens for page in PAGES for block in blocks(page) if block.language == "bash" for tokens in block.commands
    ]
    parsed_only = [b for page in PAGES for b in blocks(page) if b.note.startswith("parse") for _ in b.commands]
    assert len(commands) > 60
    assert len(parsed_only) <= 12


def options_of(group: Any) -> Iterator[str]:
    for command in getattr(group, "commands", {}).values():
        yield from options_of(command)
    for parameter in group.params:
        yield from (*parameter.opts, *parameter.secondary_opts)


def keys_of(kind: type[Config], prefix: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield prefix + name
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, Config):
                yield from keys_of(part, f"{prefix}{name}.")
    for name, table in (("method", METHODS), ("router", ROUTERS), ("data", DATASETS)):
        if not prefix and name in kind.model_fields:
            yield from (key for one in table.values() for key in keys_of(one, f"{name}."))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_option_setting_and_file_of_the_text_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = "\n".join(re.findall(r"`[^`\n]+`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))
    known = {"--help", *options_of(typer.main.get_command(app))}.union(*OTHERS.values())
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose)) - known
    keys = {*keys_of(DistillConfig), *keys_of(PretrainConfig)}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    used = {key for key in re.findall(r"`([a-z_]+\.[a-z_]+)[`=]", prose) if key.partition(".")[0] in sections}
    assert not used - keys
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert not set(re.findall(r"sakd\[(\w+)\]", text)) - set(extras)
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (page.parent / link).exists(), link
    for file in re.findall(r"`((?:tests|sakd_cli|presets)/[\w./-]+)`", text):
        assert (ROOT / file).exists() or page.stem == "extending", file
    assert not set(re.findall(r"`sakd guide ([a-z-]+)`", text)) - set(guide.topics())


def test_the_readme_is_short_and_begins_with_the_two_lines_that_set_all_up() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"# sakd\n\n```bash\n{SETUP}```\n")
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 10_000


@pytest.mark.parametrize("topic", GENERATED)
def test_what_is_generated_is_up_to_date(topic: str) -> None:
    page = GUIDES / f"{topic}.md"
    assert page.read_text(encoding="utf-8") == generated(topic), f"run: python tests/generated_guides.py {topic}"


def test_the_index_lists_every_guide_in_one_line(cli: CliRunner) -> None:
    assert {f"{topic}.md" for topic in guide.topics()} == {page.name for page in GUIDES.glob("*.md")} - {guide.INDEX}
    listed = cli.sakd("guide")
    assert (listed.code, listed.err) == (0, "")
    assert all(f"  {topic} " in listed.out for topic in guide.topics())
    assert max(map(len, listed.out.splitlines())) <= 80


@pytest.mark.parametrize("topic", guide.topics())
def test_a_guide_fits_a_terminal_of_80_columns(cli: CliRunner, topic: str) -> None:
    shown: Result = cli.sakd("guide", topic, COLUMNS="80", FORCE_COLOR="1")
    assert (shown.code, shown.err) == (0, "")
    piped, text = cli.sakd("guide", topic).out, (GUIDES / f"{topic}.md").read_text(encoding="utf-8")
    assert piped.split() == re.sub("<!--.*?-->", "", text, flags=re.DOTALL).split()
    assert "<!--" not in shown.out + piped
    assert ".md" not in shown.out.replace("README.md", "").replace("CHANGELOG.md", "").replace("table.md", "")
    for block in blocks(GUIDES / f"{topic}.md"):
        if block.language in ("bash", "yaml"):
            assert max(map(len, block.text.splitlines())) <= 78, "a command is to be copied in one piece"


def test_an_unknown_topic_is_one_line_with_the_nearest_name(cli: CliRunner) -> None:
    result = cli.assert_rejects(["guide", "netwroks"], 2, "unknown guide 'netwroks'; did you mean 'networks'?")
    assert "sakd guide" in result.err
    assert [name for name, _ in guide._complete("spe")] == ["speed"]


def test_a_guide_needs_no_torch() -> None:
    program = "import sys; from sakd_cli.cli.app import run; run(['guide', 'speed']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT).returncode == 0
