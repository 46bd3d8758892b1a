"""A grid of runs: what it is made of, what is skipped, what is resumed, what fails, and the table at the end"""

import csv
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final
from unittest import mock

import pytest
import yaml
from conftest import SHAPES, TINY, CliRunner, Result
from fork_server import Child, ForkServer

from sakd_cli import api
from sakd_cli.documents.sweep import SweepDocument, SweepPlan
from sakd_cli.errors import SeriesError
from sakd_cli.sweep import carry_out, scheduler
from sakd_cli.sweep.executor import Ended, Executor, Job, LocalExecutor, gpus

GRID: dict[str, Any] = {
    "task": "sweep",
    "pairs": ["ResNet-8:resnet8"],
    "methods": ["fitnet"],
    "routers": ["random-matched", "always", "adaptive"],
    "common": {"data": {"name": "shapes"} | SHAPES, "train": {"epochs": 1}},
}


@final
class ForkExecutor(Executor):
    """Carries out jobs one by one in forks of a loaded process, which spares them torch's import."""

    def __init__(self, fork_server: ForkServer) -> None:
        self.fork_server, self.waiting, self.made = fork_server, list[Job](), list[str]()

    def about(self) -> str:
        return "forks"

    def room(self) -> int:
        return 1 - len(self.waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        self.waiting += jobs
        self.made += [job.key for job in jobs]

    def ended(self) -> list[Ended]:
        over = []
        for job in self.waiting:
            child: Child = self.fork_server.sakd(*job.arguments)
            job.log.write_text(child.err)
            over.append(Ended(job.key, child.code or 0))
        self.waiting = []
        return over

    def stop(self, signum: int) -> None:
        raise AssertionError("nobody asked for that")

    def close(self) -> None:
        assert not self.waiting


Run = Callable[..., tuple[Result, list[str]]]


@contextmanager
def by(executor: Executor) -> Iterator[None]:
    with mock.patch.object(carry_out, "executor_of", return_value=executor), mock.patch.object(carry_out, "PAUSE", 0.0):
        yield


def runner(cli: CliRunner, fork_server: ForkServer) -> Run:
    """Writes a file, sweeps it, and tells what was said and which runs were made."""

    def sweep_it(fields: dict[str, Any], *options: str) -> tuple[Result, list[str]]:
        (cli.path / "mine.yaml").write_text(yaml.safe_dump(fields))
        executor = ForkExecutor(fork_server.at(cli.path))
        with by(executor):
            return cli.sakd("sweep", "mine.yaml", *options), executor.made

    return sweep_it


@pytest.fixture(scope="module")
def swept(
    trained_cli: CliRunner, teacher: Path, distilled: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> CliRunner:
    """A folder of its own that has the teacher and the adaptive run of the others, made by hand, and no more."""
    cli = CliRunner(tmp_path_factory.mktemp("swept"))
    for run in (teacher, trained_cli.path / distilled["run"]):
        shutil.copytree(run, cli.path / "runs" / run.name)
    return cli


def test_what_was_made_by_hand_is_left_alone_and_what_is_missing_is_made(
    swept: CliRunner, fork_server: ForkServer, distilled: dict[str, Any], teacher: Path
) -> None:
    run = runner(swept, fork_server)
    result, made = run(GRID | {"baseline": True}, "--json", "--markdown", "table.md")
    assert [key.split(" resnet8:")[0] for key in made] == ["fitnet always", "fitnet random-matched"]
    document = result.document
    SweepDocument.model_validate(document)
    runs = {row["key"]: row for row in document["runs"]}
    assert {row["state"] for row in runs.values()} == {"done"}
    assert (
        Path(runs["teacher resnet8"]["run"]).name == teacher.name == Path(runs["baseline resnet8 seed 0"]["run"]).name
    )
    assert Path(runs["fitnet adaptive resnet8:resnet8 seed 0"]["run"]).name == Path(distilled["run"]).name
    matched = yaml.safe_load((swept.path / runs[made[1]]["run"] / "config.yaml").read_text())["router"]["run"]
    assert Path(matched).name == Path(distilled["run"]).name, "the rates of its own seed"
    [gain] = [g for g in document["gains"] if (g["router"], g["against"]) == ("adaptive", "always")]
    assert (gain["verdict"], gain["p"], gain["published"]) == ("one seed", None, None)
    assert document["published"] is None, "figures of CIFAR-100 do not stand beside shapes"
    assert "| fitnet | always |" in (swept.path / "table.md").read_text()
    before = swept.tree()
    result, made = run(GRID | {"baseline": True})
    assert (result.code, made, result.err) == (0, [], "")
    assert "nothing is claimed" in result.out
    assert {k: v for k, v in swept.tree().items() if k != "mine.yaml"} == {
        k: v for k, v in before.items() if k != "mine.yaml"
    }
    rows = list(csv.DictReader(io.StringIO(run(GRID, "--csv")[0].out)))
    assert [(row["router"], row["verdict"]) for row in rows] == [
        ("adaptive", "one seed"),
        ("always", ""),
        ("random-matched", "one seed"),
    ]


def test_what_distils_nowhere_is_trained_once_for_all_methods_teachers_and_the_baseline(
    swept: CliRunner, fork_server: ForkServer, teacher: Path
) -> None:
    """To the bit: so is a training without a teacher, which the run directory of another seed shows."""
    run = runner(swept, fork_server)
    fields = GRID | {"methods": ["kd", "fitnet", "ab"], "routers": ["never"], "baseline": True, "seeds": [3]}
    fields |= {"overrides": {"ab": {"method": {"warmup_epochs": 1}}}}
    plan = run(fields, "--dry-run", "--measure", "0", "--json")[0].document
    assert (plan["runs"], [row["what"] for row in plan["rows"]]) == (
        3,
        ["teacher resnet8", "baseline resnet8", "ab never resnet8:resnet8"],
    )
    result, made = run(fields)
    assert made == ["baseline resnet8 seed 3", "ab never resnet8:resnet8 seed 3"]
    said = "One run per seed, since nothing is distilled: baseline resnet8, kd never resnet8:resnet8, fitnet"
    assert said in " ".join(result.out.split())
    document = run(fields, "--json")[0].document
    used = {row["key"]: row["run"] for row in document["runs"]}
    never = used["baseline resnet8 seed 3"]
    assert used["fitnet never resnet8:resnet8 seed 3"] == never != used["ab never resnet8:resnet8 seed 3"]
    assert swept.sakd("pretrain-teacher", "resnet8", *TINY, "--seed", "3", "--run-dir", "alone").code == 0
    both = [swept.path / "alone" / "teacher", swept.path / never / "student"]
    assert len({(folder / "model.safetensors").read_bytes() for folder in both}) == 1


def test_a_dry_run_counts_times_and_writes_nothing(swept: CliRunner, fork_server: ForkServer) -> None:
    run = runner(swept, fork_server)
    fields = GRID | {"methods": ["kd", "at"], "routers": ["always", "adaptive"], "seeds": 2}
    (swept.path / "mine.yaml").write_text(yaml.safe_dump(fields))
    before = swept.tree()
    plan = run(fields, "--dry-run", "--measure", "0.001", "--json", "--quiet")[0].document
    SweepPlan.model_validate(plan)
    assert {k for k in swept.tree() if k != "mine.yaml"} == {k for k in before if k != "mine.yaml"}
    assert (plan["runs"], plan["finished"], plan["failed"]) == (9, 1, 0)
    rows = {row["what"]: row for row in plan["rows"]}
    assert rows["teacher resnet8"]["to_do"] == 0
    assert [row["measured"] for row in plan["rows"]].count(True) == 1, "the time was up"
    assert all(row["step_seconds"] > 0 and row["steps"] == 2 for row in plan["rows"] if row["to_do"])
    assert plan["hours"] > 0
    real = swept.path / run(GRID, "--json")[0].document["runs"][1]["run"]
    size = sum(path.stat().st_size for path in real.rglob("*") if path.is_file())
    size += sum(path.stat().st_size for path in (real / "checkpoints" / "last").iterdir())  # no previous yet
    assert rows["at adaptive resnet8:resnet8"]["run_bytes"] == pytest.approx(size, rel=0.3)
    table = run(fields, "--dry-run", "--measure", "0", "--quiet")[0].out
    assert all(text in table for text in ("nothing written", "Runs: 9; 1 finished", "GB of disk", " s of cpu"))


def test_a_run_that_fails_touches_no_other_and_is_tried_again_when_asked(
    swept: CliRunner, fork_server: ForkServer
) -> None:
    run = runner(swept, fork_server)
    # The limit is not met by the fields alone: the method finds it out with the number of images.
    fields = GRID | {"methods": ["crd"], "overrides": {"adaptive crd": {"method": {"weight": 1e38}}}}
    result, made = run(fields, "--runs-dir", "others", "--json")
    assert result.code == 7
    document = json.loads(result.out)
    states = {row["key"].split(" resnet8")[0]: row["state"] for row in document["runs"]}
    assert states == {
        "teacher": "done",
        "crd adaptive": "failed",
        "crd always": "done",
        "crd random-matched": "blocked",
    }
    [failed] = [row["error"] for row in document["runs"] if row["state"] == "failed"]
    assert "exit code 7" in failed
    assert "1 of 4 runs failed, 1 that wait for them were not made; crd adaptive" in result.err
    result, made = run(fields, "--runs-dir", "others")
    assert (result.code, made) == (7, [])
    assert "Failed" in result.out
    result, made = run(fields, "--runs-dir", "others", "--retry-failed", "--quiet")
    assert (result.code, made) == (7, ["crd adaptive resnet8:resnet8 seed 0"])


def test_a_run_that_a_signal_keeps_ending_is_tried_three_times_and_not_remembered(
    swept: CliRunner, fork_server: ForkServer
) -> None:
    (swept.path / "mine.yaml").write_text(yaml.safe_dump(GRID | {"methods": ["pkt"], "routers": ["always"]}))
    executor = ForkExecutor(fork_server)
    with (
        mock.patch.object(fork_server, "sakd", return_value=mock.Mock(code=-9, err="")),
        by(executor),
    ):
        result = swept.sakd("sweep", "mine.yaml")
    assert (result.code, len(executor.made)) == (137, 3)
    assert "waiting  pkt always resnet8:resnet8 seed 0: killed by signal 9 (attempt 1 of 3)" in result.err
    assert "killed by signal 9" in result.err
    assert not list((swept.path / "runs" / "sweeps" / "mine" / "failed").iterdir())


def test_a_run_that_another_command_trains_is_told_and_waited_for(swept: CliRunner, fork_server: ForkServer) -> None:
    (swept.path / "mine.yaml").write_text(yaml.safe_dump(GRID | {"methods": ["vid"], "routers": ["always"]}))
    taken = iter([None, None])
    lock = mock.Mock(wraps=scheduler.acquire_lock, side_effect=lambda path: next(taken, mock.DEFAULT))
    with (
        mock.patch.object(scheduler, "acquire_lock", lock),
        mock.patch.object(scheduler, "CLAIMED_PAUSE", 0),
        by(ForkExecutor(fork_server.at(swept.path))),
    ):
        result = swept.sakd("sweep", "mine.yaml")
    told = [line for line in result.err.splitlines() if "vid always" in line]
    assert (result.code, len(told)) == (0, 3)
    assert told[0] == "[1/2] waiting  vid always resnet8:resnet8 seed 0: another command of this sweep trains it"
    assert "another" not in "".join(told[1:]) + result.out


def test_ctrl_c_saves_every_run_and_the_same_command_goes_on(
    swept: CliRunner, fork_server: ForkServer, tmp_path: Path
) -> None:
    """With real child processes."""
    cli = CliRunner(tmp_path)
    shutil.copytree(swept.path / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("sweeps"))
    common = GRID["common"] | {"train": {"epochs": 10}, "log_every": 1}
    fields = GRID | {"methods": ["kd"], "routers": ["always"], "common": common, "teachers": {"train": {"epochs": 1}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(fields))
    begun = {path.parent.name for path in (tmp_path / "runs").glob("mine/*/metrics.jsonl")}
    child = fork_server.at(tmp_path).start("sweep", "mine.yaml")
    child.signal_when("running  kd always", 0)
    deadline = time.monotonic() + 120
    while not [new for new in set((tmp_path / "runs").glob("mine/*/metrics.jsonl")) if new.parent.name not in begun]:
        assert child.err.count("error") == 0
        assert time.monotonic() < deadline, child.err
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 130, child.err
    assert "resume with sakd sweep mine.yaml" in child.err
    [path] = {path.parent for path in (tmp_path / "runs").glob("mine/*/metrics.jsonl") if path.parent.name not in begun}
    assert (path / "checkpoints" / "last" / "manifest.json").is_file()
    fields["common"]["train"] = {"epochs": 10}
    executor = ForkExecutor(fork_server.at(tmp_path))
    with by(executor):
        document = cli.sakd("sweep", "mine.yaml", "--json").document
    [row] = [row for row in document["runs"] if row["role"] == "student"]
    assert (row["run"], row["resumed"], row["state"]) == (f"runs/mine/{path.name}", True, "done")


REFUSED = {
    "methods: unknown method 'att'; did you mean 'at'?": {"methods": ["att"]},
    "router": {"routers": ["allways"]},
    "no model has": {"pairs": ["x" * 300 + ":resnet8"]},
    "unknown model 'resnett8'": {"pairs": ["resnett8:resnet8"]},
    "pairs: ./nowhere": {"pairs": ["./nowhere:resnet8"]},
    "random-matched matches the rates of adaptive": {"routers": ["random-matched"]},
    "simkd never resnet8:resnet8: router: never leaves": {"methods": ["simkd"], "routers": ["never"]},
    "fsp resnet8x4:resnet8": {"methods": ["fsp"], "pairs": ["resnet8x4:resnet8"]},
    "unknown method, router or pair 'fitnett'": {"overrides": {"fitnett": {}}},
    "unknown key 'epochs'": {"common": {"epochs": 3}},
    "is no sweep": {"task": "distill"},
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_is_told_before_anything_starts(swept: CliRunner, text: str) -> None:
    (swept.path / "wrong.yaml").write_text(yaml.safe_dump(GRID | REFUSED[text]))
    swept.assert_rejects(["sweep", "wrong.yaml"], 2, text)


OPTIONS = {
    "--budget '2'": ["--budget", "2"],
    "is not of the form key=value": ["--executor", "ray", "--resource", "num_cpus"],
    "--resource is for --executor": ["--resource", "num_cpus=1"],
    "both write to stdout": ["--csv", "--json"],
    "unknown method": ["--methods", "nix"],
}


@pytest.mark.parametrize("text", OPTIONS)
def test_options_that_cannot_be_are_told_too(swept: CliRunner, text: str) -> None:
    (swept.path / "wrong.yaml").write_text(yaml.safe_dump(GRID | {"methods": ["nst"]}))
    swept.assert_rejects(["sweep", "wrong.yaml", *OPTIONS[text]], 2, text)


def test_what_cannot_be_is_skipped_with_its_reason_where_the_file_says_so(
    swept: CliRunner, fork_server: ForkServer
) -> None:
    fields = GRID | {"methods": ["fitnet", "fsp"], "pairs": ["resnet8x4:resnet8"], "infeasible": "skip"}
    plan = runner(swept, fork_server)(fields, "--dry-run", "--measure", "0", "--json", "--quiet")[0].document
    assert [row["what"] for row in plan["skipped"]] == ["fsp resnet8x4:resnet8"]
    assert not [row for row in plan["rows"] if row["what"].startswith("fsp")]


@pytest.mark.parametrize("kind", ["local", "slurm"])
def test_an_executor_carries_out_commands_and_gives_their_exit_codes(kind: str, tmp_path: Path) -> None:
    """submitit without a cluster: with its executor for processes of this machine."""
    executor: Executor = LocalExecutor(2, 1, "cpu")
    if kind == "slurm":
        pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
        from sakd_cli.sweep.cluster import SlurmExecutor

        executor = SlurmExecutor(None, {"cluster": "local"}, tmp_path)
    jobs = {"good": ("list", "routers"), "bad": ("show", "method", "nix")}
    logs = {key: tmp_path / f"{key}.log" for key in jobs}
    executor.submit([Job(key, fields, logs[key], tmp_path) for key, fields in jobs.items()])
    codes: dict[str, int] = {}
    while len(codes) < 2:
        codes |= {one.key: one.code for one in executor.ended()}
    assert codes == {"good": 0, "bad": 2}
    assert logs["bad"].read_text().startswith("error: unknown method 'nix'")
    assert executor.room() >= 2
    executor.close()


@pytest.mark.parametrize(("visible", "names"), [("", []), ("-1", []), ("1,0", ["1", "0"]), ("0,-1,1", ["0"])])
def test_the_gpus_of_a_sweep_are_those_that_cuda_sees(
    visible: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus() == names


@final
class Failing(Executor):
    """Every job fails, at the second look."""

    def __init__(self) -> None:
        self.jobs = list[Job]()

    def about(self) -> str:
        return "nowhere"

    def room(self) -> int:
        return 8

    def submit(self, jobs: Sequence[Job]) -> None:
        self.jobs += jobs

    def ended(self) -> list[Ended]:
        over, self.jobs = self.jobs, []
        return [Ended(job.key, 2) for job in over]


def test_a_program_that_sweeps_rests_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rests = list[float]()
    monkeypatch.setattr(time, "sleep", rests.append)
    with mock.patch.object(carry_out, "executor_of", return_value=Failing()), pytest.raises(SeriesError):
        api.sweep(GRID | {"routers": ["always"]})
    assert rests
    assert min(rests) > 0.1
