"""The house plan as tests: imports point down, caps, light floors stay light, one loop, tables that agree."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap
import tomllib
from abc import ABC
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import sakd_cli
from sakd_cli.config.datasets import DATASETS
from sakd_cli.config.methods import METHODS
from sakd_cli.config.networks import NETWORKS, reusing
from sakd_cli.config.resolve import ConfigSource, preset_folder, preset_source, preset_summary, presets, resolve
from sakd_cli.config.routers import ROUTERS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sakd_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))
# From low to high. The package itself holds the version only; `__main__` is the command line.
FLOORS = [
    "",
    "errors",
    "torchrun",
    "batch",
    "documents",
    "files",
    "writing",
    "distributed",
    "config",
    "runindex",
    "rundir",
]
FLOORS += ["data", "engine", "models", "report", "routing", "distillers", "evaluation", "tasks", "runs"]
FLOORS += ["bench", "export", "sweep", "calls", "api", "cli", "__main__"]
FORBIDDEN = {
    "distillers": {"routing"},
    "routing": {"distillers"},
    "data": {"models", "distillers", "routing"},
    "engine": {"models", "distillers", "routing", "data"},
    "report": set(FLOORS) - {"", "errors", "documents", "files", "writing", "config", "runindex", "rundir", "report"},
}
LIGHT = ("errors", "torchrun", "documents", "files", "writing", "config", "runindex", "rundir", "report", "api", "cli")
HEAVY = ("torch", "torchvision", "safetensors", "numpy")
LINES_OF_FILE, LINES_OF_FUNCTION = 400, 60
NOTHING = {"return", "return []", "return {}", "return iter(())"}  # the body of a hook


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree_of(path)))


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").replace("__init__", "")


def imported(nodes: list[ast.AST]) -> Iterator[str]:
    """Full name of every module that is imported anywhere in the tree, inside functions too."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def floors_used(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported(nodes_of(path)) if name.split(".")[0] == "sakd_cli"]
    return {part[1] if part[1:] and part[1] in FLOORS else "" for part in parts}


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def calls(path: Path, attribute: str) -> list[str]:
    """`file:function` of every call of a method of that name."""
    found = []
    for function in nodes_of(path):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == attribute:
                    found.append(f"{named(path)}:{function.name}")
    return found


@cache
def classes_of_package() -> tuple[type, ...]:
    """Every class that the package defines; importing all of it on the way."""
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(sakd_cli.__path__, "sakd_cli.")
        if not found.name.endswith("__main__")
    ]
    members = {kind for module in modules for kind in vars(module).values() if inspect.isclass(kind)}
    return tuple(sorted((k for k in members if k.__module__.startswith("sakd_cli")), key=lambda k: k.__qualname__))


def contracts() -> list[type]:
    return [kind for kind in classes_of_package() if ABC in kind.__bases__]


def below(contract: type) -> list[type]:
    return [kind for kind in classes_of_package() if issubclass(kind, contract) and kind is not contract]


def test_a_module_imports_from_its_own_floor_and_lower_ones_only() -> None:
    homeless = {named(path) for path in MODULES if floor_of(path) not in FLOORS}
    assert not homeless, "on no floor of the house plan"
    above = {}
    for path in MODULES:
        own = floor_of(path)
        forbidden = {*FLOORS[FLOORS.index(own) + 1 :], *FORBIDDEN.get(own, ())}
        above[named(path)] = sorted(forbidden & floors_used(path))
    assert not {name: used for name, used in above.items() if used}, "these reach up, or to what they may not know"


def test_the_import_checker_sees_the_imports_that_are_there() -> None:
    assert {"config", "data", "distillers", "engine", "routing"} <= floors_used(PACKAGE / "runs" / "build.py")
    assert "report" in floors_used(PACKAGE / "cli" / "train.py"), "imports inside functions count"


