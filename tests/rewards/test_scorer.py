from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor
from functools import partial
from queue import SimpleQueue
from threading import Lock

import numpy as np
import psutil
import pytest

from recap_fast.config import RewardsConfig, RewardSpec, SourceConfig
from recap_fast.rewards.functions import BUILTIN
from recap_fast.rewards.resolve import RewardError, resolve
from recap_fast.rewards.scorer import RewardScorer, RewardTally
from recap_fast.types import Objective, Prompt, Rollout

CASES = "tests.rewards.reward_cases"


def source(rewards, name="s", **keys):
    if "reasoning_gym" not in keys:
        keys["path"] = "rows.jsonl"
    return SourceConfig(name=name, kind="rl", rewards=rewards, **keys)


def rollout(text, answer="4", source_name="s", entry=None, group=0):
    prompt = Prompt(source_name, 0, [1], "q", answer, entry or {"answer": answer})
    return Rollout(prompt, group, [1, 2], [0.0, 0.0], "stop", text)


def objectives(*names):
    return [Objective(name, "reward") for name in names]


def scorer(rewards, names=("r",), **config):
    config = {"workers": 2, "timeout": 1.0, "max_failure_fraction": 1.0, **config}
    return RewardScorer([source(rewards)], objectives(*names), RewardsConfig(**config))


def test_accuracy_knows_the_options_of_its_source():
    rows = [{"answer": 1, "options": ["left", "right"]}, {"answer": "7", "options": None}]
    rollouts = [
        rollout("<answer>(B)</answer>", 1, entry=rows[0]),
        rollout("<answer>left</answer>", 1, entry=rows[0]),
        rollout("<answer>7</answer>", "7", entry=rows[1]),
    ]
    asked = source({"r": "accuracy"}, choices="options")
    with RewardScorer([asked], objectives("r"), RewardsConfig(timeout=30)) as scoring:
        assert scoring.score(rollouts, 10).values[:, 0].tolist() == [1, 0, 1]


# -- from a name to a function


def test_resolve():
    assert resolve("accuracy") == (BUILTIN["accuracy"], {})
    function, parameters = resolve(
        RewardSpec(function=f"{CASES}:scaled", parameters={"factor": 2.0})
    )
    assert function.__name__ == "scaled"
    assert parameters == {"factor": 2.0}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("acuracy", "no reward 'acuracy'; did you mean 'accuracy'"),
        ("xyz", "built in are accuracy, thinking_format"),
        ("no_such_module:f", "module 'no_such_module' cannot be imported: ModuleNotFoundError"),
        (":f", "module '' cannot be imported"),
        (f"{CASES}:misbehav", "has no 'misbehav'; did you mean 'misbehave'"),
        (f"{CASES}:not_callable", "is int, which cannot be called"),
        (f"{CASES}:scaled", "missing a required argument: 'factor'"),
        (f"{CASES}:judge", "is async"),
        (f"{CASES}:judge_twice", "is async"),
        (f"{CASES}:judge_object", "is async"),
        (f"{CASES}:judge_method", "is async"),
        (f"{CASES}:judge_partly", "is async"),
        (f"{CASES}:judge_partly_object", "is async"),
        (f"{CASES}:judge_step_by_step", "is a generator"),
        (RewardSpec(function="overlong", parameters={"bufer": 3}), "parameters are: max_length, b"),
        (
            RewardSpec(function="iou", parameters={"units": "percent"}),
            "parameter units is one of pixels, fraction, thousandths; got 'percent'",
        ),
        (RewardSpec(function="iou", parameters={"box_format": "yxyx"}), "xyxy, xywh; got 'yxyx'"),
    ],
)
def test_unusable_reward_is_refused_at_the_start(spec, expected):
    with pytest.raises(RewardError) as caught:
        RewardScorer([source({"r": spec})], objectives("r"), RewardsConfig())
    assert expected in str(caught.value)
    assert "source 's', objective 'r'" in str(caught.value)


