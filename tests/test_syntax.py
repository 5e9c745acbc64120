"""Reading candidate code in several threads."""
from __future__ import annotations

import ast
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

from poise_hpc import syntax
from poise_hpc.algorithms import seeds


def test_threads_may_read_code_at_once():
    """The garbage collector runs often, and its callback hands over to the other threads: within a tree that is being built."""
    texts, before = [seeds.source(name) for name in seeds.SEEDS], gc.get_threshold()
    turn = threading.Event()

    def hand_over(phase, info):
        turn.wait(0.0001)

    gc.callbacks.append(hand_over)
    gc.set_threshold(50)
    try:
        with ThreadPoolExecutor(4) as pool:
            trees = list(pool.map(syntax.parse, texts * 4))
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(hand_over)
    assert len({ast.dump(tree) for tree in trees}) == len(texts)
