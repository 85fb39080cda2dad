"""The forms of ``speculative_config``, and what is wrong with the others."""

import pytest

from dovetail.core.config.schema import EngineConfig
from dovetail.core.config.speculative import SpeculativeConfig
from dovetail.core.errors import ConfigError


def test_nothing_is_no_speculation():
    assert SpeculativeConfig.parse({}) is None


@pytest.mark.parametrize(
    ("given", "method", "count"),
    [
        ({"method": "ngram"}, "ngram", 5),
        ({"method": "[ngram]", "num_speculative_tokens": 3}, "ngram", 3),
        ({"method": "suffix"}, "suffix", 16),
        ({"model": "some/folder"}, "draft_model", 4),
        ({"method": "draft_model", "model": "some/folder"}, "draft_model", 4),
    ],
)
def test_methods_and_their_defaults(given, method, count):
    config = SpeculativeConfig.parse(given)
    assert (config.method, config.num_speculative_tokens) == (method, count)


def test_the_names_of_vllm_are_understood():
    config = SpeculativeConfig.parse(
        {"method": "ngram", "prompt_lookup_min": 3, "prompt_lookup_max": 6}
    )
    assert (config.shortest_match, config.longest_match) == (3, 6)
    config = SpeculativeConfig.parse({"method": "suffix", "suffix_decoding_min_token_prob": 0.5})
    assert config.min_token_prob == 0.5
    assert SpeculativeConfig.parse({"method": "ngram", "prompt_lookup_min": 9}).longest_match == 9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "medusa"}, "method must be one of ngram, suffix, draft_model"),
        ({"num_speculative_tokens": 3}, "method must be one of"),
        ({"method": "draft_model"}, "draft_model needs model"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "from 1 to 32, not 0"),
        ({"method": "ngram", "num_speculative_tokens": True}, "must be an integer"),
        ({"method": "suffix", "min_token_prob": 1.5}, "must be a number from 0 to 1"),
        ({"method": "ngram", "shortest_match": 5, "longest_match": 2}, "must not exceed"),
        ({"method": "ngram", "longest_mach": 5}, "did you mean 'longest_match'"),
        ({"method": "ngram", "model": "x"}, "means nothing to ngram"),
        ({"method": "ngram", "longest_match": 5, "prompt_lookup_max": 5}, "mean the same"),
        ({"method": "ngram", "adaptive": 1}, "adaptive must be true or false"),
    ],
)
def test_what_is_wrong_is_named(given, message):
    with pytest.raises(ConfigError, match="speculative_config") as caught:
        EngineConfig.from_kwargs(speculative_config=given)
    assert message in str(caught.value)
