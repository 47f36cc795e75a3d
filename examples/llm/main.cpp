// nibble: look at, quantize, measure and run Llama-family language models.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench.hpp"
#include "chat.hpp"
#include "compare.hpp"
#include "model.hpp"
#include "model_file.hpp"
#include "nibble/gemm/explain.hpp"
#include "perplexity.hpp"
#include "progress.hpp"
#include "quantize_model.hpp"
#include "runner.hpp"
#include "sampler.hpp"
#include "tokenizer.hpp"

namespace {

using llm::Token;

/// What several commands share.
struct Common {
  std::string model;
  std::string json;
  std::string activations = "auto";
  int threads = 0;
};

nibble::Activations activations_of(const Common& c) {
  return c.activations == "float" ? nibble::Activations::fp32 : nibble::Activations::automatic;
}

void write_file(const std::string& path, const std::string& text) {
  nibble::AtomicFile file(path);
  file.write(text);
  file.commit();
}

void write_json(const Common& c, const nlohmann::json& json) {
  if (!c.json.empty())
    write_file(c.json, json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw nibble::IoError("cannot open '" + path + "'");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

double mib(std::size_t bytes) { return static_cast<double>(bytes) / 1048576.0; }

/// A model that is open and ready to run.
struct Session {
  nibble::ThreadPool pool;
  std::unique_ptr<llm::Tokenizer> tokenizer;
  llm::Model model;
  std::size_t file_bytes = 0;
  double load_seconds = 0.0;

  explicit Session(const Common& c) : pool(c.threads) {
    const double start = llm::limits_detail::seconds_now();
    // What the model needs of the file it keeps itself: a GGUF's map goes, a packed file's stays.
    const auto file = llm::open_model(c.model);
    file_bytes = file->bytes();
    tokenizer = std::make_unique<llm::Tokenizer>(file->vocabulary());
    if (tokenizer->vocabulary().size() > file->hparams().vocabulary)
      throw nibble::FormatError("the vocabulary has more tokens than the embedding has rows");
    model = llm::load_model(*file, &pool);
    load_seconds = llm::limits_detail::seconds_now() - start;
  }
  nibble::ThreadPool* workers() { return pool.threads() > 1 ? &pool : nullptr; }
};

// ---- inspect -------------------------------------------------------------------------------------------------------

void inspect(const Common& c) {
  const auto file = llm::open_model(c.model);
  const llm::Hparams& h = file->hparams();
  const llm::Vocabulary v = file->vocabulary();
  std::printf("%s: %s, %.1f MiB\n\n", c.model.c_str(), file->kind().c_str(), mib(file->bytes()));
  std::printf("  %s\n  layers %zu, embedding %zu, feed-forward %zu, heads %zu (%zu key-value heads) of %zu\n",
              h.name.c_str(), h.layers, h.dim, h.ffn, h.heads, h.kv_heads, h.head_size);
  std::printf("  context %zu, rope base %g over %zu dimensions, rms epsilon %g\n", h.context, h.rope_base,
              h.rope_size, static_cast<double>(h.rms_epsilon));
  std::printf("  vocabulary %zu (%s%s%s), %s embeddings\n\n", h.vocabulary, v.model.c_str(),
              v.model == "gpt2" ? ", " : "", v.model == "gpt2" ? v.pre.c_str() : "",
              file->has("output.weight") ? "separate" : "tied");

  struct Group {
    std::size_t tensors = 0;
    std::size_t weights = 0;
    std::size_t bytes = 0;
  };
  std::map<std::string, Group> groups;
  nlohmann::json tensors = nlohmann::json::array();
  std::size_t weights = 0, bytes = 0;
  std::printf("  %-28s %-14s %-20s %12s\n", "tensor", "shape", "format", "bytes");
  for (const llm::TensorInfo& t : file->tensors()) {
    std::string shape;
    std::size_t count = 1;
    for (const std::size_t d : t.shape) {
      shape += (shape.empty() ? "" : " x ") + std::to_string(d);
      count *= d;
    }
    std::printf("  %-28s %-14s %-20s %12zu\n", t.name.c_str(), shape.c_str(), t.format.c_str(), t.bytes);
    tensors.push_back({{"name", t.name}, {"shape", t.shape}, {"format", t.format}, {"bytes", t.bytes}});
    Group& g = groups[t.format];
    ++g.tensors;
    g.weights += count;
    g.bytes += t.bytes;
    weights += count;
    bytes += t.bytes;
  }
  std::printf("\n  %-20s %8s %12s %10s %8s\n", "format", "tensors", "weights", "MiB", "bits");
  nlohmann::json formats = nlohmann::json::object();
  const auto line = [](const std::string& name, const Group& g) {
    std::printf("  %-20s %8zu %12zu %10.2f %8.3f\n", name.c_str(), g.tensors, g.weights, mib(g.bytes),
                8.0 * static_cast<double>(g.bytes) / static_cast<double>(g.weights == 0 ? 1 : g.weights));
  };
  for (const auto& [name, g] : groups) {
    line(name, g);
    formats[name] = {{"tensors", g.tensors}, {"weights", g.weights}, {"bytes", g.bytes}};
  }
  line("all", {file->tensors().size(), weights, bytes});
  write_json(c, {{"model", c.model},
                 {"kind", file->kind()},
                 {"file_bytes", file->bytes()},
                 {"weights", weights},
                 {"tensor_bytes", bytes},
                 {"hparams", llm::to_json(h)},
                 {"formats", formats},
                 {"tensors", tensors}});
}

// ---- quantize ------------------------------------------------------------------------------------------------------

struct QuantizeArguments {
  std::string out;
  std::string format;
  std::string method = "rtn";
  std::string scales;
  std::size_t group = 0;
  bool has_group = false;
  bool symmetric = false;
  bool float_offset = false;
  std::vector<std::string> keep;
};

llm::QuantizePlan plan_of(const QuantizeArguments& a) {
  llm::QuantizePlan plan;
  std::string format = a.format;
  if (a.has_group) format += a.group == 0 ? "-row" : "-g" + std::to_string(a.group);
  if (a.symmetric) format += "-sym";
  if (a.float_offset) format += "-offset";
  if (!a.scales.empty()) format += a.scales == "fp32" ? "-s32" : a.scales == "fp16" ? "-s16" : "-sbf16";
  plan.format = llm::parse_format(format);
  for (const std::string& k : a.keep) plan.keep.push_back(llm::parse_keep(k));
  return plan;
}

void quantize(const Common& c, const QuantizeArguments& a) {
  const llm::QuantizePlan plan = plan_of(a);
  const bool gguf = llm::wants_gguf(a.out);
  const auto file = llm::open_model(c.model);
  nibble::ThreadPool pool(c.threads);
  const double start = llm::limits_detail::seconds_now();
  llm::QuantizeReport report;
  {
    llm::Progress progress("quantize", file->tensors().size());
    const auto done = [&](const std::string& name) { progress.step(name); };
    report = gguf ? llm::quantize_to_gguf(*file, a.out, plan, done)
                  : llm::quantize_to_packed(*file, a.out, plan, &pool, done);
  }
  const double seconds = llm::limits_detail::seconds_now() - start;
  const auto size = static_cast<std::size_t>(std::filesystem::file_size(a.out));
  std::printf("%s: %zu of %zu tensors quantized, %.1f MiB -> %.1f MiB (file %.1f MiB) in %.1f s\n", a.out.c_str(),
              report.quantized, report.tensors, mib(report.bytes_in), mib(report.bytes_out), mib(size), seconds);
  write_json(c, {{"model", c.model},
                 {"output", a.out},
                 {"format", llm::name_of(llm::scheme_of(plan.format, gguf))},
                 {"method", a.method},
                 {"tensors", report.tensors},
                 {"quantized", report.quantized},
                 {"bytes_in", report.bytes_in},
                 {"bytes_out", report.bytes_out},
                 {"file_bytes", size},
                 {"seconds", seconds}});
}

// ---- perplexity ----------------------------------------------------------------------------------------------------

struct PerplexityArguments {
  std::string text;
  std::size_t context = 512;
  std::size_t windows = 0;  // 0: all
};

void perplexity(const Common& c, const PerplexityArguments& a) {
  const std::string text = read_text(a.text);
  Session s(c);
  const std::vector<Token> tokens = s.tokenizer->encode(text);
  const std::size_t available = tokens.size() / a.context;
  nibble::detail::require(available > 0, "'", a.text, "' has ", tokens.size(), " tokens, a window takes ",
                          a.context);
  const std::size_t windows = a.windows == 0 ? available : a.windows;
  nibble::detail::require(windows <= available, "'", a.text, "' has ", tokens.size(), " tokens: ", available,
                          " windows of ", a.context, ", not ", windows);
  llm::RunnerOptions options;
  options.context = a.context;
  options.activations = activations_of(c);
  options.pool = s.workers();
  llm::Runner runner(s.model, options);
  const double start = llm::limits_detail::seconds_now();
  llm::PerplexityResult result;
  {
    llm::Progress progress("perplexity", windows);
    result = llm::perplexity(runner, tokens, a.context, windows, s.workers(), [&](const llm::PerplexityResult& r) {
      char note[32];
      std::snprintf(note, sizeof note, "%.4f", r.perplexity());
      progress.step(note);
    });
  }
  const double seconds = llm::limits_detail::seconds_now() - start;
  std::printf("perplexity %.4f over %zu windows of %zu (%zu tokens in the text), %.1f s\n", result.perplexity(),
              result.windows, a.context, tokens.size(), seconds);
  write_json(c, {{"model", c.model},
                 {"text", a.text},
                 {"activations", c.activations},
                 {"perplexity", result.perplexity()},
                 {"negative_log_likelihood", result.negative_log_likelihood},
                 {"predictions", result.predictions},
                 {"windows", result.windows},
                 {"context", a.context},
                 {"tokens", tokens.size()},
                 {"threads", s.pool.threads()},
                 {"load_seconds", s.load_seconds},
                 {"seconds", seconds}});
}

// ---- generate ------------------------------------------------------------------------------------------------------

struct GenerateArguments {
  std::string prompt;
  std::string system;
  std::size_t tokens = 128;
  llm::SamplerOptions sampler;
  bool chat = false;
  bool echo = false;
};

std::vector<Token> prompt_tokens(const llm::Tokenizer& tokenizer, const GenerateArguments& a) {
  const llm::Vocabulary& v = tokenizer.vocabulary();
  std::vector<Token> tokens;
  if (v.add_bos && v.bos != llm::no_token) tokens.push_back(v.bos);
  const auto add = [&](const std::string& text, bool special) {
    const std::vector<Token> more = tokenizer.encode(text, special);
    tokens.insert(tokens.end(), more.begin(), more.end());
  };
  if (a.chat) {
    const llm::ChatPrompt p = llm::chat_prompt(v.chat_template, a.system, a.prompt);
    add(p.before, true);
    add(p.user, false);
    add(p.after, true);
  } else {
    add(a.prompt, false);
  }
  // A model cannot begin from nothing.
  if (tokens.empty() && v.bos != llm::no_token) tokens.push_back(v.bos);
  if (tokens.empty() && v.eos != llm::no_token) tokens.push_back(v.eos);
  nibble::detail::require(!tokens.empty(), "the prompt is empty and the model has no token to begin a text with");
  return tokens;
}

void generate(const Common& c, const GenerateArguments& a) {
  const double start = llm::limits_detail::seconds_now();
  Session s(c);
  const std::vector<Token> prompt = prompt_tokens(*s.tokenizer, a);
  llm::RunnerOptions options;
  options.context = prompt.size() + a.tokens;
  options.block = std::min<std::size_t>(options.block, prompt.size());
  options.activations = activations_of(c);
  options.pool = s.workers();
  if (options.context > s.model.hparams.context)
    std::fprintf(stderr, "nibble: %zu tokens reach beyond the context of %zu that the model was trained for\n",
                 options.context, s.model.hparams.context);
  llm::Runner runner(s.model, options);
  auto cache = runner.new_cache();
  llm::Sampler sampler(a.sampler);
  llm::StreamDecoder decoder(*s.tokenizer, a.prompt.empty() && !a.chat);
  if (a.echo) std::fputs(a.prompt.c_str(), stdout);

  std::string text;
  const auto say = [&](const std::string& piece) {
    if (piece.empty()) return;
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
    text += piece;
  };
  const double loaded = llm::limits_detail::seconds_now();
  const std::size_t vocabulary = s.tokenizer->vocabulary().size();
  double first = 0.0;
  std::size_t generated = 0;
  bool ended = false;
  const float* logits = a.tokens > 0 ? runner.append(cache, prompt.data(), prompt.size()) : nullptr;
  while (generated < a.tokens) {
    const Token token = sampler.sample(logits, vocabulary);
    if (generated == 0) first = llm::limits_detail::seconds_now();
    ended = s.tokenizer->ends_text(token);
    if (ended) break;
    say(decoder.push(token));
    if (++generated < a.tokens) logits = runner.append(cache, &token, 1);
  }
  say(decoder.finish());
  const double end = llm::limits_detail::seconds_now();
  if (text.empty() || text.back() != '\n') std::fputc('\n', stdout);
  write_json(c, {{"model", c.model},
                 {"prompt_tokens", prompt.size()},
                 {"generated_tokens", generated},
                 {"end_of_text", ended},
                 {"text", text},
                 {"load_seconds", loaded - start},
                 {"time_to_first_token_seconds", generated > 0 ? first - start : 0.0},
                 {"decode_tokens_per_second",
                  generated > 1 ? static_cast<double>(generated - 1) / std::max(end - first, 1e-9) : 0.0},
                 {"threads", s.pool.threads()}});
}

// ---- bench ---------------------------------------------------------------------------------------------------------

void bench(const Common& c, const llm::BenchOptions& options, const std::vector<int>& threads) {
  Common loading = c;
  loading.threads = *std::max_element(threads.begin(), threads.end());
  Session s(loading);
  std::printf("%s on %s\n", c.model.c_str(), nibble::explain(s.model.layers[0].gate, 1).c_str());
  std::vector<llm::BenchResult> results;
  {
    llm::Progress progress("bench", threads.size() * (options.repeats + 1));
    for (const int t : threads) {
      nibble::ThreadPool pool(t);
      results.push_back(llm::bench(s.model, options, activations_of(c), pool, [&] { progress.step(); }));
    }
  }
  const std::size_t resident = llm::resident_bytes();
  std::printf("\nload %.3f s, resident %.1f MiB, file %.1f MiB, weights read a token %.1f MiB\n\n", s.load_seconds,
              mib(resident), mib(s.file_bytes), mib(s.model.bytes_per_token()));
  std::printf("%7s %12s %12s %10s %18s %18s\n", "threads", "prompt t/s", "decode t/s", "first s", "prompt GOP/s",
              "decode GB/s");
  nlohmann::json runs = nlohmann::json::array();
  const bool integer =
      activations_of(c) != nibble::Activations::fp32 && nibble::is_integer(s.model.layers[0].gate.format());
  for (const llm::BenchResult& r : results) {
    const double compute = integer ? r.limits.integer_gops : r.limits.float_gops;
    char gops[64], gbps[64];
    std::snprintf(gops, sizeof gops, "%.0f of %.0f", r.prompt_gops, compute);
    std::snprintf(gbps, sizeof gbps, "%.1f of %.1f", r.decode_gbps, r.limits.read_gbps);
    std::printf("%7d %12.1f %12.1f %10.3f %18s %18s\n", r.threads, r.prompt_tokens_per_second,
                r.decode_tokens_per_second, r.time_to_first_token, gops, gbps);
    runs.push_back({{"threads", r.threads},
                    {"prompt_tokens_per_second", r.prompt_tokens_per_second},
                    {"decode_tokens_per_second", r.decode_tokens_per_second},
                    {"time_to_first_token_seconds", r.time_to_first_token},
                    {"prompt_gops", r.prompt_gops},
                    {"limit_gops", compute},
                    {"limit_integer_gops", r.limits.integer_gops},
                    {"limit_float_gops", r.limits.float_gops},
                    {"decode_gbps", r.decode_gbps},
                    {"limit_read_gbps", r.limits.read_gbps}});
  }
  const llm::BenchResult& last = results.back();
  write_json(c, {{"model", c.model},
                 {"activations", c.activations},
                 {"isa", std::string(nibble::name_of(nibble::detail::kernels().isa))},
                 {"prompt", options.prompt},
                 {"decode", options.decode},
                 {"depth", options.depth},
                 {"file_bytes", s.file_bytes},
                 {"resident_bytes", resident},
                 {"load_seconds", s.load_seconds},
                 {"bytes_per_token", s.model.bytes_per_token()},
                 {"threads", last.threads},
                 {"prompt_tokens_per_second", last.prompt_tokens_per_second},
                 {"decode_tokens_per_second", last.decode_tokens_per_second},
                 {"time_to_first_token_seconds", last.time_to_first_token},
                 {"runs", runs}});
}

// ---- compare -------------------------------------------------------------------------------------------------------

struct CompareArguments {
  std::string text;
  std::vector<std::string> formats;
  std::size_t context = 512;
  std::size_t windows = 16;
  std::size_t prompt = 512;
  std::size_t decode = 64;
  std::string csv;
  std::string svg;
};

void compare(const Common& c, const CompareArguments& a) {
  std::vector<llm::QuantizePlan> plans;
  for (const std::string& f : a.formats) {
    plans.emplace_back();
    if (f == "same")
      plans.back().keep.push_back(llm::parse_keep(".*=same"));
    else
      plans.back().format = llm::parse_format(f);
  }
  const auto file = llm::open_model(c.model);
  const std::size_t tokens = llm::Tokenizer(file->vocabulary()).encode(read_text(a.text)).size();
  nibble::detail::require(a.windows * a.context <= tokens, "'", a.text, "' has ", tokens, " tokens, ", a.windows,
                          " windows of ", a.context, " take ", a.windows * a.context);
  const llm::TemporaryFolder folder;
  const std::string threads = std::to_string(nibble::ThreadPool(c.threads).threads());
  std::vector<llm::CompareRow> rows;
  for (std::size_t i = 0; i < plans.size(); ++i) {
    llm::CompareRow row;
    row.format = a.formats[i];
    const std::string path = (folder.path() / "model.safetensors").string();
    {
      nibble::ThreadPool pool(c.threads);
      llm::Progress progress(row.format + ": quantize", file->tensors().size());
      llm::quantize_to_packed(*file, path, plans[i], &pool, [&](const std::string&) { progress.step(); });
    }
    row.file_bytes = static_cast<double>(std::filesystem::file_size(path));
    const std::vector<std::string> shared = {"--activations", c.activations, "--threads", threads};
    const auto run = [&](std::vector<std::string> arguments) {
      arguments.insert(arguments.end(), shared.begin(), shared.end());
      std::fprintf(stderr, "%s: %s\n", row.format.c_str(), arguments[0].c_str());
      return llm::run_self(std::move(arguments), folder.path() / "result.json");
    };
    row.perplexity = run({"perplexity", path, a.text, "--context", std::to_string(a.context), "--windows",
                          std::to_string(a.windows)})
                         .at("perplexity")
                         .get<double>();
    const nlohmann::json speed =
        run({"bench", path, "--prompt", std::to_string(a.prompt), "--decode", std::to_string(a.decode)});
    row.resident_bytes = speed.at("resident_bytes").get<double>();
    row.load_seconds = speed.at("load_seconds").get<double>();
    row.prompt_tokens_per_second = speed.at("prompt_tokens_per_second").get<double>();
    row.decode_tokens_per_second = speed.at("decode_tokens_per_second").get<double>();
    rows.push_back(row);
  }
  llm::fill_changes(rows);
  std::fputs(llm::compare_table(rows).c_str(), stdout);
  if (!a.csv.empty()) write_file(a.csv, llm::compare_csv(rows));
  if (!a.svg.empty()) write_file(a.svg, llm::compare_svg(rows, file->hparams().name));
  write_json(c, {{"model", c.model},
                 {"text", a.text},
                 {"context", a.context},
                 {"windows", a.windows},
                 {"activations", c.activations},
                 {"threads", std::stoi(threads)},
                 {"formats", llm::compare_json(rows)}});
}

// ---- command line --------------------------------------------------------------------------------------------------

void add_common(CLI::App* app, Common& c, bool runs) {
  app->add_option("--json", c.json, "Write every figure to this file as JSON");
  if (!runs) return;
  app->add_option(
         "--activations", c.activations,
         "float: exact products of the dequantized weights; int8: quantize activations where the weights are "
         "integers; auto: int8 for them, float for the others")
      ->check(CLI::IsMember({"auto", "float", "int8"}))
      ->capture_default_str();
}

void add_threads(CLI::App* app, Common& c) {
  app->add_option("--threads", c.threads, "Threads; 0: all cores. Results do not depend on it")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
}

CLI::Option* add_model(CLI::App* app, Common& c) {
  return app->add_option("model", c.model, "A GGUF, or a packed .safetensors made by nibble quantize")
      ->required()
      ->check(CLI::ExistingFile);
}

std::string one_line(std::string text) {
  for (char& ch : text)
    if (ch == '\n' || ch == '\r') ch = ' ';
  while (!text.empty() && text.back() == ' ') text.pop_back();
  return text;
}

int run(int argc, char** argv) {
  CLI::App app(
      "nibble - look at, quantize, measure and run Llama-family language models on a CPU\n\n"
      "  nibble inspect model.gguf\n"
      "  nibble quantize model.gguf model-int4.safetensors --format int4 --group 64\n"
      "  nibble perplexity model-int4.safetensors text.txt --context 512 --windows 64\n"
      "  nibble generate model.gguf --chat --prompt \"Why is the sky blue?\" --tokens 200\n"
      "  nibble bench model.gguf --prompt 512 --decode 64 --threads 1,2\n"
      "  nibble compare model.gguf text.txt --formats fp32,int8,int4-g32,nf4 --svg plot.svg\n\n"
      "Exit status: 0 done, 1 it failed (a broken file, a full disk), 2 the arguments make no sense.");
  app.name("nibble");
  app.require_subcommand(1);
  app.set_version_flag("--version", std::to_string(NIBBLE_VERSION_MAJOR) + "." +
                                        std::to_string(NIBBLE_VERSION_MINOR) + "." +
                                        std::to_string(NIBBLE_VERSION_PATCH));
  Common c;
  const auto positive = CLI::Range(std::size_t{1}, std::size_t{1} << 24);

  CLI::App* inspect_app =
      app.add_subcommand("inspect", "Show a model's tensors, formats, sizes and hyperparameters");
  add_model(inspect_app, c);
  add_common(inspect_app, c, false);

  QuantizeArguments q;
  CLI::App* quantize_app = app.add_subcommand("quantize", "Write a model in another format");
  quantize_app->description(
      "Write a model in another format. The matrices of the blocks are quantized; the embedding, the output layer "
      "and "
      "the norms stay as they are unless --keep names them. The output is a GGUF or a packed safetensors file by "
      "its "
      "extension; a GGUF that could not decode to exactly the same values is refused.");
  add_model(quantize_app, c);
  quantize_app->add_option("out", q.out, "The file to write: .safetensors (packed) or .gguf")->required();
  quantize_app->add_option("--format", q.format, std::string("Format of the weights: ") + llm::format_spec_help())
      ->required();
  CLI::Option* group = quantize_app->add_option("--group", q.group,
                                                "Inputs that share a scale, a multiple of 16; 0: a scale a row");
  CLI::Option* symmetric = quantize_app->add_flag("--symmetric", q.symmetric, "No zero point");
  quantize_app
      ->add_flag("--float-offset", q.float_offset, "A float offset instead of an integer zero point (Q4_1)")
      ->excludes(symmetric);
  quantize_app->add_option("--scales", q.scales, "Type of the scales")
      ->check(CLI::IsMember({"fp32", "fp16", "bf16"}));
  quantize_app->add_option("--method", q.method, "How codes are chosen; rtn: round to nearest")
      ->check(CLI::IsMember({"rtn"}))
      ->capture_default_str();
  quantize_app
      ->add_option(
          "--keep", q.keep,
          "REGEX=FORMAT: tensors whose name matches get FORMAT ('same': as it is). May be repeated; the first "
          "that matches decides")
      ->allow_extra_args(false);
  add_threads(quantize_app, c);
  add_common(quantize_app, c, false);

  PerplexityArguments p;
  CLI::App* perplexity_app = app.add_subcommand(
      "perplexity", "Perplexity of a text: windows side by side, the second half of each is predicted");
  add_model(perplexity_app, c);
  perplexity_app->add_option("text", p.text, "A text file")->required()->check(CLI::ExistingFile);
  perplexity_app->add_option("--context", p.context, "Tokens of a window")
      ->check(CLI::Range(std::size_t{4}, std::size_t{1} << 20))
      ->capture_default_str();
  perplexity_app->add_option("--windows", p.windows, "Windows, from the start of the text; 0: all")
      ->capture_default_str();
  add_threads(perplexity_app, c);
  add_common(perplexity_app, c, true);

  GenerateArguments g;
  CLI::App* generate_app = app.add_subcommand("generate", "Continue a prompt; only the new text goes to stdout");
  add_model(generate_app, c);
  generate_app->add_option("--prompt", g.prompt, "The text to continue, or with --chat what the user says");
  generate_app->add_option("--tokens", g.tokens, "Most tokens to generate")
      ->check(CLI::Range(std::size_t{0}, std::size_t{1} << 20))
      ->capture_default_str();
  generate_app->add_option("--temperature", g.sampler.temperature, "0: always the likeliest token")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  generate_app
      ->add_option("--top-p", g.sampler.top_p, "Sample among the likeliest tokens that hold this probability")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  generate_app->add_option("--seed", g.sampler.seed, "The same seed says the same text")->capture_default_str();
  generate_app->add_flag("--chat", g.chat, "Use the model's chat template");
  generate_app->add_option("--system", g.system, "System message for --chat");
  generate_app->add_flag("--echo", g.echo, "Print the prompt first");
  add_threads(generate_app, c);
  add_common(generate_app, c, true);

  llm::BenchOptions b;
  std::vector<int> threads = {0};
  CLI::App* bench_app =
      app.add_subcommand("bench", "Speed of prompts and decoding, against this machine's limits");
  add_model(bench_app, c);
  bench_app->add_option("--prompt", b.prompt, "Tokens of the prompt; 0: none")
      ->check(CLI::Range(std::size_t{0}, std::size_t{1} << 20))
      ->capture_default_str();
  bench_app->add_option("--decode", b.decode, "Tokens to decode, one by one; 0: none")
      ->check(CLI::Range(std::size_t{0}, std::size_t{1} << 20))
      ->capture_default_str();
  bench_app->add_option("--depth", b.depth, "Tokens of context before decoding is timed")
      ->check(CLI::Range(std::size_t{0}, std::size_t{1} << 20))
      ->capture_default_str();
  bench_app->add_option("--repeats", b.repeats, "Timed rounds; medians are shown")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1000}))
      ->capture_default_str();
  bench_app->add_option("--threads", threads, "One or more numbers of threads, e.g. 1,2; 0: all cores")
      ->delimiter(',')
      ->check(CLI::Range(0, 1024))
      ->allow_extra_args(false);
  add_common(bench_app, c, true);

