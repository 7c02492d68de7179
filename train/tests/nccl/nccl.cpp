// NCCL over Unix sockets.
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "stand_in.h"

namespace {
enum Answer { OK = 0, CUDA_ERROR = 1, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE = 6, IN_PROGRESS = 7 };

bool is(const char *variable, const char *value) {
    const char *set = getenv(variable);
    return set && !strcmp(set, value);
}

struct Id {
    char text[128];
};
struct Config {
    size_t size;
    unsigned magic, version;
    int blocking;
};
struct Transfer {
    bool sending;
    int peer;
    char *at;
    size_t left;
};
struct Work {
    Stream *stream; // nullptr: finalize
    std::vector<Transfer> transfers;
};

struct Communicator {
    int rank, size, device, wake[2];
    std::string id, error;
    std::vector<int> sockets;
    std::atomic<int> state{IN_PROGRESS};
    std::atomic<bool> aborted{false};
    std::mutex lock;
    std::condition_variable more;
    std::deque<Work> queue;
    std::thread worker;

    // Waits until a socket is ready; false if the communicator was aborted.
    bool ready(std::vector<pollfd> &sockets, int milliseconds) {
        sockets.push_back({wake[0], POLLIN, 0});
        poll(sockets.data(), sockets.size(), milliseconds);
        return !aborted;
    }
    // Sends or receives all of a short message; false if the communicator was aborted.
    bool whole(int socket, bool sending, int *message, size_t bytes) {
        for (char *at = (char *)message; bytes;) {
            std::vector<pollfd> one{{socket, short(sending ? POLLOUT : POLLIN), 0}};
            if (!ready(one, -1))
                return false;
            ssize_t moved = sending ? send(socket, at, bytes, MSG_NOSIGNAL | MSG_DONTWAIT) : recv(socket, at, bytes, MSG_DONTWAIT);
            if (moved > 0)
                at += moved, bytes -= moved;
            // The peer has ended: wait for an abort, as the real NCCL does.
            else if (moved == 0 || errno != EAGAIN)
                ready(one = {}, -1);
        }
        return true;
    }

    sockaddr_un name(int rank, socklen_t *length) const {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        // A leading zero byte: an abstract address, without a file.
        int text = snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "%s-%d", id.c_str(), rank);
        *length = socklen_t(offsetof(sockaddr_un, sun_path) + 1 + text);
        return address;
    }

    // Connects to every other rank; the higher rank of two connects, the lower accepts.
    int connect_all() {
        socklen_t length;
        sockaddr_un own = name(rank, &length);
        int door = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (bind(door, (sockaddr *)&own, length) || listen(door, size))
            return REMOTE;
        for (int i = 1; i < size; i++) {
            int peer = i <= rank ? i - 1 : -1, made;
            if (peer >= 0) {
                made = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
                sockaddr_un other = name(peer, &length);
                while (connect(made, (sockaddr *)&other, length)) {
                    std::vector<pollfd> none;
                    if (!ready(none, 5))
                        return REMOTE;
                }
            } else {
                std::vector<pollfd> one{{door, POLLIN, 0}};
                if (!ready(one, -1))
                    return REMOTE;
                made = accept4(door, nullptr, nullptr, SOCK_CLOEXEC);
            }
            int mine[2] = {rank, device}, theirs[2];
            if (!whole(made, true, mine, sizeof mine) || !whole(made, false, theirs, sizeof theirs))
                return REMOTE;
            sockets[theirs[0]] = made;
            if (theirs[1] == device) {
                error = "Duplicate GPU detected : rank " + std::to_string(rank) + " and rank " + std::to_string(theirs[0]) +
                        " both on CUDA device " + std::to_string(device) + "\n";
                return INVALID_USAGE;
            }
        }
        close(door);
        return OK;
    }

    // Carries out the transfers; false if the communicator was aborted.
    bool move(std::vector<Transfer> &transfers) {
        for (;;) {
            // The next transfer with each rank in each direction.
            std::map<std::pair<int, bool>, Transfer *> next;
            for (auto &transfer : transfers)
                if (transfer.left)
                    next.insert({{transfer.peer, transfer.sending}, &transfer});
            if (next.empty())
                return true;
            std::vector<pollfd> waiting;
            for (auto &[key, transfer] : next) {
                auto &[peer, sending] = key;
                if (peer == rank) {
                    Transfer *from = next[{rank, true}], *to = next[{rank, false}];
                    memcpy(to->at, from->at, to->left);
                    from->left = to->left = 0;
                    waiting.clear();
                    break;
                }
                int socket = sockets[peer];
                ssize_t moved = sending ? send(socket, transfer->at, transfer->left, MSG_NOSIGNAL | MSG_DONTWAIT)
                                        : recv(socket, transfer->at, transfer->left, MSG_DONTWAIT);
                if (moved > 0)
                    transfer->at += moved, transfer->left -= moved;
                else if (moved < 0 && errno == EAGAIN)
                    waiting.push_back({socket, short(sending ? POLLOUT : POLLIN), 0});
                else if (is("FAKE_DEAD", "error")) {
                    error = "connection closed by rank " + std::to_string(peer);
                    state = REMOTE;
                    return false;
                }
            }
            // A short wait, since the sockets of a peer that has ended are not polled.
            if (!ready(waiting, 2))
                return false;
        }
    }

