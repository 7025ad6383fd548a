"""A reward from an HTTP server. Requests and responses are JSON.

Each batch of completions is one POST request with content type application/json:

    {"prompts": ["..."], "completions": ["..."], "columns": {"NAME": [...], ...}}

All lists have the same length. `columns` holds the other columns of the data. A row without a column has null in this
column. The server responds with status 200 and a list with one entry per completion, in the same order. An entry is a
finite number, or null for a completion without a score:

    {"scores": [0.25, null, ...]}

With a granularity other than completion, an entry is a list of numbers for the places inside a completion, see
`steps.Granularity`, and the request also has "steps" or "tokens": the texts of the steps or tokens of each completion.

`client.Client` has the rules for retries and faults.
"""

import json
from typing import Any

import numpy as np

from jaxrlhf.errors import one_line
from jaxrlhf.rewards.client import Client
from jaxrlhf.rewards.completions import Completions, abstained_rows, with_abstained
from jaxrlhf.rewards.functions import checked_scores, columns_of
from jaxrlhf.rewards.steps import Granularity, Placed


class HTTPReward:
    """A reward (see `completions.Reward`) from a server. The module docstring describes requests and responses.

    `batch_size` is the number of completions per request. If there is a `granularity`, the server scores inside
    completions. `settings` are those of `client.Client`. The constructor raises `UserError` if the URL or the token
    cannot be used. A call raises `RewardFault` if the server fails.
    """

    may_abstain = True

    def __init__(self, url: str, *, batch_size: int = 64, granularity: Granularity | None = None, **settings: Any):
        self.client, self.batch_size = Client(url, **settings), batch_size
        self.granularity, self.by_step = granularity, granularity is not None
        self.name = self.client.name

    def __call__(self, completions: Completions) -> np.ndarray:
        count = len(completions.prompts)
        batches = [slice(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]

        texts = self.granularity.texts(completions) if self.granularity is not None else {}

        def read(number: int, response: Any) -> np.ndarray | list[Placed]:
            if not isinstance(response, dict) or not isinstance(response.get("scores"), list):
                raise self.client.fault('the response must be {"scores": [numbers]}')
            rows = batches[number]
            if self.granularity is None:
                return checked_scores(response["scores"], rows.stop - rows.start, self.client.source)
            given = [of_rows[rows] for of_rows in texts.values()]
            return self.granularity.read(response["scores"], completions.texts[rows], *given, source=self.client.source)

        parts = self.client.send([self._request(completions, rows, texts) for rows in batches], read)
        if self.granularity is not None:
            return self.granularity.at_tokens([row for part in parts for row in part], completions)
        parts = [np.zeros(0, np.float32), *parts]
        return with_abstained(np.concatenate(parts), np.concatenate([abstained_rows(part) for part in parts]))

    def _request(self, completions: Completions, rows: slice, texts: dict[str, list[list[str]]]) -> bytes:
        columns = columns_of(completions.rows[rows])
        for name, values in columns.items():
            try:
                json.dumps(values, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise self.client.fault(f"column {name} cannot be sent as JSON: {one_line(error)}") from error
        request = {"prompts": list(completions.prompts[rows]), "completions": completions.texts[rows]}
        request |= {name: of_rows[rows] for name, of_rows in texts.items()}
        return json.dumps(request | {"columns": columns}).encode()
