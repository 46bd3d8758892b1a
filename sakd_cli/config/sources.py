"""Which layers the options of a command make, or the keywords of a call: the same words mean the same run."""

from collections.abc import Mapping
from typing import Any

from sakd_cli.config.presets import preset_layer
from sakd_cli.config.resolve import (
    OPTIONS,
    ConfigSource,
    environment_layers,
    file_layer,
    nested,
    option_layers,
    set_layers,
)


def layers(params: Mapping[str, Any]) -> list[ConfigSource]:
    """From the weakest to the strongest: preset, file, environment, options, --set; of a program its `settings`."""
    # An option that may be given several times and was not is empty.
    given = {name: None if params[name] in ([], ()) else params[name] for name in OPTIONS if name in params}
    stack = [preset_layer(params["preset"])] if params.get("preset") else []
    stack += [file_layer(params["config"], f"file {params['config']}")] if params.get("config") else []
    stack += [*environment_layers(given), *option_layers(given), *set_layers(params.get("set_") or [])]
    return stack + [
        ConfigSource(f"settings {key}", nested({key: word})) for key, word in (params.get("settings") or {}).items()
    ]
