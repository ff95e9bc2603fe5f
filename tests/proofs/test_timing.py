"""The one rule for "faster": the same lines on every page that compares, and what they
say of simulated clocks, on a quiet host and beside a busy process."""

import math
import random

import pytest
from pages import defined_in, functions_of, names_of, pages_of

SECTIONS = ["basics", "training", "speed", "uncertainty", "scale", "beyond", "uses"]
PAGES = [page for section in SECTIONS for page in pages_of(section)]
COMPARING = [page for page in PAGES if "in_turns" in defined_in(page)]
MODEL = "training/plot_training"


def test_the_lines_are_the_same_on_all_pages():
    assert len(COMPARING) > 5
    for name in ["in_turns", "said"]:
        texts = {
            functions_of(page, name).rpartition(f"def {name}(")[2]
            for page in COMPARING
            if name in defined_in(page)
        }
        assert len(texts) == 1, f"copy {name} as {MODEL} has it"


class Host:
    """A clock: work takes longer, and waits while another process has the core."""

    def __init__(self, busy, seed):
        self.now, self.busy, self.random = 0.0, busy, random.Random(seed)
        self.others, self.until = 0, 0.0

    def work(self, seconds):
        drift = 1 + 0.04 * math.sin(self.now / 3)
        seconds *= drift * math.exp(self.random.gauss(0, 0.02))
        while seconds > 0:
            if self.now > self.until:
                self.others = int(self.busy and not self.others)
                self.until = self.now + self.random.expovariate(3)
            slice = min(seconds, 0.004)
            self.now, seconds = self.now + slice, seconds - slice
            self.now += 0.004 * self.others * (self.random.random() < slice / 0.004)


def verdicts(ratio, busy, base, times):
    """What in_turns and said say of two statements with this ratio of their times."""
    words = []
    for seed in range(times):
        host = Host(busy, seed)
        page = names_of(MODEL, "in_turns", "said")
        page["timer"] = lambda host=host: host.now
        ways = [lambda c=c, host=host: host.work(c) for c in (ratio * base, base)]
        first, (seconds, *gain) = page["in_turns"](*ways)
        assert first[1:] == (1, 1, 1)
        assert gain[0] == pytest.approx(first[0] / seconds), "both come from one call"
        words.append(page["said"](*gain))
    return words


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("base", [5e-3, 0.1])
def test_equal_ways_are_seldom_called_different_and_1_5_is_told(busy, base):
    said = verdicts(1, busy, base, 60)
    assert sum("no difference" not in words for words in said) <= 3  # 5 percent
    said = verdicts(1.5, busy, base, 20)
    assert not [words for words in said if "slower" in words]
    few = busy and base > 0.01  # seven turns of 0.1 s beside a busy process: not often
    assert sum("faster" in words for words in said) >= (5 if few else 19)


def test_the_words_say_which_way_and_how_far():
    said = names_of(MODEL, "said")["said"]
    assert said(2, 1.5, 3) == "2x faster (1.5 to 3)"
    assert said(0.5, 0.25, 0.8) == "2x slower (1.25 to 4)"
    for interval in [(0.9, 1.1), (1.01, 1.2), (0.9, 0.99)]:
        assert said(1, *interval).startswith("no difference seen")
