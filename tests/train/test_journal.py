import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from plait.errors import PlaitError
from plait.tokenizers.media import Audio
from plait.tokenizers.sound import read_sound
from plait.train.journal import Journal, keep
from plait.train.recipe import DecoderRecipe
from plait.train.recipe_file import load_recipe

RECIPE = DecoderRecipe(["a"], "t", "o", steps=7)


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_folder_of_a_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a" / "b", RECIPE, vocabulary="abc")
    journal.log(1, loss=0.123456789, lr=1e-5)
    (line,) = (tmp_path / "a" / "b" / "metrics.jsonl").read_text().splitlines()
    assert {k: v for k, v in json.loads(line).items() if k != "seconds"} == {"step": 1, "loss": 0.123457, "lr": 1e-5}
    assert load_recipe(str(tmp_path / "a" / "b" / "recipe.yaml")) == RECIPE
    facts = json.loads((tmp_path / "a" / "b" / "run.json").read_text())
    assert facts["vocabulary"] == "abc"
    assert {"python", "torch", "plait"} <= set(facts["versions"])


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run", RECIPE, active=False)
    journal.log(1, loss=1.0)
    journal.rewind(0)
    assert not (tmp_path / "run").exists()


def test_rewind_drops_what_comes_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, RECIPE)
    journal.rewind(3)
    for step in (1, 2, 3, 3, 4, 5):
        journal.log(step, loss=step)
    journal.rewind(3)
    assert steps(tmp_path) == [1, 2, 3, 3]
    journal.log(4, loss=4)
    assert steps(tmp_path) == [1, 2, 3, 3, 4]
    journal.rewind(0)
    assert steps(tmp_path) == []


def test_rewind_drops_a_line_cut_short(tmp_path: Path) -> None:
    journal = Journal(tmp_path, RECIPE)
    journal.log(1, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "sec')
    journal.rewind(1)
    journal.log(2, loss=2.0)
    assert steps(tmp_path) == [1, 2]


def test_seconds_go_on_after_a_resume(tmp_path: Path) -> None:
    first = Journal(tmp_path, RECIPE)
    first.started -= 100
    first.log(1, loss=1.0)
    second = Journal(tmp_path, RECIPE)
    second.rewind(1)
    second.log(2, loss=1.0)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["seconds"] >= 100


def scalars(out: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_shows_a_resumed_step_once(tmp_path: Path) -> None:
    first = Journal(tmp_path, RECIPE)
    for step in (1, 2, 3, 4):
        first.log(step, loss=step / 2)
    first.show(2, "sheet", Image.new("RGB", (4, 3), "red"))
    # Readable at once: a run that is killed loses nothing.
    assert scalars(tmp_path, "loss") == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    time.sleep(1.1)  # TensorBoard reads its files by the second that they were begun in
    second = Journal(tmp_path, RECIPE)
    second.rewind(2)
    second.log(3, loss=8.0)
    assert scalars(tmp_path, "loss") == [(1, 0.5), (2, 1.0), (3, 8.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("sheet")] == [2]


def test_sound_is_heard_and_kept(tmp_path: Path) -> None:
    sound = Audio(torch.stack([torch.linspace(-1, 1, 800), torch.linspace(1, -1, 800) / 2]), 8000)
    Journal(tmp_path, RECIPE).show(3, "tone", sound)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Audio("tone")
    assert (event.step, event.sample_rate) == (3, 8000)
    mixed = read_sound(event.encoded_audio_string).samples
    assert torch.allclose(mixed, sound.samples.mean(0, keepdim=True), atol=1e-4)
    keep(sound, tmp_path / "tone")
    assert torch.allclose(read_sound(tmp_path / "tone.wav").samples, sound.samples, atol=1e-4)
    keep(Image.new("RGB", (4, 3), "red"), tmp_path / "sheet")
    assert Image.open(tmp_path / "sheet.png").size == (4, 3)


def test_one_run_keeps_others_out(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from plait.train.journal import Journal; "
        "from plait.train.recipe import DecoderRecipe; "
        "j = Journal(Path(sys.argv[1]), DecoderRecipe(['a'], 't', 'o')); print('holds', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "holds\n"
        with pytest.raises(PlaitError, match="another run is writing to this folder"):
            Journal(tmp_path, RECIPE)
    finally:
        other.kill()
        other.wait()
    Journal(tmp_path, RECIPE)
