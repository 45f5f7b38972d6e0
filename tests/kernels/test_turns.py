"""Loops that threads share, and their meetings (kernels/turns.h): every piece once, nothing before what it needs, and nobody
waits for a thread that is held up."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from waypost.kernels import compiling

pytestmark = pytest.mark.skipif(compiling.compiler() is None, reason="this machine has no C++ compiler")

SOURCE = """
#include <sched.h>

#include <chrono>

#include "{turns}"

using namespace waypost;

// `loops` loops of counts[l] pieces. did (loops, most): how often each was done; who: by whom; wrong: bounds that cannot be.
extern "C" int turns(int threads, const long *counts, int loops, long most, int *did, int *who) {{
  Turns turns(threads);
  std::atomic<int> wrong{{0}};
#pragma omp parallel num_threads(threads)
  {{
    Turn turn(turns);
    for (int l = 0; l < loops; ++l) {{
      turn.each(counts[l], [&](long i, long stop) {{
        if (i < 0 || i >= counts[l] || stop <= i || stop > counts[l]) ++wrong;
#pragma omp atomic
        ++did[l * most + i];
        who[l * most + i] = omp_get_thread_num();
      }});
      turn.meet();
    }}
  }}
  return wrong;
}}

// Loops of every kind, each of which reads what other threads have just written: numbers (2, count) go from one row to the
// other and grow by one on the way. Returns how many were taken out of order.
extern "C" long meetings(int threads, long count, int loops, long *numbers) {{
  Turns turns(threads);
  std::atomic<long> wrong{{0}};
#pragma omp parallel num_threads(threads)
  {{
    Turn turn(turns);
    for (int l = 0; l < loops; ++l) {{
      const long *from = numbers + l % 2 * count;
      long *to = numbers + (l + 1) % 2 * count, last = -1;
      const auto move = [&](long i) {{ to[i] = from[count - 1 - i] + 1; }};
      const int kind = (l * 2654435761u >> 16) % 3;  // each behind each, after an even and an odd number of loops
      if (kind == 0) turn.divide(count, move);
      if (kind == 1) turn.in_order(count, [&](long i) {{ wrong += i <= last, last = i, move(i); }});
      if (kind == 2) turn.each(count, [&](long i, long) {{ move(i); }});
      turn.meet();
    }}
  }}
  return wrong;
}}

// The first piece of thread `held` lasts until nothing is left that another could do. Returns how many pieces it did itself; -1
// where the others never came to that, -2 where there are fewer threads than asked for.
extern "C" long held(int threads, int held, long count) {{
  Turns turns(threads);
  std::atomic<long> done{{0}}, own{{0}}, wrong{{0}};
  const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(1);
#pragma omp parallel num_threads(threads)
  {{
    if (omp_get_num_threads() < threads) wrong = -2;
    Turn turn(turns);
    turn.each(count, [&](long, long) {{
      const bool first = omp_get_thread_num() == held && own++ == 0;
      const long before = count * held / threads, pieces = count * (held + 1) / threads - before;
      while (first && !wrong && done < count - (pieces + 1) / 2) {{
        if (std::chrono::steady_clock::now() > end) wrong = -1;
        sched_yield();
      }}
      ++done;
    }});
  }}
  return wrong ? (long)wrong : (long)own;
}}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    import torch  # its OpenMP runtime is the one that kernels use

    del torch
    folder = tmp_path_factory.mktemp("turns")
    source = folder / "turns.cpp"
    source.write_text(SOURCE.format(turns=Path(compiling.__file__).parent / "turns.h"))
    cxx = compiling.compiler()
    assert cxx is not None
    compiling.compile_library(cxx, folder / "turns.so", [([source], "float")])
    library = ctypes.CDLL(str(folder / "turns.so"))
    library.held.restype = library.meetings.restype = ctypes.c_long
    library.meetings.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_void_p]
    library.held.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long]
    return library


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_piece_is_done_once_in_every_loop(library: ctypes.CDLL, threads: int) -> None:
    counts = [*range(20), 1000, 0, 1, 1000, 17, threads, threads - 1] * 20
    most = max(counts)
    did, who = ((ctypes.c_int * (len(counts) * most))(*[start] * (len(counts) * most)) for start in (0, -1))
    wrong = library.turns(threads, (ctypes.c_long * len(counts))(*counts), len(counts), ctypes.c_long(most), did, who)
    assert wrong == 0
    for loop, count in enumerate(counts):
        here = slice(loop * most, loop * most + count)
        assert did[here] == [1] * count
        assert all(0 <= thread < threads for thread in who[here])
        assert not any(did[loop * most + count : (loop + 1) * most])


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("count", [1, 2, 5, 1000])
def test_after_a_meeting_everyone_has_what_the_others_did(library: ctypes.CDLL, threads: int, count: int) -> None:
    loops = 600
    numbers = (ctypes.c_long * (2 * count))(*range(count))
    assert library.meetings(threads, count, loops, numbers) == 0
    assert numbers[:count] == [i + loops for i in range(count)], "turned round an even number of times"


@pytest.mark.parametrize(("threads", "held", "count"), [(2, 0, 12), (2, 1, 64), (3, 1, 20), (4, 0, 11), (4, 3, 1000)])
def test_what_a_held_up_thread_has_not_taken_is_done_by_the_others(
    library: ctypes.CDLL, threads: int, held: int, count: int
) -> None:
    pieces = count * (held + 1) // threads - count * held // threads
    own = library.held(threads, held, count)
    if own == -2:
        pytest.skip("this machine gives fewer threads")
    assert 0 <= own <= (pieces + 1) // 2, "of its own it keeps what it took at once"
