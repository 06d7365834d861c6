"""Arguments of a call are of the type that the configuration asks for, or named; prompts that are too long are too."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.model_folders import written  # noqa: F401
from support.pipelines import PROMPTS, array, make, pipe, text_encoder  # noqa: F401

from ldm.cli.main import main
from ldm.config import ConfigError
from ldm.models.text import Cut
from ldm.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[2]
LONG = "a small red circle and two blue stars above it with a Green SQUARE on white, ça va"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"negative_prompt": ["a"]}, "negative_prompt must be text, got ['a']"),
    ({"negative_prompt": 3}, "negative_prompt must be text, got 3"),
    ({"negative_prompt": b"a"}, "negative_prompt must be text, got b'a'"),
    ({"seed": 1.5}, "seed must be an integer, got 1.5"),
    ({"seed": True}, "seed must be an integer, got True"),
    ({"seed": np.True_}, "seed must be an integer, got True"),
    ({"seed": "3"}, "seed must be an integer, got '3'"),
    ({"seed": torch.tensor([1, 2])}, "seed must be an integer, got tensor([1, 2])"),
    ({"seed": torch.tensor(1.0)}, "seed must be an integer, got 1.0"),
    ({"seed": 10**5000}, "seed must be an integer of at most 256 bits, got one of 16610"),
    ({"steps": 2.0}, "steps must be an integer, got 2.0"),
    ({"steps": [3]}, "steps must be an integer, got [3]"),
    ({"guidance_scale": "3"}, "guidance_scale must be a number, got '3'"),
    ({"guidance_scale": 10**400}, "guidance_scale must be a number of at most 256 bits"),
    ({"guidance_scale": 1j}, "guidance_scale must be a number, got 1j"),
    ({"eta": False}, "eta must be a number, got False"),
    ({"end_clean": 1}, "end_clean must be true or false, got 1"),
    ({"guidance_interval": (0.0, 1.0, 2.0)}, "guidance_interval must be 2 values, got [0.0, 1.0, 2.0]"),
    ({"guidance_interval": 3}, "guidance_interval must be 2 values, got [3]"),
    ({"guidance_interval": ("a", 1)}, "guidance_interval[0] must be a number, got 'a'"),
    ({"lora": 3}, "lora[0] must be text, got 3"),
    ({"autoguidance": 3}, "autoguidance must be text, got 3"),
    ({"stepz": 3}, "unknown key stepz: did you mean steps?"),
    ({"scale": 3}, "unknown key scale"),
]
OF_THE_CALL: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": "4"}, "batch_size must be an integer, got '4'"),
    ({"batch_size": 4.0}, "batch_size must be an integer, got 4.0"),
    ({"size": 64.0}, "size must be an integer, got 64.0"),
    ({"size": (64, 64.0)}, "size[1] must be an integer, got 64.0"),
    ({"size": 10**12}, "size must be at most 16384 pixels, got 1000000000000"),
    ({"negative_prompt": "caf\udce9"}, "negative_prompt must be text without NUL and in UTF-8, got 'caf\\udce9'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [*WRONG, *OF_THE_CALL],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_an_argument_of_another_type_is_named(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        pipe(PROMPTS[:1], **arguments)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value) and len(str(raised.value)) < 300


OPENING: list[tuple[dict[str, Any], str]] = [
    ({"path": [""]}, "path must be that of a model, got ['']"),
    ({"path": None}, "path must be that of a model, got None"),
    ({"dtype": "float16"}, "dtype must be a floating-point type of torch, such as torch.bfloat16, got 'float16'"),
    ({"dtype": torch.int64}, "dtype must be a floating-point type of torch"),
    ({"device": [1]}, "device must be one that torch has here, such as cpu or cuda, got [1]: "),
    ({"device": "gpu"}, "device must be one that torch has here, such as cpu or cuda, got 'gpu': "),
    ({"device": "meta"}, "device must be one that torch has here, such as cpu or cuda, got 'meta': "),
    ({"device": 10**400}, "device must be one that torch has here, such as cpu or cuda, got "),
    ({"variant": 1}, "variant must be text, got 1"),
    ({"vae": {}}, "vae must be text, got {}"),
    ({"no_such": 3}, "unknown key no_such: known are prediction"),
    ({"scale_": 3}, "unknown key scale_: did you mean scale?"),
]


@pytest.mark.parametrize(("arguments", "message"), OPENING)
def test_an_argument_of_opening_is_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    (tmp_path / "a.safetensors").touch()  # before it is looked into
    with pytest.raises(ConfigError) as raised:
        Pipeline.from_pretrained(**{"path": tmp_path / "a.safetensors", "device": "cpu", **arguments})
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value) and len(str(raised.value)) < 1000


def test_settings_made_in_python_are_checked_as_those_of_a_file() -> None:
    """In a process of its own, where no other checker of types is at work."""
    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/pipeline']\n"
        "import jaxtyping; jaxtyping.install_import_hook = lambda *_: None\n"
        "import numpy, torch; from test_prompts import WRONG; from ldm.config import ConfigError, SampleConfig, build\n"
        "for arguments, message in WRONG:\n    if 'unknown' in message: continue\n"
        "    for made in (lambda: SampleConfig(**arguments), lambda: build(SampleConfig, arguments)):\n"
        "        try: made()\n        except ConfigError as error: assert str(error).startswith(message), error\n"
        "        else: raise AssertionError(message)\n"
        "from ldm.interop.compvis.inferred import Hints\n"
        "wrong = ('heads', 'x'), ('heads', [1, None]), ('prediction', [1]), ('scale', '2'), ('groups', True)\n"
        "for name, value in wrong:\n"
        "    try: Hints(**{name: value})\n    except ConfigError as error: assert str(error).startswith(name), error\n"
        "    else: raise AssertionError(name)\n"
        "assert Hints(heads=2).heads == (2,)\n"
        "scalars = dict(seed=numpy.int64(3), steps=torch.tensor(4), guidance_scale=2)\n"
        "made = SampleConfig(**scalars, guidance_interval=[0, 5], lora=['a'])\n"
        "assert made == SampleConfig(seed=3, guidance_scale=2.0, guidance_interval=(0.0, 5.0), lora=('a',), steps=4)\n"
        "values = made.seed, made.steps, made.guidance_scale, made.guidance_interval[0], made.lora\n"
        "print([type(value).__name__ for value in values])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == "['int', 'int', 'float', 'float', 'tuple']\n", done.stderr


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([1, None], "prompts[0] must be text, got 1"),
        (["a", None], "prompts[1] must be text, got None"),
        ([["a"]], "prompts[0] must be text, got ['a']"),
        (None, "prompts must be a text or several, got None"),
        (3, "prompts must be a text or several, got 3"),
        (b"a", "prompts must be a text or several, got b'a'"),
        ({"a": 1}, "prompts must be a text or several, got {'a': 1}"),
        (["caf\udce9"], "prompts[0] is not text in UTF-8: 'caf\\udce9'"),
    ],
)
def test_prompts_are_texts(pipe: Pipeline, prompts: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        pipe(prompts)
    assert str(raised.value) == message


def test_scalars_of_numpy_and_torch_are_numbers(pipe: Pipeline) -> None:
    settings = {"seed": 3, "steps": 2, "guidance_scale": 2.0, "size": 16, "batch_size": 2}
    scalars = {
        "seed": np.int64(3),
        "steps": torch.tensor(2),
        "guidance_scale": np.float32(2),
        "size": np.uint8(16),
        "batch_size": torch.tensor(2),
    }
    plain = pipe(PROMPTS[:2], guidance_interval=(0.0, 5.0), **settings)
    others = pipe(np.array(PROMPTS[:2]), guidance_interval=np.array([0, 5]).tolist(), **scalars)
    assert (array(plain) == array(others)).all()


def test_the_empty_caption_is_a_caption(pipe: Pipeline) -> None:
    assert (array(pipe("", steps=2, seed=1)) == array(pipe([""], steps=2, seed=1))).all()


# ---------------------------------------------------------------- prompts that are too long


def test_what_is_dropped_is_what_the_encoder_does_not_see() -> None:
    encoder = text_encoder()
    (cut,) = encoder.cut([LONG, "short", LONG, ""])
    assert cut.caption == LONG and LONG.endswith(cut.text) and "Green SQUARE on white, ça va" in cut.text
    ids = encoder.tokenizer(LONG, split_special_tokens=True, verbose=False)["input_ids"]
    assert cut.tokens == len(ids) - encoder.max_length
    kept = LONG[: -len(cut.text)]
    assert torch.equal(encoder.encode([LONG]), encoder.encode([kept + "something quite different that is as long"]))
    assert not torch.equal(encoder.encode([LONG]), encoder.encode([kept[:-1] + cut.text]))
    assert encoder.cut([]) == encoder.cut(["short", ""]) == []


def test_room_is_used_to_the_last_token() -> None:
    encoder = text_encoder()
    letters = "x " * (encoder.max_length - 2)  # each an own token
    assert encoder.cut([letters]) == [] and encoder.cut([letters + "y z"]) == [Cut(letters + "y z", 2, "y z")]


def test_a_cut_prompt_is_one_warning() -> None:
    pipe = make()
    with pytest.warns(UserWarning) as caught:
        pipe([LONG, "short", "x " * 16], steps=1, negative_prompt="y " * 15, batch_size=1)
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith("the text encoder takes 14 tokens: prompt 'a small red") and "ça va'" in message
    assert "its last 2 tokens are dropped: 'x x'" in message and "negative prompt 'y y" in message
    assert "\n" not in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe([LONG], steps=1)  # said before
        pipe(["short"], steps=1)
        make(text=False)(["x " * 50], steps=1)
    many = [f"{LONG} {i}" for i in range(9)]
    with pytest.warns(UserWarning, match="6 more are cut"):
        pipe(many, steps=1)


def test_the_command_says_what_it_drops(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, command = "red square " * 100 + "a blue circle", ["sample", str(written), "--steps", "1"]
    assert main([*command, "--prompt", prompt, "--count", "2", "--out", str(tmp_path / "o")]) == 0
    said = capsys.readouterr().err
    assert said.count("warning:") == 1 and said.count("\n") == 1 and "a blue circle'" in said
    assert main([*command, "--prompt", "a", "--out", str(tmp_path / "o")]) == 0
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- a file of prompts


def test_a_file_of_prompts_is_read_as_every_text(written: Path, tmp_path: Path) -> None:
    contents = {"plain": "a red square\nb\n", "bom": "\ufeffa red square\r\nb", "old": "a red square\rb\r\n\n  \n"}

    def draw(name: str) -> int:
        file, out = str(tmp_path / f"{name}.txt"), str(tmp_path / name)
        return main(["sample", str(written), "--steps", "1", "--prompts-file", file, "--out", out])

    drawn = {}
    for name, content in contents.items():
        (tmp_path / f"{name}.txt").write_bytes(content.encode())
        assert draw(name) == 0
        drawn[name] = [np.asarray(Image.open(file)).tolist() for file in sorted((tmp_path / name).glob("0*.png"))]
    assert len(drawn["plain"]) == 2 and drawn["plain"] == drawn["bom"] == drawn["old"]
    (tmp_path / "one.txt").write_text("a\u2028red\u0085 square\n", encoding="utf-8")
    assert draw("one") == 0
    assert len(list((tmp_path / "one").glob("*.png"))) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (b"a\ncaf\xe9", "line 2 is not UTF-8"),
        (b" \n", "holds no caption"),
        (None, "No such"),
    ],
)
def test_a_file_that_is_no_text_is_one_line(
    tmp_path: Path, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    assert main(["sample", "nowhere", "--prompts-file", str(tmp_path / "p.txt")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_bytes_on_the_command_line_that_are_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sample", "nowhere", "--prompt", "a", "--prompt", "caf\udce9"])
    assert ended.value.code == 2 and "argument 'caf\\udce9' is not UTF-8 text" in capsys.readouterr().err
