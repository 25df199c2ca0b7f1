"""What a model says, with its cache and its choice of tokens."""

from faults.checks import CACHED
from faults.fault import Fault

FILE, META, CACHE = "accessory/infer/generate.py", "accessory/infer/meta.py", "accessory/model/cache.py"
GREEDY = "'tests/test_generate.py::test_cached_generation_equals_recomputing[1]'"
CHOSEN = "tests/test_generate.py::test_temperature_and_nucleus"
DRAWN = "'tests/test_generate.py::test_draws_are_those_of_the_nucleus[1]'"

FAULTS = (
    Fault(
        "the token that reaches top-p is cut off too",
        FILE,
        "probs[probs.cumsum(-1) - probs > top_p] = 0.0",
        "probs[(probs.cumsum(-1) > top_p) & (probs.cumsum(-1) > probs)] = 0.0",
        CHOSEN,
    ),
    Fault(
        "the nucleus is taken before the temperature",
        FILE,
        "probs[probs.cumsum(-1) - probs > top_p] = 0.0",
        "cold = logits.softmax(-1).gather(1, order)\n        probs[cold.cumsum(-1) - cold > top_p] = 0.0",
        CHOSEN,
    ),
    Fault("the temperature is ignored", FILE, "(logits / temperature).softmax(-1)", "logits.softmax(-1)", CHOSEN),
    Fault(
        "a drawn place is taken for a token",
        FILE,
        "chosen = order.gather(1, probs.multinomial(1)).squeeze(1)",
        "chosen = probs.multinomial(1).squeeze(1)",
        DRAWN,
    ),
    Fault(
        "each rank draws for itself",
        FILE,
        "return mp.broadcast(chosen)",
        "return chosen",
        "'tests/test_generate.py::test_sampling_is_the_same_on_all_ranks_and_another_each_time[2]'",
    ),
    Fault(
        "a new token leaves a place free in the cache",
        CACHE,
        "self.keys[slots, positions], self.values[slots, positions] = k, v",
        "self.keys[slots, positions] = k; self.values[slots, (positions + 1) % self.values.shape[1]] = v",
        GREEDY,
    ),
    Fault(
        "a prompt goes on from its last token but one",
        FILE,
        "Logits(documents.ends)",
        "Logits((documents.ends - 1).clamp(min=0))",
        GREEDY,
    ),
    Fault(
        "a chunk is behind one token less than it is",
        CACHE,
        "steps[past - first :, None] - steps",
        "steps[past - first :, None] - steps - 1",
        CACHED,
    ),
    Fault(
        "the cached window has one key more",
        CACHE,
        "(behind >= 0) & (behind < window) if window",
        "(behind >= 0) & (behind <= window) if window",
        GREEDY,
    ),
    Fault(
        "documents of a cache change places",
        "accessory/model/documents.py",
        "tuple(slots or range(len(lengths)))",
        "tuple(sorted(slots or range(len(lengths))))",
        CACHED,
    ),
    Fault(
        "an answer may be a token that stands for nothing",
        FILE,
        "_choose(last[:, :vocab_size], temperature, top_p, model.mesh.mp)",
        "_choose(last, temperature, top_p, model.mesh.mp)",
        "tests/test_generate.py::test_tokens_beyond_the_tokenizer_do_not_stop_generation",
    ),
    Fault(
        "a text is scored by the logits behind each token",
        META,
        "scored = logits[start - 1 : -1]",
        "scored = logits[start:]",
        "'tests/test_generate.py::test_evaluate_examples' -k scores",
    ),
)
