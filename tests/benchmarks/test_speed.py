"""Short forms of the benchmarks. Their bounds are wide: a busy machine does not break them, only code that became much slower.

The best of a few rounds counts, because slow code is slow in every round. The programs in benchmarks/ have the gates.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import (
    cache_shards,
    caption_table,
    data_at_scale,
    dataset_report,
    header_scan,
    latent_caching,
    optimizers,
    order_at_scale,
    s3_reading,
    start_up,
    text_caching,
    training_step,
)
from benchmarks.material import caption, run_settings, write_photographs
from benchmarks.measure import in_turns
from helpers.families import FAMILIES
from helpers.families.miniatures.sdxl import SdxlSizes, write_sdxl
from tests.storage.s3_server import S3Server

pytestmark = pytest.mark.slow
LONG = bool(os.environ.get("SIMPLETUNER_TEST_LONG"))


PROGRAMS = (
    cache_shards,
    caption_table,
    data_at_scale,
    dataset_report,
    header_scan,
    latent_caching,
    optimizers,
    order_at_scale,
    s3_reading,
    start_up,
    text_caching,
    training_step,
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_every_benchmark_explains_itself(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        program.main(["--help"])
    assert leaving.value.code == 0
    said = capsys.readouterr().out
    assert f"python -m {program.__name__}" in said
    assert "--rounds" in said


def test_a_benchmark_prints_each_figure_next_to_its_limit_and_then_the_profiles_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    header_scan.main(["--images", "50", "--rounds", "2", "--profile"])
    said = capsys.readouterr().out
    row = r"^scanned, compared with Pillow opening them +[\d,]+ /s +[\d,]+ /s +[\d.]+ +>= 5,000 /s +(ok|MISSED)$"
    assert re.search(row, said, re.MULTILINE)
    assert said.count("--- profile:") == 2


def best(rounds: list[tuple[float, float]]) -> float:
    """The smallest ratio of ours to theirs, over rounds of (theirs, ours)."""
    return min(ours / theirs for theirs, ours in rounds)


def test_a_training_step_takes_about_as_long_as_one_by_hand_and_only_equal_loops_are_compared(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "images", 8, (240, 160))
    with training_step.loops(tmp_path, write_sdxl(tmp_path / "model"), images, 128, "lora") as (bare, ours):
        compare(bare, ours)


def compare(bare: training_step.Bare, ours: training_step.Ours) -> None:
    training_step.require_same_loss(bare, ours)
    right = bare.unet.conv_out.weight.data.clone()
    bare.unet.conv_out.weight.data += 0.1
    with pytest.raises(AssertionError, match="not close"):
        training_step.require_same_loss(bare, ours)
    bare.unet.conv_out.weight.data.copy_(right)
    held = [training_step.tensors_of(batch) for (batch,) in ours.data.steps(0, 5)]
    took = in_turns(4, lambda: bare.steps(held), lambda: ours.steps(5))
    assert best([(theirs.clock, mine.clock) for theirs, mine in took]) < 1.3
    assert best([(theirs.processor, mine.processor) for theirs, mine in took]) < 1.3
    assert ours.waited / ours.counted < 0.1


def test_images_are_cached_about_as_fast_as_they_can_be_decoded_and_encoded(tmp_path: Path) -> None:
    bench = latent_caching.Bench(tmp_path, images=12, threads=2)
    bench.bare()  # loads the files into the page cache
    rates = in_turns(3, bench.bare, bench.ours)
    bench.catalogue.close()
    assert max(ours / theirs for theirs, ours in rates) > 0.6


def test_captions_are_cached_about_as_fast_as_they_are_encoded(tmp_path: Path) -> None:
    captions = [caption(index) for index in range(64)]
    model = write_sdxl(tmp_path / "model", sizes=SdxlSizes(text_width=128, text_2_width=128, text_layers=4))
    config = run_settings(tmp_path, model, write_photographs(tmp_path / "images", 1, (64, 64)), 64)
    family = FAMILIES[config.family_name](config.model, config.cache)
    bare = text_caching.Bare(model)
    with family.text_encoders(torch.device("cpu")) as encoders:
        encoders.encode(captions[:1])  # loads them
        rounds = in_turns(3, lambda: bare.seconds(captions), lambda: text_caching.cached(tmp_path, encoders, captions))
    assert best(rounds) < 1.8


def test_a_scan_reads_headers_and_a_second_one_nothing(tmp_path: Path) -> None:
    """Compared with Pillow, which opens the same files in turn with the scans: a rate alone depends on the machine and its load."""
    header_scan.make_images(tmp_path / "images", 600)
    scans = header_scan.Scans(tmp_path / "images", tmp_path)
    rounds = in_turns(3, lambda: header_scan.opened(tmp_path / "images"), scans.cold)
    assert max(ours / pillows for pillows, ours in rounds) > 0.25
    assert max(warm / pillows for warm, (pillows, _) in zip(scans.warm, rounds, strict=True)) > 3


def test_a_table_is_joined_row_by_row_and_a_second_scan_reads_nothing(tmp_path: Path) -> None:
    caption_table.write_table(tmp_path / "table.parquet", 10_000)
    rounds = [caption_table.measure(tmp_path / "table.parquet", 10_000, tmp_path / f"{number}.sqlite") for number in range(3)]
    assert min(each.joined for each in rounds) < 10_000 * 150e-6
    assert min(each.again for each in rounds) < 10_000 * 100e-6


def test_the_report_on_many_images_takes_moments_and_its_page_stays_small(tmp_path: Path) -> None:
    with dataset_report.many_images(tmp_path, 50_000 if LONG else 10_000) as report:
        assert min(report.seconds(cold=False) for _ in range(2)) < 3
        assert len(report.page) < dataset_report.MOST_BYTES


def test_cached_tensors_are_written_and_read_in_bulk_and_take_hardly_more_than_themselves(tmp_path: Path) -> None:
    rounds = [cache_shards.measure(tmp_path, 32, 16) for _ in range(3)]
    assert max(each.written for each in rounds) > 1_000
    assert max(each.read for each in rounds) > 10_000
    assert all(each.on_disk < cache_shards.MOST_ON_DISK for each in rounds)


def test_a_step_of_a_million_samples_is_chosen_in_microseconds_at_the_end_of_an_epoch_too(tmp_path: Path) -> None:
    columns = order_at_scale.write_plan(tmp_path / "plan.npy", 10**6)
    order, memory = order_at_scale.most_memory(lambda: order_at_scale.order_over(columns))
    count = order.micro_batches_per_epoch
    assert memory < 80e6
    assert min(sum(order_at_scale.steps(order, range(5_000))) / 5_000 for _ in range(3)) < 50e-6
    assert min(max(order_at_scale.steps(order, range(number * count - 300, number * count + 300))) for number in (1, 2, 3)) < 0.02
    assert min(order_at_scale.steps(order, [700 * count + 1, 900 * count + 2, 300 * count + 3])) < 0.02


def test_a_bucket_far_away_is_read_about_as_fast_as_by_a_bare_pool(s3: S3Server, tmp_path: Path) -> None:
    with s3_reading.far_away(s3, 0.1) as url:
        bucket = s3.new_bucket()
        files = s3_reading.Files(s3, bucket, url, 120)
        records = s3_reading.Records(bucket, url, 80, tmp_path)
        assert max(ours / bare for bare, ours in in_turns(3, files.bare, files.ours)) > 0.7
        assert max(ours / bare for bare, ours in in_turns(3, records.bare, records.ours)) > 0.7


def test_a_start_spends_its_time_importing_libraries(tmp_path: Path) -> None:
    """A warm one with a hundred images in the long form, a first one with four in the short."""
    flags = start_up.cached_run(tmp_path, 100) if LONG else start_up.run_of_thumbnails(tmp_path, 4)
    seconds, stages, libraries = start_up.start(flags)
    assert stages["imports"] / seconds > start_up.LEAST_IMPORTS
    assert set(stages) == {"settings", "imports", "runtime and choices", "data", "model", "first batch"}
    if LONG:
        assert stages["data"] + stages["first batch"] < 2
    assert {"torch", "diffusers", "transformers", "peft", "accelerate"} <= set(libraries)


def processor_seconds(run: Callable[[], object]) -> float:
    """Of the processes that it starts and waits for: what else the machine does is not counted."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_and_mistakes_are_answered_at_once() -> None:
    for argument, code in (("--help", 0), ("--learning_rte=1", 2)):
        assert any(processor_seconds(lambda asked=argument, code=code: start_up.answer(asked, code=code)) < 2 for _ in range(4))  # type: ignore[misc]


def test_a_warm_start_looks_nothing_up_and_its_index_stays_small(tmp_path: Path) -> None:
    data_at_scale.started(tmp_path, 2_000)
    warm = (data_at_scale.started(tmp_path, 2_000, trust=True) for _ in range(3))
    assert any(start["seconds"] < 1 and start["index"] < 20e6 for start in warm)


def test_optimizers_hold_what_their_kind_holds_and_no_step_is_of_another_order() -> None:
    found = {figure.name: figure for figure in optimizers.figures(["adamw", "adamw_bf16", "lion"], 1, 2, torch.device("cpu"))}
    assert found["adamw: state per weight"].value == pytest.approx(8, rel=0.01)  # two moments in float32
    assert found["adamw_bf16: state per weight"].value == pytest.approx(4, rel=0.01)
    assert found["lion: state per weight"].value == pytest.approx(4, rel=0.01)
    assert found["adamw: a step"].ratio < 3 and found["lion: a step"].ratio < 3 and found["adamw_bf16: a step"].ratio < 40
