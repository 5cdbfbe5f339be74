"""The reward functions that come with lrlhf."""

import pytest

from lrlhf.rewards import exact_answer, math_answer

EXACT = [
    ("The answer is 42.", "42", 1),
    ("6 * 7 = 42", "42", 1),
    ("42 or 43", "42", 0),
    ("It costs $1,000.00 in total", "1000", 1),
    ("#### 12\nThat was 13 steps.", "12", 1),
    (r"So \boxed{7}, not 8", "7", 1),
    ("Answer: 1/2", "0.5", 1),
    ("-3", "3", 0),
    ("5 - 3 = 2", "2", 1),
    ("about 50%", "50", 1),
    ("yes", "Yes", 1),
    ("The answer is: Paris.", "paris", 1),
    ("I do not know", "7", 0),
    ("", "7", 0),
    ("4", 4, 1),
    ("1/0", "1", 0),
]


@pytest.mark.parametrize(("response", "answer", "expected"), EXACT)
def test_exact_answer_compares_the_final_answer(response, answer, expected):
    assert exact_answer(["?"], [response], [answer]).tolist() == [expected]


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [(r"$\frac{2}{4}$", "1/2", 1), ("The answer is $x^2+2x$", "x(x+2)", 1), ("$3$", "4", 0), ("no idea", "4", 0)],
)
def test_math_answer_knows_algebra(response, answer, expected):
    pytest.importorskip("math_verify")
    assert math_answer(["?"], [response], [answer]).tolist() == [expected]
