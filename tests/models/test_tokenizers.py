"""Ids against open_clip's tokenizers."""

import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer

from vlkit.errors import ModelError
from vlkit.models.tokenizers import CLIP_BPE, TextTokenizer, cut, get_tokenizer, tokenizer_id_of

HOSTILE = [
    "",
    "A photo of a DOG's   ball, isn't it?",
    "tab\tand\nline feed\r\nand \x1b[31mescape\x1b[0m \x00 \x7f",
    "caf\u00e9 \u2018quoted\u2019 \ufb01sh \uff21\uff22 \u4e2d\u6587 \U0001f600 \u202eabc",
    "&lt;img src=x onerror=alert(1)&gt; &amp;amp; AT&T",
    "<start_of_text> <end_of_text> <|endoftext|>",
    "0123456789 3.14159 -- !!! ...",
    "schÃ¶n",
    "word " * 200,
]


@pytest.fixture(scope="module")
def theirs() -> Any:
    return open_clip.SimpleTokenizer()


@given(st.text() | st.text(alphabet=st.characters(max_codepoint=127)))
def test_any_text_gives_the_ids_of_simple_tokenizer(text: str) -> None:
    assert ours_full([text], 77).equal(SIMPLE([text]))


SIMPLE = open_clip.SimpleTokenizer()


def ours_full(texts: list[str], context_length: int) -> torch.Tensor:
    return TextTokenizer(CLIP_BPE, context_length, full_context=True)(texts)


@pytest.mark.parametrize("context_length", [4, 16, 77])
def test_hostile_texts(context_length: int, theirs: Any) -> None:
    assert ours_full(HOSTILE, context_length).equal(theirs(HOSTILE, context_length=context_length))


def test_other_cleaning() -> None:
    options = {"tokenizer_kwargs": {"clean": "canonicalize"}}
    name = tokenizer_id_of(options)
    assert name == "open_clip:clip_bpe?clean=%22canonicalize%22"
    theirs = open_clip.SimpleTokenizer(clean="canonicalize")
    assert TextTokenizer(name, 77, full_context=True)(HOSTILE).equal(theirs(HOSTILE))


def test_ragged_lists_hold_start_and_end_and_are_cut_to_the_context(theirs: Any) -> None:
    rows = get_tokenizer(CLIP_BPE).encode_ragged(["a dog", "word " * 200], 77)
    assert [len(row) for row in rows] == [4, 77]
    assert {row[0] for row in rows} == {theirs.sot_token_id} and {row[-1] for row in rows} == {theirs.eot_token_id}
    (whole,) = get_tokenizer(CLIP_BPE).encode_ragged(["word " * 200])
    assert len(whole) == 202
    assert cut(cut(whole, 77), 16) == cut(whole, 16) == theirs("word " * 200, context_length=16)[0].tolist()


def test_a_batch_is_as_wide_as_its_longest_text() -> None:
    tokenize = TextTokenizer(CLIP_BPE, 77)
    assert tokenize(["a dog", "a very small dog"]).shape == (2, 6)
    assert tokenize.pad([[1, 2], [1, 2, 3]]).tolist() == [[1, 2, 0], [1, 2, 3]]
    assert tokenize([]).shape == (0, 1)


def test_it_can_be_sent_to_a_worker_process() -> None:
    tokenize = TextTokenizer(CLIP_BPE, 16)
    sent = pickle.dumps(tokenize)
    assert len(sent) < 500
    assert pickle.loads(sent)(HOSTILE).equal(tokenize(HOSTILE))


def test_a_tokenizer_from_the_hub_is_read_from_a_folder(tmp_path: Path) -> None:
    make_word_tokenizer(tmp_path)
    name = tokenizer_id_of({"hf_tokenizer_name": "org/words", "tokenizer_kwargs": {"clean": "lower"}})
    assert name == "hf:org/words?clean=%22lower%22"
    tokenize = TextTokenizer(name, 6, full_context=True, folder=tmp_path)
    texts = ["A dog", "a dog a dog a dog a dog", ""]
    expected = HFTokenizer(str(tmp_path), context_length=6, clean="lower")(texts)
    assert tokenize(texts).equal(expected)
    assert tokenize.encode_ragged(texts)[0] == [2, 4, 5, 3]
    assert tokenize.vocabulary.pad_id == 1


@pytest.mark.parametrize("name", ["clip_bpe", "open_clip:clip_bp", "hf:", ""])
def test_unknown_ids(name: str) -> None:
    with pytest.raises(ModelError, match="Unknown tokenizer"):
        get_tokenizer(name)


def test_what_cannot_be_had_is_named() -> None:
    with pytest.raises(ModelError, match=r"org/missing cannot be loaded.*tokenizer\.json"):
        get_tokenizer("hf:org/missing")
    with pytest.raises(ModelError, match="options open_clip does not know"):
        get_tokenizer("open_clip:clip_bpe?cleen=%22lower%22")


def make_word_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "dog": 5}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)


def test_a_vocabulary_can_be_sent_to_another_process() -> None:
    vocabulary = get_tokenizer(CLIP_BPE)
    assert pickle.loads(pickle.dumps(vocabulary.encode_ragged))(["a dog"]) == vocabulary.encode_ragged(["a dog"])
