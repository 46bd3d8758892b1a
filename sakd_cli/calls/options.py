"""The options of the calls of `sakd_cli.api`, typed: those of the commands of the same names."""

import functools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypedDict, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from sakd_cli.config import code
from sakd_cli.config.hints import option_hint
from sakd_cli.config.options import FILE, FLAG, TEXTS, Option, options_of
from sakd_cli.engine.reporter import NullReporter, Reporter
from sakd_cli.errors import UsageError

Place = str | os.PathLike[str]
Given = ParamSpec("Given")
Result = TypeVar("Result")
Own = Any  # a name, or a class, a function or an object of your own
# fmt: off
_Common = TypedDict("_Common", {  # noqa: UP013
    "settings": Mapping[str, Any], "reporter": Reporter, "trust": Sequence[str],
}, total=False)
_Inputs = TypedDict("_Inputs", {  # noqa: UP013
    "dataset": Own, "data_root": Place, "device": str, "runs_dir": Place, "config": Place,
}, total=False)
_Training = TypedDict("_Training", {  # noqa: UP013
    "epochs": int, "batch_size": int, "lr": float, "milestones": Sequence[int], "validation": float, "seed": int,
    "manifest": Place, "head": Literal["keep", "replace"], "precision": Literal["auto", "fp32", "bf16"],
    "compile": bool, "deterministic": bool, "sync_batchnorm": bool, "log": str | Sequence[str], "preset": str,
    "protocol": Literal["honest", "published"],
    "run_dir": Place, "resume": Place, "overwrite": bool,
}, total=False)
_Distillation = TypedDict("_Distillation", {  # noqa: UP013
    "teacher": Own, "teacher_weights": Place, "student": Own, "method": Own, "router": Own, "temperature": float,
    "loss_weight": float | Literal["auto"], "dfa_weights": Place, "residual_students": int, "pretrain": bool,
    "cache_teacher": bool, "allow_teacher_mismatch": bool, "global_batch": bool,
}, total=False)
# fmt: on


class PretrainOptions(_Common, _Inputs, _Training, total=False):
    """The options of `sakd pretrain-teacher`, and `settings` and `reporter`."""

    student_friendly: Sequence[str]


class PredictOptions(_Common, total=False):
    """The options of `sakd predict`."""

    runs_dir: Place
    device: str
    batch_size: int
    top: int
    always_on: bool


class ExportOptions(_Common, total=False):
    """The options of `sakd export`."""

    data_root: Place
    runs_dir: Place
    format: Literal["safetensors", "onnx", "pt2", "openvino"]
    fp16: bool
    int8: bool
    max_drop: float
    images: int
    out: Place
    overwrite: bool
    without_normalisation: bool
    opset: int


class ImportOptions(_Common, total=False):
    """The options of `sakd import-weights`."""

    model: Own
    key: str
    classes: Place
    dataset: Own
    data_root: Place
    device: str
    out: Place


class BenchOptions(_Common, total=False):
    """The options of `sakd bench`."""

    teacher: Own
    student: Own
    method: Own
    batch_size: int
    device: str
    precision: Literal["auto", "fp32", "bf16"]
    compile: bool
    rounds: int
    scaling: str
    compare: Place
    peer: Place
    peer_entry: str


class SweepOptions(_Common, total=False):
    """The options of `sakd sweep`."""

    methods: str | Sequence[str]
    pairs: str | Sequence[str]
    routers: str | Sequence[str]
    seeds: int
    budget: str
    data_root: Place
    runs_dir: Place
    device: str
    precision: Literal["auto", "fp32", "bf16"]
    jobs: int
    jobs_per_gpu: int
    executor: Literal["local", "ray", "slurm"]
    resource: Sequence[str]
    retry_failed: bool
    baseline: str
    protocol: Literal["honest", "published"]
    markdown: Place


class DistillOptions(_Common, _Inputs, _Training, _Distillation, total=False):
    """The options of `sakd distill` for one run, and `settings` and `reporter`."""


class SeriesOptions(DistillOptions, total=False):
    """The options of `sakd distill`, also for several runs."""

    seeds: int
    routers: str | Sequence[Own]
    with_control: bool
    parallel: bool
    baseline: str


class EvaluateOptions(_Common, _Inputs, total=False):
    """The options of `sakd eval`; `confusion=True` puts the matrix into the document alone."""

    teacher: Own
    teacher_weights: Place
    manifest: Place
    split: Literal["train", "val", "test", "all"]
    early_exit: bool
    always_on: bool
    curve: bool
    plot: Place
    confusion: Place | bool
    batch_size: int
    preset: str


class CheckOptions(_Common, total=False):
    """The options of `sakd data check`."""

    data_root: Place


class SpotOptions(_Common, _Inputs, total=False):
    """The options of `sakd inspect-spots`."""

    live: bool
    split: Literal["train", "validation", "test"]
    probe: bool
    sample: bool
    seed: int
    extremes: int
    plot: Place
    panel: Literal["epochs", "classes", "difficulty", "paths"]
    html: Place
    samples: Place


# Keywords that a call does not have, and what to write instead.
OF_TERMINALS = {"verbose": "a call prints nothing", "set": "settings={'train.lr': 0.1}"}
# Options that name what may be an object.
NAMED = {"model", "network", "teacher", "student", "student_friendly", "method", "router", "routers", "dataset"}
NAMED |= {"methods", "pairs", "some_routers"}


