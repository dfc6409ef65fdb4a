"""Tables of Wan transformers in files of other programs: names, layouts and settings.

"diffusers" is WanTransformer3DModel; "original" is the layout of the Wan repository, which
Self-Forcing's checkpoints, ComfyUI and LightX2V share. Imports the network and the row.
"""

import math

from dmd_jax.models.wan import PATCH, WanConfig
from dmd_jax.weights.table import Row

LAYOUTS = ("diffusers", "original")

# ours: (diffusers, original)
LINEAR = {
    "text_mlp/up": ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    "text_mlp/down": ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    "time_mlp/up": ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    "time_mlp/down": ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    "modulation": ("condition_embedder.time_proj", "time_projection.1"),
    "blocks/self_attention/query": ("blocks.{}.attn1.to_q", "blocks.{}.self_attn.q"),
    "blocks/self_attention/key": ("blocks.{}.attn1.to_k", "blocks.{}.self_attn.k"),
    "blocks/self_attention/value": ("blocks.{}.attn1.to_v", "blocks.{}.self_attn.v"),
    "blocks/self_attention/out": ("blocks.{}.attn1.to_out.0", "blocks.{}.self_attn.o"),
    "blocks/cross_attention/query": ("blocks.{}.attn2.to_q", "blocks.{}.cross_attn.q"),
    "blocks/cross_attention/key": ("blocks.{}.attn2.to_k", "blocks.{}.cross_attn.k"),
    "blocks/cross_attention/value": ("blocks.{}.attn2.to_v", "blocks.{}.cross_attn.v"),
    "blocks/cross_attention/out": ("blocks.{}.attn2.to_out.0", "blocks.{}.cross_attn.o"),
    "blocks/ffn/up": ("blocks.{}.ffn.net.0.proj", "blocks.{}.ffn.0"),
    "blocks/ffn/down": ("blocks.{}.ffn.net.2", "blocks.{}.ffn.2"),
    "head": ("proj_out", "head.head"),
}
RMS_NORM = {
    "blocks/self_attention/query_norm": ("blocks.{}.attn1.norm_q", "blocks.{}.self_attn.norm_q"),
    "blocks/self_attention/key_norm": ("blocks.{}.attn1.norm_k", "blocks.{}.self_attn.norm_k"),
    "blocks/cross_attention/query_norm": ("blocks.{}.attn2.norm_q", "blocks.{}.cross_attn.norm_q"),
    "blocks/cross_attention/key_norm": ("blocks.{}.attn2.norm_k", "blocks.{}.cross_attn.norm_k"),
}
LAYER_NORM = {"blocks/cross_norm": ("blocks.{}.norm2", "blocks.{}.norm3")}
OFFSET = {
    "blocks/offset": ("blocks.{}.scale_shift_table", "blocks.{}.modulation"),
    "head_offset": ("scale_shift_table", "head.modulation"),
}
# With image features.
IMAGE_LINEAR = {
    "image_mlp/mlp/up": ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    "image_mlp/mlp/down": ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    "blocks/cross_attention/image_key": (
        "blocks.{}.attn2.add_k_proj",
        "blocks.{}.cross_attn.k_img",
    ),
    "blocks/cross_attention/image_value": (
        "blocks.{}.attn2.add_v_proj",
        "blocks.{}.cross_attn.v_img",
    ),
}
IMAGE_RMS_NORM = {
    "blocks/cross_attention/image_key_norm": (
        "blocks.{}.attn2.norm_added_k",
        "blocks.{}.cross_attn.norm_k_img",
    )
}
IMAGE_LAYER_NORM = {
    "image_mlp/norm_in": ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    "image_mlp/norm_out": ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
}


