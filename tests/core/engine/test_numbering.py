"""A message that is lost is noticed with the next one; one that comes twice is dropped."""

import pytest

from dovetail.core.engine.numbering import Numbered, Numbers, unnumbered
from dovetail.core.errors import InvariantError


def test_messages_arrive_once_and_in_order() -> None:
    sender, receiver = Numbers(), Numbered()
    frames = [sender.wrap(bytes([i])) for i in range(3)]
    assert [receiver.unwrap(frame) for frame in frames] == [b"\0", b"\1", b"\2"]
    assert receiver.unwrap(frames[1]) is None and receiver.unwrap(frames[2]) is None
    assert receiver.unwrap(unnumbered(b"beat")) == b"beat"
    assert receiver.unwrap(sender.wrap(b"")) == b""


def test_a_lost_message_is_noticed() -> None:
    sender, receiver = Numbers(), Numbered()
    receiver.unwrap(sender.wrap(b"a"))
    sender.wrap(b"b")
    with pytest.raises(InvariantError, match="message 3 follows message 1"):
        receiver.unwrap(sender.wrap(b"c"))