def test_module_that_fails_to_import(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("raise OSError('no licence')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RewardError, match=r"OSError: no licence .*broken_rewards.py:1"):
        resolve("broken_rewards:f")


def test_modules_in_the_current_folder_are_found(tmp_path):
    (tmp_path / "my_rewards.py").write_text("def half(sample):\n    return 0.5\n")
    code = (
        "import sys; sys.path.remove('')\n"
        "from recap_fast.rewards.resolve import resolve\n"
        "print(resolve('my_rewards:half')[0](None))"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "0.5", result.stderr


def test_workers_need_no_torch():
    code = (
        "import recap_fast.rewards.scorer, sys; "
        "print('torch' in sys.modules, 'sympy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["False", "False"], result.stderr


# -- the table


def test_table_has_nan_where_a_source_does_not_carry_an_objective():
    sources = [
        source({"accuracy": "accuracy", "format": "answer_format"}, "a"),
        source({"format": "answer_format"}, "b"),
        SourceConfig(name="c", kind="sft", path="rows.jsonl"),
    ]
    columns = [Objective("ntp", "loss"), *objectives("format", "accuracy")]
    rollouts = [
        rollout("<answer>4</answer>", source_name="a"),
        rollout("<answer>5</answer>", source_name="a"),
        rollout("4", source_name="b"),
    ]
    with RewardScorer(sources, columns, RewardsConfig()) as scores:
        table = scores.score(rollouts, 16)
        again = scores.score(rollouts, 16)
        empty = scores.score([], 16)
    nan = np.nan
    expected = np.array([[nan, 1, 1], [nan, 1, 0], [nan, 0, nan]], dtype=np.float32)
    np.testing.assert_array_equal(table.values, expected)
    np.testing.assert_array_equal(again.values, expected)
    assert table.values.dtype == np.float32
    assert table.failures == {}
    assert empty.values.shape == (0, 3)


def test_sources_may_compute_one_objective_differently():
    sources = [
        source({"r": RewardSpec(function=f"{CASES}:scaled", parameters={"factor": 1})}, "a"),
        source({"r": RewardSpec(function=f"{CASES}:scaled", parameters={"factor": 10})}, "b"),
    ]
    rollouts = [rollout("xx", source_name="a"), rollout("xx", source_name="b")]
    with RewardScorer(sources, objectives("r"), RewardsConfig()) as scores:
        assert scores.score(rollouts, 16).values[:, 0].tolist() == [2.0, 20.0]


def test_reasoning_gym_reward_knows_its_source():
    gym = source({"r": "reasoning_gym"}, reasoning_gym="chain_sum", parameters={"max_terms": 2})
    rows = [rollout("<answer>+4.0</answer>", entry={"answer": "4"})]
    with RewardScorer([gym], objectives("r"), RewardsConfig()) as scores:
        assert scores.score(rows, 16).values.tolist() == [[1.0]]


def test_no_workers_without_rewards():
    sft = SourceConfig(name="c", kind="sft", path="rows.jsonl")
    with RewardScorer([sft], [Objective("ntp", "loss")], RewardsConfig()) as scores:
        assert scores.score([], 16).values.shape == (0, 1)


# -- what goes wrong


@pytest.fixture(scope="module")
def cases():
    with scorer({"r": f"{CASES}:misbehave"}) as scores:
        yield scores


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", 1.0),
        ("numpy", 0.5),
        ("numpy_bool", 1.0),
        ("int", 3.0),
        ("none", np.nan),
        ("array", 0.5),
        ("truth", 1.0),
    ],
)
def test_values_that_are_fine(cases, text, value):
    table = cases.score([rollout(text)], 16)
    np.testing.assert_array_equal(table.values, np.float32([[value]]))
    assert table.failures == {}


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("raise", "raised"),
        ("exit", "raised"),
        ("text", "invalid"),
        ("list", "invalid"),
        ("generator", "invalid"),
        ("nan", "invalid"),
        ("inf", "invalid"),
        ("huge", "invalid"),
        ("hang", "timeout"),
        ("stubborn", "timeout"),
        ("die", "crashed"),
        ("quit", "timeout"),
    ],
)
def test_failure_concerns_one_rollout_only(cases, text, kind):
    texts = ["ok"] * 16
    texts[5] = text
    table = cases.score([rollout(text) for text in texts], 16)
    expected = np.full((16, 1), 0.25, dtype=np.float32)
    expected[5] = np.nan
    np.testing.assert_array_equal(table.values, expected)
    assert table.failures == {f"r/{kind}": 1}
    assert cases.failures[f"r/{kind}"] >= 1


def test_first_error_is_kept_with_its_place():
    with scorer({"r": f"{CASES}:misbehave"}) as scores:
        scores.score([rollout("raise"), rollout("text")], 16)
        assert " KeyError: 'gone' (" in scores.first_errors["r/raised"]
        assert scores.first_errors["r/raised"].startswith("row ")
        assert "reward_cases.py:" in scores.first_errors["r/raised"]
        assert "got str '1.0'" in scores.first_errors["r/invalid"]


