// nibble: look at, quantize, measure and run Llama-family language models.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <functional>
#include <new>
#include <string>

#include "../train/commands/finetune.hpp"
#include "../train/commands/merge.hpp"
#include "commands/bench.hpp"
#include "commands/common.hpp"
#include "commands/compare.hpp"
#include "commands/generate.hpp"
#include "commands/inspect.hpp"
#include "commands/perplexity.hpp"
#include "../train/commands/qat.hpp"
#include "../train/commands/train.hpp"
#include "commands/quantize.hpp"
#include "nibble/nibble.hpp"

namespace {

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
      "  nibble generate model.gguf --prompts questions.txt --tokens 60\n"
      "  nibble bench model.gguf --prompt 512 --decode 64 --threads 1,2 --batch 1,8,32 --profile\n"
      "  nibble compare model.gguf text.txt --formats fp32,int8,int4-g32,nf4 --svg plot.svg\n"
      "  nibble qat model.gguf text.txt model-int3.safetensors --format int3 --test test.txt\n\n"
      "Exit status: 0 done, 1 it failed (a broken file, a full disk), 2 the arguments make no sense.");
  app.name("nibble");
  app.require_subcommand(1);
  app.set_version_flag("--version", std::to_string(NIBBLE_VERSION_MAJOR) + "." +
                                        std::to_string(NIBBLE_VERSION_MINOR) + "." +
                                        std::to_string(NIBBLE_VERSION_PATCH));
  llm::commands::Common c;
  std::function<void()> action;
  llm::commands::add_inspect(app, c, action);
  llm::commands::add_quantize(app, c, action);
  llm::commands::add_perplexity(app, c, action);
  llm::commands::add_generate(app, c, action);
  llm::commands::add_bench(app, c, action);
  llm::commands::add_compare(app, c, action);
  llm::commands::add_train(app, c, action);
  llm::commands::add_qat(app, c, action);
  llm::commands::add_finetune(app, c, action);
  llm::commands::add_merge(app, c, action);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& e) {
    return app.exit(e);  // --help, --version
  } catch (const CLI::ParseError& e) {
    std::fprintf(stderr, "nibble: %s (see nibble --help)\n", one_line(e.what()).c_str());
    return 2;
  }
  action();
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
