"""A process that writes to the board until it is told to stop, or killed. Run by test_board.py.

``python board_writer.py PATH NAME SEED``: moves tokens between two lines, and says on a line of
standard output when it has begun, and when it has stopped what its two lines hold.
"""

import random
import select
import sys

from chimera_daemon.board import Board

TOKENS = 1_000_003
KEYS = ("engine:a", "engine:b")


def values(tokens: int, move: int) -> tuple[int, int, int, int, int, int]:
    """What a line says of so many tokens: words that only fit together if written together."""
    return tokens, TOKENS - tokens, move, move * 7, tokens ^ move, move + tokens


def main(path: str, name: str, seed: str) -> None:
    chance = random.Random(seed)
    with Board.open(path) as board:
        writer = board.writer("worker", name)
        lines = [writer.line(key) for key in KEYS]
        held = [TOKENS, 0]
        move = 0
        while move % 64 or not select.select([sys.stdin], [], [], 0)[0]:
            giver = chance.randrange(2)
            moved = chance.randint(0, held[giver])
            held[giver] -= moved
            held[1 - giver] += moved
            move += 1
            for line, tokens in zip(lines, held, strict=True):
                line.set(*values(tokens, move))
            writer.beat()
            if move == 1:
                print("begun", flush=True)
        print(*held, flush=True)
        while sys.stdin.readline():
            writer.beat()


if __name__ == "__main__":
    main(*sys.argv[1:])
