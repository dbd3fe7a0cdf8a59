from __future__ import annotations

import json

import pytest
import yaml

from recap_fast.config import ConfigError, SourceConfig, TrainConfig, load_config, save_config
from tests.tiny import tiny_settings


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_settings(tmp_path, tmp_path / "model")))
    return file


def message(path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert len(text.splitlines()) < 20
    return text


def test_loads_and_round_trips(path, tmp_path):
    config = load_config(path)
    assert isinstance(config, TrainConfig)
    assert [(o.name, o.kind) for o in config.objectives] == [
        ("length", "reward"), ("vowels", "reward"), ("ntp", "loss"),
    ]  # fmt: skip
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_overrides_replace_keys(path):
    config = load_config(
        path, ["optimizer.learning_rate=1e-5", "data.sources.1.size=7", "evaluation.every=3"]
    )
    assert config.optimizer.learning_rate == 1e-5
    assert config.data.sources[1].size == 7
    assert config.evaluation.every == 3


@pytest.mark.parametrize(
    ("override", "where", "nearest"),
    [
        ("optimizer.lerning_rate=1", "optimizer.lerning_rate", "'learning_rate'"),
        ("loss.clip_lo=0.1", "loss.clip_lo", "'clip_low'"),
        ("data.sources.0.kindd=rl", "data.sources.0.kindd", "'kind'"),
        ("trainig={}", "trainig", "'training'"),
        ("rollout.asinc.depth=1", "rollout.asinc", "'async'"),
        ("rollout.async.deph=1", "rollout.async.deph", "'depth'"),
        ("data.mixing={sumz: 1}", "data.mixing", "'sums'"),
        ("reweighting.signals={lenght: loss}", "reweighting.signals", "'length'"),
    ],
)
def test_mistyped_names_are_named_with_the_nearest_valid_one(path, override, where, nearest):
    text = message(path, override)
    assert str(path) in text
    assert where in text
    assert f"did you mean {nearest}" in text


@pytest.mark.parametrize(
    "override",
    ["seed=abc", "seed=true", "training.steps=1.5", "loss.clip_low=high", "model=3", "run=7",
     "data.sources=[]", "data.sources.0.rewards=[a]", "training.steps=0", "loss.clip_low=-1",
     "loss.aggregation=constant", "rollout.temperature=0", "data.mixing=evenly", "seed=-1",
     "optimizer.betas=[2.0, 3.0]", "optimizer.learning_rate=.inf", "optimizer.eps=.nan"],
)  # fmt: skip
def test_wrong_types_and_values_name_the_key(path, override):
    key = override.split("=")[0]
    assert key in message(path, override) or key.rsplit(".", 1)[0] in message(path, override)


SERVER = ["rollout.engine=vllm_server"]
NAMED = ["rollout.server.adapters=named"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss.kl_coef=0.1"], ["loss.kl_coef", "model.reference"]),
        (["rollout.group_size=1"], ["rollout.group_size", "advantages.normalize"]),
        (["training.max_tokens=100"], ["training.max_tokens", "520"]),
        (["loss.temperature=0.5"], ["loss.temperature", "rollout.temperature"]),
        (["data.mixing=coreset", "data.sources.1.replay=false"], ["coreset", "replay"]),
        (["data.mixing={sums: 0}"], ["data.mixing", "above 0"]),
        (
            ["data.mixing=adaptive", "data.adaptive.shares={sums: -1}"],
            ["data.adaptive.shares", "at least 0"],
        ),
        (["data.mixing=adaptive", "data.adaptive.shares={sumz: 1}"], ["shares", "'sums'"]),
        (
            ["data.mixing=adaptive", "data.sources.1.replay=false", "data.adaptive.shares=coreset"],
            ["data.adaptive.shares", "replay"],
        ),
        (["data.mixing=adaptive", "data.adaptive.most=1.0"], ["data.adaptive.most", "1"]),
        (["data.adaptive={most: 3.0}"], ["data.adaptive", "set data.mixing to adaptive"]),
        (
            ["data.mixing=adaptive", "reweighting={method: uniform}"],
            ["reweighting.method is uniform", "set reweighting.method to recap"],
        ),
        (
            ["data.mixing=adaptive", "data.adaptive.shares={sums: 1}"],
            ["adaptive", "the same objectives", "set data.mixing to another"],
        ),
        (["data.review={}"], ["data.review.rewards", "'accuracy'", "length"]),
        (["data.review={rewards: [lenght]}"], ["data.review.rewards", "'length'"]),
        (["data.review={rewards: [ntp]}"], ["data.review.rewards", "'ntp'", "name a reward"]),
        (["data.review={rewards: [length], share: 0.0}"], ["data.review.share", "0"]),
        (["data.sources.1.objective=vowels"], ["vowels", "reward", "supervised"]),
        (["data.sources.1.name=sums"], ["'sums'", "twice"]),
        (["data.sources.0.path=x.jsonl"], ["data.sources.0", "exactly one"]),
        (["data.sources.0.rewards={}"], ["data.sources.0", "rewards"]),
        (["model.reference=initial"], ["model.reference", "kl_coef"]),
        (["loss.logit_softcap=30.0"], ["logit_softcap", "the model's own"]),
        (["training.updates_per_rollout=5"], ["updates_per_rollout", "batch_size"]),
        (
            ["rollout.dynamic_sampling={}", "rollout.group_size=1", "advantages.normalize=none"],
            ["rollout.group_size is 1", "rollout.dynamic_sampling", "at least 2"],
        ),
        (
            ["reweighting.advantages=gdpo"],
            ["reweighting.advantages is gdpo", "reweighting.method is recap", "uniform or static"],
        ),
        (
            ["reweighting={method: uniform, advantages: dvao}", "advantages.normalize=none"],
            ["reweighting.advantages is dvao", "advantages.normalize is none", "set it to std"],
        ),
        (
            [
                "reweighting={method: static, advantages: gd2po}",
                "data.mixing=uniform",
                "data.sources=[{name: words, kind: sft, reasoning_gym: spell_backward, size: 9}]",
            ],
            ["reweighting.advantages is gd2po", "no source has rewards"],
        ),
        (["rollout.dynamic_sampling.max_refills=0"], ["rollout.dynamic_sampling.max_refills", "1"]),
        (["loss.rollout_is_mode=mask"], ["rollout_is_cap", "rollout_is_mode 'mask'", "None"]),
        (["loss.rollout_is_min=0.5"], ["rollout_is_cap", "rollout_is_min 0.5", "None"]),
        (
            ["loss.rollout_is_cap=2.0", "loss.rollout_is_min=2.0"],
            ["rollout_is_min", "below rollout_is_cap 2.0", "got 2.0"],
        ),
        (["rollout.async.depth=1"], ["async.depth", "set engine to vllm_server"]),
        ([*SERVER, "rollout.async.depth=1"], ["rollout.async.depth", "set loss.rollout_is_cap"]),
        (
            [*SERVER, "rollout.async={depth: 1, max_staleness: 0}"],
            ["max_staleness is 0 and depth 1", "raise max_staleness to at least 1"],
        ),
        ([*SERVER, "rollout.async={max_staleness: 2}"], ["max_staleness is 2", "depth is 0"]),
        ([*SERVER, "rollout.server.urls=[localhost]"], ["rollout.server.urls", "http://host:port"]),
        ([*SERVER, "rollout.server.urls=['http://a b:80']"], ["http://host:port", "a b"]),
        ([*SERVER, 'rollout.server.urls=["http://a\\tb:80"]'], ["http://host:port"]),
        ([*SERVER, "rollout.server.urls=['http://x:0']"], ["http://host:port"]),
        ([*SERVER, "rollout.server.urls=['http://x:99999']"], ["http://host:port", "range"]),
        (
            [*SERVER, "rollout.server.urls=['http://me:mine@x:1']"],
            ["without a user", "environment"],
        ),
        ([*SERVER, "rollout.server.urls=['http://x:1/v1']"], ["leave out what comes after"]),
        ([*SERVER, "rollout.server.urls=['http://x:1?a=1']"], ["leave out what comes after"]),
        (["rollout.server.urls=['http://x:1']"], ["server.urls", "set engine to vllm_server"]),
        (["rollout.server.count=2"], ["server.count is set", "engine is transformers", "leave"]),
        (
            ["rollout.engine=vllm", "rollout.server.timeout=5.0"],
            ["server.timeout is set", "set engine to vllm_server"],
        ),
        (
            [*SERVER, "rollout.server.urls=['http://x:1', 'http://x:1/']"],
            ["rollout.server.urls", "http://x:1 is given twice"],
        ),
        (
            [*SERVER, "rollout.server={urls: ['http://x:1'], count: 2}"],
            ["rollout.server", "count is 2", "urls names 1", "leave one of the two out"],
        ),
        (
            [*SERVER, "rollout.async.on_update=recompute"],
            ["on_update is recompute", "depth is 0", "set depth to at least 1"],
        ),
        (
            [*SERVER, "rollout.async.depth=1", "training.updates_per_rollout=2"],
            ["rollout.async.depth", "set loss.rollout_is_cap"],
        ),
        ([*SERVER, "rollout.sleep=true"], ["sleep is true"]),
        (
            [*SERVER, "model.device=cpu", "rollout.server.transfer=nccl"],
            ["transfer is nccl", "model.device is cpu", "to shared_memory"],
        ),
        ([*SERVER, *NAMED], ["adapters is named", "model.lora is unset", "to merged"]),
        (
            [*SERVER, *NAMED, "model.lora.rank=4", "model.train_vision=true"],
            ["adapters is named", "beside train_vision"],
        ),
    ],
)
def test_impossible_combinations(path, overrides, words):
    text = message(path, *overrides)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    "override", ["nothing", "=1", "seed=[1", "data.sources.9.name=x", "run.x=1"]
)
def test_malformed_overrides(path, override):
    assert override in message(path, override)


