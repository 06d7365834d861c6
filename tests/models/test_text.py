import itertools
import json
import math
import random
import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.config import ClipConfig
from ldm.errors import FolderError
from ldm.interop.text import read_text
from ldm.models import text
from ldm.models.clip import build_clip, from_clip, train_tokenizer, vocabulary_hash
from ldm.models.contrastive import contrastive_loss, left_right_accuracy, retrieval_top1, same_captions, swap_relation
from ldm.models.text import CaptionTable, TextEncoder, save_tokenizer, tokenize

CONFIG = ClipConfig(width=32, layers=2, heads=2, max_length=24, merges=30, patch_size=4, projection=16)
CAPTIONS = [
    f"a {c} {s} {r} a {d} square"
    for c in ("red", "green")
    for d in ("blue", "teal")
    for s in ("circle", "star")
    for r in ("left of", "above")
]
UNICODE = [
    "Ein Würfel, größer als Ø 5 µm",
    "cafe\u0301 NAI\u0308VE",  # decomposed accents
    "👩‍🚀🏳️‍🌈 rockets 🚀!!",
    "赤い丸は青い四角の左 红色圆形",
    "دائرة حمراء على يسار مربع أزرق",
    "עיגול אדום",
    "लाल वृत्त — วงกลม",
    "tabs\tand\nlines  \x00 \x7f",
    "it's 3.14 & we'll <b>see</b>",
]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(CAPTIONS, CONFIG.merges, CONFIG.max_length)


@pytest.fixture(scope="module")
def clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    torch.manual_seed(0)
    model = build_clip(CONFIG, tokenizer, image_size=16, image_channels=1).eval()
    for parameter in model.parameters():  # the initial biases are 0 and the norms 1: a lost one would go unseen
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def encoder(clip: CLIPModel, tokenizer: CLIPTokenizer) -> TextEncoder:
    return from_clip(clip, tokenizer)


@pytest.fixture
def folder(encoder: TextEncoder, tmp_path: Path) -> Path:
    encoder.save(tmp_path / "model")
    return tmp_path / "model"


