"""Which runs on the disk have the settings of a run that is wanted, whoever made them and wherever its files lie"""

import json
from pathlib import Path

from sakd_cli.config.resolve import ConfigSource, flat, resolve
from sakd_cli.config.training import LOCATIONS, RunConfig
from sakd_cli.errors import UsageError
from sakd_cli.rundir import RunDir, all_runs

PLACES = LOCATIONS | {"method.weights_sha256", "data.root", "data.download"}


def identity(config: RunConfig) -> str:
    """What two runs share that are the same run in all that they compute."""
    places = PLACES - config.data.identity().keys()  # of a folder of images the place is the data set
    known = {key: value for key, value in flat(config.model_dump(mode="json")).items() if key not in places}
    if known.get("router.run") is not None:
        known["router.run"] = str(Path(known["router.run"]).resolve())
    return json.dumps(known, sort_keys=True, default=str)


class RunIndex:
    """The runs of a folder by what they compute; of several that compute the same, a finished one, else the newest."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self._seen: dict[Path, str | None] = {}

    def refresh(self) -> None:
        """Read what was not there at the last call."""
        for path in {run.path for run in all_runs(self.runs_dir)} - self._seen.keys():
            self._seen[path] = _identity_at(RunDir(path))

    def of(self, config: RunConfig) -> RunDir | None:
        """The run of these settings."""
        wanted = identity(config)
        same = [RunDir(path) for path, known in self._seen.items() if known == wanted and path.is_dir()]
        return max(same, key=lambda run: (run.finished, run.path.name), default=None)


def _identity_at(run: RunDir) -> str | None:
    try:
        settings = run.config
        config = resolve(str(settings.get("task")), [ConfigSource(str(run.path), settings)]).config
        return identity(config) if isinstance(config, RunConfig) else None
    except (UsageError, KeyError):
        return None
