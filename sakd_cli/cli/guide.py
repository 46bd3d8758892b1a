"""`sakd guide`: the handbook, Markdown files inside the package that a web page shows as well."""

import re
from importlib.resources import files
from typing import Annotated

import typer

from sakd_cli.cli.console import out, show
from sakd_cli.errors import UsageError, unknown

GUIDES = files("sakd_cli") / "guides"
COMMENT = re.compile(r"<!--.*?-->\n*", re.DOTALL)  # what tests and generators are told
INDEX = "README.md"  # what a repository's web page shows of the folder; it has one line per guide


def topics() -> dict[str, str]:
    """Name of every guide and one sentence about it, in reading order, from the index."""
    text = (GUIDES / INDEX).read_text(encoding="utf-8")
    return dict(re.findall(r"^- \[([a-z-]+)\]\(\1\.md\): (.+)$", text, re.MULTILINE))


def read(topic: str) -> str:
    """The Markdown text of one guide. Raises UsageError with the nearest topic."""
    if topic not in topics():
        raise UsageError(unknown("guide", topic, topics()), hint="sakd guide lists them all")
    return (GUIDES / f"{topic}.md").read_text(encoding="utf-8")


def for_terminal(text: str) -> str:
    """The text without what only a web page can show: comments, pictures, and links between guides."""
    text = COMMENT.sub("", text)
    text = re.sub(r"!\[([^]]*)\]\([^)]*\)", r"(\1: see the web page)", text)
    text = re.sub(r"\[([^]]+)\]\(([a-z-]+)\.md(#[\w-]+)?\)", _reference, text)
    return re.sub(r"\[([^]]+)\]\(\.\.[^)]*/([\w.-]+)\)", r"\1 (\2)", text)


def _reference(link: re.Match[str]) -> str:
    command = f"`sakd guide {link[2]}`"
    return command if link[1] == link[2] else f"{link[1]} ({command})"


def _complete(incomplete: str) -> list[tuple[str, str]]:
    return [(name, about) for name, about in topics().items() if name.startswith(incomplete)]


def guide(
    topic: Annotated[
        str | None, typer.Argument(help="A guide; without it, the list of all.", autocompletion=_complete)
    ] = None,
) -> None:
    """Read the handbook: one guide, or the list of all guides.

    Examples:

        sakd guide

        sakd guide own-images
    """
    from rich.markdown import Markdown

    if topic is not None:
        text = read(topic)
        plain = COMMENT.sub("", text).rstrip()
        show(Markdown(for_terminal(text), code_theme="ansi_dark") if out().is_terminal else plain)
        return
    width = max(map(len, topics()))
    show("Guides, in reading order; `sakd guide TOPIC` shows one:\n")
    show("\n".join(f"  {name:{width}}  {about}" for name, about in topics().items()))
