// tile_order.cpp: the order in which the sweep takes tiles, for the host's tests.

#include "pairs/tile_order.cuh"

extern "C" void ddtas_emulated_tile_at(uint32_t tiles, uint32_t band, uint64_t position, uint32_t *row, uint32_t *column) {
    Pairs pairs{};
    pairs.square = 1;
    pairs.band = band;
    pairs.anchors.tiles = pairs.references.tiles = tiles;
    TileIndex tile = tile_at(pairs, position);
    *row = tile.row;
    *column = tile.column;
}
