from __future__ import annotations

import math

import pytest

from recap_fast.simulate.engine import Engine, Request, spread


def run(engine: Engine) -> list[tuple[float, float]]:
    """(time, tokens) of every request, in the order in which they end."""
    ended = []
    while (time := engine.next_end()) < math.inf:
        engine.advance(time)
        ended += [(time, request.tokens) for request in engine.collect()]
    return ended


def test_a_decode_step_costs_more_with_more_requests():
    engine = Engine(step=0.01, request=0.001)
    engine.admit([Request(0, 10), Request(1, 30)])
    (first, _), (last, _) = run(engine)
    assert first == pytest.approx(10 * (0.01 + 2 * 0.001))
    assert last == pytest.approx(first + 20 * (0.01 + 0.001))
    assert engine.request_seconds == pytest.approx(2 * first + (last - first))


def test_a_batch_takes_its_longest_completion_and_its_tokens():
    lengths = [5, 5, 17, 40, 100]
    engine = Engine(step=0.02, request=0.003)
    engine.admit([Request(0, tokens) for tokens in lengths])
    assert run(engine)[-1][0] == pytest.approx(0.02 * max(lengths) + 0.003 * sum(lengths))


def test_requests_wait_for_a_slot():
    engine = Engine(step=0.01, request=0.0, slots=2)
    engine.admit([Request(0, 10), Request(0, 10), Request(0, 10)])
    assert (engine.in_flight, engine.load) == (2, 3)
    assert [time for time, _ in run(engine)] == pytest.approx([0.1, 0.1, 0.2])


def test_nothing_is_sampled_in_a_pause():
    engine = Engine(step=0.01, request=0.0)
    engine.admit([Request(0, 10)])
    engine.advance(0.05)
    engine.pause(1.05)
    assert run(engine)[0][0] == pytest.approx(1.1)
    assert engine.idle_seconds == 0


def test_time_without_a_request_is_idle():
    engine = Engine(step=0.01, request=0.0)
    engine.advance(3.0)
    engine.admit([Request(0, 10)])
    run(engine)
    engine.advance(5.0)
    assert engine.idle_seconds == pytest.approx(3.0 + 5.0 - 3.1)


def test_tokens_have_the_version_that_sampled_them():
    engine = Engine(step=0.01, request=0.0)
    request = Request(0, 100)
    engine.advance(0.2)
    engine.admit([request])
    for time, version in ((0.5, 1), (0.5, 2), (1.0, 3)):
        engine.advance(time)
        engine.set_version(version)
    engine.advance(engine.next_end())
    assert [*engine.collect()] == [request]
    assert dict(engine.tokens_by_version(request)) == pytest.approx({0: 30, 2: 50, 3: 20})


def test_a_request_of_one_version_has_it_alone():
    engine = Engine(step=0.01, request=0.0)
    engine.set_version(1)
    request = Request(0, 8)
    engine.admit([request])
    run(engine)
    engine.set_version(2)
    assert dict(engine.tokens_by_version(request)) == pytest.approx({1: 8})


def test_requests_go_where_there_are_fewest():
    engines = [Engine(0.01, 0.0) for _ in range(3)]
    engines[1].admit([Request(0, 5)] * 4)
    spread(engines, [Request(0, 5) for _ in range(8)])
    assert [engine.load for engine in engines] == [4, 4, 4]