def test_files_and_functions_stay_below_their_caps() -> None:
    files, functions = {}, {}
    for path in [*MODULES, *sorted(Path(__file__).parent.glob("*.py"))]:
        files[path.name] = len(path.read_text(encoding="utf-8").splitlines())
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions[f"{path.name}: {node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    assert not {name: lines for name, lines in files.items() if lines > LINES_OF_FILE}
    assert not {name: lines for name, lines in functions.items() if lines > LINES_OF_FUNCTION}


def test_no_file_has_a_name_that_means_nothing() -> None:
    empty = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [path for path in [*MODULES, *(ROOT / "tests").rglob("*.py")] if {path.stem, path.parent.name} & empty]


def test_the_light_floors_load_without_torch_and_its_like() -> None:
    light = [
        f"sakd_cli.{named(path).removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")
        for path in MODULES
        if floor_of(path) in LIGHT
    ]
    assert len(light) > 10
    program = f"""
import importlib, sys
for module in {light!r}:
    importlib.import_module(module)
    loaded = set({HEAVY!r}) & set(sys.modules)
    if loaded:
        sys.exit(f"{{module}} loads {{sorted(loaded)}}")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


OPTIMIZERS = 2 * ["engine/optim.py"]  # one; two levels in turn
# The bench has the published step as it was (two optimizers, two backward passes), and calls ours over and over.
OURS = [path for path in MODULES if path.parent.name != "bench"]


def test_an_optimizer_makes_one_backward_pass_and_nobody_else_but_the_dry_run() -> None:
    found = [place for path in OURS for place in calls(path, "backward")]
    assert found == [*(f"{path}:step" for path in OPTIMIZERS), "runs/first_batch.py:first_losses"]


def test_there_is_one_training_loop() -> None:
    steps = [place for path in OURS for place in calls(path, "step")]
    assert steps == ["engine/optim.py:update", "engine/step.py:__call__"]
    loops = [
        named(path)
        for path in MODULES
        for node in nodes_of(path)
        if isinstance(node, ast.For)
        for call in ast.walk(node.iter)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "epoch"
    ]
    assert loops == ["engine/trainer.py"], "who else walks through the batches of an epoch?"
    optimizers = [named(path) for path in MODULES if "torch.optim." in path.read_text(encoding="utf-8")]
    assert optimizers == ["bench/literal.py", "engine/optim.py"]


def test_nothing_but_the_bench_knows_the_published_step() -> None:
    users = [named(path) for path in MODULES if "sakd_cli.bench.literal" in path.read_text(encoding="utf-8")]
    assert all(user.startswith("bench/") for user in users)


def test_an_assert_decides_nothing() -> None:
    """`python -O` leaves it out: it tells the type checker what is so, and no input is refused by it."""
    asserts = [
        (named(path), ast.unparse(n.test)) for path in MODULES for n in nodes_of(path) if isinstance(n, ast.Assert)
    ]
    plain = re.compile(r"(not )?isinstance\(.*\)|[\w.\[\]]+ is not None")
    assert not [(file, test) for file, test in asserts if plain.fullmatch(test) is None]


def compared_words(nodes: list[ast.AST]) -> Iterator[str]:
    """Every text that is compared (==, in, match) or is a key of a written-out dict."""
    for node in nodes:
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            sides += [part for side in sides if isinstance(side, ast.Tuple | ast.List | ast.Set) for part in side.elts]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        elif isinstance(node, ast.Dict):
            sides = [key for key in node.keys if key is not None]
        yield from (side.value for side in sides if isinstance(side, ast.Constant) and isinstance(side.value, str))


@pytest.mark.parametrize(
    ("names", "table"),
    [(METHODS.own, "distillers/table.py"), (ROUTERS, "routing/table.py"), (DATASETS, "data/table.py")],
    ids=["methods", "routers", "data sets"],
)
def test_a_name_meets_code_in_no_place_but_its_table(names: dict[str, type], table: str) -> None:
    found = {named(path): set(compared_words(nodes_of(path))) & set(names) for path in MODULES}
    assert {path for path, fields in found.items() if fields} == {table}
    assert found[table] == set(names)


def test_the_word_finder_sees_every_form_of_a_comparison() -> None:
    source = """