def apart(call: Callable[Given, Result]) -> Callable[Given, Result]:
    """The same call, which computes as in a new process and leaves what the program has set in torch as it was."""

    @functools.wraps(call)
    def computed(*given: Given.args, **options: Given.kwargs) -> Result:
        if "torch" not in sys.modules:
            return call(*given, **options)  # nothing is set, and not every call needs it
        from sakd_cli.engine.runtime import as_in_new_process

        with as_in_new_process():
            return call(*given, **options)

    return computed


def reporter_of(options: Mapping[str, Any]) -> Reporter:
    """Who follows the call; nobody where none is given."""
    return options.get("reporter") or NullReporter()


def place_of(what: str, value: Any) -> Path:
    """A path. Raises UsageError for what is none; `what`: its name in the call."""
    if isinstance(value, str | os.PathLike):
        return Path(value)
    hint = "settings={...} takes a mapping" if isinstance(value, Mapping) and what == "--config" else None
    several = isinstance(value, list | tuple) and not what.startswith("--")
    raise UsageError(f"{what}: must be a path, got {short(value)}", "one after the other: f(a, b)" if several else hint)


def short(value: Any) -> str:
    """A value as a message shows it, on one line; of an array or a network the beginning."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def _plain_setting(value: Any) -> Any:
    """Paths, runs, devices and the numbers of numpy and torch as a settings file has them; also in mappings."""
    if isinstance(value, Mapping):
        return {key: _plain_setting(one) for key, one in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value) if type(value).__module__ == "torch" and type(value).__name__ == "device" else value


def _read(row: Option, value: Any) -> Any:
    """What typer makes of the value of an option, or UsageError; the config reads all that has a key."""
    if value is None or row.type == TEXTS or (row.key and row.type != FILE):
        return value
    if row.type == FILE:
        return place_of(row.flag, value)
    if row.type in (str | None, str):
        several = isinstance(value, list | tuple) and "..." in (row.metavar or "")
        for one in value if several else [value]:
            if isinstance(one, bool) or not isinstance(one, str | int | float | Path):
                raise UsageError(f"{row.flag}: must be text, got {short(value)}")
        return [*map(str, value)] if several else str(value)
    kind: Any = Annotated[row.type, Field(ge=row.least)] if row.least is not None else row.type
    try:
        return TypeAdapter[Any](kind).validate_python(value, strict=row.type == FLAG)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].replace("Input should be", "must be").partition(", unable to parse")[0]
        reason = reason.replace("a valid boolean", "True or False").replace("a valid integer", "a whole number")
        raise UsageError(f"{row.flag}: {reason}, got {short(value)}") from None


def params_of(command: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call as the options of its command, with paths as the command line has them.

    Where a network, method, router or data set is named, an object may stand (`code.name_of`).
    """
    rows = options_of(command)
    names = {row.flag.removeprefix("--").replace("-", "_"): name for name, row in rows.items()}
    names |= {name: name for name in (*rows, "settings", "reporter", "trust")}
    names = {name: row for name, row in names.items() if name not in OF_TERMINALS}
    if wrong := options.keys() - names.keys():
        raise TypeError(f"unknown option: {', '.join(_with_hint(name, command) for name in sorted(wrong))}")
    settings, reporter = options.get("settings") or {}, options.get("reporter")
    if not isinstance(settings, Mapping) or not all(isinstance(key, str) for key in settings):
        raise UsageError(f"settings: must be a mapping of dotted keys, such as {{'train.lr': 0.1}}, got {settings!r}")
    if reporter is not None and (isinstance(reporter, type) or not isinstance(reporter, Reporter)):
        raise UsageError("reporter: must be an object whose class is a subclass of sakd_cli.api.Reporter")
    trusted = options.get("trust") or ()
    trusted = [trusted] if isinstance(trusted, str) else trusted
    if not isinstance(trusted, Sequence) or not all(isinstance(name, str) for name in trusted):
        raise UsageError(f"trust: must be names such as my.py:Hard, got {short(trusted)}")
    code.trust(*trusted)
    given = {names[name]: _plain_setting(value) for name, value in options.items() if value is not None}
    given = {name: plain_of(value) if name in NAMED else value for name, value in given.items()}
    given |= {name: _read(rows[name], value) for name, value in given.items() if name in rows}
    params = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    of_paths = [name for name, row in rows.items() if row.type == FILE]
    paths = {name: Path(params[name]) for name in of_paths if params.get(name) is not None}
    defaults = {name: None if row.default is ... else row.default for name, row in rows.items()}
    return defaults | params | paths


def _with_hint(name: str, command: str) -> str:
    """An unknown keyword, and what to write instead where that is known."""
    flag = f"--{name}"
    hint = OF_TERMINALS.get(name) or option_hint(flag, command, [row.flag for row in options_of(command).values()])
    for setting in re.findall(r"--set (\S+?)=(\S+)", hint or ""):
        hint = str(hint).replace("--set {}={}".format(*setting), f"settings={{{setting[0]!r}: {setting[1]}}}")
    hint = re.sub(r"--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", "_") + "=", hint or "")
    return f"{name} ({hint})" if hint else name


def plain_of(value: Any) -> Any:
    """A name, a place, a number or a truth value as text or it is, of an object its name; also in lists and dicts."""
    if isinstance(value, Mapping):
        return {key: plain_of(one) for key, one in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, str | int | float | None):
        return value
    return [plain_of(one) for one in value] if isinstance(value, list | tuple) else code.name_of(value)
