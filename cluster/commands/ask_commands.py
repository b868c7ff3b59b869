"""`diptych generate` and `diptych chat`: ask a running cluster something."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ...core.errors import ConfigError
from . import knobs
from .reach import ApiKey, Ca, Name, Server, Tls, reach


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; without it, what comes on stdin.")] = None,
    max_tokens: knobs.MaxTokens = 128,
    min_tokens: knobs.MinTokens = 0,
    temperature: knobs.Temperature = 1.0,
    top_p: knobs.TopP = 1.0,
    top_k: knobs.TopK = 0,
    min_p: knobs.MinP = 0.0,
    repetition_penalty: knobs.RepetitionPenalty = 1.0,
    presence_penalty: knobs.PresencePenalty = 0.0,
    frequency_penalty: knobs.FrequencyPenalty = 0.0,
    logit_bias: knobs.LogitBias = None,
    seed: knobs.Seed = None,
    stop: knobs.Stop = None,
    stop_token: knobs.StopTokens = None,
    ignore_eos: knobs.IgnoreEos = False,
    n: knobs.Choices = 1,
    logprobs: knobs.Logprobs = None,
    stats: Annotated[bool, typer.Option("--stats", help="Then print times and the KV hand-over, on stderr.")] = False,
    name: Name = "default",
    server: Server = None,
    api_key: ApiKey = None,
    tls: Tls = False,
    ca: Ca = None,
) -> None:
    """Continue a text, streaming the answer to stdout.

    [bold]diptych generate "The capital of France is" --max-tokens 20 -t 0[/]

    [bold]cat story.txt | diptych generate --stats[/]
    """
    from ...core.access import Access
    from ...core.generate import Generate
    from .ask import answer, read_stdin

    if prompt is None:
        if sys.stdin.isatty():
            raise ConfigError('Nothing to continue: give a text (`diptych generate "Once upon a time"`) or pipe one in.', field="prompt")
        prompt = read_stdin()
    sampling = knobs.sampling_of(
        max_tokens=max_tokens, min_tokens=min_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        logit_bias=logit_bias, seed=seed, stop_tokens=stop_token, ignore_eos=ignore_eos, n=n, logprobs=logprobs,
    )  # fmt: skip
    call = Generate(prompt=prompt, sampling=sampling, stop=tuple(stop or ()))
    answer(*reach(server, name, Access(api_key, tls, ca)), call, stats=stats)


def chat(
    max_tokens: knobs.MaxTokens = 512,
    min_tokens: knobs.MinTokens = 0,
    temperature: knobs.Temperature = 0.7,
    top_p: knobs.TopP = 1.0,
    top_k: knobs.TopK = 0,
    min_p: knobs.MinP = 0.0,
    repetition_penalty: knobs.RepetitionPenalty = 1.0,
    presence_penalty: knobs.PresencePenalty = 0.0,
    frequency_penalty: knobs.FrequencyPenalty = 0.0,
    logit_bias: knobs.LogitBias = None,
    seed: knobs.Seed = None,
    stop: knobs.Stop = None,
    stop_token: knobs.StopTokens = None,
    ignore_eos: knobs.IgnoreEos = False,
    system: Annotated[str | None, typer.Option(help="Instructions put before the conversation.")] = None,
    name: Name = "default",
    server: Server = None,
    api_key: ApiKey = None,
    tls: Tls = False,
    ca: Ca = None,
) -> None:
    """Talk with the model; Ctrl-D ends. Needs a model with a chat template.

    A model without one can be given one where it is served: [bold]diptych up --chat-template FILE[/].
    """
    from ...core.access import Access
    from .chat import Conversation

    sampling = knobs.sampling_of(
        max_tokens=max_tokens, min_tokens=min_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        logit_bias=logit_bias, seed=seed, stop_tokens=stop_token, ignore_eos=ignore_eos,
    )  # fmt: skip
    Conversation.begin(name, server, Access(api_key, tls, ca), system=system, options=knobs.body_of(sampling, stop)).run()
