"""A wrong input costs one line: what, where, what to do, the right exit code, and the disk as it was."""

import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAIR, TINY, CliRunner
from fork_server import ForkServer
from safetensors.torch import save_file

from sakd_cli.engine import checkpoint
from sakd_cli.files import json_bytes, sha256
from sakd_cli.models.artifact import NetworkCard, save_weights
from sakd_cli.models.table import create

CLASSES = 20


@pytest.fixture(scope="module")
def messy(cli: CliRunner, distilled: dict[str, Any]) -> CliRunner:
    """The folder with two runs and with files to stumble over."""
    cifar10 = NetworkCard("resnet8", "cifar10", tuple("abcdefghij"), (0.5,) * 3, (0.3,) * 3, 32)
    save_weights(cli.path / "cifar10.safetensors", create("resnet8", 10), cifar10)
    sound = (cli.path / "cifar10.safetensors").read_bytes()
    (cli.path / "cut.safetensors").write_bytes(sound[:-100])
    (cli.path / "text.safetensors").write_text("no weights at all")
    save_file({"a": torch.zeros(2)}, cli.path / "foreign.safetensors")
    (cli.path / "flipped").mkdir()
    student = cli.path / distilled["run"] / "student"
    (cli.path / "flipped" / "config.json").write_bytes((student / "config.json").read_bytes())
    weights = (student / "model.safetensors").read_bytes()
    (cli.path / "flipped" / "model.safetensors").write_bytes(weights[:-5] + bytes([weights[-5] ^ 1]) + weights[-4:])
    shutil.copytree(student, cli.path / "odd" / "student")
    (cli.path / "odd" / "config.yaml").write_text("{}")
    (cli.path / "empty").mkdir()
    (cli.path / "broken.yaml").write_text("train: [")
    (cli.path / "nothing.yaml").touch()
    (cli.path / "list.yaml").write_text("- train\n- data\n")
    (cli.path / "binary.yaml").write_bytes(sound[:999])
    (cli.path / "future.yaml").write_text("task: dream\nstudent: resnet8\n")
    os.mkfifo(cli.path / "pipe")
    (cli.path / "photos" / "cat").mkdir(parents=True)
    (cli.path / "photos" / "cat" / "1.JPG").touch()
    run = cli.path / distilled["run"]
    shutil.copytree(run, cli.path / "future", ignore=shutil.ignore_patterns("summary.json", "best", "previous"))
    last = cli.path / "future" / "checkpoints" / "last"
    (last / "state.json").write_text((last / "state.json").read_text().replace(checkpoint.FORMAT, "sakd.checkpoint/99"))
    (last / "manifest.json").write_bytes(
        json_bytes({name: sha256(last / name) for name in ("model.safetensors", "state.json", "training.safetensors")})
    )
    (cli.path / "cifar" / "cifar-100-python").mkdir(parents=True)
    for name in ("train", "test", "meta"):
        (cli.path / "cifar" / "cifar-100-python" / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    return cli


BAD = f"""
2 | unknown model 'resnt8'; did you mean 'resnet8'?         | pretrain-teacher resnt8
2 | unknown model 'resnt8'; did you mean 'resnet8'?         | distill --teacher resnet8 --student resnt8
2 | unknown model 'resnt8'; did you mean 'resnet8'?         | distill --teacher resnt8 --student resnet8
2 | --student: is given 2 times, and takes one value        | PAIR --student=resnet20
2 | --epochs: is given 3 times, and takes one value         | PAIR --epochs=1 --epochs=2 --epochs=3
2 | --device: is given 2 times, and takes one value         | eval --device=cpu --device=cuda
2 | unknown method 'atx'; did you mean 'at'?                | PAIR --method atx
2 | unknown method 'at,kd'; did you mean 'at+kd'?          | PAIR --method at,kd
2 | unknown router 'adaptve'; did you mean 'adaptive'?      | PAIR --router adaptve
2 | unknown data set 'shaps'; did you mean 'shapes'?        | PAIR --dataset shaps
2 | unknown preset 'quikstart'; did you mean 'quickstart'?  | distill --preset quikstart
2 | unknown key 'train.epoch'; did you mean 'train.epochs'? | PAIR --set train.epoch=3
2 | method.weights: belongs to another method: dfa (from --dfa-weights) | PAIR --dfa-weights uniform
2 | serch: no such file                                     | PAIR TINY --method dfa --dfa-weights serch
2 | holds no mixtures of blocks, or damaged ones            | PAIR TINY --method dfa --dfa-weights flipped/config.json
2 | preact needs a teacher of pre-activation blocks; resnet8 is none | PAIR TINY --method dfa --set method.norm=preact
2 | train: nesterov needs a momentum above 0                | PAIR --set train.nesterov=true --set train.momentum=0
2 | train.epochs: must be a whole number                    | PAIR --epochs ten
2 | train.lr: must be a finite number                       | PAIR --set train.lr=.nan
2 | seed: must be greater than or equal to 0                | pretrain-teacher resnet8 --seed -1
2 | unknown key 'train.student'                             | PAIR --set train.student=resnet8
2 | unknown key 'epochs'                                    | PAIR --set epochs=3
2 | unknown key 'method.tau'                                | PAIR --method fitnet --set method.tau=3
2 | train.lr: must be a number                              | PAIR --set train.lr=1e-4x
2 | train.lr: must be greater than 0                        | PAIR --set train.lr=-0.1
2 | train.lr: must be a number, got '1:30'                  | PAIR --set train.lr=1:30
2 | is not of the form key=value                            | runs --where method.name==fitnet
2 | 'DISTILLER.TEACHER'; here it is 'teacher.source'        | config show --set DISTILLER.TEACHER=vgg13
2 | did you mean 'train.lr'?                                | PAIR --set TRAIN.LR=0.1
2 | did you mean 'train.lr'?                                | PAIR --set +train_lr=0.1
2 | 'optimizer.lr'; here it is 'train.lr'                   | PAIR --set optimizer.lr=0.1
2 | here it is 'teacher.source'                             | PAIR --set models.teacher_model.key=resnet8
2 | here it is 'teacher.source'                             | PAIR --set teacher.checkpoint=x
2 | is one value, not a section; 'train.optimizer.lr' is 'train.lr' here | PAIR --set train.optimizer.lr=0.1
2 | (from --set student.name)                               | PAIR --set student.name=resnet8
2 | train: must be a section of keys, got 'fast'            | PAIR --set train=fast
2 | runs_dir: must be a path                                | PAIR --set runs_dir=null
2 | train.betas: has too few values, got [0.9]              | PAIR --set train.optimizer=adam --set train.betas=[0.9]
2 | unknown value 'inductor'; known: auto, false, true      | PAIR --set runtime.compile=inductor
2 | unknown value 'CosineAnnealingLR'; here it is 'cosine'  | PAIR --set train.schedule=CosineAnnealingLR
2 | unknown value 'accuracy'; here it is 'top1'             | PAIR --set train.metric=accuracy
2 | unknown value 'FP32'; did you mean 'fp32'?              | PAIR --precision FP32
2 | unknown method 'hint'; here it is 'fitnet'              | PAIR --method hint
2 | unknown method 'vanilla'; here: sakd pretrain-teacher   | PAIR --method vanilla
2 | unknown method 'kd crd'; did you mean 'kd+crd'?         | PAIR --method 'kd crd'
2 | did you mean '--routers adaptive,always'?               | PAIR --router adaptive,always
2 | of a library: torchvision/densenet121, timm/densenet121 | pretrain-teacher densenet121
2 | of a library: torchvision/resnet50, timm/resnet50       | pretrain-teacher torchvision.models.resnet50
2 | it is a file of weights                                 | pretrain-teacher resnet18.pth
2 | its network is 'resnet56'                               | pretrain-teacher resnet56_vanilla
2 | is not of the form TEACHER:STUDENT, got 'resnet8-resnet8' | sweep sweep-small --pairs resnet8-resnet8
2 | more than 63 bits, got '99999999999999999999' (from --seed) | PAIR --seed 99999999999999999999
2 | train.lr: is true or false                              | PAIR --set train.lr=yes
2 | train.momentum: must be less than 1                     | PAIR --set train.momentum=1
2 | train.batch_size: must be greater than 0                | PAIR --batch-size 0
2 | train.epochs: must be greater than 0                    | PAIR --epochs 0
2 | train.epochs: must be less than or equal to 100000      | PAIR --epochs 1000000000000000000
2 | data.train: must be less than or equal to 1000000       | PAIR --dataset shapes --set data.train=1000000000
2 | data.resize: must be less than or equal to 8192| PAIR --dataset imagefolder --data-root empty --set data.resize=9999
2 | method.temperature: must be greater than 0              | PAIR --method kd --set method.temperature=0
2 | method.weight: must be greater than or equal to 0       | PAIR --method fitnet --set method.weight=-1
2 | milestone 30 must come before the last epoch (1)        | PAIR TINY --set train.milestones=[30]
2 | milestones [3, 2] must rise                             | PAIR --set train.milestones=[3,2]
2 | data.validation: must be less than 1                    | PAIR --validation 1
2 | seed: must be a whole number                            | PAIR --seed one
2 | seed: must be a whole number                            | PAIR --set seed=1.5
2 | --set 'train.epochs' is not of the form key=value       | PAIR --set train.epochs
2 | no YAML value                                           | PAIR --set seed=[
2 | no YAML value                                           | PAIR --set seed=2020-13-45
2 | nothing.yaml: a config is a mapping                     | PAIR --config nothing.yaml
2 | list.yaml: a config is a mapping                        | PAIR --config list.yaml
2 | binary.yaml: not a text file                            | PAIR --config binary.yaml
2 | empty: is a directory                                   | PAIR --config empty
2 | pipe: not a regular file                                | PAIR --config pipe
2 | is written for 'dream', not for 'distill'               | PAIR --config future.yaml
2 | stage_map                                               | PAIR TINY --set stage_map=[]
2 | stage_map                                               | PAIR TINY --set stage_map=[[2,2],[1,1]]
2 | exists and is no run directory                          | PAIR TINY --run-dir empty/..
2 | there is a run already                                  | PAIR TINY --run-dir TEACHER
2 | --resume changes no setting of a run, but train.momentum was | distill --resume future --set train.momentum=0.1
4 | written by another version of sakd ('sakd.checkpoint/99') | distill --resume future -q
3 | leaves no training image                                | pretrain-teacher resnet8 TINY --validation 0.999
2 | student: missing                                        | distill --teacher resnet8
2 | model: missing                                          | pretrain-teacher
2 | device: unknown device 'gpu'                            | pretrain-teacher resnet8 --device gpu
2 | device: 'cuda:99' is not available here                 | pretrain-teacher resnet8 --device cuda:99
2 | No such option                                          | pretrain-teacher resnet8 --bogus
2 | sakd runs rm: which runs?                               | runs rm
2 | No such command                                         | distil
2 | unknown preset 'swep-small'; did you mean 'sweep-small'? | sweep swep-small
2 | nothing.yml: no such file                               | sweep nothing.yml
2 | ~nobody-of-that-name/x.yml: nobody knows that home folder | sweep ~nobody-of-that-name/x.yml
2 | Invalid value for '--jobs':                             | sweep sweep-small --jobs two
2 | --html spots.txt: the name of an HTML file ends in .html | inspect-spots --html spots.txt
2 | Missing argument 'RUN...'                               | compare
2 | Missing argument 'FILE'                                 | sweep
2 | nowhere.yaml: no such file                              | PAIR --config nowhere.yaml
2 | broken.yaml, line 1: not valid YAML                     | PAIR --config broken.yaml
2 | is no YAML value                                        | PAIR --set 'router.run="\\ud83c\\udf93"'
2 | is beyond the last of 3 stages                          | PAIR TINY --set method.stage=9
2 | is beyond the last of 3 stages | PAIR --teacher resnet14 --pretrain TINY --set method.stage=9
2 | nothing would be learned; --set method.ce_weight=1      | PAIR TINY --method simkd --router never
2 | made by a distillation | pretrain-teacher simkd2-resnet8-resnet14
2 | made by a distillation | distill --teacher simkd2-resnet8-resnet14 TO8
2 | made by a distillation | distill --teacher resnet8 --student simkd2-resnet8-resnet14
2 | no finished adaptive run of resnet8 to resnet14         | PAIR --student resnet14 TINY --router random-matched
2 | no/where: no such file                                  | distill --teacher no/where TO8
2 | cut.safetensors: damaged                                | distill --teacher cut.safetensors TO8
2 | text.safetensors: damaged                               | distill --teacher text.safetensors TO8
2 | foreign.safetensors: not a network saved by sakd        | distill --teacher foreign.safetensors TO8
2 | damaged, its content does not fit                       | distill --teacher flipped TO8
2 | the 10 classes of cifar10, not for the {CLASSES} of shapes | distill --teacher cifar10.safetensors TO8
2 | the 10 classes of cifar10, not for the {CLASSES} of shapes | eval cifar10.safetensors FEW -q
2 | damaged, its content does not fit                       | eval flipped -q
2 | nowhere: no such file                                   | eval nowhere -q
2 | File name too long                                      | eval LONG
2 | File name too long                                      | PAIR --teacher LONG
2 | File name too long                                      | inspect-spots --runs-dir LONG
2 | no such file                                            | eval empty -q
4 | odd: not a run directory                                | eval odd -q
2 | no run with a trained network in empty                  | eval --runs-dir empty
2 | no distillation in empty                                | inspect-spots --runs-dir empty
2 | not a run directory                                     | inspect-spots empty
2 | it is a 'pretrain' run                                  | inspect-spots TEACHER
2 | Invalid value for '--top'                               | inspect-spots --top 0
2 | 'modles' is not one of                                  | list modles
3 | cifar100: files not found in       | pretrain-teacher resnet8 --data-root empty --set data.download=false
3 | cifar100: damaged file                                  | pretrain-teacher resnet8 --data-root cifar
3 | nowhere: no such folder            | PAIR --dataset imagefolder --data-root nowhere
2 | 'empty' is a folder: --dataset imagefolder --data-root empty | PAIR --dataset empty
3 | photos: holds pictures, not the files of cifar100 | PAIR --data-root photos
3 | leaves no held-out image                                | pretrain-teacher resnet8 TINY --set data.limit=3
5 | cannot make a run directory                             | pretrain-teacher resnet8 TINY -q --runs-dir broken.yaml
"""


@pytest.mark.parametrize("case", BAD.strip().splitlines(), ids=lambda case: case.split("|")[2].strip())
def test_a_mistake_costs_one_line_and_writes_nothing(
    fork_server: ForkServer, messy: CliRunner, teacher: Path, case: str
) -> None:
    code, text, line = (part.strip() for part in case.split("|"))
    known = {
        "PAIR": PAIR,
        "TINY": TINY,
        "TO8": ["--student", "resnet8", *TINY],
        "TEACHER": [str(teacher)],
        "FEW": TINY[:-2],
        "LONG": ["a" * 300],
    }
    arguments = [part for word in shlex.split(line) for part in known.get(word, [word])]
    fork_server.at(messy.path).assert_rejects(arguments, int(code), text)


@pytest.mark.parametrize("size", ["64", "200"], ids=["seen in training", "seen when judged"])
def test_numbers_that_explode_end_the_run_with_their_own_exit_code(messy: CliRunner, size: str) -> None:
    result = messy.sakd(*PAIR, *TINY, "--set", "train.lr=1e30", "--batch-size", size, "--quiet")
    assert result.code == 7
    assert [line.partition(":")[0] for line in result.err.splitlines()] == ["error", "hint"]


HINTS = """
2 | an option of distill, bench                       | pretrain-teacher resnet8 --method kd
2 | --method                                          | distill --teacher resnet8 --student resnet8 --loss kd
2 | --device                                          | pretrain-teacher resnet8 --gpu 0
2 | sakd pretrain-teacher MODEL                       | pretrain-teacher --model resnet8
2 | sakd distill --help                               | distill ''
2 | sakd predict NETWORK PATH...                      | predict --weights x
2 | hint: --preset quickstart                         | PAIR --config quickstart
2 | --student                                         | distill --model resnet8
2 | --set train.weight_decay=... or --set router.w    | distill --weight-decay 1e-4
2 | --set teacher.logits=...                          | distill --teacher-logits x.npy
2 | --set data.workers=...                            | eval --num-workers 3
2 | an option of pretrain-teacher, distill            | eval --epochs 3
2 | hint: --pairs                                     | sweep --model resnet8
2 | sakd pretrain-teacher MODEL trains one network    | yolo classify train model=resnet8 data=shapes
2 | hint: sakd eval RUN                               | val
2 | hint: sakd runs                                   | ls
2 | sakd config show --preset NAME                    | show preset quickstart
2 | sakd show key lr                                  | show lr
2 | one at a time: sakd show method kd                | show method kd+crd
2 | did you mean 'train.lr'?                          | show key train.LR
2 | behind the command: sakd COMMAND --device         | --device cpu distill
2 | hint: --batch-size                                | pretrain-teacher resnet8 --batch_size 32
2 | hint: --batch-size                                | pretrain-teacher resnet8 -b 32
2 | hint: --loss-weight or --batch-size               | distill -b 32
2 | hint: --epochs                                    | pretrain-teacher resnet8 -epochs 3
2 | hint: --run-dir                                   | pretrain-teacher resnet8 --name exp
2 | hint: --run-dir or --runs-dir                     | pretrain-teacher resnet8 --output exp
2 | hint: --out                                       | export --output exp
2 | hint: --json > FILE                               | eval --output x.json
2 | hint: --precision bf16                            | pretrain-teacher resnet8 --fp16
2 | hint: --device cpu                                | pretrain-teacher resnet8 --no-cuda
2 | hint: --set runtime.compile=false                 | pretrain-teacher resnet8 --no-compile
2 | hint: --compile alone, or --set runtime.compile=f | pretrain-teacher resnet8 --compile=false
2 | hint: --set data.download=false                   | pretrain-teacher resnet8 --no-download
2 | hint: --set init_from=...                         | pretrain-teacher resnet8 --pretrained
2 | torchrun, see sakd guide several-devices          | pretrain-teacher resnet8 --local_rank 0
2 | hint: sakd pretrain-teacher --help                | pretrain-teacher resnet8 --dropout 0.1
2 | hint: --epochs N                                  | distill --epochs
2 | hint: --epochs 3 --lr 0.1                         | pretrain-teacher resnet8 epochs=3 train.lr=0.1
2 | hint: --set train.momentum=0.8                    | pretrain-teacher resnet8 train.momentum=0.8
2 | hint: --set train.lr=0.1                          | pretrain-teacher resnet8 --set train.lr 0.1
2 | hint: --dataset shapes                            | pretrain-teacher resnet8 shapes
2 | hint: --teacher resnet14 --student resnet8        | distill resnet14 resnet8
2 | hint: --milestones 150,180                        | PAIR --milestones 150 180
2 | hint: --teacher a --teacher b                     | distill --teacher a b
2 | hint: --seed takes one value                      | PAIR --seed 1 2
2 | hint: --parallel takes no value                   | PAIR --parallel 3
2 | hint: --methods                                   | sweep sweep-small --method kd
2 | hint: --method dkd                                | distill --dkd
2 | hint: --set router.tau=...                        | distill --router.tau 3
2 | hint: --lr 0.1                                    | PAIR ++train.lr=0.1
2 | the last and the best epoch are kept              | pretrain-teacher resnet8 --save-best
2 | hint: --set train.epochs=...                      | sweep sweep-small --epochs 3
2 | hint: sakd sweep FILE                             | sweep --config x.yaml
2 | hint: sakd import-weights FILE                    | import-weights --weights x.pth
2 | sweep and 4 more                                  | predict x y --set data.resize=3
2 | sakd runs lists the runs                          | eval resnet8
3 | name an unpacked folder                           | data check broken.yaml
2 | --set method.stage=3                              | PAIR TINY --set method.stage=9
3 | sakd predict NETWORK PATH                         | predict photos/cat/1.JPG empty
"""


@pytest.mark.parametrize("case", HINTS.strip().splitlines(), ids=lambda case: case.split("|")[2].strip())
def test_a_mistake_is_told_what_to_do_instead(fork_server: ForkServer, messy: CliRunner, case: str) -> None:
    code, text, line = (part.strip() for part in case.split("|"))
    words = [part for word in shlex.split(line) for part in {"PAIR": PAIR, "TINY": TINY}.get(word, [word])]
    result = fork_server.at(messy.path).assert_rejects(words, int(code), "")
    assert text in result.err.splitlines()[1]
