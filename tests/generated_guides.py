"""The generated parts of the guides, from docstrings and settings: `python tests/generated_guides.py` writes them."""

import ast
import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sakd_cli"
GUIDES = PACKAGE / "guides"
BLOCK = "<!-- generated: {} -->\n"
END = "<!-- end -->"
# What each floor is for, from low to high: a floor imports from those above it in this list only.
FLOORS = {
    "": "The bottom: no torch.",
    "documents": "The `--json` document of every command, as closed classes.",
    "config": "Every setting, as small classes without torch.",
    "data": "Images on the device, batched augmentation.",
    "engine": "The one training loop. It knows no network, no loss and no router.",
    "models": "Networks as lists of stages.",
    "report": "Tables, plots and pages from what a run has written. No torch.",
    "routing": "WHERE to distil.",
    "distillers": "WHAT to distil.",
    "evaluation": "How good and how fast a network is.",
    "tasks": "The training procedures.",
    "runs": "From settings to a finished run directory.",
    "bench": "What a step costs.",
    "export": "Networks for and from other programs.",
    "sweep": "Many runs, one scheduler.",
    "calls": "What `sakd_cli.api` offers beside trainings, and the options of all its calls.",
    "cli": "The commands, one file each.",
}


def first_sentence(path: Path) -> str:
    """The first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def code() -> str:
    """Every module in one line, grouped by floor."""
    found = sorted(path for path in PACKAGE.rglob("*.py") if not path.name.startswith("__"))
    parts = []
    for floor, about in FLOORS.items():
        of_floor = [path for path in found if path.parent.relative_to(PACKAGE).parts[:1] == ((floor,) if floor else ())]
        lines = [f"- `{path.relative_to(PACKAGE).as_posix()}`: {first_sentence(path)}" for path in of_floor]
        parts.append(f"## {floor or 'sakd_cli'}\n\n{about}\n\n" + "\n".join(lines))
    listed = {path for floor in FLOORS for path in PACKAGE.glob(f"{floor}/**/*.py" if floor else "*.py")}
    assert set(found) <= listed, "a floor has no line in FLOORS"
    return "\n\n".join(parts)


def methods() -> str:
    """Every loss: what `sakd show method` says of it."""
    from sakd_cli.config.base import summary
    from sakd_cli.config.methods import METHODS
    from sakd_cli.distillers.table import DISTILLERS

    parts = []
    for name, config in METHODS.own.items():
        row = DISTILLERS.row(name)
        kinds = [row.warmup[0]] if row.warmup else [row.features or row.logits]
        text = "\n\n".join(_formatted(inspect.getdoc(kind) or "") for kind in kinds)
        parts.append(f"### {name}\n\n{summary(config)}.\n\n{text}")
    return "\n\n".join(parts)


def _formatted(text: str) -> str:
    """A docstring as Markdown: its formulas, paragraphs that begin with `loss =` or the like, stand in code blocks."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        formula = re.match(r"\S+ =|\S+\(.*\) =", paragraph)
        paragraphs.append(f"```\n{paragraph}\n```" if formula else paragraph)
    return "\n\n".join(paragraphs)


def settings() -> str:
    """Every setting with its default and what it means, by section."""
    from sakd_cli.config.base import summary
    from sakd_cli.config.datasets import DATASETS
    from sakd_cli.config.method import MethodConfig
    from sakd_cli.config.methods import METHODS
    from sakd_cli.config.routers import ROUTERS
    from sakd_cli.config.training import DistillConfig, PretrainConfig

    parts = [_keys("Of every run", DistillConfig, ""), _keys("Of `pretrain-teacher`", PretrainConfig, "")]
    for key, field in [*DistillConfig.model_fields.items(), *PretrainConfig.model_fields.items()]:
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if hasattr(kind, "model_fields") and key not in ("method", "router", "data"):
                parts.append(_keys(f"`{key}`", kind, f"{key}."))
    parts.append(_keys("`method`, of every loss", MethodConfig, "method."))
    for key, table in (("method", METHODS.own), ("router", ROUTERS), ("data", DATASETS)):
        parts += [_keys(f"`{key}={name}`: {summary(kind)}", kind, f"{key}.", key) for name, kind in table.items()]
    return "\n\n".join(dict.fromkeys(part for part in parts if part))


def _keys(title: str, kind: type[Any], prefix: str, table: str = "") -> str:
    """One table; of the losses' classes only the keys that are their own or have another default."""
    from sakd_cli.config.base import Config, description, written

    rows = []
    for key, field in kind.model_fields.items():
        above = kind.__mro__[1].model_fields.get(key) if table == "method" else None
        if key in ("name", "task") or (above is not None and above.default == field.default):
            continue
        if field.is_required() or isinstance(field.default, Config):
            default = "required" if field.is_required() else ""
        else:
            default = f"`{written(field.default)}`"
        rows.append(f"| `{prefix}{key}` | {default} | {description(kind, key)} |")
    return "" if not rows else f"## {title}\n\n| Key | Default | |\n|---|---|---|\n" + "\n".join(rows)


GENERATED = {"code": code, "methods": methods, "settings": settings}


def generated(topic: str) -> str:
    """The guide as it should be: its text as it stands, and what is between the two marks anew."""
    text = (GUIDES / f"{topic}.md").read_text(encoding="utf-8")
    before, mark, rest = text.partition(BLOCK.format(topic))
    assert mark, f"{topic}.md has no generated part"
    return f"{before}{mark}\n{GENERATED[topic]()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    for topic in sys.argv[1:] or GENERATED:
        (GUIDES / f"{topic}.md").write_text(generated(topic), encoding="utf-8")
