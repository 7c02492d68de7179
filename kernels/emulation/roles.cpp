// roles.cpp: warp specialisation: named barriers, setmaxnreg, and the rule that aligned instructions need
// converged warps.

#include "state.h"

namespace emulation {

void lanes_apart() { machine->self().apart = true; }
void lanes_together() { machine->self().apart = false; }

// After waits, arrivals, copies and branches of some_lanes() the lanes of a warp may have diverged on a GPU. Here every lane is a
// fiber, and an aligned instruction would work without this check, while on a GPU it would trap now and then.
void aligned(const char *what) {
    if (machine->self().apart) die("lanes are apart, no warp_sync() before ", what);
}

void named_sync(uint32_t barrier, uint32_t threads) {
    aligned("named_sync");
    if (barrier == 0 || barrier >= kNamedBarriers) die("no named barrier, or that of the whole block: ", std::to_string(barrier));
    if (threads == 0 || threads % 32) die("a named barrier of parts of warps", "");
    // By whole warps: this finds a lane that took another branch.
    collective("named_sync", nullptr, meet);
    NamedBarrier &one = machine->named[barrier];
    if (one.arrived != 0 && one.threads != threads) die("a named barrier of different sizes: ", std::to_string(barrier));
    one.threads = threads;
    void *token = one.meeting.token(machine->crew);
    release(token);
    Thread &self = machine->self();
    if (++one.arrived < threads) {
        self.state = State::at_named_barrier;
        self.named_barrier = barrier;
        yield();
        acquire(token);
    } else {
        one.arrived = 0;
        ++one.meeting.turn;
        for (Thread &thread : machine->threads()) {
            if (thread.state == State::at_named_barrier && thread.named_barrier == barrier) thread.state = State::ready;
        }
        acquire(token);
        preempt();
    }
}

// The registers of a thread at launch: a multiprocessor has 65,536, in units of eight; at most what ptxas can give.
namespace {
uint32_t launch_registers() {
    uint32_t even = 65536 / machine->thread_count / 8 * 8;
    return even < 255 ? even : 255;
}
}  // namespace

void begin_roles() {
    for (Warp &warp : machine->warps) {
        warp.registers = launch_registers();
        warp.late = machine->random.below(4) == 0;
    }
    for (NamedBarrier &barrier : machine->named) barrier.arrived = 0;
    for (Thread &thread : machine->threads()) thread.apart = false;
}

void setmaxnreg(uint32_t registers, bool more) {
    aligned("setmaxnreg");
    collective("setmaxnreg", nullptr, meet);
    if (registers < 24 || registers > 256 || registers % 8) die("setmaxnreg wants a multiple of 8 from 24 to 256", "");
    if (machine->current % 32 != 0) return;  // once a warp
    uint32_t now = machine->warp().registers;
    if (more ? registers < now : registers > now) die("setmaxnreg the other way: from ", std::to_string(now));
    machine->warp().registers = registers;
}

// On a GPU setmaxnreg waits until enough registers are free: for ever, if the block does not have them.
void end_roles() {
    uint32_t total = 0;
    for (uint32_t warp = 0; warp < machine->warp_count; ++warp) {
        uint32_t registers = machine->warps[warp].registers;
        total += registers;
        if (registers != machine->warps[warp / 4 * 4].registers) die("setmaxnreg by a part of a warpgroup", "");
    }
    if (total > launch_registers() * machine->warp_count) die("setmaxnreg: more registers than the block has", "");
}

}  // namespace emulation