def test_other_objectives_of_a_failing_rollout_survive():
    with scorer({"r": f"{CASES}:misbehave", "f": "answer_format"}, ("r", "f")) as scores:
        table = scores.score([rollout("hang"), rollout("<answer>1</answer>")], 16)
    np.testing.assert_array_equal(table.values, np.float32([[np.nan, 0], [0.25, 1]]))


def test_hung_and_killed_workers_are_gone():
    with scorer({"r": f"{CASES}:misbehave", "pid": f"{CASES}:process"}, ("r", "pid")) as scores:
        before = set(scores.score([rollout("ok")] * 20, 16).values[:, 1].astype(int))
        scores.score([rollout("hang"), rollout("stubborn")], 16)
        for process in before:
            with pytest.raises(ProcessLookupError):
                os.kill(process, 0)
        assert scores.score([rollout("ok")], 16).values[0, 0] == 0.25


def test_idle_workers_that_the_system_kills_are_replaced():
    with scorer({"r": f"{CASES}:misbehave", "pid": f"{CASES}:process"}, ("r", "pid")) as scores:
        for process in set(scores.score([rollout("ok")] * 20, 16).values[:, 1].astype(int)):
            os.kill(int(process), signal.SIGKILL)
        time.sleep(0.3)  # the pool notices, and gives up
        table = scores.score([rollout("ok")] * 8, 16)
    assert table.values[:, 0].tolist() == [0.25] * 8


def test_workers_that_take_no_jobs_are_replaced(monkeypatch):
    with scorer({"r": f"{CASES}:misbehave", "pid": f"{CASES}:process"}, ("r", "pid")) as scores:
        for process in set(scores.score([rollout("ok")] * 20, 16).values[:, 1].astype(int)):
            os.kill(int(process), signal.SIGSTOP)
        monkeypatch.setattr("recap_fast.rewards.scorer._SILENT_SECONDS", 6.0)
        table = scores.score([rollout("ok")] * 8, 16)
    assert table.values[:, 0].tolist() == [0.25] * 8


@pytest.mark.parametrize("kills", [2, 3])
def test_workers_that_are_killed_as_they_start_are_started_again(monkeypatch, kills):
    start, left = RewardScorer._try_to_start_pool, [None] * kills

    def killed(self):
        start(self)
        if left:
            left.pop()
            raise BrokenExecutor("All workers expired")

    monkeypatch.setattr(RewardScorer, "_try_to_start_pool", killed)
    make = partial(scorer, {"r": f"{CASES}:misbehave"})
    if kills == 3:
        with pytest.raises(RewardError, match="did not start.*All workers expired"), make():
            pass
    else:
        with make() as scores:
            assert scores.score([rollout("ok")], 16).values.tolist() == [[0.25]]


IN_A_GROUP = """
import signal
from tests.rewards.test_scorer import CASES, rollout, scorer

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: print("asked to stop", flush=True))
    rewards = {"r": f"{CASES}:slow", "pid": f"{CASES}:process"}
    with scorer(rewards, ("r", "pid"), timeout=20.0) as scores:
        print(*set(scores.score([rollout("")] * 8, 16).values[:, 1].astype(int)), flush=True)
        print(scores.score([rollout("")] * 16, 16).values[:, 0].tolist(), flush=True)
    with scorer({"r": f"{CASES}:misbehave"}, workers=1) as scores:
        table = scores.score([rollout("hang"), rollout("ok")], 16)
        print(table.values[:, 0].tolist(), table.failures, flush=True)
    with scorer({"r": f"{CASES}:misbehave"}, workers=1, timeout=1000.0) as scores:
        scores.score([rollout("hang")], 16)
"""


