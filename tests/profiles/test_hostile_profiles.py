"""A file with any contents is read as it is, or refused with a one-line error."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsjax.errors import ProfileError
from bsjax.profiles.profile import Profile, shipped, shipped_names
from tests.support.fuzzing import FUZZ, check_message, damaged

DOCUMENTS = [
    json.loads(Profile.uniform("SINK", family="gemma3", layers=3, heads=2).to_json()),
    *(json.loads(shipped(name).to_json()) for name in shipped_names()),
]


@FUZZ
@given(data=st.data())
def test_fuzzed_profiles_are_read_as_they_are_or_refused(data):
    text = data.draw(damaged(data.draw(st.sampled_from(DOCUMENTS))))
    started = time.process_time()
    try:
        profile = Profile.from_json(text)
    except ProfileError as error:
        check_message(error)
    else:
        # Measurements are floats: a whole number of 30 digits is rounded to one.
        written, given_ = (json.loads(one, parse_int=float) for one in (profile.to_json(), text))
        # Offsets of sinks are a set, which is written in order.
        given_["sinks"]["offsets"] = sorted(set(given_["sinks"]["offsets"]))
        assert written == given_
    assert time.process_time() - started < 10


@pytest.mark.parametrize("field", DOCUMENTS[0])
@pytest.mark.parametrize("depth", [5, 50, 90, 200, 100_000])
def test_nested_fields_are_refused(field, depth):
    document = {name: value for name, value in DOCUMENTS[0].items() if name != field}
    nested = "[" * depth + "]" * depth
    text = f'{json.dumps(document)[:-1]}, "{field}": {nested}}}'
    with pytest.raises(ProfileError) as caught:
        Profile.from_json(text)
    check_message(caught.value)
