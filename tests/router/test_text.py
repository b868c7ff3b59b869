"""Detokenising against `decode everything`, stop strings against a search in the whole text, chat templates."""

import asyncio
import json

import pytest
from diptych.core.errors import ContextExceeded, InvalidRequest, ModelError
from diptych.core.model import read_card
from diptych.router.admission import check_unicode
from diptych.router.template import ChatTemplate
from diptych.router.text import Detokeniser, Pieces, StopStrings, Text
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

BYTE_TOKENS = {f"<0x{byte:02X}>": byte for byte in range(256)}
QUICK = settings(max_examples=150, deadline=None)


def sentencepiece(strip: bool) -> Tokenizer:
    """Gemma's shape (byte fallback, spaces as ▁); with `strip` Llama 2's, whose decoder drops the first space."""
    words = ["▁", "a", "b", "é", "日本", "▁the", "▁Paris", "\n", "▁▁", "<", ">", "🙂"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {name: 3 + byte for name, byte in BYTE_TOKENS.items()}
    vocab |= {word: len(vocab) + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    return tokenizer


def byte_level() -> Tokenizer:
    """Llama 3's shape."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)} | {"Ġt": 256, "Ġth": 257, "æĹ": 258}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "t"), ("Ġt", "h"), ("æ", "Ĺ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<|日|>", normalized=False, special=False)])
    return tokenizer


TOKENIZERS = {"gemma": sentencepiece(False), "llama2": sentencepiece(True), "llama3": byte_level()}


def incremental(pieces: Pieces, ids: list[int]) -> str:
    decoder = Detokeniser(pieces)
    return "".join([decoder.push(i) for i in ids] + [decoder.flush()])


@pytest.mark.parametrize("name", TOKENIZERS)
@QUICK
@given(data=st.data())
def test_detokeniser_equals_decoding_everything(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=40))
    pieces = Pieces(tokenizer)
    text = incremental(pieces, ids)
    assert text == b"".join(pieces.bytes_of(i) for i in ids).decode("utf-8", "replace")
    anchor = tokenizer.encode("a", add_special_tokens=False).ids
    twin = tokenizer.decode([*anchor, *ids], skip_special_tokens=True)[len(tokenizer.decode(anchor)) :]
    # A run of byte tokens that is no UTF-8 is written as one U+FFFD a byte by `tokenizers`; we keep its good characters.
    if name == "llama3" or "\ufffd" not in twin:
        assert text == twin


@pytest.mark.parametrize("name", TOKENIZERS)
@QUICK
@given(text=st.text(max_size=30))
def test_text_survives_there_and_back(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if text.replace("▁", " ") == text and "<" not in text:
        assert incremental(Pieces(tokenizer), ids) == text


def test_a_character_is_sent_when_its_last_byte_comes():
    decoder = Detokeniser(Pieces(TOKENIZERS["gemma"]))
    ids = [TOKENIZERS["gemma"].token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    assert [decoder.push(i) for i in ids] == ["", "", "€"]
    assert decoder.push(ids[0]) == ""
    assert decoder.flush() == "\ufffd"


def test_the_first_space_is_kept():
    tokenizer = TOKENIZERS["llama2"]
    assert incremental(Pieces(tokenizer), [tokenizer.token_to_id("▁Paris")]) == " Paris"


def first_stop(text: str, stops: list[str]) -> str | None:
    """Slow twin: cut at the stop string that is complete first, the longest of those complete at once."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return None


@QUICK
@given(
    pieces=st.lists(st.text("ab\n", max_size=5), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
)
def test_stop_strings_equal_searching_the_whole_text(pieces, stops):
    finder, sent, stopped = StopStrings(stops), "", False
    for i, piece in enumerate(pieces):
        text, stopped = finder.push(piece)
        sent += text
        if stopped:
            break
        so_far = "".join(pieces[: i + 1])
        held = so_far[len(sent) :]
        assert so_far.startswith(sent)
        assert not held or any(stop.startswith(held) for stop in stops), "held back what can become no stop string"
        assert not any(stop.startswith(so_far[-n:]) for stop in stops for n in range(len(held) + 1, len(stop)) if n <= len(so_far))
    whole = "".join(pieces)
    expected = first_stop(whole, stops)
    assert stopped == (expected is not None)
    assert (sent if stopped else sent + finder.flush()) == (whole if expected is None else expected)


def test_lone_surrogates_are_refused_by_name():
    with pytest.raises(InvalidRequest) as refused:
        check_unicode("a\ud800", "stop")
    assert refused.value.field == "stop"


GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def test_chat_template():
    template = ChatTemplate(GEMMA, bos_token="<s>")
    expected = "<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
    assert template.render([{"role": "user", "content": " hi "}]) == expected
    with pytest.raises(InvalidRequest, match="No system role") as refused:
        template.render([{"role": "system", "content": "x"}])
    assert refused.value.field == "messages"


def test_chat_template_has_what_hugging_face_templates_use():
    source = (
        "{% generation %}{{ messages | tojson }}{% endgeneration %}{% for i in [1, 2] %}{% break %}{% endfor %}{{ strftime_now('%Y') }}"
    )
    text = ChatTemplate(source).render([{"role": "user", "content": "<é>"}])
    assert json.loads(text[:-4]) == [{"role": "user", "content": "<é>"}]
    assert text[-4:].isdigit()


@pytest.mark.parametrize("source", ["{% for %}", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}"])
def test_chat_template_that_is_no_good(source):
    with pytest.raises((ModelError, InvalidRequest)):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])


def test_a_chat_template_of_ones_own(prepared, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{{ bos_token }}own")
    text = Text.load(prepared, read_card(prepared), file)
    assert asyncio.run(text.encode_chat([{"role": "user", "content": "x"}])) == (1, *asyncio.run(text.encode("own", special=False)))
    with pytest.raises(ModelError, match=r"none\.jinja"):
        Text.load(prepared, read_card(prepared), tmp_path / "none.jinja")


def test_text_encodes_long_texts_off_the_loop(prepared):
    text = Text.load(prepared, read_card(prepared))
    long = "ab" * 10000
    with pytest.raises(ContextExceeded, match="more than 4097 tokens"):
        asyncio.run(text.encode(long))
    text.card = text.card.model_copy(update={"max_context": 30000})
    ids = asyncio.run(text.encode(long))
    assert len(ids) == 20001
    assert asyncio.run(text.encode("ab", special=False)) == ids[1:3]
    text.close()