def test_what_ends_the_group_spares_the_workers():
    """torchrun, SLURM and `timeout` send SIGTERM to all of a group, of which one saves and stops; a
    killed trainer leaves nobody behind, not even a worker that hangs."""
    with subprocess.Popen(
        [sys.executable, "-c", IN_A_GROUP],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as trainer:  # fmt: skip
        assert trainer.stdout is not None
        children = psutil.Process(trainer.pid).children
        try:
            pids = set(map(int, trainer.stdout.readline().split()))
            begun = time.perf_counter()
            os.killpg(trainer.pid, signal.SIGTERM)
            assert trainer.stdout.readline() == "asked to stop\n"
            assert trainer.stdout.readline() == f"{[1.0] * 16}\n"
            assert time.perf_counter() - begun < 15.0
            assert len(pids) == 2
            # And a worker that hangs is replaced: the server of workers is there still.
            assert trainer.stdout.readline() == "[nan, 0.25] {'r/timeout': 1}\n"
            time.sleep(2.0)  # the last one hangs by now
            left = children(recursive=True)
            assert len(left) >= 2
        finally:
            trainer.kill()
        psutil.wait_procs(left, timeout=10.0)
        assert not [process for process in left if process.is_running()]


def test_rows_that_cannot_be_sent_fail_alone():
    rows = [rollout("ok"), rollout("ok", entry={"lock": Lock()})]
    with scorer({"r": f"{CASES}:misbehave"}) as scores:
        table = scores.score(rows, 16)
    np.testing.assert_array_equal(table.values, np.float32([[0.25], [np.nan]]))
    assert table.failures == {"r/raised": 1}


def test_slow_rewards_do_not_time_out_as_a_batch():
    rows = [rollout("")] * 16
    with scorer({"r": f"{CASES}:slow"}, workers=1, timeout=0.6) as scores:
        scoring = scores.start(16)
        scoring.add(rows)
        assert {len(batch) for batch, _ in scoring._pending.values()} == {4}  # 0.8 s
        table = scoring.table()
        scoring = scores.start(16)
        scoring.add(rows)
        assert {len(batch) for batch, _ in scoring._pending.values()} == {1}
    assert table.values.min() == 1.0
    assert table.failures == {}


@pytest.mark.parametrize(("failing", "stops"), [(1, False), (2, False), (3, True)])
def test_too_many_failures_stop_the_run(failing, stops):
    rows = [rollout("raise")] * failing + [rollout("ok")] * (10 - failing)
    with scorer({"r": f"{CASES}:misbehave"}, max_failure_fraction=0.2) as scores:
        if stops:
            with pytest.raises(RewardError, match=r"'r' failed for 3 of 10 .*KeyError: 'gone'"):
                scores.score(rows, 16)
        else:
            assert scores.score(rows, 16).failures == {"r/raised": failing}


def test_close_does_not_wait_for_hung_workers():
    scores = scorer({"r": f"{CASES}:misbehave"}, timeout=60.0)
    scores.start(16).add([rollout("hang")])
    time.sleep(0.5)
    start = time.perf_counter()
    scores.close()
    assert time.perf_counter() - start < 10.0


def test_workers_do_not_run_the_script(tmp_path):
    """It may import torch and transformers, or train without asking whether it is `__main__`."""
    script = tmp_path / "script.py"
    script.write_text(
        "from tests.rewards.test_scorer import CASES, rollout, scorer\n"
        "print('run', flush=True)\n"
        f"with scorer({{'r': '{CASES}:misbehave'}}, workers=2) as scores:\n"
        "    for _ in range(2):\n"  # the worker that is killed is replaced
        "        print(scores.score([rollout('ok'), rollout('die')], 16).values.tolist())\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": os.getcwd()})  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "run\n" + 2 * "[[0.25], [nan]]\n"


# -- a step in progress


def test_rollouts_may_come_group_by_group():
    groups = [[rollout("x" * (3 * group + i)) for i in range(3)] for group in range(5)]
    spec = RewardSpec(function=f"{CASES}:scaled", parameters={"factor": 1})
    with scorer({"r": spec, "f": "answer_format"}, ("r", "f")) as scores:
        scoring = scores.start(16)
        for group in groups:
            scoring.add(group)
        scoring.add([])
        other = scores.start(16)  # an evaluation, say, while the step goes on
        other.add(groups[0])
        table = scoring.table()
        assert other.table().values[:, 0].tolist() == [0, 1, 2]
    assert table.values[:, 0].tolist() == list(range(15))
    assert table.values[:, 1].tolist() == [0] * 15
    with scorer({"r": spec}) as scores:
        assert scores.start(16).table().values.shape == (0, 1)


def test_workers_begin_before_all_rollouts_are_there():
    with scorer({"r": f"{CASES}:slow"}, workers=2, timeout=10.0) as scores:
        scoring = scores.start(16)
        start = time.perf_counter()
        scoring.add([rollout("")] * 4)
        assert time.perf_counter() - start < 0.2
        deadline = start + 20
        while not all(future.done() for future in scoring._pending):
            assert time.perf_counter() < deadline
            time.sleep(0.05)
        start = time.perf_counter()
        assert scoring.table().values.tolist() == [[1.0]] * 4
        assert time.perf_counter() - start < 0.2  # nothing was left to be waited for


