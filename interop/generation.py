"""generation_config.json: how text is generated, to our settings and back.

What has no counterpart here is named in one line with its value.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from triform.models import ModelConfig
from triform.models.decode import DecodeConfig

NAME = "generation_config.json"
# Ids of special tokens are read with the tokenizer.
IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
# What describes the file, or how transformers computes and returns the same text.
SILENT = (
    *("transformers_version", "_from_model_config", "use_cache", "cache_config"),
    *("cache_implementation", "return_dict_in_generate", "output_attentions"),
    *("output_hidden_states", "output_scores", "output_logits", "low_memory"),
    *("remove_invalid_values", "is_assistant", "compile_config", "disable_compile"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "prefill_chunk_size"),
    *("assistant_confidence_threshold", "target_lookbehind", "assistant_lookbehind"),
    *("forced_eos_token_id",),  # ends a text that is cut at its longest length
)
# Values with which a key changes nothing; None, False, 0 and empty ones do not either.
NEUTRAL = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "typical_p": 1.0,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
}
# Keys that a config.json holds where there is no generation_config.json.
OLDER = (
    *("num_beams", "length_penalty", "early_stopping", "max_length", "min_length"),
    *("do_sample", "temperature", "top_k", "top_p", "typical_p", "bad_words_ids"),
    *("repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("num_beam_groups", "diversity_penalty", "forced_bos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens"),
)
TOP_K = 50  # transformers' own, where sampling is on and no number is given
Keys = Mapping[str, Any]


def settings_of(hf: Keys, generation: Keys) -> dict[str, Any]:
    """The settings of a folder: of its generation_config.json, else of config.json."""
    found = dict(generation or {key: hf[key] for key in OLDER if key in hf})
    # transformers reads these in pipelines for one task.
    return found | {k: hf[k] for k in ("task_specific_params",) if hf.get(k)}


def taken(given: Keys, model: ModelConfig) -> tuple[DecodeConfig, list[str]]:
    """(our settings; one line for every key that is not taken or means another)."""
    left = {k: x for k, x in given.items() if k not in (*SILENT, *IDS) and _acts(k, x)}
    found, lines = DecodeConfig(method="greedy"), []
    sampled = left.pop("do_sample", False)
    if sampled:
        found.method, found.top_k = "sample", TOP_K
    for key in ("temperature", "top_k", "top_p", "repetition_penalty"):
        if key in left:
            _take(found, key, key, left)
    if "no_repeat_ngram_size" in left:
        _take(found, "no_repeat_ngram", "no_repeat_ngram_size", left)
    if given.get("top_k") == 0:
        found.top_k = 0
    lines += _beams(found, left, sampled)
    lines += _length(found, left, model)
    words = [*left.get("bad_words_ids", ()), *([x] for x in _suppressed(left))]
    single = {ids[0] for ids in words if len(ids) == 1}
    found.banned = tuple(sorted(single - _ends(given)))
    if all(len(ids) == 1 for ids in words):
        left.pop("bad_words_ids", None)
    left.pop("suppress_tokens", None)
    rest = [f"{key}={_shown(value)} has no counterpart" for key, value in left.items()]
    return found, [f"{NAME}: {line}" for line in (*lines, *rest)]


def _acts(key: str, value: Any) -> bool:
    empty = value is None or value is False or value in (0, "") or value in ([], {})
    return not empty and value != NEUTRAL.get(key)


def _take(found: DecodeConfig, ours: str, key: str, left: dict[str, Any]) -> bool:
    """Moves a value of `left` into `found`, unless our rules forbid it."""
    before, value = getattr(found, ours), left[key]
    setattr(found, ours, type(before)(value))
    try:
        found.validate()
    except ValueError:
        setattr(found, ours, before)
        return False
    del left[key]
    return True


def _beams(found: DecodeConfig, left: dict[str, Any], sampled: bool) -> list[str]:
    """Sets beams and their penalty; lines."""
    count = left.pop("num_beams", 1)
    if count <= 1:
        left.pop("length_penalty", None)  # of beams only
        left.pop("early_stopping", None)
        return []
    if sampled:
        return [f"num_beams={count} is not taken: samples are drawn without beams"]
    found.method, found.beam_size = "beam", count
    penalty = float(left.get("length_penalty", 1.0))
    if "length_penalty" not in left or not _take(
        found, "length_penalty", "length_penalty", left
    ):
        found.length_penalty = 1.0
    return [
        f"num_beams={count} and length_penalty={penalty} are decode.beam_size and "
        f"decode.length_penalty; a sum is divided by ((5 + n) / 6) ** "
        f"{found.length_penalty}, by n ** {penalty} there, so some texts differ"
    ]


def _length(found: DecodeConfig, left: dict[str, Any], model: ModelConfig) -> list[str]:
    """Sets the longest length; lines."""
    given = {k: left.pop(k) for k in ("max_length", "max_new_tokens") if k in left}
    if not given:
        return []
    key, most = next(reversed(given.items()))
    if "S" not in model.longest():
        return [f"{key}={most} is not taken: generate.py --max_tokens says how many"]
    # Theirs counts the decoder's start.
    wanted, longest = most - (key == "max_length"), model.longest().get("L", most)
    found.max_len = max(1, min(wanted, longest))
    if wanted > longest:
        return [f"{key}={most}: the model writes at most {longest} tokens"]
    return []


def _suppressed(given: Keys) -> list[int]:
    return list(given.get("suppress_tokens") or ())


def _ends(given: Keys) -> set[int]:
    """transformers lifts a ban on what ends a text."""
    ends = given.get("eos_token_id")
    return set(ends) if isinstance(ends, list) else {ends}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def given_back(
    decode: DecodeConfig, model: ModelConfig, longest: int, original: Keys
) -> dict[str, Any]:
    """The keys of generation_config.json that say `decode`; {} if `original` does.

    `longest` is the number of tokens that are written where `decode` leaves it open.
    """
    if original and taken(original, model)[0] == decode:
        return {}
    found: dict[str, Any] = {}
    writes = "S" in model.longest()
    if decode.method == "sample":
        found = {
            "do_sample": True,
            "temperature": decode.temperature,
            "top_k": decode.top_k,
            "top_p": decode.top_p,
        }
    elif decode.method == "beam":
        found = {
            "num_beams": decode.beam_size,
            "length_penalty": decode.length_penalty,
        }
    elif original:
        found = {"do_sample": False, "num_beams": 1}
    if writes:
        found["max_length"] = (decode.max_len or longest) + 1
    if decode.repetition_penalty != 1:
        found["repetition_penalty"] = decode.repetition_penalty
    if decode.no_repeat_ngram:
        found["no_repeat_ngram_size"] = decode.no_repeat_ngram
    if decode.banned:
        found["bad_words_ids"] = [[i] for i in decode.banned]
    return found


def merged(original: Keys, ours: Keys) -> dict[str, Any]:
    """`original` with our keys in place of all that say the same."""
    replaced = {f.name for f in dataclasses.fields(DecodeConfig)} | {"max_new_tokens"}
    replaced |= {"do_sample", "num_beams", "bad_words_ids", "suppress_tokens"}
    replaced |= {"no_repeat_ngram_size"}
    kept = {k: x for k, x in original.items() if not ours or k not in replaced}
    return {**kept, **ours}
