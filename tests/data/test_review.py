from __future__ import annotations

import json

import numpy as np

from recap_fast.config import ReviewConfig
from recap_fast.data.review import ReviewQueue


def queue(share=1.0, after=4):
    return ReviewQueue(ReviewConfig(share=share, after=after))


def test_a_solved_prompt_comes_back_and_its_interval_doubles():
    one = queue()
    one.report(7, True, 10)
    assert [one.take(2, step) for step in (10, 13, 14)] == [[], [], [7]]
    assert one.take(2, 15) == [], "it is being sampled"
    assert one.report(7, True, 15)
    assert [one.take(2, step) for step in (22, 23)] == [[], [7]]
    assert one.report(7, True, 24)
    assert [one.take(2, step) for step in (39, 40)] == [[], [7]]


def test_a_prompt_that_was_lost_comes_back_at_once_a_few_times():
    one = queue()
    one.report(3, True, 0)
    for step in range(4, 9):
        assert one.take(2, step) == [3]
        assert one.report(3, False, step + 1)
    assert one.take(2, 9) == [], "it goes its ordinary way"
    assert not one.report(3, False, 10)
    assert one.take(2, 10) == []
    one.report(3, True, 11)
    assert one.take(2, 15) == [3]
    one.report(3, False, 16)
    one.take(2, 16)
    one.report(3, True, 17)
    assert [one.take(2, step) for step in (20, 21)] == [[], [3]], "it begins anew"


def test_unsolved_prompts_are_none_of_its_business():
    one = queue()
    assert not one.report(1, False, 0)
    assert one.take(5, 100) == []


def test_prompts_of_the_ordinary_order_count_too():
    one = queue()
    one.report(1, True, 0)
    assert not one.report(1, True, 2), "it was not reviewed"
    assert [one.take(1, step) for step in (4, 5, 6)] == [[], [], [1]]


def test_a_row_that_comes_several_times_a_step_waits_no_longer_for_it():
    """As in a source that is smaller than a step's rows."""
    one = queue()
    for step in range(2000):
        for _ in range(8):
            one.report(1, True, step)
    assert one.state_dict()["solved"][1] == (2003, 4, 0)
    assert one.take(1, 2003) == [1]
    for _ in range(8):
        one.report(1, True, 2004)
    assert one.state_dict()["solved"][1] == (2012, 8, 0)


def test_what_is_lost_goes_first_then_what_is_due_for_longest():
    one = queue()
    one.report(5, True, 1)
    one.report(9, True, 0)
    one.report(2, True, 1)
    one.report(8, True, 30)
    one.report(8, False, 31)
    assert one.take(2, 40) == [8, 9]
    assert one.take(2, 40) == [2, 5]


def test_the_share_holds_over_steps_and_is_not_saved_up():
    one = queue(share=0.25, after=1)
    for _ in range(50):  # nothing is due
        assert one.take(2, 0) == []
    for row in range(200):
        one.report(row, True, 0)
    taken = [len(one.take(2, 60)) for _ in range(40)]
    assert sum(taken) == 20
    assert max(taken) == 1
    assert np.abs(np.cumsum(taken) - 0.5 * np.arange(1, 41)).max() <= 1


def test_a_prompt_of_which_nobody_knows_is_neither_lost_nor_kept():
    """Its reward failed."""
    one = queue()
    one.report(1, None, 0)
    assert one.take(1, 100) == []
    one.report(1, True, 100)
    one.report(1, None, 101)
    assert one.take(1, 104) == [1]
    assert one.report(1, None, 105)
    assert [one.take(1, step) for step in (105, 108, 109)] == [[], [], [1]]
    assert one.report(1, True, 110)
    assert [one.take(1, step) for step in (117, 118)] == [[], [1]]


def test_a_row_that_cannot_be_used_is_forgotten():
    one = queue()
    one.report(1, True, 0)
    assert one.take(1, 4) == [1]
    one.forget(1)
    assert not one.report(1, False, 5)
    assert one.take(1, 50) == []


def test_the_state_goes_on_as_it_was():
    random = np.random.default_rng(0)
    solved = random.random((60, 30)) < 0.7

    def run(one, steps):
        found = []
        for step in steps:
            rows = one.take(6, step)
            found.append(rows)
            for row in [*rows, step % 30]:
                one.report(row, bool(solved[step, row]), step + 1)
        return found

    whole = run(queue(0.4), range(60))
    assert sum(map(len, whole)) > 50
    stopped, resumed = queue(0.4), queue(0.4)
    run(stopped, range(31))
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert run(resumed, range(31, 60)) == whole[31:]
