"""Config files and overrides: the resulting config, and the message for each mistake."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tora.config.components import instantiate
from tora.config.load import config_names, configs_dir, dump_yaml, load_config, missing_folders, to_dict
from tora.config.schema import RunConfig
from tora.errors import ConfigError


def write(path: Path, text: str) -> str:
    path.write_text(textwrap.dedent(text))
    return str(path)


def refusal(name: str = "quickstart", *overrides: str) -> str:
    """The message that rejects a config."""
    with pytest.raises(ConfigError) as error:
        load_config(name, overrides)
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


def test_quickstart_is_the_documented_run() -> None:
    cfg = load_config("quickstart")
    assert cfg.async_rl and cfg.rollout.engine == "vllm" and cfg.dtype == "fp32"
    assert (cfg.model.lora_rank, cfg.model.lora_alpha, len(cfg.model.lora_targets)) == (1, 32.0, 7)
    assert cfg.optimizer["lr"] == 6e-4 and cfg.output_dir == "outputs/quickstart"


def test_every_shipped_config_loads() -> None:
    names = config_names()
    assert len(names) > 50
    for name in names:
        cfg = load_config(name)
        kind = "full" if "_full_" in name else "lora"
        assert cfg.model.lora_type == kind
        assert name == "quickstart" or cfg.name == name.replace("/", "_")


def test_adapters_learn_ten_times_faster_than_full_weights() -> None:
    lora, full = load_config("qwen3/0.6B_lora_grpo"), load_config("qwen3/0.6B_full_grpo")
    assert lora.optimizer["lr"] == pytest.approx(10 * full.optimizer["lr"])


def test_overrides() -> None:
    overrides = ['model.lora_type="dora"', "clip_grad_norm=null", "model.lora_targets=[q_proj,v_proj]", "name=mine"]
    overrides += ["optimizer.betas=[0.8,0.9]", "rewards.0.weight=2", "rollout.kv_cache_gib=1", "eval.temperature=0"]
    cfg = load_config("quickstart", overrides)
    assert cfg.model.lora_type == "dora" and cfg.clip_grad_norm is None
    assert cfg.model.lora_targets == ["q_proj", "v_proj"]
    assert cfg.optimizer["betas"] == [0.8, 0.9] and cfg.optimizer["lr"] == 6e-4
    assert cfg.rewards[0]["weight"] == 2 and cfg.output_dir == "outputs/mine"
    assert isinstance(cfg.eval and cfg.eval.temperature, float) and isinstance(cfg.rollout.kv_cache_gib, float)
    assert load_config("quickstart", ["eval=null"]).eval is None


def test_another_component_drops_the_arguments_of_the_one_before() -> None:
    overrides = ["optimizer.lr=1.0", "optimizer._component_=torch.optim.SGD"]
    for ordered in (overrides, overrides[::-1]):
        assert load_config("quickstart", ordered).optimizer == {"_component_": "torch.optim.SGD", "lr": 1.0}
    assert "optimizer.lr=null" in refusal("quickstart", "optimizer._component_=torch.optim.SGD")


def test_extends_merges_in_order_and_prefers_files_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base/full.yaml", "seed: 7\nmodel: {path: here}\n")  # hides the shipped base/full.yaml
    write(tmp_path / "b.yaml", "extends: base/full.yaml\nnum_steps: 3\nmodel: {lora_rank: 2}\n")
    path = write(
        tmp_path / "a.yaml",
        """\
        extends: [base/grpo.yaml, base/lora.yaml, b.yaml]
        name: a
        num_steps: 4
        optimizer: {lr: 1e-3}
        """,
    )
    cfg = load_config(path, ["num_steps=5"])
    assert (cfg.seed, cfg.num_steps, cfg.model.lora_rank, cfg.model.path) == (7, 5, 2, "here")
    assert cfg.model.lora_alpha == 32 and cfg.optimizer["lr"] == 1e-3 and cfg.optimizer["betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    ("overlay", "loss", "normalization", "normalizes"),
    [
        ("dr_grpo", "DrGRPOLoss", "constant", False),
        ("dapo", "DAPOLoss", "token", True),
        ("gspo", "GSPOLoss", "sequence", True),
        ("cispo", "CISPOLoss", "token", True),
        ("sapo", "SAPOLoss", "sequence", True),
    ],
)
def test_a_loss_overlay_sets_what_its_loss_requires(
    tmp_path: Path, overlay: str, loss: str, normalization: str, normalizes: bool
) -> None:
    text = f"extends: [base/grpo.yaml, base/lora.yaml, base/{overlay}.yaml]\nname: mine\nmodel: {{path: here}}\n"
    path = write(tmp_path / "mine.yaml", text)
    cfg = load_config(path, ["max_generated_tokens=1000"])
    assert cfg.loss["_component_"] == f"learner.loss.{loss}"
    assert (cfg.loss_normalization, cfg.normalize_advantages) == (normalization, normalizes)
    assert type(instantiate(cfg.loss)).__name__ == loss
    if overlay == "dapo":
        assert [r["_component_"].rpartition(".")[2] for r in cfg.rewards] == ["math_answer", "overlong"]
        assert (cfg.rewards[1]["max_tokens"], cfg.rewards[1]["buffer"]) == (1000, 128)
    other = {"constant": "token", "token": "sequence", "sequence": "constant"}[normalization]
    assert f'loss_normalization="{other}" must be "{normalization}"' in refusal(path, f"loss_normalization={other}")


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        ("dppo", ("DPPOLoss", "grpo", True, "token")),
        ("rloo", ("GRPOLoss", "rloo", False, "constant")),
        ("reinforce_pp", ("GRPOLoss", "reinforce++", True, "token")),
    ],
)
def test_overlays_of_objectives_that_require_no_normalization(
    tmp_path: Path, overlay: str, expected: tuple[str | bool, ...]
) -> None:
    text = f"extends: [base/grpo.yaml, base/lora.yaml, base/{overlay}.yaml]\nname: mine\nmodel: {{path: here}}\n"
    cfg = load_config(write(tmp_path / "mine.yaml", text))
    loss = instantiate(cfg.loss)
    assert (type(loss).__name__, cfg.advantage, cfg.normalize_advantages, cfg.loss_normalization) == expected
    if overlay == "dppo":
        assert (loss.proximal, loss.importance_correction, loss.clip_high) == ("actor", "none", 0.15)


def test_losses_are_found_by_either_path() -> None:
    for path in ("learner.loss.GRPOLoss", "learner.loss.grpo.GRPOLoss"):
        cfg = load_config("quickstart", [f"loss._component_={path}", "loss.kl_in=reward", "loss.kl_coeff=0.1"])
        assert instantiate(cfg.loss).kl_in == "reward"
        assert "kl_coef=1" in refusal("quickstart", f"loss._component_={path}", "loss.kl_coef=1")
    assert "learner.loss.dr_grpo.DrGRPOLoss" in refusal(
        "quickstart", "loss._component_=learner.loss.dr_grpo.DrGRPOLoss"
    )


def test_extends_that_cannot_be_followed(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    assert "extends itself" in refusal(str(tmp_path / "a.yaml"))
    assert "the nearest is base/grpo.yaml" in refusal(write(tmp_path / "c.yaml", "extends: base/grop.yaml\n"))


@pytest.mark.parametrize("text", ["a: [1,\n", "- a\n", "a: 1\na: 2\n", "name: '${oops'\n", "name: \x00\n"])
def test_files_that_are_not_configs(tmp_path: Path, text: str) -> None:
    assert "a.yaml" in refusal(write(tmp_path / "a.yaml", text))


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORA_MODELS", "/models")
    assert load_config("qwen3/0.6B_lora_grpo").model.path == "/models/Qwen3-0.6B"
    monkeypatch.delenv("TORA_MODELS")
    assert load_config("qwen3/0.6B_lora_grpo").model.path == "/tmp/Qwen3-0.6B"
    assert "NOT_SET" in refusal("quickstart", "model.path=${oc.env:NOT_SET}")


def test_relative_model_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = load_config("quickstart", ["model.path=base"])
    assert cfg.model.path == str(configs_dir() / "base") and not missing_folders(cfg)
    (tmp_path / "base").mkdir()
    assert load_config("quickstart", ["model.path=base"]).model.path == str(tmp_path / "base")
    cfg = load_config("quickstart", ["model.path=nowhere"])
    assert missing_folders(cfg) == ['model.path="nowhere" is not a folder']


@pytest.mark.parametrize("name", ["quickstart", "qwen3/0.6B_full_grpo"])
def test_dumped_yaml_reads_back(tmp_path: Path, name: str) -> None:
    cfg = load_config(name)
    again = load_config(write(tmp_path / "dump.yaml", dump_yaml(cfg)))
    assert isinstance(again, RunConfig) and to_dict(again) == to_dict(cfg)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.lora_rnk=4", "model.lora_rnk=4; the nearest is model.lora_rank"),
        ("lora_rank=4", "lora_rank=4; the nearest is model.lora_rank"),
        ("rollout.num_worker=4", "rollout.num_worker=4; the nearest is rollout.num_workers"),
        (
            "model.lora_type=dorra",
            'model.lora_type="dorra" must be one of full, lora, dora, dora_cache; the nearest is',
        ),
        ("batch_size=two", 'batch_size="two" must be a whole number'),
        ("batch_size=2.5", "batch_size=2.5 must be a whole number"),
        ("batch_size=true", "batch_size=true must be a whole number"),
        ("async_rl=1", "async_rl=1 must be true or false"),
        ("temperature=hot", 'temperature="hot" must be a finite number'),
        ("temperature=.nan", "temperature=NaN must be a finite number"),
        ("name=3", "name=3 must be text"),
        ("name=null", "name=null must be text"),
        ("model=3", "model=3 must hold keys and values"),
        ("model.lora_targets=3", "model.lora_targets=3 must be a list"),
        ("model.lora_targets=[1]", "model.lora_targets.0=1 must be text"),
        ("dataset=gsm8k", 'dataset="gsm8k" must hold _component_'),
        ("rewards.3.weight=1", "rewards.3"),
        ("output_dir=${nam}", "'nam'"),
        ("seed", "The override seed"),
        ("seed=[1,", "The override seed=[1,"),
    ],
)
def test_wrong_keys_and_types(override: str, words: str) -> None:
    assert words in refusal("quickstart", override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("num_steps=0", "num_steps=0 must be at least 1"),
        ("grpo_samples=1", "grpo_samples=1 must be at least 2"),
        ("temperature=0", "temperature=0.0 must be greater than 0"),
        ("eval.temperature=-1", "eval.temperature=-1.0 must be at least 0"),
        ("top_p=0", "top_p=0.0 must be greater than 0"),
        ("top_p=1.1", "top_p=1.1 must be at most 1"),
        ("max_staleness=-1", "max_staleness=-1 must be at least 0"),
        ("model.lora_rank=0", "model.lora_rank=0 must be at least 1"),
        ("model.lora_targets=[]", "model.lora_targets=[]"),
        ("model.lora_targets=q_proj", "regular expression that must match a layer's whole name; [q_proj] selects"),
        ('model.lora_targets=".*(q_proj"', "is no regular expression: missing )"),
        ('model.lora_targets=".*"', "must not match lm_head"),
        ("model.lora_targets=[q_proj,lm_head]", "lm_head"),
        ("model.lora_targets=[model.embed_tokens]", "model.embed_tokens"),
        ("rollout.max_model_len=64", "max_prompt_tokens + max_generated_tokens"),
        ("optimizer.lr=0", "optimizer.lr=0"),
        ("rewards=[]", "rewards=[]"),
        ("rewards.0.weight=much", 'rewards.0.weight="much" must be a finite number'),
        ("rewards.0.weight=0", "at least one weight"),
        ("rewards=[{_component_: a.f},{_component_: b.f}]", "rewards.1.name=f is already used"),
    ],
)
def test_ranges(override: str, words: str) -> None:
    assert words in refusal("quickstart", override)


def test_rules_between_keys() -> None:
    workers = ["rollout.num_workers=2", "async_rl=false"]
    assert "needs async_rl=true" in refusal("quickstart", *workers)
    assert "needs async_rl=true and rollout.engine=vllm" in refusal(
        "quickstart", "rollout.tensor_parallel=2", "rollout.engine=torch"
    )
    assert "needs rollout.update=in_flight" in refusal("quickstart", "rollout.recompute_kv=true")
    in_flight = "rollout.update=in_flight"
    assert "in_flight does not interrupt rollouts" in refusal("quickstart", in_flight, "rollout.partial=8")
    assert "needs async_rl=true" in refusal("quickstart", "rollout.partial=8", "async_rl=false")
    assert "max_staleness of at least 1" in refusal("quickstart", in_flight, "max_staleness=0")
    assert "needs rollout.engine=vllm" in refusal("quickstart", in_flight, "rollout.engine=torch")
    assert load_config("quickstart", [workers[0]]).rollout.num_workers == 2
    full = "model.lora_type=full"
    assert "model.adapter_path" in refusal("quickstart", full, "model.adapter_path=/a")
    assert "needs an adapter" in refusal("quickstart", full, in_flight, "rollout.engine=vllm")
    assert "not both" in refusal("quickstart_vl", "model.train_vision=full", "rollout.engine=vllm")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dataset._component_=null", "Missing key dataset._component_"),
        ("dataset._component_=chain_sum", "must be a dotted path"),
        ("dataset._component_=tora.tasks.chain_sum", "is a module"),
        ("dataset._component_=tora.tasks.chain_sum.chain_sun", "the nearest is tora.tasks.chain_sum.chain_sum"),
        ("dataset._component_=tora.tasks.chain_sun.chain_sum", "the nearest is tora.tasks.chain_sum.chain_sum"),
        ("dataset.spilt=test", 'dataset.spilt="test" is not an argument of tora.tasks.chain_sum.chain_sum'),
        ("eval.dataset.spilt=test", "eval.dataset.spilt"),
        ("loss._component_=learner.loss.GRPOLos", "the nearest is learner.loss.GRPOLoss"),
        ("rewards.0.wieght=1", "the nearest is weight"),
    ],
)
def test_components_of_our_own(override: str, words: str) -> None:
    assert words in refusal("quickstart", override)


def test_unknown_config() -> None:
    assert refusal("quickstrat") == "There is no config quickstrat; the nearest is quickstart."
    assert "missing.yaml" in refusal("missing.yaml")
