// retrieval.cu: the k most similar references of each query, without the Q x N matrix (SPEC 6).
// Truth: a full sort (cases/src/table). Launcher: src/backend/device/retrieval.rs.
//
// One block a query tile walks all reference tiles. Each query has a buffer of `capacity`
// keys in global memory (it stays in L2): what beats the k-th best so far is appended;
// before a tile that might overflow it, the buffer is sorted and cut to k. After the first
// few tiles almost nothing passes, so sorts are few: about k ln(N / k) keys are ever kept.
// A key orders by similarity, descending, then by index, ascending. Keys are unique: the
// order in which lanes append cannot change the result.

#include "tile.cuh"

struct RetrievalShared {
    unsigned char stages[SIMILARITY_STAGES_BYTES];
    uint32_t counts[TILE];
    uint32_t bounds[TILE];  // ordered key of the k-th best similarity, 0 before there are k
};
static_assert(sizeof(RetrievalShared) == RETRIEVAL_SHARED_BYTES, "the launch plan's shared memory");
static_assert(RETRIEVAL_SLACK >= TILE, "a tile appends at most TILE keys to a row");

constexpr uint64_t kNothing = ~static_cast<uint64_t>(0);

// Ascending keys are descending similarities.
DEVICE uint64_t retrieval_key(uint32_t ordered, uint32_t index) {
    return static_cast<uint64_t>(~ordered) << 32 | index;
}

// Sorts `keys` (a power of two of them) ascending. The whole block takes part.
DEVICE void sort_keys(uint64_t *keys, uint32_t size) {
    for (uint32_t width = 2; width <= size; width *= 2) {
        for (uint32_t distance = width / 2; distance > 0; distance /= 2) {
            for (uint32_t pair = thread_index(); pair < size / 2; pair += THREADS) {
                uint32_t low = pair / distance * 2 * distance + pair % distance, high = low + distance;
                bool ascending = (low & width) == 0;
                uint64_t first = keys[low], second = keys[high];
                if ((first > second) == ascending) {
                    keys[low] = second;
                    keys[high] = first;
                }
            }
            block_sync();
        }
    }
}

// Cuts the buffer of one row to its k best, sorted. Uniform over the block.
DEVICE void compact_row(const RetrievalParams &p, RetrievalShared &shared, uint64_t *buffer, uint32_t row) {
    uint32_t count = shared.counts[row];
    // Sorted where it fits over the stages, else where it lies.
    bool fits = p.capacity * sizeof(uint64_t) <= SIMILARITY_STAGES_BYTES;
    uint64_t *keys = fits ? reinterpret_cast<uint64_t *>(shared.stages) : buffer;
    for (uint32_t i = thread_index(); i < p.capacity; i += THREADS) keys[i] = i < count ? buffer[i] : kNothing;
    block_sync();
    sort_keys(keys, p.capacity);
    uint32_t kept = count < p.k ? count : p.k;
    if (fits) {
        for (uint32_t i = thread_index(); i < kept; i += THREADS) buffer[i] = keys[i];
    }
    if (thread_index() == 0) {
        shared.counts[row] = kept;
        if (kept == p.k) shared.bounds[row] = ~static_cast<uint32_t>(keys[kept - 1] >> 32);
    }
    block_sync();
}

template <class Numbers>
DEVICE void retrieval_body(const RetrievalParams &p) {
    SHARED_MEMORY(bytes);
    auto &shared = *reinterpret_cast<RetrievalShared *>(bytes);
    uint32_t first_query = (p.first_tile + block_x()) * TILE;
    uint64_t *buffers = p.buffer + static_cast<uint64_t>(block_x()) * TILE * p.capacity;
    if (thread_index() < TILE) {
        shared.counts[thread_index()] = 0;
        shared.bounds[thread_index()] = 0;
    }
    block_sync();

    Place<4> place;
    uint64_t row_bytes = static_cast<uint64_t>(p.stride) * Numbers::stored_bytes;
    auto queries = static_cast<const unsigned char *>(p.queries) + first_query * row_bytes;
    auto references = static_cast<const unsigned char *>(p.references);
    for (uint32_t tile = 0; tile * TILE < p.reference_count; ++tile) {
        Accumulators<4> acc;
        multiply_tile<Numbers, 4>(acc, queries, references + static_cast<uint64_t>(tile) * TILE * row_bytes, row_bytes,
                                  shared.stages);
#pragma unroll
        for (int row = 0; row < 8; ++row) {
            uint32_t r = place.row(row / 2, row % 2);
            uint32_t bound = shared.bounds[r];
#pragma unroll
            for (int column = 0; column < 8; ++column) {
                uint32_t j = tile * TILE + place.column(column / 2, column % 2);
                if (j >= p.reference_count || first_query + r >= p.query_count) continue;
                if (p.leave_self_out && j == first_query + r) continue;
                float s = acc[row / 2][column / 2][row % 2 * 2 + column % 2];
                uint32_t key = ordered_key(s + 0.0f);  // -0 and 0 are one similarity
                // Indices ascend over tiles: an equal similarity comes after those that are kept.
                if (key <= bound) continue;
                uint32_t at = atomic_next(&shared.counts[r]);
                buffers[static_cast<uint64_t>(r) * p.capacity + at] = retrieval_key(key, j);
            }
        }
        block_sync();  // all keys of this tile are appended
        for (uint32_t row = 0; row < TILE; ++row) {
            if (shared.counts[row] + TILE > p.capacity) {
                compact_row(p, shared, buffers + static_cast<uint64_t>(row) * p.capacity, row);
            }
        }
    }

    for (uint32_t row = 0; row < TILE; ++row) {
        uint32_t query = first_query + row;
        if (query >= p.query_count) break;
        uint64_t *buffer = buffers + static_cast<uint64_t>(row) * p.capacity;
        compact_row(p, shared, buffer, row);
        uint32_t kept = shared.counts[row];
        for (uint32_t i = thread_index(); i < p.k; i += THREADS) {
            uint64_t at = static_cast<uint64_t>(query) * p.k + i;
            p.indices[at] = i < kept ? static_cast<uint32_t>(buffer[i]) : NO_ROW;
            p.similarities[at] = i < kept ? key_value(~static_cast<uint32_t>(buffer[i] >> 32)) : -INFINITE;
        }
        block_sync();  // the row is written before its buffer's keys are sorted again
    }
}
KERNEL_IN_EVERY_PRECISION(retrieval, RetrievalParams, 1)
