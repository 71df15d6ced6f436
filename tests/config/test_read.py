from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from helpers.choices import known_axes
from helpers.config.axes import Axes
from helpers.config.config import Config
from helpers.config.datasets import DatasetConfig
from helpers.config.declare import options_of
from helpers.config.env_file import EnvFile
from helpers.config.facts import Facts, FamilyFacts, Settings
from helpers.config.options import OPTIONS
from helpers.config.other_names import FLAGS, KEYS
from helpers.config.read import read_config
from helpers.config.sources import from_flags, from_preset, from_variables
from helpers.errors import ConfigError

Read = Callable[..., Config]
Refuse = Callable[..., str]


def test_what_is_required_is_asked_for_by_name(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config([], {}, Axes())
    missing = "\n".join(caught.value.problems)
    assert "MODEL_NAME" in missing and "DATALOADER_CONFIG" in missing and "--demo" in missing


def test_the_strongest_source_wins(read: Read) -> None:
    facts = Axes(families={"sdxl": FamilyFacts("sdxl", "SDXL", defaults={"learning_rate": 1.0, "lora_rank": 1, "lora_alpha": 1.0})})
    config = read(
        "--learning_rate=4", facts=facts, LEARNING_RATE="2", LORA_RANK="2", TRAINER_EXTRA_ARGS="--learning_rate=3 --lora_dropout 0.3"
    )
    assert config.schedule.learning_rate == 4
    assert config.adapter.lora_rank == 2
    assert config.adapter.lora_alpha == 1
    assert config.adapter.lora_dropout == 0.3
    assert config.adapter.lora_init_type == "default"
    origins = [config.origins[name] for name in ("learning_rate", "lora_rank", "lora_alpha", "lora_dropout", "lora_init_type")]
    assert origins == ["--learning_rate", "LORA_RANK", "family sdxl", "--lora_dropout in TRAINER_EXTRA_ARGS", "default"]
    assert {"learning_rate", "lora_alpha"} <= config.given and "lora_init_type" not in config.given


def test_a_preset_is_weaker_than_a_variable_and_its_paths_are_in_the_repository(tmp_path: Path) -> None:
    (tmp_path / "demo" / "model").mkdir(parents=True)
    preset = {"pretrained_model_name_or_path": "demo/model", "data_backend_config": "demo/data.json", "max_train_steps": 3, "use_ema": True}
    (tmp_path / "demo" / "lora.json").write_text(json.dumps(preset))
    source = from_preset(OPTIONS, "lora", tmp_path)
    assert source.problems == []
    assert source.settings["pretrained_model_name_or_path"].value == str(tmp_path / "demo" / "model")
    assert source.settings["data_backend_config"].value == tmp_path / "demo" / "data.json"
    assert source.settings["max_train_steps"].value == 3
    assert source.settings["use_ema"].value is True
    assert source.settings["use_ema"].origin == "demo/lora.json"
    assert source.settings["use_ema"].rank < from_variables(OPTIONS, {"USE_EMA": "false"}, env_file=EnvFile()).settings["use_ema"].rank


def test_the_demo_is_chosen_with_or_without_a_name(refuse: Refuse) -> None:
    words = [("--demo",), ("--demo", "--seed=1"), ("--demo=photos",), ("--demo", "photos")]
    assert [from_flags(OPTIONS, flags).settings["demo"].value for flags in words] == ["lora", "lora", "photos", "photos"]
    assert "--demo: 'picture' is not one of lora, photos" in refuse("--demo=picture")


@pytest.mark.parametrize("name", ["lora", "photos"])
def test_an_embedded_demo_needs_no_other_setting(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = read_config([f"--demo={name}", "--output_dir=out"], {}, known_axes())
    assert config.datasets and config.run.output_dir == Path("out")
    assert Path(config.model.pretrained_model_name_or_path).is_dir()


def test_a_misspelt_option_of_a_preset_is_named(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "lora.json").write_text('{"lora_rnk": 4}')
    assert from_preset(OPTIONS, "lora", tmp_path).problems == ["demo/lora.json: lora_rnk is not an option (did you mean lora_rank?)."]


def test_all_mistakes_are_told_at_once(refuse: Refuse) -> None:
    problems = refuse("--lora_rnk=4", "--seed=x", "--push_to_hub", "stray", LEARNING_RATE="fast").splitlines()
    assert problems == [
        "LEARNING_RATE: 'fast' is not a number.",
        "--lora_rnk is not an option (did you mean --lora_rank?).",
        "--seed: 'x' is not a whole number.",
        "'stray' is not an option; a value with spaces stands in quotes.",
        "--push_to_hub is not available yet; leave it at false.",
    ]


def test_a_wrong_choice_names_the_choices_and_the_nearest(refuse: Refuse) -> None:
    assert "'cosin' is not one of linear, sine, cosine" in refuse("--lr_scheduler=cosin")
    assert "(did you mean cosine?)" in refuse("--lr_scheduler=cosin")


def test_flags_are_not_abbreviated_but_for_the_one_the_old_wrappers_used(read: Read, refuse: Refuse) -> None:
    assert read("--train_batch=7").data.train_batch_size == 7
    assert "--learning is not an option" in refuse("--learning=1")


def test_a_flag_without_its_value_is_named(refuse: Refuse) -> None:
    assert refuse("--learning_rate", "--use_ema") == "--learning_rate needs a value."


def test_a_later_flag_wins_over_an_earlier_one(read: Read) -> None:
    assert read("--seed=1", "--seed=2").run.seed == 2


def test_an_empty_variable_counts_as_not_set(read: Read) -> None:
    config = read(LEARNING_RATE="", USE_EMA="  ", VALIDATION_SEED="")
    assert config.origins["learning_rate"] == config.origins["use_ema"] == config.origins["validation_seed"] == "default"


def test_two_variables_of_one_option_must_agree(read: Read, refuse: Refuse) -> None:
    assert read(TRAINING_SEED="5", SEED="5").run.seed == 5
    assert refuse(TRAINING_SEED="5", SEED="6") == "TRAINING_SEED and SEED are the same setting and differ; remove one."


def test_the_wrapper_chooses_the_family(read: Read, refuse: Refuse) -> None:
    assert read(SIMPLETUNER_FAMILY="sdxl").family_name == "sdxl"
    assert read(SIMPLETUNER_FAMILY="sd2x").family_name == "sd2x"
    assert read(SIMPLETUNER_FAMILY="sd3").family_name == "sd3"


def test_a_switch_names_another_family_than_the_wrapper(read: Read, refuse: Refuse) -> None:
    """As `STABLE_DIFFUSION_3='true'` in the env file of ./train_sdxl.sh; a family that the user names too is a contradiction."""
    config = read(SIMPLETUNER_FAMILY="sdxl", STABLE_DIFFUSION_3="true", facts=known_axes())
    assert (config.family_name, config.objective_name) == ("sd3", "flow")
    assert config.origins["model_family"] == "STABLE_DIFFUSION_3"
    assert read(SIMPLETUNER_FAMILY="sd3", STABLE_DIFFUSION_3="true").family_name == "sd3"
    assert "means model_family=sd3, but MODEL_FAMILY says sd2x" in refuse(MODEL_FAMILY="sd2x", STABLE_DIFFUSION_3="true")


@pytest.mark.parametrize(("variable", "family"), [(name, name.lower()) for name in ("PIXART_SIGMA", "PIXART_ALPHA", "HUNYUAN_DIT")])
def test_a_switch_chooses_another_family_than_the_wrappers(variable: str, family: str, read: Read, refuse: Refuse) -> None:
    config = read(SIMPLETUNER_FAMILY="sdxl", **{variable: "true"})
    assert config.family_name == config.model.model_family == family
    assert config.origins["model_family"] == variable
    assert read(SIMPLETUNER_FAMILY="sdxl", **{variable: "false"}).family_name == "sdxl"
    assert "remove one" in refuse(MODEL_FAMILY="sd2x", **{variable: "true"})


@pytest.mark.parametrize(
    ("said", "family", "method"),
    [
        ("deepfloyd-full", "deepfloyd_1", "full"),
        ("deepfloyd-lora", "deepfloyd_1", "lora"),
        ("deepfloyd-stage2", "deepfloyd_2", "full"),
        ("deepfloyd-stage2-lora", "deepfloyd_2", "lora"),
    ],
)
def test_a_model_type_of_deepfloyd_chooses_stage_and_method(said: str, family: str, method: str, read: Read, refuse: Refuse) -> None:
    config = read(SIMPLETUNER_FAMILY="sd2x", MODEL_TYPE=said)
    assert (config.family_name, config.method_name) == (config.model.model_family, config.model.model_type) == (family, method)
    assert config.origins["model_family"] == config.origins["model_type"] == "MODEL_TYPE"
    assert read("--model_type=lora", SIMPLETUNER_FAMILY="sd2x", MODEL_TYPE=said).family_name == "sd2x"
    assert "LORA_RANK" not in "".join(read(MODEL_TYPE=said, LORA_RANK="4").notes) or method == "full"
    assert f"MODEL_TYPE means model_family={family}, but MODEL_FAMILY says sd2x; remove one." in refuse(
        MODEL_FAMILY="sd2x", MODEL_TYPE=said
    )


def test_two_switches_contradict_each_other(refuse: Refuse) -> None:
    assert "remove one" in refuse(SIMPLETUNER_FAMILY="sdxl", PIXART_SIGMA="true", PIXART_ALPHA="true")


def test_the_method_and_objective_are_named(read: Read) -> None:
    config = read("--model_type=lora")
    assert (config.method_name, config.objective_name) == ("lora", "diffusion")
    assert read("--model_family=sd3", facts=known_axes()).objective_name == "flow"


def test_every_choice_may_refuse_settings(refuse: Refuse) -> None:
    def judge(settings: Settings) -> list[str]:
        return [f"the resolution is {settings['resolution']}."]

    facts = Axes(methods={"full": Facts("full", "full", judge=judge)})
    assert refuse("--resolution=2", facts=facts) == "the resolution is 2.0."


def test_a_refusal_says_who_set_what_it_is_about(refuse: Refuse) -> None:
    refused = refuse("--model_family=sd3", "--sd3_uses_diffusion", VALIDATION_NOISE_SCHEDULER="euler")
    assert refused.startswith("VALIDATION_NOISE_SCHEDULER: --validation_noise_scheduler=euler cannot be used with --sd3_uses_diffusion")


def test_what_the_run_does_not_read_is_refused_as_a_flag_and_left_out_as_a_variable(read: Read, refuse: Refuse) -> None:
    """An env file may serve several families; a flag was meant for this run."""
    trained = "is for diffusion, and Stable Diffusion 3 is trained by flow matching"
    refused = refuse("--model_family=sd3", "--offset_noise")
    assert refused == f"--offset_noise {trained} (flow matching can already generate images of any brightness). Remove it."
    config = read("--model_family=sd3", MIN_SNR_GAMMA="5", OFFSET_NOISE="true")
    assert (config.objective.snr_gamma, config.objective.offset_noise, config.objective.loss_weighting) == (None, False, "none")
    assert [note.partition(" (")[0] for note in config.notes] == [
        f"MIN_SNR_GAMMA does nothing here: it {trained}",
        f"OFFSET_NOISE does nothing here: it {trained}",
    ]
    assert refuse("--logit_mean=1").startswith("--logit_mean is for flow matching, and SDXL is trained by diffusion.")
    assert refuse(TRAINER_EXTRA_ARGS="--sd3_caption_dropout=together").startswith(
        "--sd3_caption_dropout in TRAINER_EXTRA_ARGS is for Stable Diffusion 3, not for SDXL."
    )
    [note] = read("--model_family=sd3", SDXL_ORIGINAL_SIZE="intermediary").notes
    assert note.startswith("SDXL_ORIGINAL_SIZE does nothing here: it is for SDXL")
    assert read("--data_aesthetic_score=5").model  # SDXL's wrapper trains its refiner too: that is known when the base model is


@pytest.mark.parametrize(
    ("flags", "edge"),
    [
        (("--resolution=768",), 768),
        (("--resolution=0.262144", "--resolution_type=area"), 512),
        (("--resolution=72",), None),
        ((), None),
    ],
)
def test_another_size_than_deepfloyds_is_said_aloud(flags: Sequence[str], edge: int | None, read: Read) -> None:
    config = read("--model_type=deepfloyd-lora", *flags, SIMPLETUNER_FAMILY="sd2x", facts=known_axes())
    said = f"dataset 'pictures' is trained at {edge} pixels, and DeepFloyd IF stage I generates images of 64: leave RESOLUTION empty"
    assert [note.startswith(said) for note in config.notes if "is trained at" in note] == [True] * bool(edge)


def test_extra_arguments_are_split_once_by_the_shells_rules(read: Read, refuse: Refuse) -> None:
    config = read(TRAINER_EXTRA_ARGS="--validation_prompt 'a *.txt; $HOME `id`' --seed=3", DEBUG_EXTRA_ARGS="--seed=4 --use_ema")
    assert config.validation.validation_prompt == "a *.txt; $HOME `id`"
    assert (config.run.seed, config.ema.use_ema) == (3, True)
    assert refuse(TRAINER_EXTRA_ARGS="'open") == "TRAINER_EXTRA_ARGS: cannot be split into words: No closing quotation."
    assert "(in TRAINER_EXTRA_ARGS)" in refuse(TRAINER_EXTRA_ARGS="--sed=3")


prompts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1)


@given(prompts)
def test_a_prompt_arrives_byte_for_byte(prompt: str) -> None:
    assume(prompt.strip() not in ("", "''", '""'))
    said = [
        from_flags(OPTIONS, [f"--validation_prompt={prompt}"]),
        from_flags(OPTIONS, shlex.split(shlex.join(["--validation_prompt=" + prompt]))),
        from_variables(OPTIONS, {"VALIDATION_PROMPT": prompt}, EnvFile()),
    ]
    if not prompt.startswith("--"):
        said.append(from_flags(OPTIONS, ["--validation_prompt", prompt]))
    assert [source.settings["validation_prompt"].value for source in said] == [prompt] * len(said)


def test_prompts_pass_through_bash_and_the_env_file(folder: Path, repository: Path) -> None:
    prompt = "\"a\" 'b' $HOME `id` * ; \\n\n\tnew line 🦊 " + "long " * 2000
    quoted = prompt.replace("'", "'\\''")
    (folder / "env.sh").write_text(f"VALIDATION_PROMPT='{quoted}'\nMODEL_NAME='a/b'\nDATALOADER_CONFIG='data.json'\n")
    program = (
        "import os, sys; from helpers.config.axes import Axes; from helpers.config.read import read_config; "
        "sys.stdout.buffer.write(read_config([], os.environ, Axes()).validation.validation_prompt.encode())"
    )
    shell = f"set -a; . ./env.sh; exec {shlex.quote(sys.executable)} -c {shlex.quote(program)}"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(repository), "SIMPLETUNER_ENV_FILE": "env.sh", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["bash", "-c", shell], capture_output=True, env=environment, check=True)
    assert done.stdout.decode() == prompt


