"""JSON schemas that nobody wrote, of the kinds that people write."""

from hypothesis import strategies as st

WORDS = st.text("abcdé_", min_size=1, max_size=6)
_PATTERNS = ["[a-z]{2,5}", "^x+$", "(ab|cd)*e", "[0-9]{3}-[0-9]{4}", "é.{0,3}"]
_KINDS = ["boolean", "null", "string", "number", "integer"]
LEAVES = st.one_of(
    st.sampled_from(_KINDS).map(lambda kind: {"type": kind}),
    st.lists(st.sampled_from(_KINDS), min_size=1, max_size=3, unique=True).map(lambda kinds: {"type": kinds}),
    st.builds(lambda kind, low, size: {"type": kind, "minimum": low, "maximum": low + size},
              st.sampled_from(["integer", "number"]), st.integers(-1000, 1000), st.integers(0, 100)),
    st.builds(lambda low, size: {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": low + size},
              st.integers(-9, 9), st.integers(1, 9)),
    st.builds(lambda n: {"type": "integer", "multipleOf": n}, st.integers(1, 30)),
    st.builds(lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size},
              st.integers(0, 4), st.integers(0, 6)),
    st.builds(lambda values: {"enum": values},
              st.lists(st.one_of(WORDS, st.integers(-9, 9), st.none()), min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, st.one_of(WORDS, st.lists(WORDS, max_size=2), st.integers(-9, 9))),
    st.sampled_from(["date", "uuid", "ipv4", "time", "email"]).map(lambda kind: {"type": "string", "format": kind}),
    st.sampled_from(_PATTERNS).map(lambda p: {"type": "string", "pattern": f"^({p})$"}),
)  # fmt: skip


def _larger(inner):
    return st.one_of(
        st.builds(lambda items, low, size: {"type": "array", "items": items, "minItems": low, "maxItems": low + size},
                  inner, st.integers(0, 2), st.integers(0, 3)),
        st.builds(lambda first, items: {"type": "array", "prefixItems": first, "items": items, "maxItems": 4},
                  st.lists(inner, min_size=1, max_size=3), st.one_of(st.just(False), inner)),
        st.builds(
            lambda properties, required, more: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[: required],
                **({} if more is None else {"additionalProperties": more}),
            },
            st.dictionaries(WORDS, inner, max_size=4), st.integers(0, 4), st.sampled_from([None, False, True]),
        ),
        st.builds(lambda choices: {"anyOf": choices}, st.lists(inner, min_size=1, max_size=3)),
    )  # fmt: skip


SCHEMAS = st.recursive(LEAVES, _larger, max_leaves=6)
