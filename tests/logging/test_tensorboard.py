"""The logger, with a writer that records its calls and with the real one, read back."""

import builtins
import itertools
import random
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from torchbp.blame.frame import Frame, LayerFrame
from torchbp.logging import BlameLogger
from torchbp.logging.heatmap import NAN, PLOT_LEFT, PLOT_TOP, PLOT_WIDTH
from torchbp.logging.tensorboard import top_units

pytest.importorskip("PIL")

HOSTILE = "<script>alert(1)</script>|*x*\n/../é"


class Recorder:
    """The part of SummaryWriter that the logger may use; keeps every call."""

    def __init__(self):
        self.scalars, self.histograms, self.images, self.texts, self.layouts = [], [], [], [], []
        self.flushed = 0

    def add_scalar(self, tag, value, global_step):
        self.scalars.append((tag, value, global_step))

    def add_histogram(self, tag, values, global_step, bins):
        self.histograms.append((tag, np.array(values), global_step, bins))

    def add_image(self, tag, image, global_step, dataformats):
        assert dataformats == "HWC" and image.dtype == np.uint8
        self.images.append((tag, image, global_step))

    def add_text(self, tag, text, global_step):
        self.texts.append((tag, text, global_step))

    def add_custom_scalars(self, layout):
        self.layouts.append(layout)

    def flush(self):
        self.flushed += 1

    def calls(self):
        return [self.scalars, self.histograms, self.images, self.texts]


