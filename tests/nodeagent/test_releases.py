import pytest

from nodeagent.releases import Releases

pytestmark = pytest.mark.pure


def test_the_last_that_was_added_is_given_back_first_and_each_once() -> None:
    given_back: list[str] = []
    with Releases() as held:
        held.add(given_back.append, "first")
        held.add(given_back.append, "second")
        held.close()
        held.add(given_back.append, "third")
    assert given_back == ["second", "first", "third"]


def test_the_others_are_given_back_although_one_fails() -> None:
    given_back: list[str] = []

    def fail() -> None:
        raise LookupError("no such thing")

    held = Releases()
    held.add(given_back.append, "first")
    held.add(fail)
    held.add(given_back.append, "third")
    with pytest.raises(LookupError, match="no such thing"):
        held.close()
    assert given_back == ["third", "first"]


def test_they_are_given_back_after_an_error_in_the_block() -> None:
    given_back: list[str] = []

    def fail() -> None:
        with Releases() as held:
            held.add(given_back.append, "it")
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert given_back == ["it"]