def openai_bytes() -> list[str]:
    """The byte symbols as OpenAI's bytes_to_unicode defines them: printable Latin-1 first, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def test_an_untrained_state_is_its_words_own(tokenizer: CLIPTokenizer) -> None:
    """Stage 2 tells captions apart by the states of single words: context must not drown them."""
    torch.manual_seed(0)
    encoder = from_clip(
        build_clip(ClipConfig(width=128, layers=2, heads=2, max_length=12), tokenizer, 16, 1), tokenizer
    )
    words = ["red", "green", "blue", "circle", "square", "star"]
    alone, within = encoder.encode(words)[:, 1], encoder.encode([f"a teal {word} above" for word in words])[:, 3]
    similarity = torch.nn.functional.cosine_similarity(alone[:, None], within[None], dim=-1)
    same, other = similarity.diagonal().mean(), similarity[~torch.eye(len(words), dtype=torch.bool)].mean()
    assert same > 0.8 and other < 0.3, (same, other)


def test_vocabulary_has_openai_layout(tokenizer: CLIPTokenizer) -> None:
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    assert tokens[:256] == openai_bytes()
    assert tokens[256:512] == [b + "</w>" for b in openai_bytes()]
    assert len(tokens) == len(tokenizer) == 512 + CONFIG.merges + 2
    assert tokens[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        len(tokens) - 2,
        len(tokens) - 1,
        len(tokens) - 1,
    )


def pair_counts(words: dict[tuple[str, ...], int]) -> dict[tuple[str, str], int]:
    counts: dict[tuple[str, str], int] = {}
    for word, n in words.items():
        for pair in itertools.pairwise(word):
            counts[pair] = counts.get(pair, 0) + n
    return counts


def test_every_merge_joins_a_most_frequent_pair(tokenizer: CLIPTokenizer) -> None:
    words: dict[tuple[str, ...], int] = {}
    for caption in CAPTIONS:
        for word in caption.split():
            key = (*word[:-1], word[-1] + "</w>")
            words[key] = words.get(key, 0) + 1
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert len(merges) == CONFIG.merges
    for a, b in merges:
        counts = pair_counts(words)
        assert counts[a, b] == max(counts.values())
        joined: dict[tuple[str, ...], int] = {}
        for word, n in words.items():
            out = list(word)
            i = 0
            while i < len(out) - 1:
                if (out[i], out[i + 1]) == (a, b):
                    out[i : i + 2] = [a + b]
                i += 1
            joined[tuple(out)] = joined.get(tuple(out), 0) + n
        words = joined


def test_training_is_deterministic_in_any_caption_order(tokenizer: CLIPTokenizer) -> None:
    vocab = tokenizer.get_vocab()
    for seed in range(20):  # the hash maps inside are seeded anew each time
        shuffled = random.Random(seed).sample(CAPTIONS, len(CAPTIONS))
        assert train_tokenizer(shuffled, CONFIG.merges, CONFIG.max_length).get_vocab() == vocab


def test_few_captions_give_fewer_merges_and_an_empty_set_none() -> None:
    assert len(train_tokenizer(["ab"], 500, 8)) == 515
    assert len(train_tokenizer([], 500, 8)) == 514


@pytest.mark.parametrize("caption", UNICODE)
def test_round_trip_without_unknown(tokenizer: CLIPTokenizer, caption: str) -> None:
    ids = tokenizer(caption, split_special_tokens=True)["input_ids"]
    assert tokenizer.unk_token_id not in ids[1:-1]
    decoded = tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False)
    expected = unicodedata.normalize("NFC", caption).lower()
    assert re.sub(r"\s", "", decoded) == re.sub(r"\s", "", expected)  # CLIP sets spaces between its word pieces


def test_end_of_text_in_a_caption_is_characters(encoder: TextEncoder) -> None:
    ids, truncated = encoder.tokenize(["a <|endoftext|> b"])
    end = encoder.tokenizer.eos_token_id
    first = ids[0].tolist().index(end)
    assert truncated == 0
    assert encoder.tokenizer.decode(ids[0, 1:first]).replace(" ", "") == "a<|endoftext|>b"


def test_empty_caption_is_start_end_padding(encoder: TextEncoder) -> None:
    start, end = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    ids, truncated = encoder.tokenize([""])
    assert ids.tolist() == [[start] + [end] * (CONFIG.max_length - 1)] and truncated == 0
    assert encoder.tokenize([])[0].shape == (0, CONFIG.max_length)


def test_long_captions_are_cut_and_counted(encoder: TextEncoder) -> None:
    captions = [
        "red " * 500,
        "a red star",
        "red " * (CONFIG.max_length - 2),
        "red " * (CONFIG.max_length - 1),
        UNICODE[4],
    ]
    ids, truncated = encoder.tokenize(captions)
    reference = encoder.tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=CONFIG.max_length,
        split_special_tokens=True,
        return_tensors="pt",
    )
    assert torch.equal(ids, reference["input_ids"])
    assert truncated == 3
    assert encoder.encode(captions).shape == (5, CONFIG.max_length, CONFIG.width)


@pytest.mark.parametrize("word", ["ab", "_!", "\x1c", "é", "漢字", "\u0301", "a1"])
def test_a_word_of_300_000_letters_is_learned_from_by_its_first_thousand(word: str) -> None:
    captions = ["a red circle", "a blue square"]
    long = word * (300_000 // len(word))
    learned = train_tokenizer([*captions, long], 64, 77)  # with its square, this would take minutes
    assert vocabulary_hash(learned) == vocabulary_hash(train_tokenizer([*captions, long[:1000]], 64, 77))
    ids, truncated = tokenize(learned, [long], 77)
    assert ids.shape == (1, 77) and truncated == 1


def test_a_caption_of_many_characters_is_cut_where_its_tokens_are(tokenizer: CLIPTokenizer) -> None:
    words = "a red circle left of a blue square " * 10_000
    assert tokenize(tokenizer, [words], 77)[0].tolist() == tokenize(tokenizer, [words[:2000]], 77)[0].tolist()
    spaced, plain = (tokenize(tokenizer, [text], 77) for text in ("a" + " \n" * 20_000 + "circle", "a circle"))
    assert spaced[0].tolist() == plain[0].tolist() and spaced[1] == 0


def test_saved_folder_loads_in_plain_transformers(encoder: TextEncoder, folder: Path) -> None:
    plain, info = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert not any(info.values()), info
    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    for caption in [*CAPTIONS, *UNICODE, ""]:
        cut = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = tokens(caption, **cut)["input_ids"]
        assert torch.equal(ids, encoder.tokenize([caption])[0])
        with torch.no_grad():
            assert torch.equal(plain.eval()(ids).last_hidden_state, encoder.encode([caption]))


def test_saved_files_suit_older_readers(encoder: TextEncoder, folder: Path) -> None:
    keys = load_file(folder / "text_encoder" / "model.safetensors").keys()
    assert all(key.startswith("text_model.") for key in keys)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("clip_text_model", ["CLIPTextModel"])
    vocab = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    assert vocab == encoder.tokenizer.get_vocab()
    lines = (folder / "tokenizer" / "merges.txt").read_text().splitlines()
    assert lines[0].startswith("#version") and len(lines) == CONFIG.merges + 1
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / "tokenizer" / name).is_file()


def test_folder_reads_back_equal(encoder: TextEncoder, folder: Path) -> None:
    again = read_text(folder)
    assert again.hash == encoder.hash
    assert torch.equal(again.encode(UNICODE), encoder.encode(UNICODE))
    assert (again.width, again.max_length) == (32, 24)
    assert not again.model.training and not any(p.requires_grad for p in again.model.parameters())


def test_whole_clip_in_one_folder_and_half_precision(encoder: TextEncoder, clip: CLIPModel, tmp_path: Path) -> None:
    clip.save_pretrained(tmp_path / "whole")
    save_tokenizer(encoder.tokenizer, tmp_path / "whole")
    assert read_text(tmp_path / "whole").hash == encoder.hash
    from_clip(clip, encoder.tokenizer).model.half().save_pretrained(tmp_path / "half")
    save_tokenizer(encoder.tokenizer, tmp_path / "half")
    half = read_text(tmp_path / "half")
    assert half.encode(["a star"]).dtype == torch.float32
    assert torch.allclose(half.encode(["a star"]), encoder.encode(["a star"]), atol=2e-2)


def test_hub_name_goes_through_one_safe_download(
    encoder: TextEncoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "owner/absent":
            raise FileNotFoundError("404\nnot there")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert read_text("owner/name").hash == encoder.hash
    assert asked[0][0] == "owner/name" and not any(p.endswith((".bin", ".py", "*")) for p in asked[0][1])
    with pytest.raises(FolderError, match=r"no folder owner/absent.*404 not there$"):
        read_text("owner/absent")


def break_folder(folder: Path, fault: str) -> None:
    model, weights = folder / "text_encoder", folder / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    config = json.loads((model / "config.json").read_text())
    if fault == "tokenizer empty":
        for file in (folder / "tokenizer").iterdir():
            file.unlink()
    elif fault == "tokenizer other":
        save_tokenizer(train_tokenizer(CAPTIONS, 7, 24), folder / "tokenizer")
    elif fault == "no config":
        (model / "config.json").unlink()
    elif fault == "not clip":
        (model / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    elif fault == "config broken":
        (model / "config.json").write_text("{")
    elif fault == "no weights":
        weights.rename(model / "pytorch_model.bin")
    elif fault == "cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif fault == "key missing":
        save_file({k: v for k, v in state.items() if "final_layer_norm.bias" not in k}, weights)
    elif fault == "fewer layers":
        (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    elif fault == "wider":
        (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("tokenizer empty", "holds no tokenizer: expected tokenizer.json"),
        ("tokenizer other", "521 tokens but the text encoder 544"),
        ("no config", "config.json is missing"),
        ("not clip", "model_type is 't5'"),
        ("config broken", "text_encoder/config.json: .*Expecting property name"),
        ("no weights", "pytorch_model.bin"),
        ("cut short", "model.safetensors"),
        ("key missing", "final_layer_norm.bias is missing"),
        ("fewer layers", "layers.1.* belongs to no layer"),
        ("wider", r"mlp.fc1.* is \[.*\], config.json says"),
    ],
)
def test_faulty_folders_are_refused_in_one_line(
    folder: Path, fault: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    break_folder(folder, fault)
    with pytest.raises(FolderError, match=message) as raised:
        read_text(folder)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_name_that_is_neither_folder_nor_hub_model(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="no folder"):
        read_text(tmp_path / "absent")


def test_pooled_output_is_at_the_first_end_of_text(
    clip: CLIPModel, tokenizer: CLIPTokenizer, encoder: TextEncoder
) -> None:
    captions = ["a red star", "a blue square above a teal circle", ""]
    ids, _ = encoder.tokenize(captions)
    ends = [len(tokenizer(c)["input_ids"]) - 1 for c in captions]
    assert ends[2] == 1
    with torch.no_grad():
        features = clip.get_text_features(ids).pooler_output
        expected = encoder.encode(captions)[range(3), ends] @ clip.text_projection.weight.T
    torch.testing.assert_close(features, expected)


def test_projected_features_of_transformers_text_model_agree(clip: CLIPModel, encoder: TextEncoder) -> None:
    projected = CLIPTextModelWithProjection(clip.config.text_config)
    projected.load_state_dict({k: v for k, v in clip.state_dict().items() if k.startswith("text_")})
    ids, _ = encoder.tokenize(CAPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(clip.get_text_features(ids).pooler_output, projected.eval()(ids).text_embeds)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_clip_takes_any_channels_and_its_sizes_from_the_config(tokenizer: CLIPTokenizer, channels: int) -> None:
    model = build_clip(CONFIG, tokenizer, image_size=8, image_channels=channels)
    assert model.get_image_features(torch.zeros(2, channels, 8, 8)).pooler_output.shape == (2, CONFIG.projection)
    for tower in (model.config.text_config, model.config.vision_config):
        assert (tower.hidden_size, tower.intermediate_size, tower.num_hidden_layers, tower.attention_dropout) == (
            32,
            128,
            2,
            0.0,
        )
    assert model.config.vision_config.patch_size == 4 and model.logit_scale.exp().item() == pytest.approx(
        1 / 0.07, rel=1e-3
    )
    with pytest.raises(ValueError, match="image size 10 is not a multiple of the patch size 4"):
        build_clip(CONFIG, tokenizer, image_size=10, image_channels=channels)


def test_encoder_is_an_independent_frozen_copy(clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    encoder = from_clip(clip, tokenizer)
    assert all(p.requires_grad for p in clip.parameters())
    before = encoder.hash
    with torch.no_grad():
        clip.text_model.final_layer_norm.bias.add_(1.0)
    assert encoder.hash == before
    clip.text_model.final_layer_norm.bias.data.sub_(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = encoder.encode(["a star"])
    assert states.dtype == torch.float32 and not states.requires_grad
    assert torch.equal(states, encoder.encode(["a star"]))


def test_hash_follows_weights_vocabulary_and_settings(encoder: TextEncoder) -> None:
    seen = {encoder.hash}
    encoder.encode(["padding and truncation leave state in a tokenizer"])
    assert encoder.hash in seen
    next(p for name, p in encoder.model.named_parameters() if name.endswith("layers.1.mlp.fc2.bias")).data[3] += 1e-6
    seen.add(encoder.hash)
    encoder.model.config.num_attention_heads = 4
    seen.add(encoder.hash)
    encoder.tokenizer = train_tokenizer(["zyx", *CAPTIONS[3:]] * 3, CONFIG.merges, CONFIG.max_length)
    assert len(encoder.tokenizer) == encoder.model.config.vocab_size
    seen.add(encoder.hash)
    assert len(seen) == 4


def test_caption_table_equals_direct_encoding(encoder: TextEncoder) -> None:
    table = CaptionTable(encoder, [*CAPTIONS, "red " * 99, *CAPTIONS], batch=3)
    assert len(table) == len(CAPTIONS) + 2 and table.truncated == 1
    asked = [CAPTIONS[5], text.NULL_CAPTION, CAPTIONS[0], CAPTIONS[5], "red " * 99]
    torch.testing.assert_close(table[asked], encoder.encode(asked), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="'a mauve dot' is not among"):
        table[["a mauve dot"]]


def test_the_vision_towers_positions_start_as_spread_as_asked(tokenizer: CLIPTokenizer) -> None:
    def positions(**changes: float) -> torch.Tensor:
        torch.manual_seed(0)
        clip = build_clip(replace(CONFIG, **changes), tokenizer, image_size=64, image_channels=1)
        return clip.vision_model.embeddings.position_embedding.weight

    own = positions()
    assert own.std().item() == pytest.approx(0.02, rel=0.1)  # transformers' initializer_range
    torch.testing.assert_close(positions(position_std=1.0), 50 * own)


def test_loss_of_distinct_captions_is_clips_own(clip: CLIPModel, encoder: TextEncoder) -> None:
    captions = CAPTIONS[:6]
    ids, _ = encoder.tokenize(captions)
    pixels = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    own = clip(input_ids=ids, pixel_values=pixels, return_loss=True).loss
    own.backward()
    gradient = clip.logit_scale.grad.clone()
    clip.zero_grad()
    image, words = clip.get_image_features(pixels).pooler_output, clip.get_text_features(ids).pooler_output
    loss = contrastive_loss(image, words, clip.logit_scale, same_captions(captions))
    loss.backward()
    torch.testing.assert_close(loss, own)
    torch.testing.assert_close(clip.logit_scale.grad, gradient)
    clip.zero_grad()


def test_loss_of_equal_captions_shares_the_positive() -> None:
    torch.manual_seed(3)
    image, words, scale = torch.randn(5, 7).double(), torch.randn(5, 7).double(), torch.tensor(1.3, dtype=torch.float64)
    captions = ["a", "b", "a", "c", "a"]
    cosine = [[float(i @ w / (i.norm() * w.norm())) * math.exp(1.3) for w in words] for i in image]

    def one_way(rows: list[list[float]]) -> float:
        total = 0.0
        for i, row in enumerate(rows):
            log_z = math.log(sum(map(math.exp, row)))
            positives = [j for j in range(5) if captions[j] == captions[i]]
            total += sum(log_z - row[j] for j in positives) / len(positives)
        return total / 5

    columns = [list(column) for column in zip(*cosine, strict=True)]
    expected = (one_way(cosine) + one_way(columns)) / 2
    assert contrastive_loss(image, words, scale, same_captions(captions)).item() == pytest.approx(expected, rel=1e-9)


def test_negatives_are_more_columns_for_the_images_alone() -> None:
    torch.manual_seed(4)
    image, words, false = (torch.randn(n, 7).double() for n in (5, 5, 3))
    captions, scale = ["a", "b", "a", "c", "d"], torch.tensor(0.7, dtype=torch.float64)

    def sharpened(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.exp(float(a @ b / (a.norm() * b.norm())) * math.exp(0.7))

    def surprise(i: int, of: torch.Tensor, among: torch.Tensor, more: torch.Tensor) -> float:
        total = sum(sharpened(of, one) for one in (*among, *more))
        alike = [-math.log(sharpened(of, among[j]) / total) for j in range(5) if captions[j] == captions[i]]
        return sum(alike) / len(alike)

    nothing = words[:0]
    to_text = sum(surprise(i, image[i], words, false) for i in range(5)) / 5
    to_image = sum(surprise(i, words[i], image, nothing) for i in range(5)) / 5
    same = same_captions(captions)
    assert contrastive_loss(image, words, scale, same, false).item() == pytest.approx((to_text + to_image) / 2)
    assert torch.equal(
        contrastive_loss(image, words, scale, same, nothing), contrastive_loss(image, words, scale, same)
    )


def test_same_captions_is_equality() -> None:
    captions = ["a", "b", "a", "", "b", "A"]
    assert same_captions(captions).tolist() == [[x == y for y in captions] for x in captions]


def test_retrieval_counts_the_nearest_caption() -> None:
    words = torch.tensor([[9.0, 0.0], [0.0, 0.5]])  # lengths must not matter
    image = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 3.0], [3.0, 1.0]])
    assert retrieval_top1(image, words, torch.tensor([0, 1, 1, 1])) == 0.75


def test_relations_swap() -> None:
    assert swap_relation("a red star left of a blue square") == "a red star right of a blue square"
    assert swap_relation("a star Above a leftover") == "a star below a leftover"
    assert swap_relation("a left of b right of c, d below e") == "a right of b left of c, d above e"
    assert (
        swap_relation("a red star") is None and swap_relation("the left officer") is None and swap_relation("") is None
    )


def test_left_right_accuracy_compares_cosines() -> None:
    image = torch.tensor([[1.0, 0.0]] * 4)
    true = torch.tensor([[0.1, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.2]])
    swapped = torch.tensor([[5.0, 5.0], [1.0, 0.5], [1.0, 0.0], [-1.0, 0.0]])
    assert left_right_accuracy(image, true, swapped) == 0.5  # the third is a tie
    with pytest.raises(ValueError, match="at least one caption"):
        left_right_accuracy(image[:0], true[:0], swapped[:0])