def test_missing_key_is_named(path):
    settings = yaml.safe_load(path.read_text())
    del settings["model"]["path"]
    path.write_text(yaml.safe_dump(settings))
    assert "model.path: missing" in message(path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("a: [1", "YAML"),
        ("seed: 1\nseed: 2\n", "twice"),
        ("? [a]\n: 1\n", "unhashable"),
        ("- 1", "mapping"),
        ("", "mapping"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_unreadable_files(tmp_path, content, word):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert word in message(file)


def test_missing_file(tmp_path):
    assert "no such file" in message(tmp_path / "absent.yaml")
    assert str(tmp_path) in message(tmp_path)


def test_local_files_are_kept_as_absolute_paths(path, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    cleared = [
        "data.sources.0.reasoning_gym=null",
        "data.sources.0.parameters={}",
        "data.sources.0.size=10000",
    ]
    config = load_config(path, [*cleared, "data.sources.0.path=rows.jsonl"])
    assert config.data.sources[0].path == str(tmp_path / "rows.jsonl")
    hub = load_config(path, [*cleared, "data.sources.0.path=someone/dataset"])
    assert hub.data.sources[0].path == "someone/dataset"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"digit_scenes": "range", "images": "image", "split": "test"}, "split is for sources wi"),
        ({"digit_scenes": "range", "images": "image", "parameters": {"a": 1}}, "parameters is for"),
        ({"digit_scenes": "range"}, "needs `images: image`"),
        ({"reasoning_gym": "chain_sum", "max_rows": 9}, "max_rows is for sources with path, not"),
        ({"path": "a/b", "size": 9}, "size is for sources with reasoning_gym or digit_scenes, not"),
    ],
)
def test_keys_of_another_kind_of_source_are_refused(source, expected):
    with pytest.raises(ValueError, match=expected):
        SourceConfig.model_validate({"name": "s", "kind": "sft", **source})


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder / f"{next(iter(files))}.yaml"


