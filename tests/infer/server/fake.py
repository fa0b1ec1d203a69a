"""An engine without a model: what it writes is a function of the prompt, so that a test knows every reply."""

import threading
import time
from collections.abc import Sequence

from llmlab.infer.engine.config import EngineConfig, Stats
from llmlab.infer.engine.request import Event, Handle, Request, RequestRefused, TokenLogprobs
from llmlab.infer.stopping import StopStrings
from llmlab.tokenizers import Bytes, Tokenizer

TOKENIZER = Bytes().build()


def letters(prompt_ids: Sequence[int], sample: int, count: int) -> str:
    """What the fake writes."""
    first = sum(place * index for place, index in enumerate(prompt_ids, 1)) + 7 * sample
    return "".join(chr(97 + (first + place * place) % 26) for place in range(count))


def scored(index: int, place: int, top: int) -> TokenLogprobs:
    """Log-probabilities that the fake reports: the token's own, then those of the tokens that follow it."""
    return TokenLogprobs(index, -0.5 - place, tuple((index + more, -0.5 - place - more) for more in range(top)))


class FakeEngine:
    """Two tokens an event, one thread a request."""

    def __init__(self, tokenizer: Tokenizer = TOKENIZER, *, seconds: float = 0.0, max_length: int = 128) -> None:
        """`seconds` pass before each event."""
        self.config = EngineConfig(num_blocks=64, max_rows=4, max_length=max_length)
        self.tokenizer = tokenizer
        self.seconds = seconds
        self.requests: list[Request] = []
        self.handles: list[Handle] = []
        self.cancelled: list[Handle] = []
        self.refusal: Exception | None = None
        self.fails = ""
        """The message of an error that ends every sample."""

    @property
    def unfinished(self) -> int:
        return sum(not handle.finished for handle in self.handles)

    def submit(self, request: Request) -> Handle:
        if self.refusal is not None:
            raise self.refusal
        if len(request.prompt_ids) >= 1000:
            raise RequestRefused("the prompt is far too long")
        self.requests.append(request)
        handle = Handle(request, lambda: self.cancelled.append(handle))
        self.handles.append(handle)
        threading.Thread(target=self._write, args=(handle,), daemon=True).start()
        return handle

    def _write(self, handle: Handle) -> None:
        for sample in range(handle.request.n):
            self._write_sample(handle, sample)

    def _write_sample(self, handle: Handle, sample: int) -> None:
        request, top = handle.request, handle.request.sampling.logprobs
        text = letters(request.prompt_ids, sample, request.max_new_tokens)
        finder = StopStrings(request.stop)
        prompt = None
        if request.prompt_logprobs and sample == 0:
            prompt = (None, *(scored(index, 0, top or 0) for index in request.prompt_ids[1:]))
        for start in range(0, len(text), 2):
            time.sleep(self.seconds)
            if handle in self.cancelled:
                return handle.put(Event(sample, finish_reason="cancelled"))
            if self.fails:
                return handle.put(Event(sample, finish_reason="error", message=self.fails))
            new = text[start : start + 2]
            shown = finder.push(new)
            last = start + 2 >= len(text)
            reason = "stop" if finder.found else "length" if last else None
            if reason == "length":
                shown += finder.finish()
            ids = tuple(new.encode())
            logprobs = None if top is None else tuple(scored(i, start + at, top) for at, i in enumerate(ids))
            event = Event(sample, ids, shown, logprobs, reason, stop=finder.found, prompt_logprobs=prompt)
            handle.put(event)
            prompt = None
            if reason:
                return None
        return None

    def stats(self) -> Stats:
        done = sum(handle.finished for handle in self.handles)
        return Stats(
            running=len(self.handles) - done,
            waiting=0,
            blocks_total=64,
            blocks_free=64 - (len(self.handles) - done),
            blocks_cached=0,
            prefix_hit_tokens=0,
            preemptions=0,
            prompt_tokens=sum(len(request.prompt_ids) for request in self.requests),
            generated_tokens=0,
            finished={"length": done},
            compilations=0,
        )
