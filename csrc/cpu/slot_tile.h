// What the forward and the backward of slot attention share: how the work is divided, and A for a block of inputs.
//
// A block is BLOCK inputs, of those that are not masked. Its tiles are (slots, BLOCK): neighbouring inputs are
// neighbouring lanes, of which those past the block's end are computed on zeros and never used.
#pragma once

#include "slot_attention.h"
#include "slot_product.h"
#include "workspace.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

constexpr int64_t BLOCK = 32;  // more would push the keys, as they are and turned, out of the caches

template <class R>
int64_t padded(int64_t n) {
  return ceil_div(n, LANES<R>) * LANES<R>;
}

template <class F>
void by_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32: return f.template operator()<float>();
    case Dtype::float64: return f.template operator()<double>();
    case Dtype::bfloat16: return f.template operator()<BFloat16>();
    case Dtype::float16: return f.template operator()<Float16>();
  }
}

inline int64_t size_of(Dtype dtype) {
  int64_t size = 0;
  by_dtype(dtype, [&]<class S>() { size = sizeof(S); });
  return size;
}

// n elements of any dtype to and from R.
template <class R>
void read(R* to, const Rows& from, int64_t offset, int64_t n) {
  by_dtype(from.dtype, [&]<class S>() {
    const S* const source = static_cast<const S*>(from.data) + offset;
    if constexpr (sizeof(S) > 2) {
      for (int64_t i = 0; i < n; ++i) to[i] = R(source[i]);
    } else if constexpr (sizeof(R) == 4) {
      widen(to, source, n);
    }
  });
}
template <class R>
void write(const Rows& to, int64_t offset, const R* from, int64_t n) {
  by_dtype(to.dtype, [&]<class S>() {
    S* const target = static_cast<S*>(to.data) + offset;
    if constexpr (sizeof(S) > 2) {
      for (int64_t i = 0; i < n; ++i) target[i] = S(from[i]);
    } else if constexpr (sizeof(R) == 4) {
      narrow(target, from, n);
    }
  });
}

// exp(x) for x <= 0 as exp_ has it, but 0 far below. On vectors: of a loop with all this compilers make branches.
inline Vec<float> exp_below(Vec<float> x) {
  const auto far = x < -87.0f;
  x = far ? Vec<float>{} - 87.0f : x;
  Vec<float> r;
  const Vec<float> shifted = split_by_ln2(x, r);
  Vec<float> p = exp_series(r);
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return far ? Vec<float>{} : p * Numbers<Vec<float>>::power_of_2(shifted);
}
inline Vec<double> exp_below(Vec<double> x) {
  for (int lane = 0; lane < LANES<double>; ++lane) x[lane] = exp_(x[lane]);
  return x;
}

// A = softmax over rows of tile + bias, in place: `rows` of each of `groups`, which are `step` apart, and their biases
// `bias_step`.
template <class R>
void softmax(R* tile, const R* bias, int64_t groups, int64_t rows, int64_t step, int64_t bias_step) {
  for (int64_t n = 0; n < BLOCK; n += LANES<R>) {
    const auto each = [&](auto f) {
      for (int64_t i = 0; i < groups; ++i) {
        for (int64_t r = 0; r < rows; ++r) f(tile + i * step + r * BLOCK + n, bias[i * bias_step + r]);
      }
    };
    Vec<R> most = load_vector(tile + n) + bias[0];
    each([&](R* at, R b) {
      const Vec<R> s = load_vector(at) + b;
      most = s > most ? s : most;  // a NaN that is dropped here comes back in the sum
    });
    Vec<R> sum = {};
    each([&](R* at, R b) {
      const Vec<R> e = exp_below(load_vector(at) + b - most);
      store_vector(at, e);
      sum += e;
    });
    const Vec<R> share = R(1) / sum;
    each([&](R* at, R) { store_vector(at, load_vector(at) * share); });
  }
}