def layer(units, seed, classes=3, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: torch.tensor(rng.standard_normal(shape), dtype=dtype)  # noqa: E731
    blame = draw(units)
    zero = torch.tensor(rng.choice([0.0, 0.5, 1.0], units), dtype=dtype)
    error_rms = draw(units).abs()
    per_class = draw(classes, units) if classes else None
    return LayerFrame(blame, blame.abs(), blame**2, zero, blame.abs(), error_rms, per_class)


def frame(step, names=("fc1", "fc2"), units=5, samples=4, **kwargs):
    layers = {name: layer(units, 100 * step + i) for i, name in enumerate(names)}
    return Frame(step, "taylor", samples, loss=1.0 / (step + 1), layers=layers, **kwargs)


def test_scalars_are_what_the_frame_says():
    writer, logger_frames = Recorder(), [frame(3), frame(8)]
    logger = BlameLogger(writer)
    for item in logger_frames:
        logger.log(item)
    got = {(tag, step): value for tag, value, step in writer.scalars}
    assert len(got) == len(writer.scalars) == 2 * (1 + 2 * 5)
    for item in logger_frames:
        assert got["blame/loss", item.step] == item.loss
        for name, stats in item.layers.items():
            blame = [float(value) / 4 for value in stats.blame]
            raising = sum(value for value in blame if value > 0)
            lowering = sum(value for value in blame if value < 0)
            rms = np.sqrt(np.mean([float(value) ** 2 for value in stats.error_rms]))
            dead = sum(float(value) == 1 for value in stats.zero) / 5
            expected = {
                "total": raising + lowering,
                "culprits": raising,
                "helpers": lowering,
                "dead": dead,
                "error_rms": rms,
            }
            for quantity, value in expected.items():
                assert got[f"blame/{quantity}/{name}", item.step] == pytest.approx(value, rel=1e-12)


def test_histograms_hold_the_signed_blame_of_every_unit():
    writer = Recorder()
    item = frame(3)
    BlameLogger(writer).log(item)
    assert [(tag, step) for tag, _, step, _ in writer.histograms] == [
        ("blame/units/fc1", 3),
        ("blame/units/fc2", 3),
    ]
    for (_, values, _, bins), stats in zip(writer.histograms, item.layers.values(), strict=True):
        np.testing.assert_allclose(values, stats.blame.double().numpy() / 4, rtol=1e-12)
        assert (np.diff(bins) > 0).all() and 0.0 in bins
        assert bins[0] <= values.min() and bins[-1] >= values.max()


def test_pictures_and_texts_are_bounded():
    writer = Recorder()
    logger = BlameLogger(writer, image_every=5)
    for step in range(1, 13):
        logger.log(frame(step))
    assert [step for tag, _, step in writer.images if tag == "blame/heatmap/fc1"] == [1, 6, 11]
    assert [step for tag, _, step in writer.texts if tag == "blame/top"] == [1, 6, 11]
    assert [step for tag, _, step in writer.texts if tag == "blame/findings"] == [1, 6, 11]
    logger.flush()
    assert [step for tag, _, step in writer.images if tag == "blame/heatmap/fc2"] == [1, 6, 11, 12]
    logger.close()
    assert writer.images[-1][2] == 12 and len(writer.images) == 8, "nothing is written twice"
    assert writer.flushed == 2
    assert len({image.shape for _, image, _ in writer.images}) == 1


def test_pictures_grow_rarer():
    writer = Recorder()
    logger = BlameLogger(writer, image_every=1, max_steps_in_heatmap=4)
    for step in range(200):
        logger.log(frame(step, names=("fc",), units=2))
    steps = [step for _, _, step in writer.images]
    assert steps[:12] == list(range(12))
    assert all(b - a <= max(1, a // 10) for a, b in itertools.pairwise(steps))
    assert len(steps) < 60
    assert len(writer.scalars) == 200 * 6, "scalars are written every time"


def test_every_tag_has_increasing_steps():
    writer = Recorder()
    logger = BlameLogger(writer, image_every=2)
    for step in (2, 5, 6, 9):
        logger.log(frame(step))
        logger.flush()
    logger.close()
    for calls in writer.calls():
        for tag in {call[0] for call in calls}:
            steps = [call[2] for call in calls if call[0] == tag]
            assert steps == sorted(set(steps)) and steps


@pytest.mark.parametrize("step", [7, 6, -1])
def test_steps_must_increase(step):
    writer = Recorder()
    logger = BlameLogger(writer)
    logger.log(frame(7))
    before = [len(calls) for calls in writer.calls()]
    with pytest.raises(ValueError, match=rf"frame\.step is {step} after step 7"):
        logger.log(Frame(step, "taylor", 1, 0.0))
    assert [len(calls) for calls in writer.calls()] == before
    logger.log(frame(8))
    assert writer.scalars[-1][2] == 8


def test_layout_matches_exactly_the_tags_of_its_layers():
    names = ["0", "features.0", "featuresX0", "10", "a+b", "block(1)", "", "1"]
    writer = Recorder()
    logger = BlameLogger(writer)
    logger.log(frame(1, names=names))
    logger.log(frame(2, names=names))
    (layout,) = writer.layouts
    written = {tag for tag, _, _ in writer.scalars} - {"blame/loss"}
    for quantity in ("total", "culprits", "helpers", "dead", "error_rms"):
        charts = [spec for title, spec in layout["blame"].items() if title.startswith(quantity)]
        assert [len(lines) for _, lines in charts] == [6, 2]
        assert {kind for kind, _ in charts} == {"Multiline"}
        matched = [
            [tag for tag in written if re.match(line, tag)] for _, lines in charts for line in lines
        ]
        assert all(len(tags) == 1 for tags in matched)
        assert {tags[0] for tags in matched} == {
            tag for tag in written if tag.split("/")[1] == quantity
        }


def test_names_become_safe_and_distinct_tags():
    names = ["a b", "a_b", "a/b", HOSTILE, "", "conv#2"]
    writer = Recorder()
    BlameLogger(writer).log(frame(1, names=names))
    tags = [tag for tag, _, _ in writer.scalars if tag.startswith("blame/total/")]
    assert len(set(tags)) == len(names)
    assert tags[0] == "blame/total/a_b" and tags[-1] == "blame/total/conv#2"
    for tag in tags:
        assert re.fullmatch(r"blame/total/[\w.#()-]+", tag)


def test_table_of_top_units():
    item = frame(3, samples=2, class_names=["cat", "dog", "owl"])
    table = top_units(item, 4)
    units = [
        (name, unit, float(stats.blame[unit]))
        for name, stats in item.layers.items()
        for unit in range(5)
    ]
    units.sort(key=lambda row: -abs(row[2]))
    assert [row[:2] for row in table] == [row[:2] for row in units[:4]]
    for row, (name, unit, blame) in zip(table, units, strict=False):
        stats = item.layers[name]
        assert row[2] == pytest.approx(blame / 2)
        assert row[3] == pytest.approx(100 * abs(blame) / float(stats.blame.abs().sum()), rel=1e-6)
        column = [float(value) for value in stats.per_class[:, unit]]
        worst = max(range(3), key=column.__getitem__)
        assert row[4] == (item.class_names[worst] if column[worst] > 0 else None)


def test_hostile_names_in_the_texts():
    render = pytest.importorskip("tensorboard.plugin_util").markdown_to_safe_html
    writer = Recorder()
    item = frame(1, names=[HOSTILE], class_names=["<b>|", "__c__", HOSTILE])
    item.nonfinite = ("**bad** <i>",)
    BlameLogger(writer).log(item)
    texts = {tag: text for tag, text, _ in writer.texts}
    assert texts["blame/top"].count("\n") == 1 + 1 + 1 + 5, "names do not break the rows"
    page = "".join(render(text) for text in texts.values())
    tags = {tag.split()[0] for tag in re.findall(r"<(\w[^>]*)>", page)}
    assert tags <= {"p", "strong", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}
    assert "**bad** &lt;i&gt;:" in page


def test_nonfinite_layers_turn_magenta_and_do_not_stop_the_rest():
    writer = Recorder()
    logger = BlameLogger(writer)
    logger.log(frame(1, names=("fc1", "fc2")))
    broken = frame(2, names=("fc1",))
    broken.nonfinite = ("fc2", "never_seen")
    logger.log(broken)
    logger.close()
    tag, image, step = writer.images[-1]
    assert (tag, step) == ("blame/heatmap/fc2", 2)
    assert image[PLOT_TOP + 3, PLOT_LEFT + PLOT_WIDTH - 1].tolist() == list(NAN)
    assert image[PLOT_TOP + 3, PLOT_LEFT].tolist() != list(NAN)
    assert ("blame/total/fc2", 2) not in {(tag, step) for tag, _, step in writer.scalars}
    assert "fc2: activations or error signals held NaN" in writer.texts[-1][1].replace("\\", "")


def test_infinite_blame_inside_a_frame():
    item = frame(1, names=("fc",))
    item.layers["fc"].blame[:] = torch.tensor([float("inf"), -float("inf"), 1.0, float("nan"), 0.0])
    writer = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BlameLogger(writer).log(item)
    assert writer.histograms[0][1].tolist() == [0.25, 0.0]


def test_frames_without_layers_or_units():
    writer = Recorder()
    logger = BlameLogger(writer)
    logger.log(Frame(1, "taylor", 4, 0.5))
    logger.log(frame(2, names=("fc",), units=0))
    logger.close()
    assert [call[0] for call in writer.scalars] == ["blame/loss", "blame/loss"]
    assert writer.histograms == [] and writer.images == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    writer = Recorder()
    item = Frame(1, "taylor", 2, 0.5, {"fc": layer(6, 0, dtype=dtype)})
    BlameLogger(writer).log(item)
    np.testing.assert_array_equal(
        writer.histograms[0][1], item.layers["fc"].blame.double().numpy() / 2
    )


class Failing(Recorder):
    def __init__(self, method, error):
        super().__init__()
        self._method, self._error = method, error
        self.failures = 0
        setattr(self, method, self._fail)

    def _fail(self, *args, **kwargs):
        self.failures += 1
        raise self._error


@pytest.mark.parametrize(
    "method", ["add_scalar", "add_histogram", "add_image", "add_text", "add_custom_scalars"]
)
@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(28, "No space left")])
def test_a_failing_writer_warns_once_and_training_goes_on(method, error):
    writer = Failing(method, error)
    logger = BlameLogger(writer)
    with pytest.warns(UserWarning, match=re.escape(str(error))) as caught:
        for step in range(15):
            logger.log(frame(step))
        logger.flush()
        logger.close()
    assert len(caught) == 1 and caught[0].filename == __file__
    assert writer.failures == 1 and writer.flushed == 0


def test_a_failing_flush_warns():
    logger = BlameLogger(Failing("flush", OSError("disk gone")))
    logger.log(frame(1))
    with pytest.warns(UserWarning, match="disk gone"):
        logger.close()


def test_errors_that_are_not_the_disks_are_raised():
    with pytest.raises(KeyError):
        BlameLogger(Failing("add_scalar", KeyError("bug"))).log(frame(1))


def test_without_pillow_only_the_pictures_are_missing(monkeypatch):
    real = builtins.__import__

    def without_pillow(name, *args, **kwargs):
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    writer = Recorder()
    logger = BlameLogger(writer, image_every=1)
    with pytest.warns(UserWarning, match="Pillow") as caught:
        for step in range(3):
            logger.log(frame(step))
    assert len(caught) == 1
    assert writer.images == [] and len(writer.texts) == 6 and len(writer.scalars) == 33


def test_random_states_are_untouched():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    logger = BlameLogger(Recorder(), image_every=1)
    for step in range(3):
        logger.log(frame(step))
    logger.close()
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_every", 0),
        ("max_units_in_heatmap", 0),
        ("top", -1),
        ("max_steps_in_heatmap", 0),
        ("max_steps_in_heatmap", 7),
    ],
)
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
        BlameLogger(Recorder(), **{name: value})


