"""What the metadata of a trained w says of its pairs and of its base model: how to have them again, and how to know them.

`pairs_of`: how they were written or read, as far as that is not usual; `pairs_hash`: a hash of their texts; `base_content`: a
hash of the base model's files.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from dataclasses import fields as fields_of

from ws.cache.syntax import digest
from ws.model.lm import LM
from ws.train.pairs import Pair, PairConfig
from ws.train.written import named_pairs


def pairs_meta(cfg: PairConfig, rows: Sequence[Pair]) -> dict:
    """The metadata of a w that is trained on these pairs."""
    usual, mine = asdict(PairConfig()), asdict(replace(cfg, file=named_pairs(cfg.file)))
    return {
        "pairs_of": {key: value for key, value in mine.items() if value != usual[key]},
        "pairs_hash": pairs_hash(rows),
    }


def pairs_hash(rows: Sequence[Pair]) -> str:
    """12 hex digits over user turns and answers."""
    return digest(repr([(row.user, row.response_pos, row.response_neg) for row in rows]).encode())[:12]


def pairs_config(known: dict) -> PairConfig:
    """A `PairConfig` from its fields as JSON holds them."""
    return PairConfig(**known | {"wordings": tuple(known.get("wordings", ()))})


def own_pairs(meta: dict) -> PairConfig | None:
    """The pairs that a w of this metadata was trained on; None where it does not say. ValueError for what cannot be read."""
    if (known := meta.get("pairs_of")) is None:
        return None
    fields = {f.name: f.type for f in fields_of(PairConfig)} | {"wordings": list | tuple}
    if not isinstance(known, dict) or not all(isinstance(v, fields.get(k, ())) for k, v in known.items()):
        raise ValueError(f"pairs_of in the metadata of w: {known!r} names no pairs")
    try:
        return pairs_config(known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"pairs_of in the metadata of w: {known!r} names no pairs ({error})") from None


def base_content(lm: LM) -> str:
    """What tells a model's files apart from others of its name, whatever the dtype; '' where that is not known."""
    return lm.fingerprint.partition("/")[0]


def other_base(meta: dict, lm: LM) -> bool:
    """Whether a w of this metadata was trained from other files under the model's name than it has now."""
    known, mine = meta.get("base_content"), base_content(lm)
    return bool(known and mine and known != mine)
