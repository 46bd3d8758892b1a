"""Files of one's own with a fault each: kind, content, exit code, what is told in one line."""

BASE = "import torch; from torch import nn\nfrom sakd_cli.api import *\nfrom sakd_cli.api import Dataset, Decision\n"
ROUTER = BASE + "class R(Router):\n    def decide(self, seen):\n        return {}\n"
LOSS = BASE + "class R(SpotwiseDistiller):\n    def spot_loss(self, k, student, teacher, weight):\n        return {}\n"
DATA = BASE + "def R():\n    one = torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8) % 2\n    return {}\n"
INIT = BASE + "class R(SpotwiseDistiller):\n def __init__(self, spots):\n"
LISTED = INIT + "  super().__init__(spots)\n  layer = nn.Conv2d(*spots[0].student_shape[:1], 64, 1)\n"
LISTED += "  self.layers = [layer]\n def spot_loss(self, k, student, teacher, weight):\n"
LISTED += "  return (weight * (self.layers[0](student) - teacher).flatten(1).mean(1)).mean()\n"
BACKWARD = LOSS.format("[loss := (weight * student.flatten(1).var(1)).mean(), loss.backward()][0]")
WARNED = ["warning", "error", "hint"]  # of a teacher at chance, before the first batch
WRONG = [
    ("router", "class R(\n", 2, r"bad\.py, line 1: '\(' was never closed"),
    ("router", "import torch\nimport nothing_like_it\n", 2, r"bad\.py, line 2: ModuleNotFoundError"),
    ("router", "x = 1\n\n1 / 0\n", 2, r"bad\.py, line 3: ZeroDivisionError"),
    ("router", "class S: pass\n", 2, r"bad\.py: unknown name 'R'; known: S"),
    ("router", "class R: pass\n", 2, r"bad\.py, line 1: bad\.py:R is no Router"),
    ("router", "import sys\nsys.exit(3)\n", 2, r"bad\.py, line 2: SystemExit"),
    ("router", BASE + "class R(Router): pass\n", 2, r"bad\.py, line 4: .* has no method decide"),
    ("router", ROUTER.format("exit(0)"), 2, r"bad\.py, line 6: SystemExit"),
    ("router", ROUTER.format("seen.nothing"), 2, r"bad\.py, line 6: AttributeError"),
    ("router", ROUTER.format("None"), 2, r"bad\.py, line 5: R\.decide: must return a tensor .* not a NoneType"),
    (
        "router",
        ROUTER.format("torch.ones(7, 3)"),
        2,
        r"line 5: R\.decide: must return a tensor .*\[2, \d+\]\) or a Decision, not torch\.float32 of shape \[7, 3\]",
    ),
    (
        "router",
        ROUTER.format("torch.ones(5, dtype=torch.int64)"),
        2,
        r"line 5: R\.decide: must return .* not torch\.int64 of shape \[5\]",
    ),
    (
        "router",
        ROUTER.format("Decision(torch.ones(7, 3))"),
        2,
        r"line 5: R\.decide: the weight .* shape \[2, \d+\], not .*7, 3",
    ),
    (
        "router",
        ROUTER.format("Decision(torch.ones(2, len(seen.labels)), torch.ones(1))"),
        2,
        r"line 5: R\.decide: the gate",
    ),
    (
        "router",
        ROUTER.format("Decision(torch.ones(2, len(seen.labels)), 2 * torch.ones(len(seen.labels), 2))")
        + "    settings = LearnedConfig\n",
        2,
        r"line 5: R\.decide: gives a gate that is NaN or outside of 0 to 1",
    ),
    (
        "router",
        ROUTER.format("Decision(torch.ones(2, len(seen.labels)), None, 2 * torch.ones(2, len(seen.labels)))"),
        2,
        r"line 5: R\.decide: gives a probability that is NaN or outside of 0 to 1",
    ),
    (
        "router",
        ROUTER.format("seen.student_loss * torch.nan"),
        7,
        r"line 5: R\.decide: .*NaN or outside of 0 to 1",
    ),
    (
        "router",
        ROUTER.format("seen.student_loss * 0 + 2"),
        7,
        r"line 5: R\.decide: .*NaN or outside of 0 to 1",
    ),
    (
        "router",
        BASE + "class R(Router):\n def __init__(self, spots, rate):\n  pass\n decide = 1\n",
        2,
        r"bad\.py, line 5: .* takes 'rate'",
    ),
    ("router", BASE + "class R(Router):\n settings = decide = int\n", 2, r"bad\.py, line 4: .* carries `settings`"),
    (
        "router",
        BASE + "class R(Router):\n def __init__(self):\n  super().__init__()\n  self.a = torch.nn.Linear(2, 2)\n"
        " def decide(self, seen):\n  return seen.student_loss\n",
        2,
        r"bad\.py, line 5: R has weights, and nothing trains them",
    ),
    (
        "router",
        INIT.replace("SpotwiseDistiller", "Router") + "  self.rate = 0.5\n def decide(self, seen):\n  return 1\n",
        2,
        r"bad\.py, line 5: R\.__init__ must begin with super\(\)\.__init__\(spots\)",
    ),
    ("method", LOSS.format("student.nothing"), 2, r"bad\.py, line 6: AttributeError"),
    ("method", LOSS.format("weight"), 2, r"bad\.py, line 5: R\.spot_loss: .* shape \[1\]"),
    ("method", LOSS.format("weight.sum() * torch.inf"), 7, r"bad\.py, line 5: R\.spot_loss: .*feature is not finite"),
    ("method", LOSS.format("student.norm()"), 2, r"line 5: R\.spot_loss: gives .* at spot .*exactly 0"),
    (
        "method",
        LOSS.format("(weight * 0 * student.sum()).square().sum().sqrt()"),
        7,
        r"bad\.py, line 5: R\.spot_loss: perhaps its gradient, .* at 0: step 1: gradient",
    ),
    ("method", LOSS.format("weight.sum() / weight.sum()"), 2, r"bad\.py, line 5: R\.spot_loss: gives nan .*exactly 0"),
    ("method", INIT + "  pass\n def spot_loss(self, k, s, t, w):\n  pass\n", 2, r"bad\.py, line 5: R.* super"),
    ("method", BASE + "class R(Router): pass\n", 2, r"bad\.py, line 4: .* is no Distiller of sakd_cli\.api"),
    (
        "method",
        LOSS.replace("    def", "    places = 'nowhre'\n    def").format("0"),
        2,
        r"unknown place 'nowhre'",
    ),
    ("dataset", DATA.format("3"), 3, r"bad\.py, line 4: returned a int, not a Dataset"),
    ("dataset", DATA.format("Dataset.of((one[0].float(), one[1]), one)"), 3, r"the images of train must be uint8"),
    ("dataset", DATA.format("Dataset.of(one, one, ['a'])"), 3, r"the labels of train must be 0 to 0, not 0 to 1"),
    (
        "dataset",
        DATA.format("Dataset('', ('a', 'b'), (0.5,) * 3, (0.5,) * 3, 1, False, one, one)"),
        3,
        r"bad\.py, line 4: train must be a Split of tensors",
    ),
    (
        "dataset",
        DATA.format("Dataset('', ('a', 'b'), (0.5,) * 3, (0.0, 0, 0), 1, False, one, one)"),
        3,
        r"its std must be three numbers above 0, of pixels / 255, not \(0\.0, 0, 0\)",
    ),
    (
        "dataset",
        DATA.format("Dataset.of(one, one, padding=-1)"),
        3,
        r"its padding must be a number of pixels from 0, not -1",
    ),
    ("dataset", DATA.format("Dataset.of(one, one, flip='yes')"), 3, r"its flip must be True or False, not 'yes'"),
    (
        "dataset",
        DATA.format("__import__('dataclasses').replace(Dataset.of(one, one), scale=(0.2, 1.0))"),
        3,
        r"its scale and seen are for pictures in files",
    ),
    ("dataset", DATA.format("one.nothing"), 2, r"bad\.py, line 6: AttributeError"),
    ("student", "def R(num_classes):\n    return num_classes.nothing\n", 2, r"bad\.py, line 2: AttributeError"),
    ("student", "def R(num_classes):\n    return 3\n", 2, r"bad\.py:R: returned a int, not an nn\.Module"),
    (
        "router",
        ROUTER.format("seen.student_loss.to(torch.complex64)"),
        2,
        r"line 5: R\.decide: .* not torch\.complex64",
    ),
    ("router", ROUTER.format("torch.ones(len(seen.labels), device='meta')"), 2, r"line 5: R\.decide: .*device meta"),
    (
        "router",
        ROUTER.format("Decision(torch.ones(2, len(seen.labels)), probability=torch.ones(3))"),
        2,
        r"line 5: R\.decide: the probability of its Decision .* not torch\.float32 of shape \[3\]",
    ),
    (
        "router",
        ROUTER.replace("(self, seen)", "(self)").format("1"),
        2,
        r"line 5: R\.decide: TypeError: R\.decide\(\) tak",
    ),
    (
        "router",
        ROUTER.format("seen.student_loss > 0") + "    def begin_epoch(self):\n        pass\n",
        2,
        r"line 5: R\.decide: TypeError: R\.begin_epoch\(\) takes",
    ),
    (
        "router",
        ROUTER.format("seen.student_loss > 0") + "    noise_width = 'one'\n",
        2,
        r"line 4: R\.noise_width must be a whole number, not 'one'",
    ),
    (
        "router",
        ROUTER.format("seen.student_loss > 0") + "    settings = LearnedConfig\n",
        2,
        r"line 5: R\.decide: gives no gate to learn by",
    ),
    (
        "method",
        LOSS.format("(weight * student.detach().flatten(1).mean(1)).mean()"),
        2,
        r"R\.spot_loss: gives a loss with",
    ),
    ("method", LOSS.format("student.mean() * weight.zero_().sum()"), 2, r"R\.spot_loss: changes its `weight`"),
    ("method", LOSS.format("(weight * teacher.zero_().sub(student).flatten(1).mean(1)).mean()"), 2, "in place, which"),
    ("method", LOSS.format("student.mean().mul(weight.sum()).to('meta')"), 2, r"gives a loss on device meta, and not"),
    ("method", BACKWARD, 2, r"line 5: R\.spot_loss: RuntimeError: Trying to backward"),
    (
        "method",
        LOSS.replace("    def", "    @torch.no_grad()\n    def").format("student.mean()"),
        2,
        r"line 5: R\.spot_",
    ),
    ("method", LISTED, 2, r"R\.spot_loss: uses weights that no optimizer gets: make them in __init__"),
    ("method", LISTED.replace("student)", "student.detach())"), 2, "no optimizer gets"),
    (
        "method",
        LISTED.replace("[layer]", "nn.ModuleList([layer])").replace("student)", "student.detach())"),
        2,
        "by what",
    ),
    ("method", LISTED.replace("[layer]", "nn.ModuleList([nn.LazyConv2d(64, 1)])"), 2, "R has layers of unknown size"),
    ("dataset", DATA.format("torch.set_grad_enabled(False)"), 2, r"bad\.py: .*switches gradients off"),
    ("method", LOSS.replace("    def", "    scope = 'batc'\n    def").format("0"), 2, r"unknown scope 'batc'; did you"),
    (
        "dataset",
        DATA.format("Dataset.of((one[0][:, 0], one[1]), one)"),
        3,
        r"the images of train must be .* \[8, 8, 8\]",
    ),
    ("dataset", DATA.format("Dataset.of(one, one, ['a', 'a'])"), 3, r"its classes must be texts, each another one"),
    ("dataset", DATA.format("Dataset.of(one, one, ['a', 3])"), 3, r"its classes must be texts, each another one"),
    ("dataset", DATA.format("torch.set_default_dtype(torch.float64)"), 2, r"bad\.py: .*sets torch's default type"),
    (
        "student",
        "from torch.nn import *\ndef R(num_classes):\n body = sum([[Conv2d(8, 8, 3, 2), ReLU()] for _ in 'ab'], [])\n"
        " head = AdaptiveAvgPool2d(1), Flatten(), Linear(8, num_classes)\n"
        " return Sequential(Conv2d(3, 8, 3, 2), ReLU(), *body, *head).requires_grad_(False)\n",
        2,
        r"bad\.py:R: none of its parameters is trained",
    ),
]
