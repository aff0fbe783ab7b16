"""`mmproj`, `draft_model` and `loras`: files beside a model's own, resolved and checked like `path`."""

from pathlib import Path

import pytest

from fakes import tiny_families
from nodeagent.config import host_problems, missing_models, parse_config
from nodeagent.config.model_keys import LoraConfig
from nodeagent.errors import ConfigError

FILE = Path("/etc/node/agent.yaml")


def test_they_are_resolved_like_the_path_of_a_model() -> None:
    [model] = parse_config(
        "models: [{model_id: a, path: a.gguf, mmproj: eyes.gguf, draft_model: /srv/small.gguf, "
        "loras: [one.gguf, {path: ../two.gguf, scale: 0.5}]}]",
        FILE,
    ).models
    assert model.mmproj == Path("/etc/node/eyes.gguf")
    assert model.draft_model == Path("/srv/small.gguf")
    two = LoraConfig(path=Path("/etc/two.gguf"), scale=0.5)
    assert model.loras == (LoraConfig(path=Path("/etc/node/one.gguf")), two)


@pytest.mark.parametrize(
    ("key", "flag"),
    [
        ("mmproj: a", "mmproj: b"),
        ("mmproj: a", "mm: b"),
        ("draft_model: a", "md: b"),
        ("draft_model: a", "spec-draft-model: b"),
        ("loras: [a]", "lora: b"),
        ("loras: [a]", "lora_scaled: 'b:1'"),
    ],
)
def test_the_same_flag_in_server_args_is_a_contradiction_that_names_both(key: str, flag: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(f"models: [{{model_id: a, path: a.gguf, {key}, server_args: {{{flag}}}}}]", FILE)
    [problem] = refused.value.problems
    assert problem.where == f"models[0].server_args.{flag.partition(':')[0]}"
    assert problem.message == f"repeats the key `{key.partition(':')[0]}` of this model; remove one"


def test_each_flag_alone_is_fine() -> None:
    text = "models: [{model_id: a, path: a.gguf, loras: [], mmproj: null, server_args: {lora: b, mmproj: c}}]"
    assert parse_config(text, FILE).models[0].loras == ()


@pytest.mark.parametrize("name", ["a,b.gguf", "a:b.gguf"])
def test_a_lora_whose_path_llama_server_would_take_apart_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must have no comma and no colon"):
        parse_config(f"models: [{{model_id: a, path: a.gguf, loras: ['{name}']}}]", FILE)


def test_files_that_are_missing_or_of_another_kind_are_problems_with_their_line(
    tmp_path: Path, tiny_model: Path
) -> None:
    adapter = tiny_families.write_adapter(tmp_path)
    text = f"""backend: cpu
llama_server_bin: /bin/true
models:
  - model_id: a
    path: {tiny_model}
    mmproj: {tiny_model}
    draft_model: missing.gguf
    loras:
      - {adapter}
      - path: {tiny_model}
"""
    found = [str(problem) for problem in host_problems(parse_config(text, tmp_path / "agent.yaml"))]
    assert found == [
        f"{tmp_path}/agent.yaml:6: models[0].mmproj: can't be used: {tiny_model}: not a projector (mmproj)",
        f"{tmp_path}/agent.yaml:7: models[0].draft_model: can't be used: {tmp_path}/missing.gguf: no such file",
        f"{tmp_path}/agent.yaml:10: models[0].loras[1]: can't be used: {tiny_model}: not a LoRA adapter",
    ]


def test_a_projector_is_one_by_its_architecture(tmp_path: Path, tiny_model: Path) -> None:
    projector = tiny_families.write_projector(tmp_path)
    text = f"models: [{{model_id: a, path: {tiny_model}, mmproj: {projector}}}]"
    assert missing_models(parse_config(text, FILE)) == []