def test_import_needs_neither_tensorboard_nor_pillow():
    code = (
        "import sys, torchbp.logging; bad = {'tensorboard', 'PIL'} & set(sys.modules); "
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_read_back_from_real_event_files(tmp_path):
    pytest.importorskip("tensorboard")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray
    from torch.utils.tensorboard import SummaryWriter

    frames = [frame(step, names=("0", "features.0")) for step in (2, 4, 9)]
    recorder = Recorder()
    with SummaryWriter(str(tmp_path)) as writer:
        for target in (writer, recorder):
            logger = BlameLogger(target, image_every=2)
            for item in frames:
                logger.log(item)
            logger.close()
        writer.add_scalar("after", 1.0, 1)  # the writer is still open

    sizes = dict.fromkeys(("scalars", "histograms", "images", "tensors"), 0)
    events = EventAccumulator(str(tmp_path), size_guidance=sizes)
    events.Reload()
    assert events.Tags()["scalars"][-1] == "after"
    for tag in {tag for tag, _, _ in recorder.scalars}:
        got = [(event.step, event.value) for event in events.Scalars(tag)]
        expected = [(step, np.float32(value)) for t, value, step in recorder.scalars if t == tag]
        assert got == expected
    for tag, values, step, bins in recorder.histograms:
        (event,) = [event for event in events.Histograms(tag) if event.step == step]
        histogram = event.histogram_value
        assert (histogram.num, histogram.min, histogram.max) == (5, values.min(), values.max())
        counts = dict(zip(histogram.bucket_limit, histogram.bucket, strict=True))
        expected = dict(zip(bins[1:], np.histogram(values, bins)[0], strict=True))
        assert {k: v for k, v in counts.items() if v} == {k: v for k, v in expected.items() if v}
    for tag, image, step in recorder.images:
        (event,) = [event for event in events.Images(tag) if event.step == step]
        path = tmp_path / "image.png"
        path.write_bytes(event.encoded_image_string)
        np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    for tag, text, step in recorder.texts:
        found = [e for e in events.Tensors(f"{tag}/text_summary") if e.step == step]
        assert [make_ndarray(e.tensor_proto)[0].decode() for e in found] == [text]
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert {tag for tag, _, step in recorder.images if step == 9} == {
        "blame/heatmap/0",
        "blame/heatmap/features.0",
    }


def test_error_of_the_writers_own_thread(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    thread = writer.file_writer.event_writer._async_writer._worker
    logger = BlameLogger(writer)
    logger.log(frame(1))
    thread.exception = OSError(28, "No space left on device")
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        logger.log(frame(2))
        logger.log(frame(3))
        logger.close()
    assert len(caught) == 1
    thread.exception = None
    writer.close()
