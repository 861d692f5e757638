from math import nan

import pytest

from ocnopt.experiments.verdict import Comparison, Scores, sentence, spread


def comparison(plain, feedback, plain_accuracy=0.5, feedback_accuracy=0.5, lr=0.7):
    return Comparison(
        lr,
        Scores(tuple(plain), (plain_accuracy,) * len(plain)),
        Scores(tuple(feedback), (feedback_accuracy,) * len(feedback)),
    )


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (comparison([2, 3], [1, 2], 0.4, 0.8), "helped"),
        (comparison([1, 2], [2, 3], 0.8, 0.4), "hurt"),
        (comparison([1, 3], [2, 2]), "unclear"),
        (comparison([2, 3], [1, 2], 0.8, 0.4), "unclear"),  # lower loss, worse on the test set
        (comparison([2, 2], [2, 2]), "unclear"),
        (comparison([nan, nan], [2, 2], 0.0, 0.8), "helped"),
        (comparison([2, 2], [nan, nan], 0.8, 0.0), "hurt"),
        (comparison([nan, nan], [nan, nan]), "unclear"),
    ],
)
def test_verdict(given, verdict):
    assert given.verdict == verdict


def test_sentence_says_that_feedback_helped():
    text = sentence([comparison([2.0, 3.0], [1.0, 1.5], 0.4, 0.8)], "SGD", "DDPNOpt")
    assert text == (
        "At learning rate 0.7 feedback helped (DDPNOpt against SGD: training loss 1.250 against"
        " 2.500, lower on 2 of 2 seeds, test accuracy 80.0 % against 40.0 %)."
    )


def test_sentence_says_that_feedback_did_not_help():
    text = sentence([comparison([1.0, 1.5], [2.0, 3.0], 0.8, 0.4)], "SGD", "DDPNOpt")
    assert "feedback did not help, it hurt" in text
    assert "feedback helped" not in text
    assert "lower on 0 of 2 seeds" in text


def test_sentence_says_that_nothing_is_clear_and_names_divergence():
    text = sentence(
        [comparison([1.0, 1.0], [0.5, 2.0], lr=0.1), comparison([nan, 2.0], [1.0, 1.0], 0.1, 0.9)],
        "SGD",
        "DDPNOpt",
    )
    assert text.startswith("At learning rate 0.1 feedback made no clear difference")
    assert "; at learning rate 0.7 feedback helped" in text
    assert "against diverged on 1 of 2 seeds" in text


def test_spread():
    assert spread([1.0]) == 0
    assert spread([1.0, 3.0]) == pytest.approx(2**0.5)
