"""Names of modules in traced and compiled programs, and what kind of module each is."""

import re

# Kind -> regular expression of a path, first match counts. What no row matches is
# 'other'. Paths are those of parameters, less the parameter itself.
KINDS = (
    ("optimiser", r"(^|/)optimiser(/|$)"),
    ("norms", r"norm(/|$)"),
    ("attention", r"(self|cross)_attention(/|$)"),
    ("feed-forward", r"feed_forward(/|$)"),
    (
        "logits and loss",
        r"_logits(/|$)|(^|/)(\w+_)?head(/|$)|(^|/)(loss|pooler|heads_\d+)(/|$)",
    ),
    ("embedding", r"(^|/)(embedding|positions|patches|\w+_embedding|frontend)(/|$)"),
)

# 'transpose(jvp(LanguageModel))', 'checkpoint', 'rematted_computation': what the
# derivative and recomputation add to the names of modules.
_WRAPPED = re.compile(r"[\w.<>-]+\(([^()]*)\)")
# 'jit(step)', 'jit(_where)': functions, not modules.
_CALLED = re.compile(r"\b(?:p?jit|pmap)\([^()]*\)")
_ADDED = {"", "jit", "pjit", "scan", "while", "body", "cond", "checkpoint", "remat"}
_ADDED |= {"remat2", "rematted_computation", "closed_call", "main", "vmap"}


def path_of(scope: str) -> str:
    """'decoder/layer_0/self_attention/query' of the name stack of an operation.

    The name of the model's class, at the front, is left out; '' outside all modules.
    """
    scope, before = _CALLED.sub("", scope), None
    while before != scope:
        before, scope = scope, _WRAPPED.sub(r"\1", scope)
    found: list[str] = []
    for part in scope.split("/"):
        # 'frontend.embed' is a method of the module `frontend`.
        name = part if "," in part else part.rpartition(".")[2]
        model = not found and re.fullmatch("[A-Z][A-Za-z]*", name)
        # A scanned trunk says `layers` twice.
        if name not in _ADDED and not model and found[-1:] != [name]:
            found.append(name)
    return "/".join(found)


def kind_of(path: str) -> str:
    """The kind of module that a path lies in."""
    for name, pattern in KINDS:
        if re.search(pattern, path):
            return name
    return "other"
