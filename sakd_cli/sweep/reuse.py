"""Which run that is there already computes what a config of a sweep asks for, so that it is not trained again."""

from pathlib import Path
from typing import Any

from sakd_cli.config.identity import identity
from sakd_cli.config.resolve import ConfigSource, flat, resolve
from sakd_cli.config.training import RunConfig
from sakd_cli.errors import UsageError
from sakd_cli.rundir import RunDir, look_up
from sakd_cli.runindex import all_settings, config_files, require_readable
from sakd_cli.runs.resume import plain_names

# What a sweep's config leaves open, or what may lie elsewhere.
OPEN = {"method.weights_sha256", "router.run_sha256", "data.root", "data.download"}


def config_identity(config: RunConfig) -> str:
    """What two runs share that compute the same."""
    known = flat(config.model_dump(mode="json"))
    if known.get("router.run") is not None:
        known["router.run"] = str(Path(known["router.run"]).resolve())
    return identity(known, without=OPEN - config.data.identity().keys())  # a folder of images is known by its place


class RunIndex:
    """The runs of a folder by what they compute; of several that compute the same, a finished one, else the newest.

    fresh   those that are there already do not count
    """

    def __init__(self, runs_dir: Path, *, fresh: bool = False) -> None:
        require_readable(runs_dir)
        self.runs_dir = runs_dir
        self._old = {path.parent for path in config_files(runs_dir)} if fresh else set[Path]()
        self._seen = dict[Path, dict[str, Any]]()
        self._identities = dict[Path, str | None]()

    def refresh(self) -> None:
        """Read what was not there at the last call."""
        if not self._seen or {path.parent for path in config_files(self.runs_dir)} - self._seen.keys() - self._old:
            found = all_settings(self.runs_dir)
            self._seen = {path.parent: known or {} for path, known in found.items() if path.parent not in self._old}

    def of(self, config: RunConfig) -> RunDir | None:
        """The run of these settings."""
        wanted, names = config_identity(config), plain_names(config)
        near = [
            path
            for path, known in self._seen.items()
            if all(look_up(known, key) == value for key, value in names.items()) and path.is_dir()
        ]
        for path in near:
            if path not in self._identities:
                self._identities[path] = _identity_at(RunDir(path))
        same = [RunDir(path) for path in near if self._identities[path] == wanted]
        return max(same, key=lambda run: (run.finished, run.path.name), default=None)


def _identity_at(run: RunDir) -> str | None:
    try:
        settings = run.config
        config = resolve(str(settings.get("task")), [ConfigSource(str(run.path), settings)]).config
        return config_identity(config) if isinstance(config, RunConfig) else None
    except (UsageError, KeyError):
        return None
