"""What to write for an option that a command does not have, by what other programs call it."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from sakd_cli.config.base import own_name
from sakd_cli.config.datasets import DATASETS
from sakd_cli.config.foreign import theirs
from sakd_cli.config.keys import default_of, keys_of
from sakd_cli.config.methods import METHODS
from sakd_cli.config.options import FLAG, OPTIONS, SWITCH, Option, options_of
from sakd_cli.config.routers import ROUTERS
from sakd_cli.config.training import TASKS

# fmt: off
# Options and other answers, by what other programs have as an option: the first answer that the command has.
_OPTIONS = {
    "--out": "html output o out_dir save_dir output_dir dest output_path",
    "--run-dir or --runs-dir": "output o out", "--markdown": "output o out",
    "--run-dir": "name run_name exp experiment exp_name experiment_name tag run_id",
    "--runs-dir": "dir logdir log_dir save_root results_dir work_dir workdir exp_dir results "
        "checkpoint_dir ckpt_dir model_dir",
    "--format": "f include onnx", "--html": "output o out report",
    "--overwrite": "exist_ok overwrite_output_dir force f",
    "--yes": "force f y", "--where": "filter", "--sort": "sort_by order_by",
    "--device cpu": "cpu no_cuda use_cpu no_gpu", "--device cuda": "cuda use_cuda use_gpu",
    "--precision bf16": "fp16 half bf16 amp_dtype mixed_precision", "--precision fp32": "no_amp no_fp16 fp32",
    "--fp16": "half", "--int8": "quantize quant",
    "--log": "wandb_project tensorboard_dir tb_dir tensorboard tb wandb log_wandb use_wandb mlflow report_to logger",
    "--resume": "resume_from_checkpoint resume_path start_epoch auto_resume ckpt_path checkpoint",
    "--validation": "val_split val_fraction val_ratio validation_split val_size split",
    "--dataset or --data-root": "data ds", "--data-root": "data_dir dataroot img_dir test_dir",
    "--config": "cfg c config_file params", "--set": "opts cfg_options override overrides",
    "--top": "topk top_k k", "--classes": "class_names class_map names",
    "--seeds": "repeat trials num_runs runs num_trials",
    "--jobs": "j n_jobs num_workers workers gpus num_gpus parallel",
    "--executor": "backend launcher slurm ray", "--resource": "partition address",
    "--dry-run": "estimate plan fast_dev_run",
    "--pairs": "model teacher student", "--with-control": "control", "--baseline": "reference control",
    "--rounds": "steps iters repeat",
    "--plot": "plots figure fig", "--confusion": "confusion_matrix conf_mat",
    "--student": "model_name arch net backbone s", "--model": "arch net network student",
    "--router always": "no_router no_routing", "--router": "policy gate agent routing adaptive",
    "--always-on": "no_early_exit", "--set timing_seconds=0": "no_timing no_speed",
    "--set train.schedule=cosine": "cos_lr cosine",
    "--json > FILE": "output_file json_file output o out results_file save_json report_file save",
    "sakd show key KEY": "key setting",
    "sakd --version; all messages are shown unless --quiet": "verbose v debug version",
    "torchrun, see sakd guide several-devices": "local_rank world_size rank dist_url dist_backend nnodes "
        "nproc_per_node ngpus num_gpus n_gpu ngpu num_nodes strategy ddp fsdp "
        "device_ids devices multiprocessing_distributed distributed",
    "the classes are those of the data set": "num_classes nc n_classes n_cls",
    "--quiet": "silent no_progress no_progress_bar disable_tqdm",
    "sakd export RUN, when it is trained": "export onnx save_model",
    "the last and the best epoch are kept": "save_best save_best_only",
    "sakd eval RUN, when it is trained": "evaluate eval test test_only do_eval val",
}
# fmt: on


def by_name(table: Mapping[str, str]) -> dict[str, list[str]]:
    """Answers by each of the names, the first ones first."""
    found: dict[str, list[str]] = {}
    for answer, names in table.items():
        for name in names.split():
            found.setdefault(name, []).append(answer)
    return found


ANSWERS = by_name(_OPTIONS)


def option_hint(flag: str, command: str, near: Sequence[str] = ()) -> str | None:
    """What to write for an option that a command does not have, where that is known; near: options of such a name."""
    rows, name = options_of(command), flag.strip("-+~").replace("-", "_").lower()
    flags = {row.flag: row for row in rows.values()}
    task = {"pretrain-teacher": "pretrain", "bench": "distill", "sweep": "distill"}.get(command, command)
    keys = keys_of(task if task in TASKS else "eval") if "set_" in rows else []

    def of_keys(wanted: Iterable[str]) -> str:
        """The options that set them, where the command has some."""
        known = {key: next((row.flag for row in rows.values() if row.key == key), f"--set {key}=...") for key in wanted}
        return " or ".join([one for key, one in known.items() if one in flags or key in keys][:3])

    if "." in name and name in keys:
        return of_keys([name])
    same = f"--{name.replace('_', '-')}"
    if found := next((one for one in (same, f"{same}s", same.removesuffix("s")) if one in flags), None):
        return found
    for answer in ANSWERS.get(name, ()):
        if not answer.startswith("--") or answer.split()[0] in flags:
            return answer
    for option, table in (("--method", METHODS), ("--router", ROUTERS), ("--dataset", DATASETS)):
        if option in flags and (known := own_name(name, table)):
            return f"{option} {known}"
    if (plain := name.removeprefix("no_")) != name and (off := _off(plain, rows, keys)):
        return off
    others = [row for row in OPTIONS.values() if row.flag == same]
    # A key with such a last part is another thing than an option of that name that other commands have.
    leaves = [] if others else [key for key in keys if name == key.rpartition(".")[2]]
    own = [*(key for key in keys if name in (key, key.replace(".", "_"))), *leaves]
    meant = [one for one in near if flag.startswith(one) or one.startswith(flag)]
    meant += [f"--{one}" for one in get_close_matches(name, [one[2:] for one in near], n=1, cutoff=0.76)]
    if known := of_keys([*theirs(flag), *(row.key for row in others if row.key)]) or of_keys(own):
        return known
    if meant:
        return meant[0]
    commands = list(dict.fromkeys(" ".join(row.commands for row in others).split()))
    if commands and not command:
        return f"behind the command: sakd COMMAND {flag}"
    more = f" and {len(commands) - 6} more" if len(commands) > 7 else ""
    return f"an option of {', '.join(commands[:6] if more else commands)}{more}" if commands else None


def _off(name: str, rows: Mapping[str, Option], keys: Sequence[str]) -> str | None:
    """How what is called `name` is switched off."""
    row = next((row for row in rows.values() if row.flag == f"--{name.replace('_', '-')}"), None)
    if row is not None and row.type == FLAG:
        return f"leave {row.flag} out"
    own = [row.key] if row is not None else [*theirs(name), *(key for key in keys if key.rpartition(".")[2] == name)]
    able = [key for key in own if key in keys and (row is not None or isinstance(default_of(key), bool))]
    return f"--set {able[0]}=false" if able and (row is None or row.type == SWITCH) else None
