"""Speculative decoding, in a process of its own: it loads numba, after which vLLM 0.32 starts no engine on CPUs."""

import pytest
from engines import Asked, assert_right, engine, every_pair
from kit import Truth, make_adapter, prompts
from test_models import ADAPTERS, adapters_of


def test_speculative_decoding(place):
    base, adapters = adapters_of("llama", place)
    truth = Truth(base, adapters)
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    loops = [[7, 8, 9] * 6, [30, 31] * 9, *prompts(4)]
    with engine(base, max_loras=2, speculative_config=speculation) as llm:
        assert_right(Asked(llm, adapters).compare(every_pair([None, *ADAPTERS], loops), truth, new=12))
        counted = make_adapter(base, place / "counted", 9, positions="d2", r=2)
        with pytest.raises(Exception, match="speculative"):
            Asked(llm, {"counted": counted}, first_id=9).generate([("counted", [5, 6])])