def test_secrets_and_credentials_are_never_written(read: Read, write_data: Callable[..., None], refuse: Refuse) -> None:
    entry = {"id": "a", "instance_data_dir": "images", "aws_secret_access_key": "CANARY", "aws_access_key_id": 7, "hub_token": "CANARY"}
    write_data([entry])
    assert "CANARY" not in refuse("--hub_token=CANARY", "--wandb_key", "CANARY", "--webhook_config=CANARY")
    write_data([{"id": "a", "instance_data_dir": "images"}])
    assert "CANARY" not in refuse("--pretrained_model_name_or_path=https://me:CANARY@host/model")
    config = read("--tracker_project_name=https://me:CANARY@host/model", HF_TOKEN="CANARY", WANDB_API_KEY="CANARY")
    assert "CANARY" not in json.dumps(config.to_json()) + config.describe()
    assert "CANARY" in config.reporting.tracker_project_name


def test_config_json_holds_every_setting_with_its_origin(read: Read) -> None:
    config = read("--learning_rate=1e-5", TRAINING_SEED="9", REPORT_TO="none")
    written = json.loads(json.dumps(config.to_json()))
    assert written["settings"]["learning_rate"] == {"value": 1e-5, "origin": "--learning_rate"}
    assert written["settings"]["seed"] == {"value": 9, "origin": "TRAINING_SEED"}
    assert written["settings"]["report_to"] == {"value": ["none"], "origin": "REPORT_TO"}
    assert written["settings"].keys() == config.values().keys()
    assert written["datasets"][0]["id"] == "pictures"
    assert written["datasets"][0]["cache_dir_vae"] == "simpletuner-results/cache/latents"


