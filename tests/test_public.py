"""The public names, and the rule that data flows one way."""

import factory


def test_every_public_name_is_there_and_is_what_it_says() -> None:
    for name in factory.__all__:
        assert getattr(factory, name).__name__ in (name, "load", "build", "run")
    assert set(factory.__all__) == set(factory._NAMES)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(factory, "nothing_of_the_kind")
