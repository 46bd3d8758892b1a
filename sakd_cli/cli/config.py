"""`sakd config show`: the configuration that options make, and where each setting comes from."""

import yaml

from sakd_cli.cli.console import emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.config.base import EFFECTIVE, written
from sakd_cli.config.effective import effective
from sakd_cli.config.keys import description_of
from sakd_cli.config.options import OPTIONS, options_of
from sakd_cli.config.resolve import config_sources, flat, resolve
from sakd_cli.documents.listing import ShownConfig, ShownKey
from sakd_cli.errors import UsageError
from sakd_cli.report.render.sheet import listing_table


@with_options("config-show")
def show_config(options: Values, json: bool, task: str, origin: bool, describe: bool) -> None:
    """Print the complete configuration that these options make, and with --origin who set each key.

    Precedence: option, then environment (SAKD_*), then --config file, then --preset, then default.

    Examples:

        sakd config show --preset quickstart

        SAKD_SEED=3 sakd config show --preset quickstart --epochs 2 --origin
    """
    command = "distill" if task == "distill" else "pretrain-teacher"
    has = {*options_of(command)}
    for name in OPTIONS.keys() & options.keys() - has:
        if OPTIONS[name].key and options[name]:
            raise UsageError(f"{OPTIONS[name].flag}: is no option of sakd {command}")
    resolved = resolve(task, config_sources({name: value for name, value in options.items() if name in has}))
    settings, values = resolved.config.model_dump(mode="json"), effective(resolved.config)
    keys = [
        ShownKey(
            key=key,
            value=value,
            origin=resolved.origins.get(key, "default"),
            description=description_of(resolved.config, key) if describe else None,
        )
        for key, value in flat(settings).items()
    ]
    listed = origin or describe
    if json:
        emit(ShownConfig(task=task, config=settings, effective=values, keys=keys if listed else None))
    elif not listed:
        show(yaml.safe_dump(settings | {EFFECTIVE: values}, sort_keys=False).rstrip())
    else:
        rows = [key.model_dump(exclude_none=True) | {"value": written(key.value)} for key in keys]
        show(listing_table(f"config of {task}", rows))