if a == "one" or "two" != b or c in ("three", x): ...
match d:
    case "four" | "five": ...
e = {"six": 1}
"""
    assert set(compared_words(list(ast.walk(ast.parse(source))))) == {"one", "two", "three", "four", "five", "six"}


def test_what_fulfils_a_contract_is_final() -> None:
    assert {"Task", "Distiller", "Router"} <= {contract.__name__ for contract in contracts()}
    for contract in contracts():
        kinds = below(contract)
        assert kinds, f"{contract.__name__}: a contract that nobody fulfils"
        leaves = [kind for kind in kinds if ABC not in kind.__bases__]  # a contract may refine another
        assert not [kind.__qualname__ for kind in leaves if "__final__" not in vars(kind)]
        heirs = [kind.__qualname__ for kind in kinds if any("__final__" in vars(base) for base in kind.__mro__[1:])]
        assert not heirs, "final means that nobody inherits"


def is_hook(method: Any) -> bool:
    """Whether a contract's method does nothing by itself, and says in its docstring when it is called."""
    if not inspect.isfunction(method):
        return False
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(method))).body
    assert isinstance(function, ast.FunctionDef)
    body = [ast.unparse(line) for line in function.body[1:]]  # behind the docstring
    return bool(method.__doc__) and len(body) == 1 and body[0] in NOTHING


def test_a_concrete_method_of_a_contract_is_never_overridden() -> None:
    for contract in contracts():
        concrete = {
            name
            for name, value in vars(contract).items()
            if inspect.isroutine(value) or inspect.isdatadescriptor(value)
        }
        hooks = {name for name in concrete if is_hook(vars(contract)[name])}
        concrete -= contract.__abstractmethods__ | hooks | {"__init__"}
        overridden = {kind.__name__: concrete & set(vars(kind)) for kind in below(contract)}
        assert not {name: methods for name, methods in overridden.items() if methods}


def test_the_tables_of_words_and_of_objects_agree() -> None:
    from sakd_cli.data import table as data
    from sakd_cli.distillers import table as distillers
    from sakd_cli.models import table as models
    from sakd_cli.routing import table as routing

    assert set(distillers.DISTILLERS) == set(METHODS) >= {"kd", "fitnet", "at", "sp"}
    routers = {"adaptive", "always", "random", "random-matched", "anti", "never"}
    assert set(routing.ROUTERS) == set(ROUTERS) >= routers
    assert set(data.DATASETS) == set(DATASETS) >= {"cifar10", "cifar100", "shapes"}
    made = {reusing("resnet8", "resnet8", 2).family}  # by a distillation; not for the user to choose
    assert set(models.FAMILIES) - made == {network.family for network in NETWORKS.values()} >= {"resnet", "wrn"}
    assert all(name == network.name for name, network in NETWORKS.items())


def test_the_console_script_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, function = project["project"]["scripts"]["sakd"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]["presets"] == "sakd_cli/presets"


def test_a_ctrl_c_while_the_commands_are_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sakd_cli.__main__ import main

    class Interrupting:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "sakd_cli.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "sakd_cli.cli.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting, *sys.meta_path])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 130
    assert capsys.readouterr() == ("", "error: interrupted\n")


def test_the_presets_of_the_issue_are_there() -> None:
    assert preset_folder() == ROOT / "presets"
    assert set(presets()) >= {"quickstart", "cifar100-sakd", "dfa-cifar100"}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "presets").glob("*.yaml")))
def test_a_preset_is_a_whole_run_and_says_what_it_is_for(name: str) -> None:
    path = ROOT / "presets" / f"{name}.yaml"
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert len(preset_summary(path)) > 10
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = resolve(fields["task"], [preset_source(name)]).config
    assert config.task == fields["task"]
    assert resolve(fields["task"], [ConfigSource("again", config.model_dump(mode="json"))]).config == config
