"""The page on two experts: both runs, the program that samples with both, and the two ways in one's own code, as written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.documentation.conftest import Followed
from tests.documentation.pages import Page

PAGE = Page.named("documentation/MIXTURE_OF_EXPERTS.md")


@pytest.mark.slow
def test_both_runs_and_the_ways_to_sample_with_both_work_as_written(quick_start: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = quick_start.reader
    runs = PAGE.section("Train them")
    [shared] = [span for span in runs.spans() if span.startswith("--cache_dir=")]
    story = reader.type(runs.block("bash").replace("expert\n", f"expert {shared}\n"))
    assert story.count("finished   2 steps") == 2 and "3 needed, 3 cached" in story

    monkeypatch.chdir(reader.clone)
    command = PAGE.section("Generate images").block("bash").strip()
    reader.type(f"{command} --size 64 --steps 5 --number 2")
    assert [Image.open(path).size for path in sorted(Path("images").glob("*.png"))] == [(64, 64)] * 2

    names: dict[str, Any] = {}
    ours, theirs = (block.text for block in PAGE.section("In your own code").blocks("python"))
    made = []
    for sample, call, written in (
        (ours, 'asleep on a sofa")', 'asleep on a sofa", num_inference_steps=5, guidance_scale=5.0, generator=torch.manual_seed(1))'),
        (theirs, "prompt, ", "prompt, num_inference_steps=5, guidance_scale=5.0, generator=torch.manual_seed(1), "),
    ):
        assert call in sample
        exec(sample.replace("bfloat16", "float32").replace(call, written), names)
        made.append(np.asarray(Image.open("rex.png"), np.int16))
    assert abs(made[0] - made[1]).max() <= 1
