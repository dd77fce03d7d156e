"""Settings, files and folders of checkpoints as they are found.

A case that failed before its test was written has `failed` at the end of its id or of
its test's name, others have `passed`. Comments name the source of what is expected, as
in `test_checkpoints.py`.
"""

import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import (
    FIXTURES,
    TEXTS,
    both_stacks,
    copy_of,
    edit_json,
    edit_tensors,
    flat_parameters,
)
from safetensors.numpy import load_file
from wild_cases import failed, passed

from ehi.model.pretrained import load_tower, resolve, save_float16, save_tower

JSON_FILES = ["config.json", "modules.json", "1_Pooling/config.json"]


@pytest.fixture
def copy(tmp_path):
    """Function: name of a tiny checkpoint -> a copy that a test may change."""

    def make(name="bert_tiny", to="copy"):
        return copy_of(name, tmp_path / to)

    return make


# Settings


# sentence-transformers reads 1_Pooling/config.json and fails without it.
@both_stacks
def test_a_listed_pooling_without_its_folder_is_refused_failed(copy, vectors):
    folder = copy("minilm_tiny")
    shutil.rmtree(folder / "1_Pooling")
    with pytest.raises(
        FileNotFoundError, match=r"modules.json lists a Pooling, but .*1_Pooling/config"
    ):
        vectors(folder, TEXTS)


# sentence-transformers normalises only in its module Normalize.
@both_stacks
def test_without_normalize_nothing_is_normalised_passed(copy, vectors):
    folder = copy("minilm_tiny")
    modules = json.loads((folder / "modules.json").read_text())[:2]
    (folder / "modules.json").write_text(json.dumps(modules))
    found, unit = vectors(folder, TEXTS), vectors(FIXTURES / "minilm_tiny", TEXTS)
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    assert np.abs(norms - 1).min() > 0.1
    np.testing.assert_allclose(found / norms, unit, atol=1e-6)


# What we do not compute is refused with a sentence.
@both_stacks
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        passed("modules.json", ["Transformer", "Pooling", "CNN"], r"'CNN'\] .*not sup"),
        passed("modules.json", ["Transformer"], "only Transformer, Pooling"),
        failed("modules.json", [["Transformer"]], "other things than"),
        failed("modules.json", {"0": "Transformer"}, "holds no list"),
        passed(
            "1_Pooling/config.json", ["mean_sqrt_len"], r"\['mean_sqrt_len'\].*1_Pool"
        ),
        passed(
            "1_Pooling/config.json", ["cls_token", "mean_tokens"], r"\['cls', 'mean'\]"
        ),
        passed("config.json", {"hidden_act": "gelu_new"}, "only 'gelu'"),
        failed("config.json", {"hidden_size": "32"}, "hidden_size '32'"),
        passed("config.json", {"model_type": "t5"}, "'t5' in .*bert"),
    ],
)
def test_other_settings_are_refused(copy, vectors, file, content, message):
    folder = copy("minilm_tiny")
    if file == "config.json":
        content = json.loads((folder / file).read_text()) | content
    elif file == "1_Pooling/config.json":
        content = {f"pooling_mode_{mode}": True for mode in content}
    elif isinstance(content, list) and content[0] == "Transformer":
        content = [{"type": f"st.{kind}", "path": ""} for kind in content]
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        vectors(folder, TEXTS)


# transformers: the layer norms of DistilBERT have 1e-12 whatever config.json says.
@both_stacks
def test_the_epsilon_of_distilbert_is_fixed_failed(copy, vectors):
    folder = copy("distilbert_tiny")
    edit_json(folder / "config.json", layer_norm_eps=0.5)
    expected = vectors(FIXTURES / "distilbert_tiny", TEXTS)
    np.testing.assert_array_equal(vectors(folder, TEXTS), expected)


# Parameters are float32, whatever type config.json names for transformers.
@both_stacks
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_in_config_json_says_nothing_passed(copy, vectors, key):
    folder = copy()
    edit_json(folder / "config.json", **{key: "bfloat16"})
    expected = vectors(FIXTURES / "bert_tiny", TEXTS)
    np.testing.assert_array_equal(vectors(folder, TEXTS), expected)


# JSON is UTF-8 without a mark, and no reader has to take any depth (RFC 8259).
@both_stacks
@pytest.mark.parametrize("file", JSON_FILES)
@pytest.mark.parametrize(
    "content",
    [
        failed(b"[" * 100_000, id="deep"),
        passed(b'\xef\xbb\xbf{"a": 1}', id="mark"),
        passed('{"a": "é"}'.encode("latin-1"), id="latin"),
        passed(b"", id="empty"),
    ],
)
def test_damaged_json_is_named(copy, vectors, file, content):
    folder = copy("minilm_tiny")
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is damaged, it is not JSON"):
        vectors(folder, TEXTS)


# Files and folders


# transformers reads these; here a sentence says what to do once.
@both_stacks
@pytest.mark.parametrize(
    ("absent", "present", "message"),
    [
        passed("model.safetensors", "pytorch_model.bin", "weights_only=True"),
        failed("tokenizer.json", "vocab.txt", "AutoTokenizer"),
        failed("config.json", "0_Transformer/config.json", "move its files"),
    ],
)
def test_what_to_do_about_a_missing_file(copy, vectors, absent, present, message):
    folder = copy()
    (folder / present).parent.mkdir(exist_ok=True)
    (folder / absent).rename(folder / present)
    with pytest.raises(FileNotFoundError, match=f"lacks {absent}: .*{message}"):
        vectors(folder, TEXTS)


