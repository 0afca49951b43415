from __future__ import annotations

import random

import numpy as np
import pytest

from raymem.training.data.packed.pack import Encoded, Packed, Packing, best_fit_decreasing, pack

S = 16
PAD = 99


def example(ids: range | list[int], prompt: int = 0, *, text: bool = False) -> Encoded:
    targets = np.arange(len(ids)) >= prompt
    return Encoded(np.array(list(ids), np.int32), targets, splittable=text)


def random_examples(seed: int, longest: int = S, *, text: bool = False) -> list[Encoded]:
    generator = random.Random(seed)
    lengths = [generator.randint(2, longest) for _ in range(40)]
    firsts = np.cumsum([1000, *lengths])
    return [
        example(range(first, first + length), generator.randint(0, length - 1), text=text)
        for first, length in zip(firsts, lengths, strict=False)
    ]


def segments(packed: Packed) -> list[tuple[list[int], list[bool]]]:
    """(ids, targets) of every segment, without padding."""
    found = []
    for ids, targets, starts, length in zip(
        packed.input_ids, packed.targets, packed.starts, packed.lengths, strict=True
    ):
        begins = [int(at) for at in np.flatnonzero(starts) if at < length]
        for begin, end in zip(begins, [*begins[1:], int(length)], strict=True):
            found.append((ids[begin:end].tolist(), targets[begin:end].tolist()))
    return found


def expected(examples: list[Encoded]) -> list[tuple[list[int], list[bool]]]:
    return [(e.input_ids.tolist(), [False, *e.targets[1:].tolist()]) for e in examples]


@pytest.mark.parametrize("packing", ["bfd", "none"])
@pytest.mark.parametrize("seed", range(5))
def test_every_example_is_one_whole_segment(packing: Packing, seed: int) -> None:
    examples = random_examples(seed)
    packed = pack(examples, S, packing, PAD)
    assert sorted(segments(packed)) == sorted(expected(examples))
    assert packed.lengths.sum() == sum(len(e.input_ids) for e in examples)
    assert (packed.dropped, packed.truncated) == (0, 0)
    assert packed.input_ids.dtype == np.int32 and packed.input_ids.shape == (len(packed.lengths), S)


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
def test_the_tail_is_padding_without_targets(packing: Packing) -> None:
    packed = pack([example(range(5)), example(range(6))], S, packing, PAD)
    padding = np.arange(S) >= packed.lengths[:, None]
    assert padding.any()
    assert (packed.input_ids[padding] == PAD).all() and (packed.input_ids[~padding] != PAD).all()
    assert not packed.targets[padding].any()


def test_only_bfd_has_segments_and_its_padding_is_one() -> None:
    examples = [example(range(5)), example(range(6))]
    assert np.flatnonzero(pack(examples, S, "bfd", PAD).starts[0]).tolist() == [0, 6, 11]
    assert np.flatnonzero(pack(examples, 11, "bfd", PAD).starts[0]).tolist() == [0, 6]
    assert np.flatnonzero(pack(examples, S, "wrapped", PAD).starts[0]).tolist() == [0]
    assert np.flatnonzero(pack(examples, S, "none", PAD).starts[0]).tolist() == [0]


def test_best_fit_takes_the_fullest_row_that_has_room() -> None:
    lengths = [2, 3, 7, 8, 5, 6]
    rows = best_fit_decreasing([example(range(n)) for n in lengths], 10)
    assert [[len(e.input_ids) for e in row] for row in rows] == [[8, 2], [7, 3], [6], [5]]


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_equals_looking_at_every_row(seed: int) -> None:
    examples = random_examples(seed, longest=12)
    rows: list[list[Encoded]] = []
    for piece in sorted(examples, key=lambda e: -len(e.input_ids)):
        room = [S - sum(len(e.input_ids) for e in row) for row in rows]
        fitting = [(free, index) for index, free in enumerate(room) if free >= len(piece.input_ids)]
        if fitting:
            rows[min(fitting)[1]].append(piece)
        else:
            rows.append([piece])
    found = [[e.input_ids.tolist() for e in row] for row in best_fit_decreasing(examples, S)]
    assert found == [[e.input_ids.tolist() for e in row] for row in rows]


def test_best_fit_decreasing_is_near_the_bound() -> None:
    examples = random_examples(7, longest=12) * 20
    total = sum(len(e.input_ids) for e in examples)
    rows = best_fit_decreasing(examples, S)
    assert all(sum(len(e.input_ids) for e in row) <= S for row in rows)
    assert len(rows) <= 11 / 9 * (total / S) + 4  # no worse than first-fit decreasing (Johnson 1973)


def test_a_long_prompt_and_completion_is_truncated_and_a_long_text_goes_on() -> None:
    for packing in ("bfd", "none"):
        cut = pack([example(range(40), prompt=4)], S, packing, PAD)
        assert segments(cut) == [(list(range(16)), [False] * 4 + [True] * 12)]
        assert (cut.truncated, cut.dropped) == (1, 0)
        split = pack([example(range(40), text=True)], S, packing, PAD)
        assert [ids for ids, _ in segments(split)] == [list(range(16)), list(range(16, 32)), list(range(32, 40))]
        assert (split.truncated, split.dropped, int(split.targets.sum())) == (0, 0, 40 - 3)


def test_examples_without_a_target_are_dropped_and_counted() -> None:
    examples = [
        example(range(40), prompt=20),  # truncated before its completion
        example(range(4), prompt=4),
        example([7]),  # its only token has no predecessor
        example(range(3)),
    ]
    packed = pack(examples, S, "bfd", PAD)
    assert (packed.dropped, packed.truncated) == (3, 0)
    assert segments(packed) == expected(examples[3:])
    nothing = pack(examples[:3], S, "none", PAD)
    assert nothing.input_ids.shape == (0, S) and nothing.dropped == 3


@pytest.mark.parametrize("seed", range(3))
def test_wrapped_is_one_stream(seed: int) -> None:
    examples = random_examples(seed, longest=50)
    packed = pack(examples, S, "wrapped", PAD)
    ids = np.concatenate([e.input_ids for e in examples])
    targets = np.concatenate([e.targets for e in examples])
    at = {int(value): i for i, value in enumerate(ids)}
    for row, mask, length in zip(packed.input_ids, packed.targets, packed.lengths, strict=True):
        first = at[int(row[0])]
        assert first % S == 0 and row[:length].tolist() == ids[first : first + S].tolist()
        assert mask[1:length].tolist() == targets[first + 1 : first + S].tolist() and not mask[0]
        assert mask.any()  # rows of prompt only are left out
    assert packed.truncated == 0
