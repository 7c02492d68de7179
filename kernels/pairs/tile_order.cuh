// tile_order.cuh: the tiles of S by index, and in the order of the sweep. The square form has only the upper triangle.
#ifndef DDTAS_TILE_ORDER_CUH
#define DDTAS_TILE_ORDER_CUH

#include "ptx/device.cuh"

// A tile of S by its tile row and column. Indices go row by row, through the upper triangle or through all tiles.
struct TileIndex {
    uint32_t row;
    uint32_t column;
};
// The row that entry `entry` of a tile stands for, on its side: entries are the tile's rows, then its columns.
DEVICE uint32_t entry_index(TileIndex tile, uint32_t entry) {
    return entry < TILE ? tile.row * TILE + entry : tile.column * TILE + entry - TILE;
}
DEVICE uint64_t triangle_before(uint64_t row, uint64_t tiles) { return row * (2 * tiles - row + 1) / 2; }
DEVICE TileIndex triangle_at(uint64_t index, uint64_t tiles) {
    // The root of the quadratic may be off by rounding; one step corrects it.
    double side = 2.0 * static_cast<double>(tiles) + 1.0;
    auto row = static_cast<uint64_t>((side - sqrt(side * side - 8.0 * static_cast<double>(index))) / 2.0);
    while (row > 0 && triangle_before(row, tiles) > index) --row;
    while (triangle_before(row + 1, tiles) <= index) ++row;
    return TileIndex{static_cast<uint32_t>(row), static_cast<uint32_t>(index - triangle_before(row, tiles) + row)};
}
DEVICE TileIndex tile_of(const Pairs &pairs, uint64_t index) {
    uint64_t tiles = pairs.references.tiles;
    if (pairs.square) return triangle_at(index, tiles);
    return TileIndex{static_cast<uint32_t>(index / tiles), static_cast<uint32_t>(index % tiles)};
}

// The tile at a position in the order of the sweep: bands of columns whose rows stay in L2, each row by row. The rows of a
// triangle come in pairs, the longest with the shortest and so on, so that row starts and tiles with positives are spread evenly
// over the blocks, of which each has a run.
DEVICE TileIndex tile_at(const Pairs &pairs, uint64_t position) {
    uint64_t tiles = pairs.references.tiles, first = 0;
    auto before = [&](uint64_t column) { return pairs.square ? column * (column + 1) / 2 : column * pairs.anchors.tiles; };
    while (first + pairs.band < tiles && before(first + pairs.band) <= position) first += pairs.band;
    uint64_t width = tiles - first < pairs.band ? tiles - first : pairs.band, left = position - before(first);
    if (!pairs.square || left < first * width) {
        return TileIndex{static_cast<uint32_t>(left / width), static_cast<uint32_t>(first + left % width)};
    }
    // A band's triangle has less than 2^32 tiles, since the band's rows fit in L2.
    auto side = static_cast<uint32_t>(width), in_triangle = static_cast<uint32_t>(left - first * width);
    uint32_t pair = in_triangle / (side + 1), at = in_triangle % (side + 1), longer = side - pair;
    uint32_t row = static_cast<uint32_t>(first) + (at < longer ? pair : longer - 1);
    return TileIndex{row, row + (at < longer ? at : at - longer)};
}
// The tile after `tile` in the order of the sweep.
DEVICE TileIndex next_tile(const Pairs &pairs, TileIndex tile) {
    uint32_t end = ++tile.column;
    if (end != pairs.references.tiles && (end & (pairs.band - 1)) != 0) return tile;  // the band is a power of two
    uint32_t first = (end - 1) & ~(pairs.band - 1), row = tile.row + 1;
    bool over = row == pairs.anchors.tiles;
    if (pairs.square && tile.row >= first) {
        uint32_t partner = first + end - 1 - tile.row;
        row = tile.row < partner ? partner : partner + 1;
        over = tile.row >= partner && 2 * row > first + end - 1;
    }
    return over ? TileIndex{0, end} : TileIndex{row, pairs.square && row > first ? row : first};
}

DEVICE uint64_t index_of(const Pairs &pairs, uint32_t row, uint32_t column) {
    uint64_t tiles = pairs.references.tiles;
    if (!pairs.square) return row * tiles + column;
    return triangle_before(row, tiles) + column - row;
}

// The tile of S that holds the pairs of row tile x of one side with tile y of the other.
struct PairTile {
    uint64_t index;
    bool transposed;  // x is the tile's column
    bool diagonal;    // x is its row and column: it has each pair once, for two rows of x
};
// Row i of one side and row j of the other as anchor and reference. In the square form the earlier row is the anchor.
struct PairRows {
    uint32_t anchor, reference;
};
DEVICE PairRows pair_rows(PairTile tile, uint32_t i, uint32_t j) {
    bool swapped = tile.diagonal ? i > j : tile.transposed;
    return PairRows{swapped ? j : i, swapped ? i : j};
}
DEVICE PairTile pair_tile(const Pairs &pairs, bool of_references, uint32_t x, uint32_t y) {
    bool transposed = pairs.square ? x > y : of_references;
    return PairTile{index_of(pairs, transposed ? y : x, transposed ? x : y), transposed, pairs.square && x == y};
}

#endif
