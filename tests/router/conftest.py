"""A prepared model without weights (all that a router reads), and fake workers over real gRPC."""

import asyncio
import secrets
from contextlib import asynccontextmanager
from functools import partial

import pytest
from diptych.core.commands import ChoiceFinished, Failed, Finished, FirstTokens, HandedOver, Movable, NewTokens, Prefill, StepEvents, Stop
from diptych.core.errors import Cancelled, DiptychError
from diptych.core.fleet import Fleet, Measure, Member, Phase, WorkerReport, WorkerState
from diptych.core.layout import DType
from diptych.core.metrics import METRICS
from diptych.core.model import CARD, CHAT_TEMPLATE, TOKENIZER, Decoder, ModelCard, Rope
from diptych.core.request import FinishReason, Token
from diptych.router.server import RouterSettings, start_router
from diptych.rpc.router import RouterClient
from diptych.rpc.server import serve
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:"
FIRST_CHARACTER = 259
"""Id of chr(32); ids below are <pad>, <s>, </s> and the 256 byte tokens."""


def character_tokenizer() -> Tokenizer:
    """One token per printable ASCII character (and newline), bytes for the rest; adds <s>."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {character: FIRST_CHARACTER + i for i, character in enumerate(["▁", *map(chr, range(33, 127)), "\n"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<pad>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def card(has_chat_template: bool = True) -> ModelCard:
    decoder = Decoder(
        family="llama", layers=1, hidden=16, heads=1, kv_heads=1, head_dim=16, intermediate=16, activation="silu",
        norm_eps=1e-6, query_scale=0.25, tied_head=True, windows=(0,), rope_full=Rope(theta=10000.0),
    )  # fmt: skip
    return ModelCard(
        name="tiny", source="test", fingerprint="f" * 64, dtype=DType.FLOAT32, vocab_size=512, max_context=256, bos_token_id=1,
        eos_token_ids=(2,), has_chat_template=has_chat_template, weights_bytes=0, decoder=decoder,
    )  # fmt: skip


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared")
    (directory / CARD).write_text(card().model_dump_json())
    (directory / CHAT_TEMPLATE).write_text(TEMPLATE)
    character_tokenizer().save(str(directory / TOKENIZER))
    return directory


class FakeWorker:
    """A worker over real gRPC, without a model: it "generates" `script`, one token of each choice per step, choice i from character i on.

    `hold` keeps P from its first token and D from its next one while cleared, `grants` P from handing over; D reports `offers`;
    `fail` is what its next attempts end with; `silent` stops its reports; `books` are the attempts open here.
    """

    def __init__(self, name, phase, script, peers):
        self.name, self.phase, self.script, self.peers = name, phase, script, peers
        self.incarnation = secrets.randbits(63)
        self.hold = asyncio.Event()
        self.hold.set()
        self.grants = asyncio.Event()
        self.grants.set()
        self.offers = 0
        self.fail, self.fail_after = None, None
        self.silent = False
        self.state = WorkerState.READY
        self.end_after = None
        self.seen, self.stopped = [], []
        self.halted = set()
        self.books = {}
        self.streams = {}
        self.committed = {}
        self.step_s = 0.0
        self.steps = 7.0
        self.capacity = 200
        self.partner = None

    async def start(self, address="127.0.0.1:0"):
        self.server = await serve(address, worker=self)
        self.address = self.server.address
        return self

    async def kill(self):
        await self.server.stop(0)

    def leave(self):
        """Drain, with nothing begun of what is here."""
        self.state = WorkerState.DRAINING
        for attempt in self.books:
            self.send(self.streams[attempt], Movable(attempt))

    def member(self):
        layout = card().layout(block_size=16, kv_tokens=256)
        return Member(self.name, self.address, self.phase, self.incarnation, layout, self.capacity, self.partner)

    async def reports(self):
        while not self.silent:
            counters = (("diptych_worker_steps_total", self.steps), ("unheard_of", 1.0))
            running = len(self.books)
            offers = (Measure("diptych_worker_grants_waiting", self.offers),)
            yield WorkerReport(self.name, self.incarnation, self.state, 0, running, 0, 10, 16, 0, counters, offers)
            await asyncio.sleep(0.1)
        await asyncio.Event().wait()

    async def attached(self, stream):
        mine = set()
        try:
            async for command in stream:
                if isinstance(command, Stop) and command.choice is not None:
                    self.halted.add((command.attempt_id, command.choice))
                    continue
                if isinstance(command, Stop):
                    self.stopped.append(command.attempt_id)
                    if task := self.books.get(command.attempt_id):
                        task.cancel()
                        self.send(stream, Failed(command.attempt_id, Cancelled("stopped")))
                    continue
                self.seen.append(command)
                task = asyncio.create_task(self.work(command, stream))
                self.books[command.attempt_id] = task
                self.streams[command.attempt_id] = stream
                mine.add(task)
                task.add_done_callback(lambda task, key=command.attempt_id: (mine.discard(task), self.books.pop(key, None)))
        except DiptychError:
            return
        finally:
            for task in mine:
                task.cancel()

    def send(self, stream, *events):
        stream.send(StepEvents(events))

    async def work(self, command, stream):
        attempt, request = command.attempt_id, command.request
        try:
            if self.fail and self.fail_after is None:
                return self.send(stream, Failed(attempt, self.fail))
            if isinstance(command, Prefill):
                await self.prefill(command, stream)
            else:
                await self.decode(command, stream)
        except asyncio.CancelledError:
            if peer := getattr(command, "destination", None):
                self.peers[peer].commit(attempt).cancel()
            raise
        assert request.sampling.seed is not None

    def commit(self, attempt):
        return self.committed.setdefault(attempt, asyncio.get_running_loop().create_future())

    def token(self, index, request, choice):
        token_id = self.script[(index + choice) % len(self.script)]
        count = request.sampling.logprobs
        top = tuple((token_id + i, -0.5 - i) for i in range(count or 0))
        return Token(index, token_id, None if count is None else -0.5, top, choice)

    async def prefill(self, command, stream):
        attempt, request = command.attempt_id, command.request
        await self.hold.wait()
        at = {choice: len(request.generated_by(choice)) for choice in request.live}
        alone = command.destination is None
        tokens = tuple(self.token(at[choice], request, choice) for choice in request.opening)
        finishes = tuple(FinishReason.LENGTH if alone else None for _ in tokens)
        self.send(stream, FirstTokens(attempt, tokens, finishes, 0.0, 0.0, 3))
        if alone:
            return self.send(stream, Finished(attempt))
        await self.grants.wait()
        self.peers[command.destination].commit(attempt).set_result({c: i + (c in request.opening) for c, i in at.items()})
        self.send(stream, HandedOver(attempt, 1000, 0.002, "shm"))

    async def decode(self, command, stream):
        attempt, request = command.attempt_id, command.request
        at = {choice: len(request.generated_by(choice)) for choice in request.live}
        if not command.local_prefill:
            at = await self.commit(attempt)
        while at:
            await self.hold.wait()
            await asyncio.sleep(self.step_s)
            for choice, index in list(at.items()):
                if self.fail and self.fail_after == index:
                    return self.send(stream, Failed(attempt, self.fail))
                if (attempt, choice) in self.halted:
                    del at[choice]
                elif index in (self.end_after, request.sampling.max_tokens):
                    reason = FinishReason.STOP if index == self.end_after else FinishReason.LENGTH
                    self.send(stream, ChoiceFinished(attempt, choice, reason))
                    del at[choice]
                else:
                    self.send(stream, NewTokens(attempt, (self.token(index, request, choice),)))
                    at[choice] += 1
        self.send(stream, Finished(attempt))

    async def drain(self, timeout_s):
        return len(self.books)


class Counted:
    """A recorder that keeps sums, and refuses what the table of metrics does not have."""

    def __init__(self):
        self.values = {}

    def inc(self, name, value=1.0, **labels):
        self._check(name, labels)
        key = (name, *sorted(labels.values()))
        self.values[key] = self.values.get(key, 0) + value

    def set(self, name, value, **labels):
        self._check(name, labels)
        self.values[(name, *sorted(labels.values()))] = value

    observe = inc

    def forget(self, worker, phase):
        self.values = {key: value for key, value in self.values.items() if worker not in key}

    def _check(self, name, labels):
        metric = next(metric for metric in METRICS if metric.name == name)
        assert set(metric.label_names) == set(labels)
        assert all(labels[label.name] in label.values for label in metric.labels if label.values)


class Site:
    """A router and its fake workers."""

    def __init__(self, directory, settings):
        self.directory, self.settings = directory, settings
        self.tokenizer = character_tokenizer()
        self.peers, self.workers = {}, {}
        self.version = 0
        self.recorder = Counted()

    async def add(self, name, phase, text="Hello, wörld! And so on."):
        script = self.tokenizer.encode(text, add_special_tokens=False).ids
        worker = await FakeWorker(name, phase, script, self.peers).start()
        self.workers[name] = self.peers[worker.address] = worker
        return worker

    async def publish_only(self):
        self.version += 1
        fleet = Fleet(self.version, tuple(worker.member() for worker in self.workers.values()))
        async with RouterClient(self.router.control) as client:
            assert await client.publish(fleet) == self.version

    async def publish(self):
        """And wait until the router could serve a request."""
        await self.publish_only()
        await self.until(lambda: len(self.router.fleet.describe()[1]) == len(self.workers))
        await self.until(lambda: self.router.service.unavailable() is None)

    async def until(self, condition, timeout_s=60.0):
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110  it watches what has no event
                await asyncio.sleep(0.01)

    @property
    def url(self):
        return f"http://{self.router.http}"

    async def idle(self):
        """Nothing is left open anywhere."""
        await self.until(lambda: not any(worker.books for worker in self.workers.values()))
        await self.until(lambda: self.router.service.running == 0)


@asynccontextmanager
async def open_site(directory, prefill=1, decode=1, text="Hello, wörld! And so on.", **settings):
    site = Site(directory, settings)
    for i in range(prefill):
        await site.add(f"p{i}", Phase.PREFILL, text)
    for i in range(decode):
        await site.add(f"d{i}", Phase.DECODE, text)
    site.router = await start_router(
        RouterSettings(model_dir=directory, **settings), recorder=site.recorder, metrics_text=lambda: b"diptych_up 1\n"
    )
    try:
        if prefill or decode:
            await site.publish()
        yield site
        await site.idle()
    finally:
        await site.router.stop(0.2)
        for worker in site.workers.values():
            await worker.kill()


@pytest.fixture(scope="session")
def site(prepared):
    """`async with site(prefill=…, decode=…, text=…, **RouterSettings) as s`; checks at the end that nothing is left open."""
    return partial(open_site, prepared)
