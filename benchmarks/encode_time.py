"""Encoding against ``datasets.map(batched=True)`` with the same tokenizer, in turn, on plain text and on chats.

python benchmarks/encode_time.py [--rows 4000] [--rounds 5]

CPU time of one process whose tokenizer has one thread: what other processes do to the machine in between counts little.
raymem goes from rows to ids *and* targets; ``datasets`` to the ids that ``tokenizer(...)`` and ``apply_chat_template``
give, which it writes to its cache. Texts and chats are the demo corpus; a chat has three turns of the user and three of
the assistant. Beside that the time of one conversation by its turns, which is to be linear.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import provenance

from raymem.training.data.demo import ensure_demo
from raymem.training.data.encode import Encoder
from raymem.training.data.formats import Format, to_example
from raymem.training.data.readers import index_file, read_block
from raymem.training.data.tokenizer import load_tokenizer

AIM = 0.8
"""Least share of the tokens per second of ``datasets`` that is aimed at."""
Rows = list[dict[str, Any]]


def corpora(rows: int, cache: Path) -> tuple[Any, dict[Format, Rows]]:
    demo = ensure_demo(cache)

    def read(name: str) -> Rows:
        return [row for block in index_file(demo.corpus(name, "train"), 10**6)[1] for _, row in read_block(block)]

    functions = read("functions")
    chats: Rows = []
    for at in range(0, len(functions) - 2, 3):
        turns = [
            {"role": role, "content": pair[column].strip()}
            for pair in functions[at : at + 3]
            for role, column in (("user", "prompt"), ("assistant", "completion"))
        ]
        chats.append({"messages": turns})
    return load_tokenizer(str(demo.tokenizer)), {"text": read("text")[:rows], "messages": chats[:rows]}


def with_raymem(tokenizer: Any, kind: Format, rows: Rows) -> int:
    encoder = Encoder(tokenizer, "demo")
    examples = [to_example(row, kind, {}, "row") for row in rows]
    encoded = encoder.encode(examples, ["row"] * len(rows))
    return sum(len(example.input_ids) for of_row in encoded for example in of_row)


def with_datasets(tokenizer: Any, kind: Format, rows: Rows) -> int:
    import datasets

    def encode(batch: dict[str, Any]) -> Any:
        return tokenizer(batch["text"]) if kind == "text" else tokenizer.apply_chat_template(batch["messages"])

    with tempfile.TemporaryDirectory() as folder:
        data = datasets.Dataset.from_list(rows)
        mapped = data.map(encode, batched=True, remove_columns=[kind], cache_file_name=f"{folder}/x.arrow")
        return sum(map(len, mapped.with_format("arrow")[:]["input_ids"]))


def measure(work: Callable[[], int]) -> tuple[float, int]:
    began = time.process_time()
    tokens = work()
    return time.process_time() - began, tokens


def with_turns(tokenizer: Any, count: int) -> float:
    """CPU seconds for one conversation of so many turns."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": f"turn {i} of a conversation that goes on and on"} for i in range(count)]
    return min(measure(partial(with_raymem, tokenizer, "messages", [{"messages": turns}]))[0] for _ in range(5))


def main() -> None:
    parser = provenance.parser(__doc__)
    parser.add_argument("--rows", type=int, default=4000, help="of each kind, at most; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="of each; default: %(default)s")
    args = parser.parse_args()
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, data = corpora(args.rows, Path(folder))
        figures: dict[str, Any] = {"aim": AIM, "rounds": args.rounds, "cases": {}}
        figures["seconds_by_turns"] = {count: round(with_turns(tokenizer, count), 4) for count in (50, 100, 200, 400)}
        for kind, rows in data.items():
            ways = {"raymem": with_raymem, "datasets": with_datasets}
            rates: dict[str, list[float]] = {name: [] for name in ways}
            tokens = {}
            for _ in range(args.rounds):
                for name, way in ways.items():
                    seconds, tokens[name] = measure(partial(way, tokenizer, kind, rows))
                    rates[name].append(tokens[name] / seconds)
            ratios = [ours / theirs for ours, theirs in zip(rates["raymem"], rates["datasets"], strict=True)]
            figures["cases"][kind] = {
                "rows": len(rows),
                "tokens": tokens,
                "tokens_per_s": {name: round(statistics.median(found)) for name, found in rates.items()},
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
            }
    provenance.save("encode_time", figures)


if __name__ == "__main__":
    main()