def table(config, layout):
    """The rows of a network of `config` in a file of `layout`, "diffusers" or "original"."""
    column = LAYOUTS.index(layout)
    linear, rms_norm, layer_norm = LINEAR, RMS_NORM, LAYER_NORM
    if config.image_dim:
        linear, rms_norm = LINEAR | IMAGE_LINEAR, RMS_NORM | IMAGE_RMS_NORM
        layer_norm = LAYER_NORM | IMAGE_LAYER_NORM
    rows = [
        Row("patch/kernel", "patch_embedding.weight", "o c t h w -> t h w c o"),
        Row("patch/bias", "patch_embedding.bias"),
    ]
    for ours, theirs in linear.items():
        rows.append(Row(f"{ours}/kernel", f"{theirs[column]}.weight", "o i -> i o"))
        rows.append(Row(f"{ours}/bias", f"{theirs[column]}.bias"))
    for ours, theirs in layer_norm.items():
        rows.append(Row(f"{ours}/scale", f"{theirs[column]}.weight"))
        rows.append(Row(f"{ours}/bias", f"{theirs[column]}.bias"))
    rows += [Row(f"{ours}/scale", f"{theirs[column]}.weight") for ours, theirs in rms_norm.items()]
    rows += [Row(ours, theirs[column], "1 n d -> n d") for ours, theirs in OFFSET.items()]
    return rows


# In config.json: the number of heads, and settings that must have these values.
HEADS = {"diffusers": "num_attention_heads", "original": "num_heads"}
FIXED = {
    "diffusers": {
        "patch_size": PATCH,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "pos_embed_seq_len": None,
    },
    "original": {"eps": 1e-6},
}


def config_of(shapes, layout, settings=None):
    """The WanConfig of a file, derived from shapes as far as possible.

    Settings are not enough: Wan 2.1's and 2.2's image-to-video networks have the same ones.

    Args:
        shapes: {name: shape} of its tensors.
        settings: its parsed config.json, for the number of heads; without one, heads have the 128
            channels of all published Wans.

    Raises:
        ValueError: it is no Wan transformer, or an unsupported one.
    """
    for name, wanted in FIXED[layout].items():
        found = (settings or {}).get(name, wanted)
        if (tuple(found) if isinstance(found, list) else found) != wanted:
            raise ValueError(f"{name} is {found!r} in its config.json, and can only be {wanted!r}")
    one = {row.ours: row.theirs for row in table(WanConfig(2, 1, 1, 1, image_dim=1), layout)}

    def shape(ours):
        return shapes[one[ours].format(0)]

    try:
        dim, in_channels = shape("patch/kernel")[:2]
        image = one["image_mlp/mlp/up/kernel"]
        return WanConfig(
            dim=dim,
            ffn=shape("blocks/ffn/up/kernel")[0],
            heads=(settings or {}).get(HEADS[layout], dim // 128),
            depth=sum(one["blocks/offset"].format(i) in shapes for i in range(len(shapes))),
            in_channels=in_channels,
            out_channels=shape("head/kernel")[0] // math.prod(PATCH),
            text_dim=shape("text_mlp/up/kernel")[1],
            image_dim=shapes[image][1] if image in shapes else 0,
            freq_dim=shape("time_mlp/up/kernel")[1],
        )
    except KeyError as error:
        raise ValueError(f"there is no {error}: this is no Wan transformer") from None


def to_settings(config, layout):
    """The config.json with which the programs of `layout` load such a network."""
    c = config
    if layout == "diffusers":
        return {
            "_class_name": "WanTransformer3DModel",
            "num_attention_heads": c.heads,
            "attention_head_dim": c.head_dim,
            "in_channels": c.in_channels,
            "out_channels": c.out_channels,
            "text_dim": c.text_dim,
            "freq_dim": c.freq_dim,
            "ffn_dim": c.ffn,
            "num_layers": c.depth,
            "rope_max_seq_len": 1024,
            "image_dim": c.image_dim or None,
            "added_kv_proj_dim": c.dim if c.image_dim else None,
            **FIXED[layout],
        }
    return {
        "_class_name": "WanModel",
        "model_type": "i2v" if c.in_channels > c.out_channels else "t2v",
        "dim": c.dim,
        "ffn_dim": c.ffn,
        "freq_dim": c.freq_dim,
        "in_dim": c.in_channels,
        "out_dim": c.out_channels,
        "num_heads": c.heads,
        "num_layers": c.depth,
        "text_len": 512,
        **FIXED[layout],
    }