def test_extended_file(path, tmp_path):
    (tmp_path / "sub").mkdir()
    child = {
        "extends": "../run.yaml",
        "run": "other",
        "data": {"mixing": {"words": 1}},
        "reweighting": {"method": "uniform", "parameters": {}},
        "evaluation": {"every": 3},
    }
    file = write(tmp_path / "sub", child=child)
    base, config = load_config(path), load_config(file, ["evaluation.every=5"])
    assert config.run == "other"
    assert config.data.mixing == {"sums": 1, "words": 1}  # merged key by key
    assert base.reweighting.parameters
    assert config.reweighting.parameters == {}  # an empty mapping replaces
    assert config.evaluation.every == 5
    assert config.model == base.model
    assert config.data.sources == base.data.sources
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_lists_of_an_extended_file_are_replaced(path, tmp_path):
    sources = yaml.safe_load(path.read_text())["data"]["sources"][:1]
    file = write(
        tmp_path, child={"extends": "run.yaml", "data": {"sources": sources, "mixing": "uniform"}}
    )
    config = load_config(file)
    assert [source.name for source in config.data.sources] == ["sums"]
    assert config.data.mixing == "uniform"


def test_extending_badly(tmp_path):
    circle = write(
        tmp_path, a={"extends": "b.yaml"}, b={"extends": "./c.yaml"}, c={"extends": "a.yaml"}
    )
    text = message(circle)
    assert "extends itself" in text
    assert text.count(".yaml") == 4
    assert "d.yaml <- " in message(write(tmp_path, e={"extends": "d.yaml"}))
    assert "no such file" in message(write(tmp_path, e={"extends": "d.yaml"}))
    for wrong in (None, 3, ["a.yaml"], ""):
        assert "extends: wanted the name of a file" in message(
            write(tmp_path, f={"extends": wrong})
        )
    (tmp_path / "list.yaml").write_text("[1]")
    assert "list.yaml <- " in message(write(tmp_path, g={"extends": "list.yaml"}))


