"""How a config is made of its sources: option > environment (SAKD_*) > file > preset > default.

A source is a nested dict with the name of its origin. Sources are merged from the weakest to the strongest; every
key remembers who set it, so that an error and `sakd config show --origin` can name the origin.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from sakd_cli.config import code, datasets, routers
from sakd_cli.config.base import EFFECTIVE, choose, of_file, own_name
from sakd_cli.config.effective import automatic_precision
from sakd_cli.config.keys import TABLES, keys_of, usage_error
from sakd_cli.config.options import OPTIONS, PROTOCOLS
from sakd_cli.config.preprocessing import SOURCE as PREPROCESSING
from sakd_cli.config.preprocessing import Preprocessing, library_preprocessing
from sakd_cli.config.train import BELONGS
from sakd_cli.config.training import STUDENT_KEYS, TASKS, FriendlyConfig, RunConfig
from sakd_cli.errors import UsageError, unreadable
from sakd_cli.files import MOST_YAML, parse_yaml, read_bytes

# Sections that may be written as one value, the key which that value stands for, and the keys that survive a change of
# it (as far as the new choice has them).
_PRIMARY_KEYS = {
    "method": ("name", set[str]()),
    "router": ("name", set(routers.LearnedConfig.model_fields)),
    "data": ("name", set(datasets.DataConfig.model_fields)),
    "teacher": ("source", {"pretrain", "epochs", "cache", "allow_mismatch"}),
    "friendly": ("students", set(FriendlyConfig.model_fields)),
}

# Keys that hold paths, and the words that may stand there instead.
PATHS = {"teacher.weights", "teacher.other_weights", "teacher.logits", "router.run", "method.weights"}
PATHS |= {"data.root", "data.unlabeled", "data.manifest"}
NO_PATHS = ("library", "search", "uniform", "last", "random")
BENCHED = {"teacher.source": "resnet56", "student": "resnet20"}  # what `sakd bench` times unless more is said


class ConfigSource(NamedTuple):
    """Config of one origin, nested as in a config file."""

    origin: str
    values: dict[str, Any]


class Resolved(NamedTuple):
    """The config (of the class that `TASKS` names), and the origin of each dotted key that some source set."""

    config: Any
    origins: dict[str, str]


def nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    tree: dict[str, Any] = {}
    for key, value in dotted.items():
        *parents, leaf = key.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def config_sources(params: Mapping[str, Any]) -> list[ConfigSource]:
    """The sources that a command's options name, from the weakest to the strongest; a program's `settings` are last."""
    # An option that may be repeated and was not given is empty.
    named = {name: params[name] for name, row in OPTIONS.items() if row.key and name in params}
    given = {name: None if value in ([], ()) else value for name, value in named.items()}
    if isinstance(teachers := given.get("teacher"), list | tuple) and len(teachers) == 1:
        given["teacher"] = teachers[0]
    found = [preset_source(params["preset"])] if params.get("preset") else []
    found += [file_source(params["config"], f"file {params['config']}")] if params.get("config") else []
    found += environment_sources(given)
    above = [*option_sources(given), *set_sources(params.get("set_") or [])]
    settings = params.get("settings") or {}
    last = [ConfigSource(f"settings {key}", nested({key: value})) for key, value in settings.items()]
    code.trust(*code.own_names(value for one in (*found, *above, *last) for value in flat(one.values).values()))
    return [*found, *protocol_sources(params.get("protocol"), [*found, *above]), *above, *last]


def protocol_sources(name: str | None, others: Iterable[ConfigSource]) -> Iterator[ConfigSource]:
    """What `--protocol` sets; the recipe of the router only where the other sources say one that has it."""
    routed = [value for source in others if (value := source.values.get("router"))]
    names = [value.get("name") if isinstance(value, dict) else value for value in routed]
    named = next((str(name) for name in reversed(names) if name), "adaptive")
    for key, value in PROTOCOLS.get(name or "", {}).items():
        router = routers.ROUTERS.get(own_name(named, routers.ROUTERS) or named)
        section, _, leaf = key.partition(".")
        if section != "router" or (router is not None and leaf in router.model_fields):
            yield ConfigSource(f"--protocol {name}", {"task": "distill"} | nested({key: value}))


def preset_folder() -> Path:
    """`sakd_cli/presets` in an installed wheel, `presets` at the top of a checkout."""
    package = Path(__file__).parents[1]
    shipped = package / "presets"
    return shipped if shipped.is_dir() else package.parent / "presets"


def presets() -> dict[str, Path]:
    return {path.stem: path for path in sorted(preset_folder().glob("*.yaml"))}


def preset_source(name: str) -> ConfigSource:
    """The preset of that name. Raises UsageError with the nearest name."""
    own = choose("preset", name, known := presets(), "a file of your own: --config FILE")
    return file_source(known[own], f"preset {own}")


def preset_summary(path: Path) -> str:
    """The first comment line of a preset: what it is for."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def option_sources(options: Mapping[str, Any]) -> list[ConfigSource]:
    return [
        ConfigSource(OPTIONS[name].flag, nested({_key_of(name, value): value}))
        for name, value in options.items()
        if value is not None
    ]


