"""Text on a terminal: pieces join to the whole text, colors follow probabilities, no line is wider than the window."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
import torch

from steerl.rollout.chat.terminal import BANDS, Piece, Pieces, columns, paint, pieces_of, visible, wants_color, width_of, wrap
from tests.models import tiny_tokenizer


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


TEXTS = ["the end is good", "日本語 🙂 👩‍👩‍👧 é naïve", "a\nb\n\n c", " lead", "x" * 80, "ä" * 40 + "🙂" * 20]


@pytest.mark.parametrize("kind,size", [("char", 64), ("word", 64), ("bytes", 270), ("pieces", 320)])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_whole_text(kind: str, size: int, text: str) -> None:
    tokenizer = tiny_tokenizer(size, kind=kind)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids, [None] * len(ids))
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind,size,low", [("bytes", 270, 0), ("pieces", 320, 260)])
def test_pieces_of_any_ids_join_to_their_text(kind: str, size: int, low: int) -> None:
    """Random bytes: half characters, special tokens in between. (Byte fallback turns a whole run of bytes into signs when
    its last is wrong: what was shown already cannot be taken back, so that vocabulary is tried without its bytes.)"""
    tokenizer = tiny_tokenizer(size, kind=kind)
    for seed in range(40):
        ids = torch.randint(low, size, (50,), generator=torch.Generator().manual_seed(seed)).tolist()
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(piece.text for piece in pieces_of(tokenizer, ids, [None] * 50)).replace("\ufffd", "") == whole.replace(
            "\ufffd", ""
        )


def test_a_character_of_several_tokens_is_one_piece_with_the_lowest_log_prob() -> None:
    tokenizer = tiny_tokenizer(270, kind="bytes")
    ids = tokenizer("a🙂b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6
    pieces = pieces_of(tokenizer, ids, [-0.1, -1.0, -4.0, -2.0, -3.0, -0.2])
    assert pieces == [Piece("a", -0.1), Piece("🙂", -4.0), Piece("b", -0.2)]
    stream = Pieces(tokenizer)
    assert [stream.add(token) for token in ids[:4]] == [Piece("a", None), None, None, None]
    assert stream.rest() == Piece("\ufffd", None)


@pytest.mark.parametrize("probability,band", [(0.01, 0), (0.1, 1), (0.4, 2), (0.99, 3), (1.0, 3)])
def test_colours_follow_the_probability_and_end_with_the_line(probability: float, band: int) -> None:
    painted = paint(Piece("one\ntwo", math.log(probability)), color=True)
    assert painted == "\n".join(f"{BANDS[band][1]}{word}\x1b[0m" for word in ("one", "two"))
    assert paint(Piece("one", math.log(probability)), color=False) == "one" == paint(Piece("one", None), color=True)


def test_a_model_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b[2Jb\r\x07\x7f\u202ec\td\n") == "a␛[2Jb␍␇␡\ufffdc\td\n"
    assert visible("👩‍👩‍👧 é 日") == "👩‍👩‍👧 é 日"


def test_colour_only_where_it_is_wanted() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert wants_color(Terminal(), {})
    assert not wants_color(io.StringIO(), {})
    assert not wants_color(Terminal(), {"NO_COLOR": "1"}) and not wants_color(Terminal(), {"TERM": "dumb"})


def test_width_counts_columns() -> None:
    assert [width_of(text) for text in ("abc", "日本", "e\u0301", "🙂")] == [3, 4, 1, 2]


@pytest.mark.parametrize("width", [2, 3, 7, 20, 59, 60, 61, 80, 200])
@pytest.mark.parametrize("color", [False, True])
def test_no_line_is_wider_than_the_window_and_no_character_is_lost(width: int, color: bool) -> None:
    text = "日本語 text that is long 🙂🙂 " * 6 + "\nnext\n\nlast 日"
    pieces = [Piece(part, -0.5 * i) for i, part in enumerate(re.findall(r".{1,3}|\n", text))]
    lines = wrap(pieces, width, color)
    assert all(width_of(plain(line)) == used <= width for line, used in lines)
    assert "".join(plain(line) for line, _ in lines) == text.replace("\n", "")
    page = list(columns(("left", pieces), ("right", pieces), width, color))
    assert all(width_of(plain(line)) <= max(width, len("right:")) for line in page)
    side_by_side = " | " in plain(page[0])
    assert side_by_side == (width >= 60)
    left = (
        [plain(line).split(" | ")[0].rstrip() for line in page[1:]]
        if side_by_side
        else [plain(line) for line in page[1 : len(lines) + 1]]
    )
    assert (
        "".join(left).replace(" ", "")[:100]
        == text.replace("\n", "").replace(" ", "")[: min(100, len("".join(left).replace(" ", "")))]
    )


def test_fixtures_are_what_they_say() -> None:
    kinds: dict[str, Any] = {
        kind: tiny_tokenizer(size, kind=kind) for kind, size in (("char", 64), ("bytes", 270), ("pieces", 320))
    }
    assert kinds["bytes"].decode(kinds["bytes"]("日", add_special_tokens=False)["input_ids"]) == "日"
    assert kinds["pieces"].decode(kinds["pieces"]("日", add_special_tokens=False)["input_ids"]) == "日"
