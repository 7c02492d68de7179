// retrieval.cu: the k most similar references of each query, without the Q x N matrix (SPEC 6).
// Truth: a full sort (cases/src/run.rs). Launcher: src/backend/device/retrieval.rs.
//
// retrieval: a block compares a query tile with its share of the references' tiles. Its warps, 4 x 2, have 32 rows and 64 columns
// of each tile, and a list for each row (query_lists.cuh).
// retrieval_merge: a block joins all lists of a query, shortens the result like a list, and sorts what is left.

#include "retrieval/query_lists.cuh"

template <class Precision>
DEVICE void retrieval_body(const RetrievalParams &p) {
    SHARED_MEMORY(stages);
    uint64_t row_bytes = static_cast<uint64_t>(p.stride) * Precision::stored_bytes;
    const unsigned char *queries = searched_rows(p.queries, p.first_tile + block_x(), row_bytes);
    SearchedTiles tiles(p);
    QueryLists<MmaLayout<2, 8>> lists(p, warp_index() % 2);
    for (uint32_t tile = tiles.first; tile < tiles.end; ++tile) {
        Accumulators<2, 8> acc;
        multiply_tile<Precision, 2, kSharingStages<Precision>, 1>(acc, queries, searched_rows(p.references, tile, row_bytes),
                                                                  row_bytes, stages);
        lists.add_tile(acc, tile);
    }
    lists.finish();
}
KERNEL_OF_16BIT_BLOCKS(retrieval, RetrievalParams, 2)

// Sorts `count` keys in ascending order, padded to a power of two; called by the whole block.
DEVICE void sort_keys(uint64_t *keys, uint32_t count) {
    uint32_t size = 1;
    while (size < count) size *= 2;
    for (uint32_t i = count + thread_index(); i < size; i += THREADS) keys[i] = kNothing;
    block_sync();
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
            block_sync();  // the pairs are in order
        }
    }
}

struct MergeShared {
    uint64_t bound;  // keys above it are not among the k best
    uint32_t taken;
};
static_assert(sizeof(MergeShared) == RETRIEVAL_MERGE_EXTRA_BYTES, "the launch plan's shared memory");

KERNEL(retrieval_merge, RetrievalParams, 4) {
    SHARED_MEMORY(bytes);
    auto &shared = *reinterpret_cast<MergeShared *>(bytes);
    uint64_t *lists = p.keys + static_cast<uint64_t>(block_x()) * p.lists * p.capacity;
    const uint32_t *counts = p.counts + static_cast<uint64_t>(block_x()) * p.lists;
    // If they do not fit into shared memory, all keys are added to the first list.
    bool in_shared = p.capacity <= RETRIEVAL_MERGED;
    uint64_t *keys = in_shared ? reinterpret_cast<uint64_t *>(bytes + RETRIEVAL_MERGE_EXTRA_BYTES) : lists;
    if (thread_index() == 0) shared = MergeShared{kNothing - 1, in_shared ? 0 : counts[0]};
    // A list has at most `kept` keys.
    auto load = [&](uint32_t place) {
        uint32_t list = place / p.kept, i = place % p.kept;
        return list < p.lists && i < counts[list] ? lists[static_cast<uint64_t>(list) * p.capacity + i] : kNothing;
    };
    uint32_t first = in_shared ? 0 : p.kept, end = p.lists * p.kept;
    uint64_t key = load(first + thread_index());
    for (; first < end; first += THREADS) {
        block_sync();  // the keys and their number are written
        if (warp_index() == 0 && shared.taken + THREADS > p.capacity) {
            uint32_t count = shared.taken;
            uint64_t bound = threshold_of(keys, count, p.k, p.kept);
            count = keep_within(keys, count, bound);
            if (lane_index() == 0) shared = MergeShared{bound, count};
        }
        block_sync();  // there is room for more keys
        uint64_t next = load(first + THREADS + thread_index());
        if (key <= shared.bound) keys[atomic_fetch_increment(&shared.taken)] = key;
        key = next;
    }
    block_sync();  // all keys are written
    uint32_t count = shared.taken;
    sort_keys(keys, count);
    uint64_t to = (static_cast<uint64_t>(p.first_tile) * TILE + block_x()) * p.k;
    for (uint32_t i = thread_index(); i < p.k; i += THREADS) {
        p.indices[to + i] = i < count ? static_cast<uint32_t>(keys[i]) : NO_ROW;
        p.similarities[to + i] = i < count ? key_similarity(keys[i]) : -INFINITE;
    }
}
