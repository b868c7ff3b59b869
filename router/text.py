"""Text to token ids and back: tokenizer, incremental detokenising, stop strings.

Detokenising works on bytes, not on strings decoded again and again: a token's bytes never depend on its neighbours in the families
we serve (byte-level BPE; sentencepiece with byte fallback), so one token costs one table look-up, however long the output is, and
only the UTF-8 decoder has to remember the bytes of an unfinished character.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tokenizers import Tokenizer

from ..core.errors import ContextExceeded, ModelError
from ..core.model import CHAT_TEMPLATE, TOKENIZER, ModelCard
from .admission import check_unicode
from .template import ChatTemplate

_LONG_TEXT = 8192
"""Characters from which encoding leaves the event loop: about 2 ms, a tenth of a decode step."""
_PROBE_CHARACTERS = 16
"""Of a text with more characters than this per token of the context only the beginning is read at first: mostly that is too long
already (English has 4 characters a token), and 4 MB cost 4 s of a core."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Text:
    """The tokenizer and the chat template of one prepared model."""

    def __init__(self, tokenizer: Tokenizer, card: ModelCard, template: ChatTemplate | None = None) -> None:
        self.card = card
        self.template = template
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenise")
        self._pieces = Pieces(tokenizer)

    @classmethod
    def load(cls, directory: Path, card: ModelCard, chat_template: Path | None = None) -> Text:
        """From a prepared model, whose chat template `chat_template` may replace; `ModelError` if a file cannot be read."""
        path = directory / TOKENIZER
        if not path.is_file():
            raise ModelError(f"{directory} has no {TOKENIZER}.")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            # tokenizers raises plain Exception.
            raise ModelError(f"{path} is damaged: {error}") from error
        source = chat_template or (directory / CHAT_TEMPLATE if card.has_chat_template else None)
        template = ChatTemplate.load(source, tokenizer, card) if source else None
        return cls(tokenizer, card, template)

    async def encode(self, text: str, *, special: bool = True, field: str = "prompt") -> tuple[int, ...]:
        """Token ids of `text`. `special`: with the tokens the tokenizer adds by itself (BOS); off for rendered chats, whose
        template writes them. Raises `InvalidRequest` for text that is not Unicode (lone surrogates)."""
        check_unicode(text, field)
        if len(text) < _LONG_TEXT:
            return tuple(self._tokenizer.encode(text, add_special_tokens=special).ids)
        probe = _PROBE_CHARACTERS * self.card.max_context
        if len(text) > probe:
            tokens = len(await self._encode_long(text[:probe], special))
            if tokens > self.card.max_context:
                raise ContextExceeded(
                    f"This model's maximum context length is {self.card.max_context} tokens, output included; "
                    f"the prompt has more than {tokens} tokens.",
                    field=field,
                )
        return await self._encode_long(text, special)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of the prompt that asks for the assistant's next message. Needs a `template`."""
        assert self.template is not None
        # The prompt may come from a thread, like its tokens: templates loop over all messages in Python.
        if sum(len(message["content"]) for message in messages) < _LONG_TEXT and len(messages) < 100:
            prompt = self.template.render(messages)
        else:
            prompt = await asyncio.get_running_loop().run_in_executor(self._threads, self.template.render, messages)
        return await self.encode(prompt, special=False, field="messages")

    async def _encode_long(self, text: str, special: bool) -> tuple[int, ...]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._encode_batch, text, special)

    def _encode_batch(self, text: str, special: bool) -> tuple[int, ...]:
        # Unlike `encode`, `encode_batch` releases the GIL: 4 MB of text stall the event loop for 0.1 s, not for 3.6.
        return tuple(self._tokenizer.encode_batch([text], add_special_tokens=special)[0].ids)

    def decoder(self) -> Detokeniser:
        """A fresh detokeniser for one output."""
        return Detokeniser(self._pieces)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to the text, special tokens by their names."""
        return self._pieces.bytes_of(token_id, special=True)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Pieces:
    """The bytes of each token, found on first use.

    A token is decoded behind an anchor (a token of plain text), because decoders strip the space of whatever comes first.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        # The whole tokenizer as JSON would take 2 s to write and read.
        kinds = _decoder_kinds(json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None)
        self._byte_level = _byte_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._anchor = tokenizer.encode("a", add_special_tokens=False).ids
        self._anchor_text = tokenizer.decode(self._anchor)
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int, *, special: bool = False) -> bytes:
        """The token's bytes; of a special token none, or with `special` its name. An id without a token has none."""
        if token_id in self._special:
            return (self._tokenizer.id_to_token(token_id) or "").encode() if special else b""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._find(token_id)
        return known

    def _find(self, token_id: int) -> bytes:
        name = self._tokenizer.id_to_token(token_id)
        if name is None:
            return b""
        if self._byte_level is not None:
            mapped = [self._byte_level.get(character) for character in name]
            # An added token is written as it is, unless all its characters happen to be of the byte alphabet.
            return name.encode() if None in mapped else bytes(byte for byte in mapped if byte is not None)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(name)):
            return bytes([int(match[1], 16)])
        return self._tokenizer.decode([*self._anchor, token_id])[len(self._anchor_text) :].encode()