    void work() {
        std::vector<pollfd> none;
        int joined = connect_all();
        state = joined;
        while (joined == OK) {
            std::unique_lock<std::mutex> asked(lock);
            more.wait(asked, [&] { return aborted || !queue.empty(); });
            if (aborted)
                return;
            Work next = std::move(queue.front());
            queue.pop_front();
            asked.unlock();
            usleep(100);
            if (!next.stream) {
                state = OK;
                return;
            }
            {
                std::lock_guard<std::mutex> held(guard);
                being_issued--, next.stream->issued++;
            }
            state = OK;
            // An abort ends the work in the stream too.
            while (!move(next.transfers) && !aborted)
                ready(none = {}, -1);
            std::lock_guard<std::mutex> held(guard);
            next.stream->done++;
            changed.notify_all();
        }
    }

    void end() {
        worker.join();
        for (int socket : sockets)
            if (socket >= 0)
                close(socket);
    }
};

struct Group {
    int depth = 0;
    Communicator *communicator = nullptr;
    Work work{};
};
thread_local Group group;

int add(Communicator *communicator, void *stream, std::vector<Transfer> transfers) {
    if (communicator->state != OK || !current || current->device != communicator->device)
        return INVALID_ARGUMENT;
    for (auto &transfer : transfers)
        if (!on_gpu(transfer.at, transfer.left))
            return INVALID_ARGUMENT;
    group.communicator = communicator, group.work.stream = (Stream *)stream;
    group.work.transfers.insert(group.work.transfers.end(), transfers.begin(), transfers.end());
    return OK;
}
int issue(Communicator *communicator, Work work) {
    communicator->state = IN_PROGRESS;
    if (work.stream) {
        std::lock_guard<std::mutex> held(guard);
        being_issued++;
    }
    std::lock_guard<std::mutex> held(communicator->lock);
    communicator->queue.push_back(std::move(work));
    communicator->more.notify_all();
    return IN_PROGRESS;
}
} // namespace

extern "C" {
int ncclGetVersion(int *version) {
    const char *set = getenv("FAKE_VERSION");
    return *version = set ? atoi(set) : 23004, OK;
}
int ncclGetUniqueId(Id *id) {
    timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    memset(id, 0, sizeof *id);
    snprintf(id->text, sizeof id->text, "ddtas-stand-in-%d-%ld-%ld", getpid(), (long)now.tv_sec, now.tv_nsec);
    return OK;
}
const char *ncclGetErrorString(int answer) { return answer == REMOTE ? "remote process exited or there was a network error" : "refused by the stand-in"; }
const char *ncclGetLastError(Communicator *communicator) { return communicator ? communicator->error.c_str() : ""; }
int ncclCommGetAsyncError(Communicator *communicator, int *state) { return *state = communicator->state, OK; }
int ncclCommInitRankConfig(Communicator **made, int size, Id id, int rank, Config *config) {
    if (config->magic != 0xcafebeef || config->version < 21400 || config->size < 20 || config->blocking != 0)
        return INVALID_ARGUMENT;
    if (!current)
        return CUDA_ERROR;
    auto *communicator = *made = new Communicator;
    communicator->rank = rank, communicator->size = size, communicator->device = current->device, communicator->id = id.text;
    communicator->sockets.assign(size, -1);
    if (pipe2(communicator->wake, O_CLOEXEC))
        return CUDA_ERROR;
    communicator->worker = std::thread([=] { communicator->work(); });
    return IN_PROGRESS;
}
int ncclGroupStart() { return group.depth++, OK; }
int ncclGroupEnd() {
    if (--group.depth || !group.communicator)
        return OK;
    Group whole = std::move(group);
    group = {};
    return issue(whole.communicator, std::move(whole.work));
}
int ncclSend(const void *from, size_t count, int, int peer, Communicator *communicator, void *stream) {
    return group.depth ? add(communicator, stream, {{true, peer, (char *)from, count}}) : INVALID_USAGE;
}
int ncclRecv(void *to, size_t count, int, int peer, Communicator *communicator, void *stream) {
    return group.depth ? add(communicator, stream, {{false, peer, (char *)to, count}}) : INVALID_USAGE;
}
int ncclAllGather(const void *from, void *to, size_t count, int, Communicator *communicator, void *stream) {
    std::vector<Transfer> transfers;
    for (int peer = 0; peer < communicator->size; peer++) {
        transfers.push_back({true, peer, (char *)from, count});
        transfers.push_back({false, peer, (char *)to + peer * count, count});
    }
    ncclGroupStart();
    int added = add(communicator, stream, transfers), ended = ncclGroupEnd();
    return added ? added : ended;
}
int ncclBroadcast(const void *from, void *to, size_t count, int, int root, Communicator *communicator, void *stream) {
    std::vector<Transfer> transfers{{false, root, (char *)to, count}};
    for (int peer = 0; peer < communicator->size && communicator->rank == root; peer++)
        transfers.push_back({true, peer, (char *)from, count});
    ncclGroupStart();
    int added = add(communicator, stream, transfers), ended = ncclGroupEnd();
    return added ? added : ended;
}
int ncclCommFinalize(Communicator *communicator) {
    return communicator->state == OK ? issue(communicator, {}) : INVALID_ARGUMENT;
}
int ncclCommDestroy(Communicator *communicator) { return communicator->end(), OK; }
int ncclCommAbort(Communicator *communicator) {
    while (is("FAKE_ABORT", "hang"))
        pause();
    if (!communicator)
        return OK;
    {
        std::lock_guard<std::mutex> held(communicator->lock);
        communicator->aborted = true;
        communicator->more.notify_all();
    }
    if (write(communicator->wake[1], "", 1) != 1)
        return CUDA_ERROR;
    return communicator->end(), OK;
}
}
