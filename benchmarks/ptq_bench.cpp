// GPTQ phase by phase, beside this machine's float product of the same size, and the searches for grids.
#include <Eigen/Core>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bench.hpp"
#include "nibble/core/thread_pool.hpp"
#include "nibble/gemm/dense.hpp"
#include "nibble/ptq/gptq.hpp"
#include "nibble/ptq/hessian.hpp"
#include "nibble/ptq/importance.hpp"
#include "nibble/ptq/weight_grids.hpp"

namespace bench {
namespace {

/// Medians over the rounds of what one phase took and of its part of the product's speed in the same round.
class Phase {
 public:
  Phase(std::string name, std::string format) : name_(std::move(name)), format_(std::move(format)) {}
  void add(double seconds, double flop, double gemm_gflops) {
    seconds_.push_back(seconds);
    gflops_.push_back(flop / seconds * 1e-9);
    percent_.push_back(100.0 * gflops_.back() / gemm_gflops);
  }
  void add(const nibble::PhaseTime& time, double gemm_gflops) { add(time.seconds, time.flop, gemm_gflops); }

  void report(std::int64_t n, int threads) const {
    if (seconds_.empty()) return;
    Row row;
    row.suite = "ptq";
    row.kernel = name_;
    row.format = format_;
    row.n = row.k = n;
    row.threads = threads;
    row.seconds = median(seconds_);
    row.gops = median(gflops_);
    row.percent_of_limit = median(percent_);
    row.limit = "gemm";
    results().rows.push_back(row);
  }

 private:
  std::string name_;
  std::string format_;
  std::vector<double> seconds_;
  std::vector<double> gflops_;
  std::vector<double> percent_;
};

EntryReport layer(std::int64_t n, int threads) {
  const auto pool = threads > 1 ? std::make_unique<nibble::ThreadPool>(threads) : nullptr;
  Eigen::MatrixXf x = Eigen::MatrixXf::Random(n, 4096);
  for (Eigen::Index i = 1; i < n; ++i) x.row(i) = 0.8F * x.row(i - 1) + 0.6F * x.row(i);
  const Eigen::MatrixXf a = Eigen::MatrixXf::Random(n, n);
  const nibble::RowMajorMatrix w = a;
  Eigen::MatrixXf product(n, n);
  nibble::MatmulOptions multiply;
  multiply.pool = pool.get();
  nibble::GptqOptions options;
  options.pool = pool.get();
  const nibble::Scheme scheme{nibble::Format::int4, nibble::Symmetry::asymmetric,
                              nibble::Granularity::per_group(128, 1), nibble::ScaleType::fp16, false};
  const std::string format = "int4 g128";
  Phase gemm("gemm", "fp32");
  Phase hessian("hessian", "4096 tokens");
  Phase cholesky("cholesky", format);
  Phase sweep("sweep", format);
  Phase update("trailing update", format);
  Phase all("gptq, all", format);
  Phase mse("mse grids", format);
  Phase importance("importance grids", format);
  const Eigen::VectorXf ones = Eigen::VectorXf::Ones(n);
  EntryReport report;
  for (int round = 0; round < 3; ++round) {
    const double gemm_seconds = seconds_of([&] { nibble::gemm(a, a, product, multiply); });
    const double gflops = ops_of(n, n, n) / gemm_seconds * 1e-9;
    gemm.add(gemm_seconds, ops_of(n, n, n), gflops);
    nibble::Hessian h(n, pool.get());
    h.add(x);
    nibble::GptqResult result;
    const double seconds = seconds_of([&] { result = nibble::gptq(w, h, scheme, options); });
    hessian.add(result.times.hessian, gflops);
    cholesky.add(result.times.cholesky, gflops);
    sweep.add(result.times.sweep, gflops);
    update.add(result.times.update, gflops);
    all.add(seconds, result.times.cholesky.flop + result.times.sweep.flop + result.times.update.flop, gflops);
    report.seconds = seconds;
    if (round != 0) continue;
    nibble::MseOptions search;
    search.pool = pool.get();
    mse.add(seconds_of([&] { nibble::fit_mse(scheme, w, search); }), 0.0, gflops);
    nibble::ImportanceOptions weigh;
    weigh.pool = pool.get();
    importance.add(seconds_of([&] { nibble::fit_importance(scheme, w, ones, weigh); }), 0.0, gflops);
  }
  for (const Phase* phase : {&gemm, &hessian, &cholesky, &sweep, &update, &all, &mse, &importance})
    phase->report(n, threads);
  return report;
}

}  // namespace

void register_ptq() {
  std::vector<std::int64_t> sizes = {576, 1536, 4096};
  if (options().quick) sizes = {576, 2048};
  for (const int threads : options().threads)
    for (const std::int64_t n : sizes)
      register_entry("ptq/gptq/n:" + std::to_string(n) + "/threads:" + std::to_string(threads),
                     [=] { return layer(n, threads); });
}

}  // namespace bench
