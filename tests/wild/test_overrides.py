"""Overrides of a config on the command line: taken, or refused in one sentence.

A case that failed before its test was written has `failed` at the end of its id or of
its test's name, others have `passed`. Comments name the source of what is expected.
"""

import contextlib
import io
from pathlib import Path

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import config_flags
from wild_cases import failed, passed

from ehi.model.pretrained import resolve
from experiments import main
from experiments.configs import pydocs
from experiments.run import checks

ROOT = Path(__file__).parents[2]


def parse(*overrides):
    """The config of pydocs with overrides, as `experiments.main` reads them."""
    values = flags.FlagValues()
    argv = ["main", "--config=experiments/configs/pydocs.py", *overrides]
    config = config_flags.DEFINE_config_file(
        "config", flag_values=values, lock_config=True, sys_argv=argv
    )
    main.parse_flags(argv, values)
    return config.value


def refusal(*overrides):
    """What is said of overrides; None if they are taken."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            checks.check_config(parse(*overrides))
    except ValueError as error:
        said = str(error)
    except SystemExit as stopped:
        assert stopped.code == 1
        said = err.getvalue().removeprefix("error: ")
    else:
        return None
    assert said.strip() and "\n" not in said.strip() and "Traceback" not in said
    return said.strip()


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


# Every mistake in a config names the field, its value and what is allowed.
@pytest.mark.parametrize(
    ("override", "said"),
    [
        passed("tree.heigth=2", 'Did you mean "height"'),
        passed("treee.height=2", 'Did you mean "tree"'),
        passed("tree.height.x=2", "no such field"),
        passed("tree.height=2.5", "tree.height=2.5"),
        passed("tree=5", "not a dict"),
        passed("=3", "Could not parse"),
        failed("budgets=5", "budgets is (5,)"),
        passed("systems=5", "systems is (5,)"),
        passed("systems=None", "systems is (None,)"),
        failed("pseudo.kinds=5", "pseudo.kinds is (5,)"),
        failed("pseudo.kinds=titel", "pseudo.kinds is 'titel'"),
        failed("tree.scale=inf", "tree.scale is inf"),
        passed("tree.scale=nan", "tree.scale is nan"),
        failed("seed=4294967296", "must be at most 4294967295"),
        failed("dev_fraction=1", "must be between 0 and 1"),
        failed("sizes.documents=-1", "sizes.documents is -1"),
        failed("variant=../x", "variant is '../x'"),
        failed("variant=a/b", "variant is 'a/b'"),
        failed("variant=.hidden", "variant is '.hidden'"),
    ],
)
def test_mistakes_in_a_config(override, said):
    assert said in refusal(f"--config.{override}")


# The names that the hub allows (huggingface_hub.utils.validate_repo_id).
@pytest.mark.parametrize(
    "name",
    [
        failed(" ", id="blank"),
        failed("a\udcff", id="surrogate"),
        passed("owner/model/x", id="two slashes"),
        passed("https://huggingface.co/owner/model", id="address"),
        failed("owner--model", id="name of a cache folder"),
    ],
)
def test_towers_that_are_no_hub_ids(tmp_path, name):
    words = "neither a folder nor a hub id|no model folder"
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        resolve(name, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


FIELDS = sorted(pydocs.get_config().to_dict())
NESTED = [
    f"{section}.{name}"
    for section, fields in pydocs.get_config().to_dict().items()
    if isinstance(fields, dict)
    for name in fields
]
LETTERS = "abcdefghijklmnopqrstuvwxyz_"


@st.composite
def misspelt(draw):
    """A field with one letter too many, too few, another one, or two exchanged."""
    name = draw(st.sampled_from(FIELDS + NESTED))
    start = name.rfind(".") + 1
    at = draw(st.integers(start, len(name) - 1))
    letter = draw(st.sampled_from(LETTERS))
    changed = draw(
        st.sampled_from(
            [
                name[:at] + letter + name[at:],
                name[:at] + name[at + 1 :],
                name[:at] + letter + name[at + 1 :],
                name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
            ]
        )
    )
    known = changed in FIELDS + NESTED
    return name if known or changed.endswith(".") or not changed else changed


# The promise of the command line: a misspelt field is one sentence, never a traceback.
@settings(max_examples=60, deadline=None)
@given(name=misspelt(), value=st.sampled_from(["1", "x", "", "None", "(1,", "true"]))
def test_misspelt_fields_passed(name, value):
    said = refusal(f"--config.{name}={value}")
    if name not in FIELDS + NESTED:
        assert said and "no such field of the config" in said


VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(["()", "[]", "{}", "('a',)", "None", "True", "1e9", "0x10", "-0"]),
)


# Any value is taken or refused in one sentence.
@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(FIELDS + NESTED), value=VALUES)
def test_any_value_is_taken_or_refused_failed(name, value):
    refusal(f"--config.{name}={value}")