def test_failures_are_counted_over_the_whole_step():
    with scorer({"r": f"{CASES}:misbehave"}, max_failure_fraction=0.5) as scores:
        scoring = scores.start(16)
        scoring.add([rollout("raise")] * 2)  # too many of the two, but not of the four
        scoring.add([rollout("ok")] * 2)
        assert scoring.table().failures == {"r/raised": 2}
        with pytest.raises(RewardError, match=r"'r' failed for 6 of 8 rollouts"):
            scores.score([rollout("raise")] * 6 + [rollout("ok")] * 2, 16)


def test_a_step_in_parts_has_one_tally():
    with scorer({"r": f"{CASES}:misbehave"}, max_failure_fraction=0.5) as scores:
        tally = RewardTally()
        parts = [["ok"] * 3, ["raise"], ["raise"] * 2]
        for words in parts:  # of the last two parts all, but half of the step's
            scoring = scores.start(16, tally)
            scoring.add([rollout(word) for word in words])
            scoring.table()
        scoring = scores.start(16, tally)
        scoring.add([rollout("raise")])
        with pytest.raises(RewardError, match=r"'r' failed for 4 of 7 rollouts"):
            scoring.table()


def test_a_pool_that_breaks_under_two_steps_is_replaced_once():
    with scorer({"r": f"{CASES}:misbehave"}) as scores:
        steps = [scores.start(16), scores.start(16)]
        for step in steps:
            step.add([rollout("ok")] * 4)
        scores.pool.stop()
        scores.pool.join()
        assert [step.table().values.sum() for step in steps] == [1.0, 1.0]


def test_a_step_behind_another_one_does_not_take_the_workers_for_silent(monkeypatch):
    monkeypatch.setattr("recap_fast.rewards.scorer._SILENT_SECONDS", 0.2)
    with scorer({"r": f"{CASES}:slow"}, workers=1, timeout=1.5) as scores:
        pool = scores.pool
        steps = [scores.start(16), scores.start(16)]
        steps[0].add([rollout("")] * 16)  # 3.2 s
        steps[1].add([rollout("")])
        assert steps[1].table().values.tolist() == [[1.0]]
        assert steps[0].table().values.min() == 1.0
        assert scores.pool is pool


def test_a_step_is_collected_without_waiting():
    with scorer({"r": f"{CASES}:slow"}, timeout=10.0) as scores:
        told = SimpleQueue()
        scoring = scores.start(16, on_done=lambda: told.put(None))
        scoring.add([rollout("")] * 2)
        assert scoring.collect() is None
        while (table := scoring.collect()) is None:
            told.get(timeout=20)
        assert table.values.tolist() == [[1.0]] * 2


# -- answers on which a built-in breaks


def test_an_answer_that_hangs_a_built_in_is_wrong_and_no_failure(monkeypatch):
    # A stand-in for what hangs a parser: the accuracy of a completion whose worker never returns.
    with scorer({"r": f"{CASES}:misbehave", "a": "accuracy"}, ("r", "a"), timeout=30) as scores:
        scoring = scores.start(16)
        scoring.add([rollout("<answer>4</answer>"), rollout("<answer>5</answer>")])
        for call, (reward, _) in enumerate(scoring._jobs):
            if scores.rewards[reward].objective == "a":
                error = TimeoutError()
                assert scoring._failed_call(call, error)[0] == "unreadable"
            else:
                assert scoring._failed_call(call, TimeoutError())[0] == "timeout"
        assert scoring.table().values[:, 1].tolist() == [1.0, 0.0]


def test_answers_that_break_a_verifier_never_end_the_run():
    gym = source({"r": "reasoning_gym"}, reasoning_gym="prime_factorization")
    rows = [
        rollout(f"<answer>{text}</answer>", "2 × 3", entry={"answer": "2 × 3", "metadata": {}})
        for text in ("2 × 3", "two", "I do not know")
    ]
    with RewardScorer([gym], objectives("r"), RewardsConfig(max_failure_fraction=0.0)) as scores:
        table = scores.score(rows, 16)
        assert "ValueError" in scores.first_errors["r/unreadable"]
        assert scores.unreadable == {"r": 2}
    assert table.values[1:, 0].tolist() == [0.0, 0.0]
    assert table.unreadable == {"r": 2}
    assert table.failures == {}
    assert not scores.failures


def test_a_row_that_a_built_in_cannot_use_is_still_a_failure():
    with scorer({"a": "accuracy"}, ("a",)) as scores:
        table = scores.score([rollout("<answer>4</answer>", answer=float("nan"))], 16)
    assert np.isnan(table.values).all()
    assert table.failures == {"a/raised": 1}
