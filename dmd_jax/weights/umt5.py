"""Tables of UMT5 encoders in files of other programs: names, layouts and settings.

"diffusers" is transformers' UMT5EncoderModel, as the text_encoder folder of a diffusers pipeline
holds it; "original" is the .pth file of the Wan repository. Imports the network and the row.
"""

from dmd_jax.models.umt5 import UMT5Config
from dmd_jax.weights.table import Row

LAYOUTS = ("diffusers", "original")

# ours: (diffusers, original)
LINEAR = {
    "attention/query": ("layer.0.SelfAttention.q", "attn.q"),
    "attention/key": ("layer.0.SelfAttention.k", "attn.k"),
    "attention/value": ("layer.0.SelfAttention.v", "attn.v"),
    "attention/out": ("layer.0.SelfAttention.o", "attn.o"),
    "ffn/gate": ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
    "ffn/up": ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
    "ffn/down": ("layer.1.DenseReluDense.wo", "ffn.fc2"),
}
# Of the same layout as ours.
PLAIN = {
    "attention/positions": (
        "layer.0.SelfAttention.relative_attention_bias",
        "pos_embedding.embedding",
    ),
    "attention_norm/scale": ("layer.0.layer_norm", "norm1"),
    "ffn_norm/scale": ("layer.1.layer_norm", "norm2"),
}
BLOCK = ("encoder.block.{}", "blocks.{}")
TOKENS = ("shared.weight", "token_embedding.weight")
NORM = ("encoder.final_layer_norm.weight", "norm.weight")

# {other name: name in the rows} of a tensor. A file has either, or both with equal values.
ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}


def table(config, layout):
    """The rows of an encoder of `config` in a file of `layout`, "diffusers" or "original"."""
    del config  # the rows are the same for all
    column = LAYOUTS.index(layout)

    def name(theirs):
        return f"{BLOCK[column]}.{theirs[column]}.weight"

    return [
        Row("tokens", TOKENS[column]),
        Row("norm/scale", NORM[column]),
        *(
            Row(f"blocks/{ours}/kernel", name(theirs), "o i -> i o")
            for ours, theirs in LINEAR.items()
        ),
        *(Row(f"blocks/{ours}", name(theirs)) for ours, theirs in PLAIN.items()),
    ]


# In config.json: settings that must have these values, and one that shapes do not determine.
FIXED = {"model_type": "umt5", "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6}
DISTANCE = "relative_attention_max_distance"


def config_of(shapes, layout, settings=None):
    """The UMT5Config of a file.

    Args:
        shapes: {name: shape} of its tensors, by any of their ALIASES.
        settings: in the layout "diffusers", its parsed config.json, for the largest relative
            distance, which is 128 without one. The original layout has none.

    Raises:
        ValueError: it is not of a UMT5 encoder, or of one that this library does not have.
    """
    settings = (settings or {}) if layout == "diffusers" else {}
    for name, wanted in FIXED.items():
        if (found := settings.get(name, wanted)) != wanted:
            raise ValueError(f"{name} is {found!r} in its config.json, and can only be {wanted!r}")
    shapes = {ALIASES.get(name, name): shape for name, shape in shapes.items()}
    one = {row.ours: row.theirs for row in table(None, layout)}

    def shape(ours):
        return shapes[one[ours].format(0)]

    try:
        vocab, dim = shape("tokens")
        buckets, heads = shape("blocks/attention/positions")
        return UMT5Config(
            vocab=vocab,
            dim=dim,
            ffn=shape("blocks/ffn/up/kernel")[0],
            heads=heads,
            head_dim=shape("blocks/attention/query/kernel")[0] // heads,
            depth=sum(one["blocks/ffn_norm/scale"].format(i) in shapes for i in range(len(shapes))),
            buckets=buckets,
            max_distance=settings.get(DISTANCE, UMT5Config.max_distance),
        )
    except KeyError as error:
        raise ValueError(f"there is no {error}: this is no UMT5 encoder") from None


def to_settings(config, layout):
    """The config.json with which the programs of `layout` load such an encoder; {} for the
    original layout, which has none."""
    if layout == "original":
        return {}
    c = config
    return {
        "architectures": ["UMT5EncoderModel"],
        "vocab_size": c.vocab,
        "d_model": c.dim,
        "d_ff": c.ffn,
        "d_kv": c.head_dim,
        "num_heads": c.heads,
        "num_layers": c.depth,
        "relative_attention_num_buckets": c.buckets,
        DISTANCE: c.max_distance,
        **FIXED,
    }
