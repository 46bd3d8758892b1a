"""What other programs call our keys: RepDistiller, mdistiller, torchvision, timm, ultralytics, Hugging Face.

A name, or a section and a name; what several keys are called elsewhere stands at each of them, the likeliest first.
"""

from sakd_cli.config.methods import METHODS

# fmt: off
_THEIRS = {
    "method.name": "distill distiller.type loss kd_loss kd_method criterion distillation_type method.type",
    "method.kl_weight": "alpha a kd_weight lambda_kd distillation_alpha kd_ratio distill_weight",
    "method.weight": "beta b feat_weight lambda feature_weight",
    "method.ce_weight": "r gamma ce_weight",
    "method.temperature": "kd_t temp t temperature tau distillation_tau",
    "router.tau": "tau gumbel_tau",
    "router.name": "router.type",
    "method.target": "dkd.alpha dkd_alpha",
    "method.others": "dkd.beta dkd_beta",
    "method.distance": "rkd.distance_weight",
    "method.angle": "rkd.angle_weight",
    "method.stage": "hint_layer",
    "method.power": "at.p",
    "method.width": "feat_dim",
    "method.negatives": "nce_k nce.k",
    "method.momentum": "nce_m nce.momentum",
    "method.contrast_temperature": "nce_t nce.temperature",
    "method.warmup_epochs": "init_epochs ab.warmup fsp.warmup ft.warmup",
    "method.weight_warmup": "dkd.warmup method.warmup loss_warmup",
    "student": "model model_s distiller.student student_model student_arch s_model student_model.name "
        "student_model.key student.name student.model student.arch",
    "student_weights": "student_ckpt student_path student_pretrained init init_from student.pretrained student.weights "
        "pretrained initial_checkpoint",
    "init_from": "pretrained initial_checkpoint ckpt checkpoint weights finetune_from finetune init",
    "teacher.source": "path_t model_t distiller.teacher teacher_model teacher_arch teacher_path teacher_ckpt "
        "teacher_checkpoint t_model model_teacher teacher_model.name "
        "teacher_model.key teacher.name teacher.model teacher.arch teacher.path teacher.checkpoint teacher.ckpt",
    "teacher.weights": "teacher.pretrained",
    "train.epochs": "solver.epochs max_epochs n_epochs num_epochs num_train_epochs e",
    "train.batch_size": "solver.batch_size batch bs b per_device_train_batch_size train_batch_size",
    "train.lr": "learning_rate solver.lr lr0 base_lr init_lr initial_lr max_lr lr_max optimizer.lr kwargs.lr",
    "train.milestones": "lr_decay_epochs lr_decay_stages lr_milestones decay_milestones lr_step_size decay_epochs "
        "step_size",
    "train.lr_decay": "lr_decay_rate lr_gamma decay_rate gamma",
    "train.momentum": "solver.momentum optimizer.momentum",
    "train.weight_decay": "solver.weight_decay wd optimizer.weight_decay",
    "data.name": "dataset.type",
    "data.root": "data_path data_dir dataroot data.path data.dir train_dir val_dir",
    "data.workers": "num_workers dataloader_num_workers j",
    "data.resize": "img_size image_size imgsz input_size",
    "data.balance": "sampler balanced_sampling weighted_sampler class_balanced oversample",
    "train.class_weights": "class_weight cls_weights loss_weights",
    "train.focal_gamma": "focal focal_loss fl_gamma",
    "train.optimizer": "opt optim optimiser solver.type optimizer.type optimizer.name",
    "train.schedule": "sched lr_scheduler scheduler lr_scheduler_type scheduler.type scheduler.name lr_schedule "
        "lr_policy lr_mode "
        "lr_scheduler.type lr_scheduler.name",
    "train.warmup_epochs": "lr_warmup_epochs train.warmup warmup warmup_t warmup_steps warmup_ratio",
    "train.betas": "opt_betas",
    "train.min_lr": "lr_min eta_min lrf final_lr end_lr",
    "train.norm_decay": "norm_weight_decay bias_weight_decay",
    "train.eps": "opt_eps",
    "train.clip_norm": "clip clip_grad clip_grad_norm grad_clip max_norm max_grad_norm gradient_clip_val",
    "train.accumulate": "grad_accum grad_accum_steps accumulation_steps accumulate_grad_batches "
        "gradient_accumulation gradient_accumulation_steps",
    "train.label_smoothing": "smoothing label_smooth label_smoothing_factor",
    "train.ema": "model_ema model_ema_decay ema_decay",
    "train.patience": "early_stopping early_stop early_stopping_patience",
    "train.metric": "eval_metric monitor",
    "train.freeze": "frozen freeze_layers freeze_backbone linear_probe",
    "train.batchnorm": "freeze_bn bn update_bn norm_eval",
    "train.drop_path": "drop_path_rate stochastic_depth stochastic_depth_prob",
    "data.mixup": "mixup_alpha",
    "data.cutmix": "cutmix_alpha",
    "data.augment": "aa auto_augment aug",
    "data.jitter": "color_jitter colour_jitter",
    "data.erase": "reprob random_erase random_erasing",
    "data.randaugment": "ra_magnitude",
    "data.flip": "hflip fliplr",
    "data.validation": "val_split val_fraction val_ratio validation_split val_size",
    "log": "wandb tensorboard wandb.project wandb.enabled use_wandb",
    "data.limit": "max_train_samples subset fraction num_samples",
    "runtime.sync_batchnorm": "sync_bn",
    "runtime.compile": "torchcompile torch_compile",
    "device": "gpu gpus gpu_id accelerator",
    "runtime.precision": "amp",
    "seed": "trial train.seed random_seed seed_everything random_state manual_seed",
    "teacher.combine": "teacher.ensemble teacher.weighting",
    "teacher.logits": "soft_labels teacher.answers",
    "log_every": "print_freq log_interval log_freq logging_steps",
    "save_every": "save_freq save_steps save_period save_interval",
    "runs_dir": "output_dir output save_dir out_dir project",
}
# Values of a key, by what they are called elsewhere (in small letters, without hyphens and underscores).
_VALUES = {
    "train.schedule": {
        "cosine": "cosineannealing cosineannealinglr cos warmupcosine", "step": "multistep multisteplr steplr",
        "one-cycle": "onecyclelr 1cycle", "constant": "constantlr constantwithwarmup none",
    },
    "train.metric": {"top1": "accuracy acc valacc", "nll": "loss valloss", "macro_f1": "f1 f1score f1macro"},
    "runtime.precision": {
        "bf16": "fp16 16 half amp mixed bfloat16 float16 bf16mixed 16mixed", "fp32": "32 float32 full no none",
    },
    "data.balance": {"balanced": "weighted weightedrandomsampler true"},
}
# fmt: on
VALUES = {
    key: {name: value for value, names in table.items() for name in names.split()} for key, table in _VALUES.items()
}
FOREIGN = dict[str, list[str]]()
for _key, _names in _THEIRS.items():
    for _name in _names.split():
        FOREIGN.setdefault(_name, []).append(_key)


def theirs(name: str, method: str = "") -> list[str]:
    """The keys that other programs call `name`, as far as this method has them."""
    parts = name.strip("-").lower().replace("-", "_").split(".")
    candidates = [f"{method}.{parts[-1]}", ".".join(parts), ".".join(parts[-2:]), parts[-1]]
    keys = next((FOREIGN[candidate] for candidate in candidates if candidate in FOREIGN), [])
    if method not in METHODS:
        return keys
    return [key for key in keys if key.partition("method.")[2] in ("", *METHODS[method].model_fields)]


def ours(name: str, method: str = "") -> str | None:
    """The first of `theirs`; None where there is none."""
    return next(iter(theirs(name, method)), None)
