// How many threads a program runs with: all that it was given, or fewer while other programs keep the cores.
//
// The members of a team wait for each other after every kernel, awake, since that takes a microsecond. Where another program has taken
// one of their cores, all wait for the member that lost it, for milliseconds and several times in a step: with one busy program beside
// it on two cores, a team of two decodes six times slower than alone, and three times slower than one thread does.
#ifndef FINBACK_COMPANY_H
#define FINBACK_COMPANY_H

#include <stdint.h>
#include <time.h>

#define WINDOW 0.05  // of a team's running, after which it is judged
#define GOOD 0.05  // absence up to which there is no company
#define FIRST_PAUSE 0.5
#define LONGEST_PAUSE 8.0

// Of one calling thread. Times are seconds of a clock that only goes forward.
typedef struct {
  double ran, absent;  // since the team was last judged
  double until, pause;  // when all threads are tried again, and how long that was put off; 0 where all went well
  int64_t fewer;  // threads than given, until then
} company;

// Threads of a program that begins now and was given `threads`.
INLINE int64_t members(company *state, int64_t threads, double now) {
  if (now >= state->until) state->fewer = 0;
  return most(1, threads - state->fewer);
}

// A team of `threads` has run until now, for `ran` seconds, in `absent` of which some member had no core and was waited for. If that is
// more than one part in `threads`, a team of one fewer is faster.
INLINE void judge(company *state, int64_t threads, double ran, double absent, double now) {
  state->ran += ran;
  state->absent += absent;
  if (state->ran < WINDOW) return;
  if (state->absent * threads > state->ran) {
    state->pause = state->pause == 0 ? FIRST_PAUSE : 2 * state->pause < LONGEST_PAUSE ? 2 * state->pause : LONGEST_PAUSE;
    state->until = now + state->pause;
    state->fewer++;
  } else if (state->fewer == 0 && state->absent < GOOD * state->ran) {
    state->pause = 0;
  }
  state->ran = state->absent = 0;
}

INLINE double seconds(clockid_t clock) {
  struct timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

#endif
