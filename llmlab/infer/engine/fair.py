"""Who is next: users share the engine by the service that they have received.

Virtual token counters (Sheng et al. 2024, 2401.00588): every user has a counter of tokens served, a generated token
counting twice a prompt token, for it costs more. Of the users who wait, the one with the smallest counter is next. So
while two users have requests waiting, the service they receive differs by a bounded amount, however many requests
either sends; and whoever needs less than the others is served at once.

A user who comes back after a pause is lifted to the smallest counter of those who are there: one cannot save up.
Requests of a higher priority go before all of a lower one; among those of one user the earliest is first.
"""

from collections import deque
from collections.abc import Iterator

from llmlab.infer.engine.jobs import Job

PROMPT_TOKEN, NEW_TOKEN = 1, 2


class FairQueue:
    """What waits for admission, and the counters of users who have something waiting or running."""

    def __init__(self) -> None:
        self._waiting: dict[int, dict[str | None, deque[Job]]] = {}
        self._served: dict[str | None, int] = {}
        self._present: dict[str | None, int] = {}  # how many requests each user has, waiting or running

    def __len__(self) -> int:
        return sum(len(items) for users in self._waiting.values() for items in users.values())

    def __iter__(self) -> Iterator[Job]:
        return (job for users in self._waiting.values() for items in users.values() for job in items)

    def arrive(self, job: Job) -> None:
        """A new request waits."""
        if not self._present.get(job.user):
            least = min((self._served[user] for user in self._present), default=0)
            self._served[job.user] = max(self._served.get(job.user, 0), least)
            self._present[job.user] = 0
        self._present[job.user] += 1
        self._waiting.setdefault(job.priority, {}).setdefault(job.user, deque()).append(job)

    def first(self) -> Job | None:
        """Who is next; it stays in the queue."""
        if not self._waiting:
            return None
        users = self._waiting[max(self._waiting)]
        return min((items[0] for items in users.values()), key=lambda job: (self._served[job.user], job.arrival))

    def remove(self, job: Job) -> None:
        """It waits no longer: it is admitted, or cancelled."""
        users = self._waiting[job.priority]
        users[job.user].remove(job)
        if not users[job.user]:
            del users[job.user]
        if not users:
            del self._waiting[job.priority]

    def leave(self, job: Job) -> None:
        """A request that arrived has ended."""
        self._present[job.user] -= 1
        if not self._present[job.user]:
            del self._present[job.user]
            # A counter below those of all who are here says nothing: coming back would lift it. Kept, they would be as
            # many as users there ever were.
            least = min((self._served[user] for user in self._present), default=None)
            for user in [user for user in self._served if user not in self._present]:
                if least is None or self._served[user] <= least:
                    del self._served[user]

    def serve(self, job: Job, prompt_tokens: int = 0, new_tokens: int = 0) -> None:
        """Count what its user received."""
        self._served[job.user] += PROMPT_TOKEN * prompt_tokens + NEW_TOKEN * new_tokens