class Detokeniser:
    """Text of one output, token by token, whole characters only. Bytes that are no UTF-8 become U+FFFD.

    Equals `b"".join(bytes of all tokens).decode("utf-8", "replace")`, its slow twin in the tests.
    """

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters this token completes."""
        return self._utf8.decode(self._pieces.bytes_of(token_id))

    def flush(self) -> str:
        """The end of the output: what is left of an unfinished character."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Finds the first stop string to be complete, across token borders, and holds back only what could still become one.

    Each string keeps its Knuth-Morris-Pratt state: the length of its longest prefix that ends the text so far. One character
    costs O(number of strings), amortised.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._borders = tuple(_borders(string) for string in self._strings)
        self._firsts = frozenset(string[0] for string in self._strings)
        self._matched = [0] * len(self._strings)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """`(text that is safe to send, whether a stop string is complete)`; after completion nothing more is to be pushed."""
        if not self._held and self._firsts.isdisjoint(text):
            return text, False
        whole = self._held + text
        for position in range(len(self._held), len(whole)):
            longest = max(self._advance(i, whole[position]) for i in range(len(self._strings)))
            if longest:
                self._held = ""
                return whole[: position + 1 - longest], True
        keep = len(whole) - max(self._matched)
        self._held = whole[keep:]
        return whole[:keep], False

    def flush(self) -> str:
        """The output ended without one: what was held back."""
        held, self._held = self._held, ""
        return held

    def _advance(self, which: int, character: str) -> int:
        """Feed one character to a string's state; its length if it is now complete, else 0."""
        string, borders, matched = self._strings[which], self._borders[which], self._matched[which]
        while matched and string[matched] != character:
            matched = borders[matched - 1]
        if string[matched] == character:
            matched += 1
        self._matched[which] = matched
        return len(string) if matched == len(string) else 0


def _borders(string: str) -> list[int]:
    """Per position, the length of the longest proper prefix of `string` that also ends there."""
    borders = [0] * len(string)
    for position in range(1, len(string)):
        length = borders[position - 1]
        while length and string[length] != string[position]:
            length = borders[length - 1]
        borders[position] = length + (string[length] == string[position])
    return borders


def _decoder_kinds(decoder: dict[str, object] | None) -> set[str]:
    """The types of a tokenizer's decoder, parts of a sequence included."""
    if decoder is None:
        return set()
    parts = decoder.get("decoders")
    kinds = {str(decoder["type"])}
    return kinds.union(*(_decoder_kinds(part) for part in parts)) if isinstance(parts, list) else kinds


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: Latin-1's printable characters for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}
