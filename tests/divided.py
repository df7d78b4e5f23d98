"""Runs the same work as several processes that divide batches, in threads."""

import threading

from anchor_jax.evaluation.protocol import Division


def run(work, count):
    """Returns what `work(division)` returns for each of `count` processes."""
    values, results = [None] * count, [None] * count
    everyone = threading.Barrier(count, timeout=60)

    def one(index):
        def gather(value):
            values[index] = value
            everyone.wait()
            found = list(values)
            everyone.wait()
            return found

        results[index] = work(Division(index, count, gather))

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