  CompareArguments m;
  CLI::App* compare_app = app.add_subcommand("compare", "One model in several formats: a table, a CSV, a plot");
  add_model(compare_app, c);
  compare_app->add_option("text", m.text, "A text file for the perplexity")->required()->check(CLI::ExistingFile);
  compare_app
      ->add_option("--formats", m.formats,
                   "Formats, separated by commas: 'same' (the weights as they are) or " +
                       std::string(llm::format_spec_help()))
      ->delimiter(',')
      ->allow_extra_args(false);
  m.formats = {"fp32", "fp16", "int8", "int4-g32", "int4-g128-sym", "nf4"};
  compare_app->add_option("--context", m.context, "Tokens of a window")
      ->check(CLI::Range(std::size_t{4}, std::size_t{1} << 20))
      ->capture_default_str();
  compare_app->add_option("--windows", m.windows, "Windows of the text")->check(positive)->capture_default_str();
  compare_app->add_option("--prompt", m.prompt, "Tokens of the timed prompt")->capture_default_str();
  compare_app->add_option("--decode", m.decode, "Tokens to decode")->capture_default_str();
  compare_app->add_option("--csv", m.csv, "Write the table as CSV");
  compare_app->add_option("--svg", m.svg, "Write a plot of size against perplexity");
  add_threads(compare_app, c);
  add_common(compare_app, c, true);

  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& e) {
    return app.exit(e);  // --help, --version
  } catch (const CLI::ParseError& e) {
    std::fprintf(stderr, "nibble: %s (see nibble --help)\n", one_line(e.what()).c_str());
    return 2;
  }
  q.has_group = group->count() > 0;
  if (inspect_app->parsed()) inspect(c);
  if (quantize_app->parsed()) quantize(c, q);
  if (perplexity_app->parsed()) perplexity(c, p);
  if (generate_app->parsed()) generate(c, g);
  if (bench_app->parsed()) bench(c, b, threads);
  if (compare_app->parsed()) compare(c, m);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const nibble::InvalidArgument& e) {
    std::fprintf(stderr, "nibble: %s\n", one_line(e.what()).c_str());
    return 2;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "nibble: out of memory\n");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "nibble: %s\n", one_line(e.what()).c_str());
  }
  return 1;
}