def _key_of(option: str, value: Any) -> str:
    """The key that an option sets; of a mapping with a name, which a program may give, the section."""
    key = OPTIONS[option].key
    return key.removesuffix(".name") if isinstance(value, Mapping) else key


def environment_sources(known: Iterable[str]) -> list[ConfigSource]:
    """One source per `SAKD_<OPTION>` that is set and not empty, for the options a command has.

    UsageError for a variable that one could take for such a one: nearly the same name, a key's, an argument's alone.
    """
    read = {row.key: row.variable for row in OPTIONS.values() if row.key}
    names = {code.TRUST, *read.values()}
    for name in sorted(os.environ.keys() - names):  # who has others of that beginning may have them
        if name.startswith("SAKD_") and (near := get_close_matches(name, names, n=1, cutoff=0.9)):
            raise UsageError(f"{name}: no variable of sakd; did you mean {near[0]}?", f"unset {name}")
        if name.startswith("SAKD_") and (instead := _meant(name, read)):
            raise UsageError(f"{name}: no variable of sakd", f"{instead}; unset {name}")
    rows = [(OPTIONS[name], os.environ.get(OPTIONS[name].variable)) for name in known]
    return [ConfigSource(row.variable, nested({row.key: value})) for row, value in rows if value]


def _meant(variable: str, read: Mapping[str, str]) -> str | None:
    """What to write instead of a variable with the name of an argument or a key; `read`: variables by their keys."""
    arguments = {row.variable.rstrip("_"): row.flag for row in OPTIONS.values() if not row.key}
    keys = (key for task in TASKS for key in keys_of(task) if f"SAKD_{key}".upper().replace(".", "_") == variable)
    return next((read.get(key, f"--set {key}=...") for key in keys), arguments.get(variable))


def set_sources(assignments: Iterable[str]) -> list[ConfigSource]:
    """One source per `--set a.b=c`; the value is read as YAML."""
    pairs = [parse_assignment("--set", text, "data.limit=1000") for text in assignments]
    found = [ConfigSource(f"--set {key}", nested({key: value})) for key, value in pairs]
    return sorted(found, key=lambda source: source.origin != f"--set {PREPROCESSING}")  # what is said beside it wins


def parse_assignment(option: str, assignment: str, example: str) -> tuple[str, Any]:
    """Key and value of `key=value`, the value read as YAML. Raises UsageError, naming the option and an example."""
    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")) or text.startswith("="):
        raise UsageError(f"{option} {assignment!r} is not of the form key=value", f"for example {option} {example}")
    for value in (text, _patterns_quoted(text)):
        with suppress(yaml.YAMLError, ValueError):  # ValueError: YAML reads 2020-13-45 as a date
            return key, parse_yaml(value)
    raise UsageError(f"{option} {key}: {text[:40]!r} is no YAML value")