def test_the_opening_line_tells_what_is_not_the_default_and_why(read: Read) -> None:
    config = read("--validation_prompt", "a\nfox " + "x" * 200, TRAINING_SEED="9", LORA_RANK="16")
    told = config.describe()
    assert "seed 9 (TRAINING_SEED)" in told
    assert "validation_prompt a fox xxx" in told and "\n" not in told and len(told) < 400
    assert "lora_rank" not in told and "cache_dir" not in told


def test_what_the_trainer_settles_later_replaces_the_setting_and_its_origin(read: Read) -> None:
    config = read("--seed=0").replaced("drawn", seed=123, mixed_precision="no")
    assert (config.run.seed, config.run.mixed_precision, config.origins["seed"]) == (123, "no", "drawn")
    assert config.run.output_dir == Path("simpletuner-results")


def test_help_lists_every_option_without_needing_any(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        read_config(["--help"], {}, known_axes())
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {item.flag}" in shown for item in known_axes().options.values())


def test_settings_are_read_within_a_second_and_without_torch(folder: Path, repository: Path) -> None:
    program = (
        "import sys, time; start = time.process_time()\n"
        "from helpers.choices import known_axes\n"
        "from helpers.config.read import read_config\n"
        "read_config(['--pretrained_model_name_or_path=a/b', '--data_backend_config=data.json'], {}, known_axes())\n"
        "heavy = {'torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'accelerate'} & sys.modules.keys()\n"
        "print(time.process_time() - start, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONPATH": str(repository)}, check=True)
    seconds, heavy = done.stdout.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 1


def test_an_empty_negative_prompt_is_one_and_other_empty_variables_are_not_set(read: Read) -> None:
    config = read(VALIDATION_NEGATIVE_PROMPT="", LEARNING_RATE="")
    assert config.validation.validation_negative_prompt == ""
    assert "learning_rate" not in config.given


def test_names_of_other_trainers_are_answered_with_the_name_here(refuse: Refuse) -> None:
    assert "--network_dim is not an option; in this trainer it is --lora_rank." in refuse("--network_dim=16", "--save_every_n_steps", "9")
    options = known_axes().options
    keys = {key for item in options_of(DatasetConfig) for key in (item.name, *item.aliases)}
    named = " ".join([*FLAGS.values(), *KEYS.values()])
    assert {flag for flag in re.findall(r"--(\w+)", named)} <= options.keys()
    assert {key for key in re.findall(r'"(\w+)"', named)} <= keys
    assert not FLAGS.keys() & options.keys() and not KEYS.keys() & keys


def test_an_output_dir_inside_the_images_is_refused_once(refuse: Refuse) -> None:
    assert refuse("--output_dir=images/out").count("is inside the images") == 1
