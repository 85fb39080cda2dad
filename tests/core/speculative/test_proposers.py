"""What host proposers guess, against slow definitions and by hand."""

import random

import numpy as np
import pytest

from dovetail.core.speculative.ngram import NgramProposer
from dovetail.core.speculative.occurrences import Occurrences
from dovetail.core.speculative.suffix import SuffixProposer


def array(tokens):
    return np.array(tokens, np.int32)


def propose(proposer, tokens, count=5, *, row=0, epoch=1, salt=""):
    return proposer.propose(row, epoch, salt, array(tokens), count)


def slow_ngram(tokens, shortest, longest, count):
    """The definition: the longest agreeing end, of equal ones the latest; then go on from there."""
    best, where = 0, None
    for end in range(len(tokens) - 1, 0, -1):
        agreed = 0
        while agreed < min(longest, end) and tokens[end - agreed - 1] == tokens[-agreed - 1]:
            agreed += 1
        if agreed >= shortest and agreed > best:
            best, where = agreed, end
    if where is None:
        return []
    text = list(tokens)
    for _ in range(count):
        text.append(text[where + len(text) - len(tokens)])
    return text[len(tokens) :]


@pytest.mark.parametrize("seed", range(20))
def test_ngram_is_its_definition_token_by_token(seed):
    rng = random.Random(seed)
    shortest = rng.randrange(1, 4)
    longest = shortest + rng.randrange(4)
    proposer = NgramProposer(shortest, longest)
    tokens, found = [], 0
    for _ in range(60):
        tokens += [rng.randrange(3) for _ in range(rng.randrange(1, 4))]
        want = slow_ngram(tokens[-33:], shortest, longest, 4)
        got = NgramProposer(shortest, longest).propose(0, 1, "", array(tokens[-33:]), 4)
        assert got == want
        found += bool(proposer.propose(0, 1, "", array(tokens), 4))
    assert found > 20


def test_ngram_goes_on_with_the_period_of_a_repetition():
    assert propose(NgramProposer(2, 4), [9, 9, 9, 9], 6) == [9] * 6
    assert propose(NgramProposer(2, 4), [5, 1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]


def test_no_match_is_no_guess():
    assert propose(NgramProposer(2, 4), [1, 2, 3, 4]) == []
    assert propose(NgramProposer(3, 4), [1, 2]) == []
    suffix = SuffixProposer(longest=8, drafts_per_match=2.0, least_share=0.1, memory=1000)
    assert propose(suffix, [1, 2, 3, 4]) == []
    assert propose(suffix, [1]) == []


def test_a_row_that_changes_hands_starts_afresh():
    proposer = NgramProposer(1, 4)
    assert propose(proposer, [1, 2, 1], 1, epoch=1) == [2]
    assert propose(proposer, [5, 6, 7, 5], 1, epoch=2) == [6]
    assert propose(proposer, [1, 3, 1], 1, row=1) == [3]


def suffix_proposer(**changes):
    settings = {"longest": 16, "drafts_per_match": 2.0, "least_share": 0.3, "memory": 1000}
    return SuffixProposer(**(settings | changes))


def test_suffix_follows_what_came_most_often():
    tokens = [1, 2, 7, 0, 1, 2, 8, 0, 1, 2, 8, 0, 1, 2]
    assert propose(suffix_proposer(), tokens, 1) == [8]


def test_suffix_guesses_further_after_a_longer_match():
    text = list(range(100, 140))
    short = propose(suffix_proposer(), [*text, 1, 2, *text[:2]], 16)
    long = propose(suffix_proposer(), [*text, 1, 2, *text[:8]], 16)
    assert short == text[2:6]
    assert long == text[8:24]


def test_suffix_stops_where_continuations_disagree():
    tokens = [1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 3, 6, 0, 1, 2]
    assert propose(suffix_proposer(least_share=0.6), tokens, 8) == [3]


def test_suffix_learns_from_sequences_of_the_same_salt_only():
    proposer = suffix_proposer()
    story = list(range(10, 30))
    propose(proposer, story, salt="a", epoch=1)
    assert propose(proposer, [1, 10, 11], 3, salt="a", epoch=2) == [12, 13, 14]
    assert propose(proposer, [1, 10, 11], 3, salt="b", epoch=3) == []


def test_suffix_forgets_the_oldest():
    proposer = suffix_proposer(memory=40)
    for epoch in range(30):
        story = [1000 + 40 * epoch + i for i in range(15)]
        propose(proposer, story, epoch=epoch)
    assert propose(proposer, [0, 1000, 1001], 3, epoch=100) == []
    assert propose(proposer, [0, 1000 + 40 * 28, 1001 + 40 * 28], 2, epoch=101)
    kept = [len(text.tokens) for text in proposer._history[""]]
    assert sum(kept) <= 60


def test_occurrences_of_a_common_gram_are_bounded():
    text = Occurrences(2)
    text.extend([4] * 10_000)
    assert len(text._ends) == 1
    found = list(text.after(text.tokens))
    assert found[0] == 9999
    assert len(found) <= 33
