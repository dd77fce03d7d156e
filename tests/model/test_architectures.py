"""Architectures beyond the BERTs: both stacks, packed rows, training, saved towers."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ehi.index.text import tower as numpy_stack
from ehi.index.text.architectures import ARCHITECTURES, relative_buckets
from ehi.index.text.checkpoint import weights_sha256
from ehi.index.text.tower import read_tower
from ehi.model.pretrained import load_tower, resolve, save_float16, save_tower

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY = ["mpnet_tiny", "modernbert_tiny", "nomic_tiny", "qwen3_tiny"]


def reference_of(name):
    with np.load(FIXTURES / name / "reference.npz") as arrays:
        return dict(arrays)


def by_numpy(folder, reference, **changes):
    tower = numpy_stack.Tower(**(vars(read_tower(folder)) | changes))
    rows = zip(reference["ids"], reference["mask"], strict=True)
    return tower([ids[mask] for ids, mask in rows])


@jax.jit
def call(tower, ids, mask):
    return tower(ids, mask)


def packed(reference):
    """Texts of 7, 2 and 9 tokens in one row, and of 12 tokens in another."""
    rows = zip(reference["ids"], reference["mask"], strict=True)
    texts = [ids[mask] for ids, mask in rows]
    ids, names = np.zeros((2, 20), int), np.zeros((2, 20), int)
    for row, order in enumerate([(1, 2, 3), (0,)]):
        joined = np.concatenate([texts[text] for text in order])
        ids[row, : len(joined)] = joined
        parts = [np.full(len(texts[t]), n + 1) for n, t in enumerate(order)]
        names[row, : len(joined)] = np.concatenate(parts)
    return ids, names.astype(np.int32)


@pytest.mark.parametrize("name", TINY)
def test_both_stacks_equal_transformers(name):
    reference, folder = reference_of(name), FIXTURES / name
    tower = load_tower(resolve(folder))
    # The pooling that is natural to each; what differs are the layers.
    pooling = "last" if name == "qwen3_tiny" else "mean"
    assert tower.pooling == pooling
    tower.normalise = False
    found = call(tower, reference["ids"], reference["mask"])
    np.testing.assert_allclose(found, reference[pooling], atol=1e-5)
    for pooling in ("mean", "cls", "last"):
        found = by_numpy(folder, reference, pooling=pooling, normalise=False)
        np.testing.assert_allclose(found, reference[pooling], atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_texts_of_a_row_do_not_see_each_other(name):
    reference = reference_of(name)
    tower = load_tower(resolve(FIXTURES / name))
    tower.normalise = False
    found = call(tower, *packed(reference))
    expected = reference[tower.pooling]
    np.testing.assert_allclose(found[0, :3], expected[1:], atol=1e-5)
    np.testing.assert_allclose(found[1, 0], expected[0], atol=1e-5)


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", TINY)
def test_a_step_trains_every_parameter_and_the_saved_tower_is_that(
    name, dtype, tmp_path
):
    reference, pretrained = reference_of(name), resolve(FIXTURES / name)
    tower = load_tower(pretrained, dtype=jnp.dtype(dtype), remat=dtype == "bfloat16")
    graphdef, params = nnx.split(tower)
    ids, mask = reference["ids"], reference["mask"]

    @jax.jit
    def step(params):
        def loss(params):
            vectors = nnx.merge(graphdef, params)(ids, mask)
            return jnp.sum((vectors - vectors[::-1]) ** 2)

        gradients = jax.grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients), gradients

    params, gradients = step(params)
    flat = {"/".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(params)}
    for path, value in nnx.to_flat_state(gradients):
        assert value[...].dtype == jnp.float32
        assert np.isfinite(value[...]).all(), path
        assert np.abs(value[...]).max() > 0, path
    if dtype == "float32":
        save_tower(pretrained, flat, tmp_path / "tower")
        assert load_file(tmp_path / "tower" / "model.safetensors").keys() == {
            key.removeprefix(ARCHITECTURES[pretrained.model_type].prefix)
            for key in load_file(pretrained.folder / "model.safetensors")
            if not key.startswith(("lm_head", "head", "decoder", "mpnet.pooler"))
        }
        expected = call(nnx.merge(graphdef, params), ids, mask)
        found = by_numpy(tmp_path / "tower", reference)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_recomputing_layers_changes_no_gradient():
    # MPNet has the only layer inputs beside token vectors that are trained.
    reference = reference_of("mpnet_tiny")
    gradients = []
    for remat in (False, True):
        tower = load_tower(resolve(FIXTURES / "mpnet_tiny"), remat=remat)
        graphdef, params = nnx.split(tower)

        def loss(params, graphdef=graphdef):
            vectors = nnx.merge(graphdef, params)(reference["ids"], reference["mask"])
            return jnp.sum(vectors[0] * vectors[1])

        gradients.append(jax.jit(jax.grad(loss))(params))
    kept, again = (jax.tree.leaves(part) for part in gradients)
    for a, b in zip(kept, again, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_relative_positions_grow_coarser():
    rows = relative_buckets(300, 32)
    assert rows.shape == (300, 300)
    assert rows.min() == 0 and rows.max() == 31
    assert rows[0, :9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert rows[[16, 32, 64, 128, 299], 0].tolist() == [10, 12, 14, 15, 15]


@pytest.mark.parametrize("type_", ["float32", "bfloat16", "float16"])
def test_weights_in_several_files_and_of_other_types(type_, tmp_path):
    folder = Path(shutil.copytree(FIXTURES / "qwen3_tiny", tmp_path / "q"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    dtype, weight_map = jnp.dtype(type_), {}
    for shard, part in enumerate([sorted(tensors)[::2], sorted(tensors)[1::2]]):
        file = f"model-{shard + 1:05}-of-00002.safetensors"
        save_file({key: tensors[key].astype(dtype) for key in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    reference, pretrained = reference_of("qwen3_tiny"), resolve(folder)
    assert pretrained.sha256 == weights_sha256(folder)
    found = by_numpy(folder, reference)
    if type_ == "float32":
        expected = by_numpy(FIXTURES / "qwen3_tiny", reference)
        np.testing.assert_array_equal(found, expected)
        save_float16(pretrained, tmp_path / "half")
        assert not (tmp_path / "half" / index.name).exists()
        half = by_numpy(tmp_path / "half", reference)
        np.testing.assert_allclose(half, expected, atol=5e-3)
    expected = call(load_tower(pretrained), reference["ids"], reference["mask"])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {file}"):
        resolve(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere"}}))
    with pytest.raises(ValueError, match="does not name files of the folder"):
        resolve(folder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nomic_tiny", {"prenorm": True}, "prenorm True .* only False"),
        ("nomic_tiny", {"rotary_scaling_factor": 2}, "rotary_scaling_factor 2 "),
        ("qwen3_tiny", {"use_sliding_window": True}, "use_sliding_window True"),
        ("qwen3_tiny", {"num_key_value_heads": 3}, "4 heads .* no multiple of 3"),
        ("qwen3_tiny", {"head_dim": "12"}, "head_width '12'"),
        (
            "qwen3_tiny",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "scaled rotary positions .*yarn.* are not supported",
        ),
        ("modernbert_tiny", {"hidden_activation": "silu"}, "only 'gelu'"),
    ],
)
def test_what_is_not_computed_is_refused(name, changes, message, tmp_path):
    folder = Path(shutil.copytree(FIXTURES / name, tmp_path / name))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(ValueError, match=message):
        resolve(folder)


def test_the_names_of_earlier_and_later_settings(tmp_path):
    # What transformers wrote before release 5, and what it writes for NomicBERT.
    older = Path(shutil.copytree(FIXTURES / "modernbert_tiny", tmp_path / "older"))
    raw = json.loads((older / "config.json").read_text())
    for key in ("layer_types", "rope_parameters"):
        raw.pop(key, None)
    raw |= {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0}
    (older / "config.json").write_text(json.dumps(raw | {"local_rope_theta": 10000.0}))
    assert resolve(older).config == resolve(FIXTURES / "modernbert_tiny").config
    later = Path(shutil.copytree(FIXTURES / "nomic_tiny", tmp_path / "later"))
    (later / "config.json").write_text(
        json.dumps(
            {
                "model_type": "nomic_bert", "vocab_size": 100, "hidden_size": 32,
                "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "silu",
                "intermediate_size": 64, "max_position_embeddings": 40,
                "type_vocab_size": 2, "layer_norm_eps": 1e-12, "rope_parameters":
                {"rope_theta": 1000.0, "rope_type": "default"},
            }
        )
    )  # fmt: skip
    assert resolve(later).config == resolve(FIXTURES / "nomic_tiny").config
