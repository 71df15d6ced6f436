"""The optimisers by name: which library has them, what they make of the learning rate, and which cannot work here.

Names only, so that a slip of the finger is answered before torch is imported; helpers/training/optimizers.py makes them.
"""

from __future__ import annotations

import ast
import shlex
from typing import Any

OPTIMIZERS = (
    "auto",
    "adamw",
    "adamw_bf16",
    "adamw8bit",
    "paged_adamw",
    "paged_adamw8bit",
    "adafactor",
    "lion",
    "lion8bit",
    "paged_lion8bit",
    "prodigy",
    "dadaptation",
    "schedulefree",
)

# The others that pytorch-optimizer 4.1 has; its adamw, adafactor, lion and prodigy are named above.
_MORE = """
    a2grad accsgd adabelief adabound adadelta adagc adai adalite adam adamax adamc adamg adamod adamp adams adamwsn adan adanorm adapnm
    adasmooth adatam ademamix adopt aggmo aida alice amos ano apollodqn avagrad bcos came dadaptadagrad dadaptadam dadaptadan
    dadaptlion dadaptsgd dash diffgrad dualadam emofact emolynx emonavi exadam fadam flashadamw focus fromage ftrl grams
    gravity grokfastadamw kate lamb laprop lars madgrad mars msvag nadam nero novograd padam pid pnm qhadam qhm racs radam
    ranger rmsprop rose sara schedulefreeadamw schedulefreeradam schedulefreesgd scion scionlight sgd sgdp sgdsai sgdw shampoo signsgd
    simplifiedademamix sm3 soap spam splus srmm stableadamw swats tam tiger vsgd yogi
"""
PYTORCH_OPTIMIZER = tuple(_MORE.split())

_MATRICES = "it updates matrices and other weights by different rules, and has to be told which is which group by group"
_CLOSURE = "it computes the loss several times in a step, and here a step has one gradient"
_SECOND_ORDER = "it needs the gradient of the gradient, which would double memory and time of every step"
_IN_BACKWARD = "it updates the weights while the gradient is computed, so nothing could be clipped, accumulated or shared by processes"
_OBJECTS = "it keeps objects in its state that a checkpoint of tensors and numbers cannot hold"
_HIDDEN_STATE = "it keeps a state that it does not show, so a resumed run would go another way"
_OWN_RATE = "it sets its learning rate itself from its earlier ones, which --lr_scheduler would overwrite"
REFUSED = {
    **dict.fromkeys(("adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon"), _MATRICES),
    **dict.fromkeys(("alig", "bsam", "lbfgs"), _CLOSURE),
    **dict.fromkeys(("adahessian", "sophiah"), _SECOND_ORDER),
    **dict.fromkeys(("adalomo", "lomo"), _IN_BACKWARD),
    **dict.fromkeys(("adashift", "conda", "scalableshampoo"), _OBJECTS),
    **dict.fromkeys(("magma", "stablespam"), _HIDDEN_STATE),
    **dict.fromkeys(("asgd", "ranger21"), _OWN_RATE),
    **dict.fromkeys(("apollo", "fira", "galore"), "it has to be told group by group which weights have how low a rank, and else is Adam"),
    "adammini": "it has to be told the blocks of a language model",
    "demo": "it exchanges compressed gradients itself, and here processes have shared them already",
    "kron": "it draws from a random generator that the seed of a run does not reach",
    "lorarite": "it takes weights for the two matrices of an adapter by the order they come in",
    "spectralsphere": "it takes matrices only",
}

LIBRARIES = {  # optimiser => module, package
    **dict.fromkeys(("adamw8bit", "paged_adamw", "paged_adamw8bit", "lion8bit", "paged_lion8bit"), ("bitsandbytes", "bitsandbytes")),
    **dict.fromkeys(("lion", "dadaptation", *PYTORCH_OPTIMIZER), ("pytorch_optimizer", "pytorch-optimizer")),
    "prodigy": ("prodigyopt", "prodigyopt"),
    "schedulefree": ("schedulefree", "schedulefree"),
}

# They estimate the size of a step themselves; the learning rate is a factor to it, 1 where all goes well.
ADAPTIVE_RATE = frozenset(("prodigy", "dadaptation", *(name for name in PYTORCH_OPTIMIZER if name.startswith("dadapt"))))
# They train one set of weights and mean another, an average.
AVERAGING = frozenset(("schedulefree", "splus", *(name for name in PYTORCH_OPTIMIZER if name.startswith("schedulefree"))))
# Forms of AdamW, which take its settings and defaults.
ADAM_FORMS = frozenset(
    ("auto", "adamw", "adamw_bf16", "adamw8bit", "paged_adamw", "paged_adamw8bit", "prodigy", "dadaptation", "schedulefree")
)
ADAM_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8}


def parse_optimizer_args(text: str | None) -> dict[str, Any]:
    """`"betas=0.9,0.99 amsgrad=true name=x"` => arguments: numbers, true/false, none, tuples of them where a comma stands, or words.

    ValueError says what cannot be read.
    """
    arguments: dict[str, Any] = {}
    for word in shlex.split(text or ""):
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{word!r} is not of the form key=value")
        if key in arguments:
            raise ValueError(f"{key} stands there twice")
        arguments[key] = _value(value)
    return arguments


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if "," in text:
        return tuple(_value(part.strip()) for part in text.strip("()[]").split(",") if part.strip())
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, int | float) else text
