"""The user's own networks: which runs with them need no trust, since this user made them here, and teachers of them."""

import hashlib
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from sakd_cli.config.base import OBJECTS
from sakd_cli.config.code import functions, is_object, named_runs, trust
from sakd_cli.config.training import DistillConfig
from sakd_cli.errors import DiskError, UsageError
from sakd_cli.files import of_user, read_json
from sakd_cli.rundir import RunDir, look_up
from sakd_cli.writing import make_folder, write_json

# Settings that may name code.
KEYS = ("model", "student", "teacher.source", "teacher.others", "method.name", "router.name", "data.name")
_file = partial(of_user, "XDG_STATE_HOME", ".local/state", "runs.json")  # identities of the user's runs with own code


def trust_own(run: RunDir | None) -> None:
    """Let the weights of a run ask for the functions that its settings name, if this user has made it here."""
    named = [] if run is None else [name for name in _named(run) if isinstance(name, str) and functions(name)]
    if run is not None and named:
        named_runs.add(run.path)
        trust(*named if run.identity in _made_here() else ())


def note_own(run: RunDir) -> None:
    """Note, for `trust_own`, that this user has made a run, where the user's own functions are in it."""
    if run.identity is None or not any(functions(str(name)) for name in _named(run)):
        return
    with suppress(DiskError, UsageError):
        make_folder(_file().parent)
        write_json(_file(), [*_made_here(), run.identity])


def _named(run: RunDir) -> list[object]:
    """What its settings name as networks."""
    settings = run.config
    found = [look_up(settings, key) for key in KEYS]
    return [name for value in found for name in (value if isinstance(value, list) else [value])]


def keep_teacher(config: Any, place: Path | None = None) -> Any:
    """The settings with a folder for a trained network that a program has given as its teacher; others as they are.

    It gets images as the data set normalises them, and is kept in `teachers` of `place`; None: beside the runs.
    """
    name = config.teacher.source if isinstance(config, DistillConfig) else ""
    if name not in OBJECTS or not is_object(name) or config.teacher.weights is not None:
        return config
    from safetensors.torch import save

    from sakd_cli.data.table import describe
    from sakd_cli.models.artifact import NetworkCard, save_folder
    from sakd_cli.models.table import create

    data = describe(config.data)
    card = NetworkCard.of(name, data)
    network = create(name, len(data.classes), data.train.side)
    numbers = save({key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()})
    folder = (place or config.runs_dir) / "teachers" / hashlib.sha256(numbers).hexdigest()[:16]
    make_folder(folder.parent, "--runs-dir DIR")
    save_folder(folder, network, card, {})
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"weights": folder})})


def _made_here() -> list[str]:
    with suppress(OSError, ValueError, TypeError, UsageError):
        return [name for name in read_json(_file()) if isinstance(name, str)]
    return []