def test_keys_of_images(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = ["reasoning_gym=null", "parameters={}", "size=10000", "path=owner/name"]
    config = load_config(
        path, [*(f"data.sources.0.{override}" for override in table),
               "data.sources.0.images=image", "data.sources.0.image_folder=pictures",
               "data.sources.0.max_image_side=512", "data.max_image_pixels=401408"],
    )  # fmt: skip
    assert config.data.sources[0].image_folder == str(tmp_path / "pictures")
    assert "no use without `images`" in message(path, "data.sources.0.max_image_side=512")
    assert "max_image_side" in message(
        path, "data.sources.0.images=image", "data.sources.0.max_image_side=0"
    )
    assert load_config(path, ["data.sources.0.question=[a, b]"]).data.sources[0].question == [
        "a",
        "b",
    ]
    assert "data.sources.0.question" in message(path, "data.sources.0.question=[]")


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + ".jsonl", "/y" * 3000, "z*" * 3000])
def test_names_too_long_for_the_system(path, name):
    table = ["reasoning_gym=null", "parameters={}", "size=10000", f"path={json.dumps(name)}"]
    overrides = [f"data.sources.0.{override}" for override in table]
    loaded = load_config(path, [*overrides, f"run={name}"])
    assert loaded.data.sources[0].path.endswith(name)
    listed = load_config(path, [*overrides, f"data.sources.0.path={json.dumps([name])}"])
    assert listed.data.sources[0].path == [loaded.data.sources[0].path]
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        load_config(name)


def test_paths_mean_the_same_from_anywhere(path, tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "a[1]"
    (here / "d").mkdir(parents=True)
    (here / "owner").mkdir()
    (here / "d" / "a.jsonl").write_text('{"question": "q", "answer": "1"}\n')
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    base = ["reasoning_gym=null", "parameters={}", "size=10000", "images=image"]
    base = [f"data.sources.0.{override}" for override in base]

    def loaded(given, folder="~/coco"):
        keys = [f"data.sources.0.path={given}", f"data.sources.0.image_folder={folder}"]
        return load_config(path, [*base, *keys, "run=~/run"])

    config = loaded("[d/a.jsonl, d/*.jsonl, ~/b.jsonl, owner/name.jsonl]")
    assert config.run == str(home / "run")
    assert config.data.sources[0].image_folder == str(home / "coco")
    assert config.data.sources[0].path == [
        f"{here}/d/a.jsonl", f"{tmp_path}/a[[]1]/d/*.jsonl", f"{home}/b.jsonl",
        f"{here}/owner/name.jsonl",
    ]  # fmt: skip
    assert loaded("d/a.jsonl").data.sources[0].path == f"{here}/d/a.jsonl"
    for kept in ("owner/name", "https://host/a.jsonl"):
        assert loaded(kept).data.sources[0].path == kept
    pattern = loaded("d/*.jsonl").data.sources[0]
    assert loaded("d/*.jsonl", "pictures").data.sources[0].image_folder == f"{here}/pictures"
    monkeypatch.chdir(tmp_path)
    from recap_fast.data.sources import find_files

    assert find_files(pattern) == [here / "d" / "a.jsonl"]


def test_a_keyword_of_python_is_a_key(path, tmp_path):
    overrides = ["rollout.async={depth: 2, max_staleness: 3}", "loss.rollout_is_cap=2.0", *SERVER]
    config = load_config(path, overrides)
    assert config.rollout.asynchronous.depth == 2
    assert config.rollout.asynchronous.staleness_bound == 3
    save_config(config, tmp_path / "saved.yaml")
    assert "async:" in (tmp_path / "saved.yaml").read_text()
    assert load_config(tmp_path / "saved.yaml") == config