# sentence-transformers reads the Transformer from the path in modules.json.
@both_stacks
@pytest.mark.parametrize(
    ("path", "refused"),
    [
        passed("", False),
        passed(".", False),
        failed("0_Transformer", True),
    ],
)
def test_the_folder_of_the_transformer(copy, vectors, path, refused):
    folder = copy("minilm_tiny")
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules))
    if refused:
        with pytest.raises(ValueError, match="puts the Transformer into '0_Transf"):
            vectors(folder, TEXTS)
    else:
        vectors(folder, TEXTS)


# sentence-transformers gives each module other than the first a folder of its own.
@both_stacks
@pytest.mark.parametrize(
    "path",
    [*map(failed, ["", ".", "1_Pooling/..", "../other", "a/1_Pooling", None])],
)
def test_a_pooling_without_a_folder_of_its_own_is_refused(copy, vectors, path):
    folder = copy("minilm_tiny")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = path
    if path is None:
        del modules[1]["path"]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"modules.json puts the Pooling into .*, not"):
        vectors(folder, TEXTS)


# The default of sentence-transformers' Pooling.
@both_stacks
def test_a_pooling_with_a_width_alone_takes_the_mean_passed(copy, vectors):
    folder, other = copy("minilm_tiny"), copy("minilm_tiny", "other")
    for place, content in (
        (folder, {"word_embedding_dimension": 32}),
        (other, {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}),
    ):
        (place / "1_Pooling" / "config.json").write_text(json.dumps(content))
    np.testing.assert_array_equal(vectors(folder, TEXTS), vectors(other, TEXTS))


# No setting says how the tokens are pooled, so none is guessed.
@both_stacks
@pytest.mark.parametrize(
    "content",
    [
        failed({}, id="empty"),
        failed({"pooling_mode_mean_tokens": False}, id="none"),
    ],
)
def test_a_pooling_without_a_mode_is_refused(copy, vectors, content):
    folder = copy("minilm_tiny")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"\[\] in .*1_Pooling.* not one of"):
        vectors(folder, TEXTS)


# huggingface_hub: a snapshot is a folder of links to blobs that are named by a hash.
@pytest.fixture
def snapshot(tmp_path):
    model = tmp_path / "models--owner--tiny"
    folder = model / "snapshots" / "c0ffee"
    (folder / "1_Pooling").mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("c0ffee")
    source = FIXTURES / "minilm_tiny"
    for number, file in enumerate(sorted(source.rglob("*.*"))):
        if file.is_file() and file.name != "reference.npz":
            blob = model / "blobs" / f"{number:040x}"
            shutil.copyfile(file, blob)
            link = folder / file.relative_to(source)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


@both_stacks
def test_a_snapshot_of_links_is_read_passed(snapshot, vectors):
    expected = vectors(FIXTURES / "minilm_tiny", TEXTS)
    np.testing.assert_array_equal(vectors(snapshot, TEXTS), expected)


def test_copies_of_a_snapshot_hold_files_passed(snapshot, tmp_path):
    found = resolve(snapshot)
    save_float16(found, tmp_path / "half")
    save_tower(found, flat_parameters(load_tower(found)), tmp_path / "saved")
    for folder in (tmp_path / "half", tmp_path / "saved"):
        assert not any(path.is_symlink() for path in folder.rglob("*"))
        assert resolve(folder).config == found.config


# A float16 copy has half the size of float32, whatever floats its source has.
@pytest.mark.parametrize(
    "kind",
    [failed("bfloat16"), failed("float64"), passed("float32"), passed("float16")],
)
def test_a_float16_copy_of_any_floats(copy, tmp_path, kind):
    folder = copy()
    ids = np.arange(40)[None]
    edit_tensors(
        folder,
        lambda tensors: (
            {name: value.astype(jnp.dtype(kind)) for name, value in tensors.items()}
            | {"bert.embeddings.position_ids": ids}
        ),
    )
    save_float16(resolve(folder), tmp_path / "half")
    half = load_file(tmp_path / "half" / "model.safetensors")
    np.testing.assert_array_equal(half.pop("bert.embeddings.position_ids"), ids)
    assert {value.dtype for value in half.values()} == {np.dtype(np.float16)}
    source = flat_parameters(load_tower(resolve(folder)))
    for name, value in flat_parameters(load_tower(resolve(tmp_path / "half"))).items():
        np.testing.assert_allclose(value, source[name], rtol=1e-3, atol=1e-6)


# A shared cache is often read-only. What is written from it belongs to its writer: the
# permissions are those of any new file.
def test_a_read_only_checkpoint_makes_writable_copies_failed(copy, tmp_path):
    folder = copy("minilm_tiny")
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o555)
    try:
        found = resolve(folder)
        parameters = flat_parameters(load_tower(found))
        for _ in range(2):  # the second replaces the first
            save_tower(found, parameters, tmp_path / "saved")
        save_float16(found, tmp_path / "half")
    finally:
        folder.chmod(0o755)
        (folder / "1_Pooling").chmod(0o755)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    for copied in (tmp_path / "saved", tmp_path / "half"):
        for path in (copied, *copied.rglob("*")):
            like = tmp_path / "new" if path.is_dir() else tmp_path / "new" / "file"
            if path.suffix != ".safetensors":
                assert path.stat().st_mode == like.stat().st_mode, path