// tile[r][n] += eps and sums[r][lane] += tile[r][n]; what lies past the block's end is zeroed.
template <class R>
void add_rows(R* tile, int64_t rows, int64_t count, R eps, R* sums) {
  for (int64_t r = 0; r < rows; ++r, tile += BLOCK, sums += LANES<R>) {
    Vec<R> sum = load_vector(sums);
    for (int64_t n = 0; n < BLOCK; n += LANES<R>) {
      store_vector(tile + n, load_vector(tile + n) + eps);
      for (int64_t past = count > n ? count : n; past < n + LANES<R>; ++past) tile[past] = 0;
      sum += load_vector(tile + n);
    }
    store_vector(sums, sum);
  }
}

template <class R>
R sum_lanes(const R* lanes) {
  R sum = 0;
  for (int64_t lane = 0; lane < LANES<R>; ++lane) sum += lanes[lane];
  return sum;
}

// What a slot has, counted through calls, batch and heads.
template <class R>
const R* at(const Slots& t, int64_t slot) {
  return static_cast<const R*>(t.data) + slot * t.step;
}

// The inputs of a block, in order: `count` neighbours from number `first` on, or, where some are masked, those of `at`.
struct Inputs {
  int64_t count = 0, first = 0;
  const int64_t* at = nullptr;

  int64_t operator[](int64_t i) const { return at ? at[i] : first + i; }

  // Calls f(i, n) for every n of them that are neighbours, from number i on.
  template <class F>
  void each_run(F f) const {
    if (!at) return f(int64_t{0}, count);
    for (int64_t i = 0, end; i < count; i = end) {
      for (end = i + 1; end < count && at[end] == at[end - 1] + 1;) ++end;
      f(i, end - i);
    }
  }
};

// A block's rows in R, `step` apart, padded with zeros to whole vectors.
template <class R>
struct Block {
  const R* data;
  int64_t step;
};

// A sample is what one softmax goes over: a head, or all heads of a row of the batch where they are joint. A part of
// its inputs is one task; parts follow from the sizes alone, and so the order of every sum does.
template <class R>
struct Plan {
  explicit Plan(const SlotAttention& p)
      : p(p), group(p.joint ? p.heads : 1), samples(p.B * p.heads / (group > 0 ? group : 1)), rows(group * p.K),
        parts(samples > 0 ? least(ceil_div(64, samples), ceil_div(p.N, 512)) : 0), D(padded<R>(p.D)),
        Dv(p.v.data ? padded<R>(p.Dv) : D), threads(work() < 65536 ? 1 : p.threads) {}

  double work() const { return double(p.B) * double(p.heads) * double(p.K) * double(p.N) * double(p.D + p.Dv); }

  int64_t wider() const { return D > Dv ? D : Dv; }

  // What a thread needs of its own: see Sample and Tile.
  int64_t sample_bytes() const {
    const auto bytes = [](int64_t n) { return Workspace::bytes<R>(n); };
    return Workspace::bytes<int64_t>(p.K) + 2 * bytes(BLOCK * D) + 2 * bytes(BLOCK * Dv) + bytes(wider());
  }
  int64_t tile_bytes() const {
    return sample_bytes() + Workspace::bytes<R>(rows * D) + Workspace::bytes<R>(rows) +
           Workspace::bytes<R>(rows * BLOCK);
  }

  const SlotAttention& p;
  const int64_t group, samples, rows, parts, D, Dv;  // D and Dv padded
  const int threads;
};

// A sample's slots that are not masked, and its inputs, one block after another, in a thread's own memory.
template <class R>
class Sample {
 public:
  Sample(const Plan<R>& plan, Workspace& memory)
      : plan(plan), p(plan.p), slots(memory.take<int64_t>(p.K)), k_rows(memory.take<R>(BLOCK * plan.D)),
        k_columns(memory.take<R>(BLOCK * plan.D)), v_rows(memory.take<R>(BLOCK * plan.Dv)),
        v_columns(memory.take<R>(BLOCK * plan.Dv)), zeros(memory.take<R>(plan.wider())) {
    memset(zeros, 0, plan.wider() * sizeof(R));
  }

  void begin(int64_t s) {
    const int64_t across = p.heads / plan.group;
    b = s / across, head = s % across * plan.group, active = 0;
    for (int64_t k = 0; k < p.K; ++k) {
      if (!p.slot_mask || p.slot_mask[b * p.K + k]) slots[active++] = k;
    }
  }