def _patterns_quoted(text: str) -> str:
    """`*.bias` and `[*.bias, stem]`, which YAML would take for aliases, with the patterns in quotes."""
    if text.startswith("*"):
        return f"'{text}'"
    return re.sub(r"([\[,]\s*)(\*[^\],]*)", r"\1'\2'", text)


def file_source(path: Path, origin: str) -> ConfigSource:
    """A YAML file as a source. Raises UsageError naming the file and, where YAML says so, the line."""
    try:
        values = parse_yaml(read_bytes(path, MOST_YAML).decode())
    except OSError as error:
        raise UsageError(
            f"{path}: {unreadable(error)}", f"--preset {path}" if str(path) in presets() else None
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text file") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "cannot be read"
        raise UsageError(f"{path}{f', line {mark.line + 1}' if mark else ''}: not valid YAML: {problem}") from None
    except ValueError as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{path}: a config is a mapping of keys to values")
    return ConfigSource(origin, found_again(values, path.parent))


def relative(settings: dict[str, Any], run: Path) -> dict[str, Any]:
    """The settings as a run writes them: paths from the working folder, where that and the run lie above them."""
    here = Path.cwd()
    if not run.resolve().is_relative_to(here):
        return settings
    return _with_paths(settings, lambda path: os.path.relpath(path, here) if Path(path).is_relative_to(here) else path)


def found_again(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of a file in this folder; what is not below the working folder is looked for above the file."""

    def found(path: str) -> str:
        if not path or path in NO_PATHS or "\0" in path or os.path.exists(path):
            return path
        return str(next((above / path for above in folder.resolve().parents if os.path.exists(above / path)), path))

    return _with_paths(settings, found)


def _with_paths(settings: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The settings with another text for each of `PATHS`."""
    for section, _, key in (path.partition(".") for path in PATHS):
        part = settings.get(section)
        value = part.get(key) if isinstance(part, dict) else None
        if isinstance(part, dict) and isinstance(value, str | list):
            several = [value] if isinstance(value, str) else value
            changed = [change(one) if isinstance(one, str) else one for one in several]
            settings = settings | {section: part | {key: changed[0] if isinstance(value, str) else changed}}
    return settings


def _merge(below: dict[str, Any], source: ConfigSource, origins: dict[str, str]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in source.values.items():
        primary, surviving = _PRIMARY_KEYS.get(key, ("", set[str]()))
        if primary and isinstance(value, str):
            value = {primary: value}
        if not isinstance(value, dict):
            merged[key] = value
            origins[key] = source.origin
            continue
        origins.pop(key, None)
        section = dict(merged[key]) if isinstance(merged.get(key), dict) else {}
        if key in TABLES and isinstance(value.get(primary), str):
            value = value | {primary: own_name(value[primary], TABLES[key]) or value[primary]}
        if primary in value and primary in section and value[primary] != section[primary]:
            kind = TABLES.get(key, {}).get(str(value[primary]))
            dropped = section.keys() - (surviving & kind.model_fields.keys() if kind else surviving)
            # Keys of own code may mean another thing.
            if kind and (of_file(value[primary]) or of_file(str(section[primary]))):
                old = TABLES[key].get(str(section[primary]), kind)
                shared: Any = next(base for base in kind.__mro__ if issubclass(old, base))
                dropped |= section.keys() - shared.model_fields.keys()
            section = {name: old for name, old in section.items() if name not in dropped}
            for name in dropped:
                origins.pop(f"{key}.{name}", None)
        both = [name for name in value if isinstance(value[name], dict) and isinstance(section.get(name), dict)]
        merged[key] = section | value | {name: section[name] | value[name] for name in both if key in TABLES}
        origins |= {f"{key}.{leaf}": source.origin for leaf in flat(value)}
    return merged


def resolve(task: str, sources: Iterable[ConfigSource]) -> Resolved:
    """Merge the sources, the strongest last, and read the result as the config of `task`.

    Raises UsageError: which key, what is wrong with it, the nearest name, and who set it.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    sources = list(sources)
    for source in sources:
        values = _merge(values, _with_preprocessing(_for_task(task, source)), origins)
    _shrink(values, origins, sources)
    try:
        config = TASKS[task].model_validate(values)
    except ValidationError as error:
        raise usage_error(task, error, values, origins) from None
    if isinstance(config, RunConfig) and config.runtime.precision == "auto":
        chosen = config.runtime.model_copy(update={"precision": automatic_precision(config.device)})
        config = config.model_copy(update={"runtime": chosen})  # written down: a run keeps it on another machine
    if isinstance(config, RunConfig):  # a run keeps what it has, and a file that has changed is told
        files = code.hashes(flat(config.model_dump(mode="json")).values(), config.code or ())
        config = config.model_copy(update={"code": files})
    return Resolved(config, origins)


def _shrink(values: dict[str, Any], origins: Mapping[str, str], sources: list[ConfigSource]) -> None:
    """What a preset counts in epochs, in proportion to those of the run; what another schedule has no use for goes."""
    preset = next((source for source in sources if source.origin.startswith("preset ")), None)
    own, train = None if preset is None else preset.values.get("train"), values.get("train")
    if preset is None or not isinstance(own, dict) or not isinstance(train, dict):
        return
    for key, (choice, names) in BELONGS.items():  # goes with the optimizer or schedule that something else replaces
        origin, chosen = origins.get(f"train.{choice}"), str(train.get(choice)).lower()
        if key in own and origins.get(f"train.{key}") == preset.origin != (origin or preset.origin):
            values["train"] = {name: one for name, one in values["train"].items() if name != key or chosen in names}
    try:
        epochs, ratio = int(train["epochs"]), int(train["epochs"]) / own["epochs"]
    except (KeyError, TypeError, ValueError):  # it is told where the whole is read
        return
    mine = {key: own[key] for key in own if origins.get(f"train.{key}") == preset.origin and ratio != 1}
    if steps := mine.get("milestones"):
        values["train"] |= {"milestones": sorted({n for m in steps if 0 < (n := round(m * ratio)) < epochs})}
    if warmup := mine.get("warmup_epochs"):
        values["train"] |= {"warmup_epochs": warmup * ratio}


def _with_preprocessing(source: ConfigSource) -> ConfigSource:
    """A source that takes the preprocessing from a library's network, with those settings, as far as it has none."""
    data = source.values.get("data")
    name = data.get("preprocessing") if isinstance(data, dict) else None
    if not isinstance(name, str) or not isinstance(data, dict) or Preprocessing.model_fields.keys() <= data.keys():
        return source
    return source._replace(values=source.values | {"data": library_preprocessing(name) | data})


def _for_task(task: str, source: ConfigSource) -> ConfigSource:
    """A preset or file written for a distillation also says how to train its teacher."""
    values = {key: value for key, value in source.values.items() if key not in ("task", EFFECTIVE)}
    written_for = source.values.get("task", task)
    if written_for == task:
        return ConfigSource(source.origin, values)
    if task == "eval":
        return ConfigSource(source.origin, {key: values[key] for key in TASKS["eval"].model_fields if key in values})
    if (written_for, task) != ("distill", "pretrain"):
        raise UsageError(f"{source.origin} is written for {written_for!r}, not for {task!r}")
    teacher = values.pop("teacher", {})
    teacher = teacher if isinstance(teacher, dict) else {"source": teacher}
    shared = {key: value for key, value in values.items() if key not in STUDENT_KEYS}
    first = [teacher["source"]] if isinstance(teacher.get("source"), str) else teacher.get("source") or []
    shared |= {"model": first[0]} if first else {}
    if teacher.get("epochs") is not None and isinstance(shared.get("train", {}), dict):
        shared["train"] = {**shared.get("train", {}), "epochs": teacher["epochs"]}
    return ConfigSource(source.origin, shared)
