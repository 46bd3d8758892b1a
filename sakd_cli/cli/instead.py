"""What to write instead of a command line that the parser refuses, for who knows other programs."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sakd_cli.cli import show
from sakd_cli.config.base import own_row
from sakd_cli.config.datasets import DATASETS
from sakd_cli.config.hints import by_name, option_hint
from sakd_cli.config.options import FLAG, OPTIONS, SWITCH, TEXTS, Option, options_of

# fmt: off
# Commands, by what other programs call them.
_COMMANDS = {
    "sakd pretrain-teacher MODEL trains one network, sakd distill one from another":
        "train fit finetune fine-tune classify yolo learn run train-teacher train_teacher train-student train_student",
    "sakd eval RUN": "test val valid validate evaluate score benchmark-accuracy",
    "sakd predict NETWORK PATH...": "infer inference detect",
    "sakd import-weights FILE": "import convert load",
    "sakd list models": "models networks archs show:model show:models show:network",
    "sakd list methods": "methods losses show:methods", "sakd list datasets": "datasets show:dataset show:data",
    "sakd list presets": "presets recipes", "sakd list routers": "routers show:routers",
    "sakd runs": "ls history experiments status", "sakd --version": "version info", "sakd COMMAND --help": "help",
    "sakd config show": "settings cfg", "sakd data check DIR": "data-check check dataset",
    "sakd inspect-spots RUN": "spots inspect visualize plot", "sakd guide": "docs doc man tutorial",
    "sakd config show --preset NAME": "show:preset", "sakd show key KEY": "show:setting show:option config:get",
    "--set KEY=VALUE of a command, or a file for its --config": "config:set config:init",
    "a training downloads its data set": "data:download download",
}
# Arguments of a command, by what other programs have as an option.
_NETWORK = "model arch network net run weights checkpoint ckpt teacher student m a model_name model_name_or_path"
_ARGUMENTS = {
    "MODEL": "model arch network net teacher student m a model_name model_name_or_path backbone architecture",
    "RUN": f"{_NETWORK} runs run_dir model_path",
    "NETWORK": f"{_NETWORK} model_path source input images image img path i data",
    "FILE": "file weights checkpoint ckpt path_t config grid preset pretrained",
    "DIR": "data dataset data_dir data_path dir path",
}
# What to do instead of giving an option of one value several times.
SEVERAL = {"--method": "--method A+B distils by both at once; sakd sweep --methods A,B tries one after the other"}
SEVERAL |= {"--router": "--routers A,B trains one student by each", "--student": "sakd sweep trains several"}
# fmt: on


COMMANDS = by_name(_COMMANDS)


def instead(error: Any, arguments: Sequence[str]) -> str:
    """The hint of a parser's error: ours where another program has such a word, else the command's help."""
    context, said = getattr(error, "ctx", None), str(error)
    path = str(context.command_path) if context is not None else "sakd"
    command = path.partition(" ")[2].replace(" ", "-")
    flag = str(getattr(error, "option_name", ""))
    if (found := re.search(r"No such command '(.*?)'\.(?: Did you mean '(.*?)')?", said)) is not None:
        kind = show.kind_of(found[1]) if command == "show" else None
        words = f"{path} {found[1]}".partition(" ")[2].replace(" ", ":")
        near = f"{path} {kind} {found[1]}" if kind else f"{path} {found[2] or '--help'}"
        return COMMANDS.get(words, [near])[0]
    table = OPTIONS if context is None else options_of(command)  # which the parser does not say of a missing value
    rows = {row.flag: row for row in table.values()}
    if "requires an argument" in said and flag in rows:
        return f"{flag} {rows[flag].metavar or 'VALUE'}"
    if "does not take a value" in said and flag in rows:
        return f"{flag} alone" + (f", or --set {rows[flag].key}=false" if rows[flag].type == SWITCH else "")
    if extra := re.search(r"extra argument\(s\) \((.*\S.*)\)$", said):
        return _of_extra(extra[1].split(), command, rows, arguments) or f"{path} --help"
    if not hasattr(error, "possibilities"):
        return f"{path} --help"
    if len(flag) == 2:  # the parser's first letter of `-epochs`
        flag = next((f"-{word.partition('=')[0]}" for word in arguments if word[:2] == flag and word[2:]), flag)
    places = [one for one in context.command.params if one.param_type_name == "argument"] if context else []
    metavars = [str(one.metavar or one.name.upper()) for one in places]
    taken = next((names for place, names in _ARGUMENTS.items() if metavars and metavars[0].startswith(place)), "")
    if flag.strip("-").replace("-", "_") in taken.split():
        return f"{path} {' '.join(metavars)}"
    return option_hint(flag, command, error.possibilities or ()) or f"{path} --help"


def _of_extra(extra: list[str], command: str, rows: Mapping[str, Option], arguments: Sequence[str]) -> str | None:
    """What to write for words that are no arguments: settings without an option, several values, names without one."""
    pairs = [word.partition("=") for word in extra if "=" in word[1:]]
    given = [(option_hint(key, command), value) for key, _, value in pairs]
    if hints := [hint.replace("...", value) if "..." in hint else f"{hint} {value}" for hint, value in given if hint]:
        return " ".join(hints)
    if "--dataset" in rows and own_row(extra[0], DATASETS):
        return f"--dataset {extra[0]}"
    start = max((k for k in range(len(arguments)) if [*arguments[k:]][: len(extra)] == extra), default=0)
    at = max((k for k in range(start) if arguments[k].startswith("--")), default=start)
    option, values = arguments[at], [*arguments[at + 1 : start]]
    row, new = rows.get(option), command == "distill" and "--teacher" not in arguments
    if row is None or len(values) != (row.type not in (FLAG, SWITCH)):
        return "--teacher {} --student {}".format(*extra) if new and len(extra) == 2 else None
    if option == "--set":
        return f"--set {values[0].strip('=')}={''.join(extra).lstrip('=')}"
    if row.type == TEXTS:
        return " ".join(f"{option} {one}" for one in [*values, *extra])
    if "..." in (row.metavar or ""):
        return f"{option} {','.join([*values, *extra])}"
    off = f", or --set {row.key}=false" if row.type == SWITCH else ""
    return SEVERAL.get(option, f"{option} takes {'one' if values else 'no'} value{off}")