  int64_t rows() const { return plan.group * active; }
  // Of row r of a tile: its slot, counted through batch and heads.
  int64_t slot(int64_t r) const { return (b * p.heads + head + r / active) * p.K + slots[r % active]; }

  // Calls f(inputs) for each block of part i of the sample's inputs.
  template <class F>
  void each_block(int64_t i, F f) {
    const int64_t end = part(p.N, i + 1, plan.parts);
    for (int64_t n = part(p.N, i, plan.parts); n < end;) {
      if (!p.input_mask) {
        const int64_t count = least(BLOCK, end - n);
        f(Inputs{count, n});
        n += count;
        continue;
      }
      int64_t at[BLOCK], count = 0;
      for (; n < end && count < BLOCK; ++n) {
        if (p.input_mask[b * p.N + n]) at[count++] = n;
      }
      if (count > 0) f(Inputs{count, at[0], at[count - 1] - at[0] == count - 1 ? nullptr : at});
    }
  }

  Block<R> keys(int64_t h, const Inputs& inputs) { return load(p.k, h, p.D, plan.D, inputs, k_rows); }
  Block<R> values(int64_t h, const Inputs& inputs) {
    return p.v.data ? load(p.v, h, p.Dv, plan.Dv, inputs, v_rows) : keys(h, inputs);
  }

  // Asks for what the block after this one has of a tensor. Past the end of a sample the next one begins, as a rule.
  void look_ahead(const Rows& t, int64_t width, const Inputs& inputs) {
    const int64_t size = size_of(t.dtype);
    for (int64_t h = 0; t.data && h < plan.group; ++h) {
      const uintptr_t from = reinterpret_cast<uintptr_t>(t.data) + offset(t, h, inputs.first + BLOCK) * size;
      ahead.add(from, t.stride_n * size, width * size, BLOCK);
    }
  }

  // columns[d][n] = block[n][d]
  void turn(const Block<R>& block, int64_t count, int64_t width, R* columns) const {
    for (int64_t n = 0; n < BLOCK; n += LANES<R>) {
      const R* from[LANES<R>];
      for (int64_t lane = 0; lane < LANES<R>; ++lane) {
        from[lane] = n + lane < count ? block.data + (n + lane) * block.step : zeros;
      }
      transpose(from, width, columns + n, BLOCK);
    }
  }

  // Where a block's gradients are computed: in their tensor, if it is of R and its rows are whole vectors, else in
  // `buffer`, from which store() then takes them.
  Block<R> target(const Rows& t, int64_t h, int64_t width, int64_t padded_width, const Inputs& inputs,
                  R* buffer) const {
    if (!in_place(t, width, padded_width, inputs)) return {buffer, padded_width};
    return {static_cast<const R*>(t.data) + offset(t, h, inputs.first), t.stride_n};
  }
  void store(const Rows& t, int64_t h, int64_t width, const Inputs& inputs, const Block<R>& from,
             const R* buffer) const {
    if (from.data != buffer) return;
    for (int64_t i = 0; i < inputs.count; ++i) write(t, offset(t, h, inputs[i]), buffer + i * from.step, width);
  }

  // Where row n of head h of a tensor begins.
  int64_t offset(const Rows& t, int64_t h, int64_t n) const {
    return b * t.stride_b + (head + h) * t.stride_h + n * t.stride_n;
  }

  const Plan<R>& plan;
  const SlotAttention& p;
  int64_t b = 0, head = 0, active = 0;
  int64_t* const slots;
  Ahead ahead;
  R *const k_rows, *const k_columns, *const v_rows, *const v_columns, *const zeros;

 private:
  static bool in_place(const Rows& t, int64_t width, int64_t padded_width, const Inputs& inputs) {
    return t.dtype == (sizeof(R) == 8 ? Dtype::float64 : Dtype::float32) && width == padded_width && !inputs.at;
  }

