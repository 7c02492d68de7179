// A cross-batch memory from C++: anchors against a ring of earlier embeddings, which gets no gradient.
//
//   packaging/install.sh ~/.local
//   cmake -S examples/cpp -B build -DCMAKE_PREFIX_PATH=~/.local && cmake --build build && build/memory_bank
#include <ddtas.h>

#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

/// A failed call, with the library's message.
struct Error : std::runtime_error {
    ddtas_status status;
    Error(ddtas_status status, const std::string &message) : std::runtime_error(message), status(status) {}
};

/// A context that destroys itself.
class Context {
public:
    explicit Context(const char *device) {
        ddtas_context_options options{};
        options.struct_size = sizeof options;
        options.device = device;
        char message[256];
        ddtas_context *made = nullptr;
        if (auto status = ddtas_context_create(&options, &made, message, sizeof message); status != DDTAS_STATUS_OK)
            throw Error(status, message);
        context_.reset(made);
    }

    ddtas_loss_result loss(const ddtas_rows &anchors, const ddtas_rows *references, std::vector<float> &gradient) {
        gradient.resize(anchors.count * anchors.dim);
        ddtas_loss_result result{};
        result.struct_size = sizeof result;
        result.gradient = gradient.data();
        check(ddtas_loss(context_.get(), nullptr, &anchors, references, &result));
        return result;
    }

private:
    struct Destroy {
        void operator()(ddtas_context *context) const { ddtas_context_destroy(context); }
    };
    std::unique_ptr<ddtas_context, Destroy> context_;

    void check(ddtas_status status) const {
        if (status == DDTAS_STATUS_OK)
            return;
        std::string message(ddtas_context_message(context_.get(), nullptr, 0), '\0');
        ddtas_context_message(context_.get(), message.data(), message.size() + 1);
        throw Error(status, message);
    }
};

/// Embeddings with their labels, which a ddtas_rows may point to.
struct Rows {
    std::size_t dim;
    std::vector<float> values;
    std::vector<std::int64_t> labels;

    ddtas_rows view() const {
        ddtas_rows rows{};
        rows.struct_size = sizeof rows;
        rows.embeddings = values.data();
        rows.labels = labels.data();
        rows.count = labels.size();
        rows.dim = dim;
        return rows;
    }
};

/// `each` rows of every class, around a centre of the class, scaled to unit length.
Rows draw(std::mt19937 &random, std::size_t classes, std::size_t each, std::size_t dim) {
    std::uniform_real_distribution<float> uniform(-1, 1);
    Rows rows{dim, {}, {}};
    for (std::size_t row = 0; row < classes * each; row++) {
        std::mt19937 centre(static_cast<unsigned>(row / each));
        std::vector<float> values(dim);
        double square = 0;
        for (float &value : values) {
            value = uniform(centre) + 1.2F * uniform(random);
            square += double(value) * value;
        }
        for (float value : values)
            rows.values.push_back(static_cast<float>(value / std::sqrt(square)));
        rows.labels.push_back(static_cast<std::int64_t>(row / each));
    }
    return rows;
}

} // namespace

int main() try {
    constexpr std::size_t classes = 16, each = 4, dim = 96, batches = 8;
    std::mt19937 random(7);
    Context context("cpu");
    Rows memory{dim, {}, {}};
    std::vector<float> gradient;
    for (std::size_t step = 0; step < batches; step++) {
        Rows batch = draw(random, classes, each, dim);
        // The batch is part of what it is compared with, and no row a pair of itself.
        std::size_t before = memory.labels.size();
        memory.values.insert(memory.values.end(), batch.values.begin(), batch.values.end());
        memory.labels.insert(memory.labels.end(), batch.labels.begin(), batch.labels.end());
        ddtas_rows references = memory.view();
        references.identity = DDTAS_IDENTITY_FROM;
        references.identity_first = static_cast<std::uint32_t>(before);
        auto result = context.loss(batch.view(), &references, gradient);
        std::printf("step %zu: %4zu references, loss %.6f, %3llu active, %5llu negatives mined\n", step,
                    references.count, result.loss, (unsigned long long)result.active,
                    (unsigned long long)result.mined_neg);
        if (result.active == 0)
            return 1;
    }

    // A row that is not of unit length is refused, and the exception says which.
    memory.values[5 * dim] += 3;
    try {
        context.loss(memory.view(), nullptr, gradient);
    } catch (const Error &error) {
        std::printf("refused: %s\n", error.what());
        return error.status == DDTAS_STATUS_NOT_UNIT ? 0 : 1;
    }
    return 1;
} catch (const Error &error) {
    std::fprintf(stderr, "ddtas: %s\n", error.what());
    return 1;
}
