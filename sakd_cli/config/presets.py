"""Presets: whole runs as YAML files beside the package, shipped inside the wheel too."""

from pathlib import Path

from sakd_cli.config.resolve import ConfigSource, file_layer
from sakd_cli.errors import UsageError, unknown


def folder() -> Path:
    """`sakd_cli/presets` in an installed wheel, `presets` at the top of a checkout."""
    package = Path(__file__).parents[1]
    shipped = package / "presets"
    return shipped if shipped.is_dir() else package.parent / "presets"


def presets() -> dict[str, Path]:
    """Name -> file of every preset."""
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def preset_layer(name: str) -> ConfigSource:
    """The preset of that name as a layer."""
    known = presets()
    if name not in known:
        raise UsageError(unknown("preset", name, known), hint="a file of your own: --config FILE")
    return file_layer(known[name], f"preset {name}")


def about(path: Path) -> str:
    """The first comment line of a preset: what it is for."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()