  Block<R> load(const Rows& t, int64_t h, int64_t width, int64_t padded_width, const Inputs& inputs, R* buffer) const {
    if (in_place(t, width, padded_width, inputs)) {
      return {static_cast<const R*>(t.data) + offset(t, h, inputs.first), t.stride_n};
    }
    for (int64_t i = 0; i < inputs.count; ++i) {
      read(buffer + i * padded_width, t, offset(t, h, inputs[i]), width);
      for (int64_t d = width; d < padded_width; ++d) buffer[i * padded_width + d] = 0;
    }
    return {buffer, padded_width};
  }
};

// A of a block of a sample's inputs.
template <class R>
class Tile : public Sample<R> {
 public:
  using Sample<R>::plan, Sample<R>::p, Sample<R>::active, Sample<R>::rows, Sample<R>::slot;

  Tile(const Plan<R>& plan, Workspace& memory)
      : Sample<R>(plan, memory), q(memory.take<R>(plan.rows * plan.D)), bias(memory.take<R>(plan.rows)),
        a(memory.take<R>(plan.rows * BLOCK)) {}

  // Of sample s, queries, times scale, and biases.
  void begin(int64_t s) {
    Sample<R>::begin(s);
    for (int64_t r = 0; r < rows(); ++r) {
      const R* const from = at<R>(p.q, slot(r));
      for (int64_t d = 0; d < plan.D; ++d) q[r * plan.D + d] = d < p.D ? from[d] * R(p.scale) : R(0);
      bias[r] = p.bias.data ? *at<R>(p.bias, slot(r)) : R(0);
    }
  }

  // out = the products of `queries`, of one head, with a block of keys or of values.
  void scores(const R* queries, int64_t width, const Block<R>& block, int64_t count, R* columns, R* out) {
    this->turn(block, count, width, columns);
    product(queries, width, active, columns, BLOCK, width, out, BLOCK, BLOCK, true, this->ahead);
  }

  // a = A of a block.
  void attend(const Inputs& inputs) {
    for (int64_t h = 0; h < plan.group; ++h) {
      scores(q + h * active * plan.D, plan.D, this->keys(h, inputs), inputs.count, this->k_columns,
             a + h * active * BLOCK);
    }
    softmax(a, bias, 1, rows(), 0, 0);
  }

  R *const q, *const bias, *const a;
};

// Sums of one part of a sample's inputs, for each row of its tiles: `width` of products, and one in LANES parts.
template <class R>
struct Sums {
  Sums(const Plan<R>& plan, int64_t width, R* memory, int64_t task)
      : products(memory + task * size(plan, width)), lanes(products + plan.rows * width) {}
  static int64_t size(const Plan<R>& plan, int64_t width) { return plan.rows * (width + LANES<R>); }

  R *products, *lanes;  // (rows, width), (rows, LANES)
};

// Worker(plan, memory, rest...).run(task) for each task, in a thread's own memory of `bytes`.
template <class Worker, class R, class... Rest>
void on_workers(const Plan<R>& plan, int64_t bytes, int64_t tasks, Rest... rest) {
  if (tasks == 0) return;
  const int64_t threads = least(plan.threads, tasks);
  Workspace memory(threads * bytes);
  char* const start = memory.take<char>(threads * bytes);
  on_threads(int(threads), [&](const Member& member) {
    const int64_t thread = member.thread, count = member.threads;
    Workspace mine(start + thread * bytes);
    Worker worker(plan, mine, rest...);
    for (int64_t i = part(tasks, thread, count); i < part(tasks, thread + 1, count); ++i) worker.run(i);
  });
}

// Worker sums up each part of each sample, in memory of `bytes`, and Finish, if there is anything to finish, the parts
// of each sample.
template <class Worker, class Finish, class R, class P>
void sum_parts(const Plan<R>& plan, const P& p, int64_t width, int64_t bytes, bool finish) {
  const int64_t tasks = plan.samples * plan.parts, size = tasks * Sums<R>::size(plan, width);
  Workspace memory(Workspace::bytes<R>(size));
  R* const sums = memory.take<R>(size);
  on_workers<Worker>(plan, bytes, tasks, &p, sums);
  if (finish) on_workers<Finish>(plan, plan.tile_bytes(), plan.samples, &p, sums);
}

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
